import pytest
import torch
from references import rows
from scipy.stats import energy_distance

from pyro_wae.kernels import Energy
from pyro_wae.penalties import MMD, PenaltyContext
from pyro_wae.penalties.energy import EnergyDistance


@pytest.mark.parametrize(("n", "m"), [(20, 20), (20, 33), (33, 20), (2, 2)])
def test_in_one_dimension_its_root_is_scipys(n, m):
    codes, prior = 0.5 * rows(n, 1) + 0.3, rows(m, 1)
    value = EnergyDistance(unbiased=False)(codes, prior)
    assert value.sqrt().item() == pytest.approx(energy_distance(codes.ravel(), prior.ravel()), rel=1e-12)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("context", [{"data_size": 40}, {"shared_data": True}], ids=str)
def test_it_is_the_mmd_of_the_energy_kernel(exponent, unbiased, particles, context):
    """Whose sums and gradients are compared with the direct ones in test_pair_sums.py, and its mean in test_mmd.py."""
    context = PenaltyContext(**context)
    codes, prior = rows(particles, 10, 2).requires_grad_(), rows(30, 2)
    penalties = EnergyDistance(exponent, unbiased=unbiased), MMD(Energy(exponent), unbiased=unbiased)
    values = [penalty(codes, prior, context) for penalty in penalties]
    assert torch.equal(*values)
    assert torch.equal(*(torch.autograd.grad(value, codes)[0] for value in values))
