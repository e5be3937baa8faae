import math

import numpy as np
import pytest
import torch
from references import mean_is_zero, rows
from scipy.integrate import quad
from scipy.spatial.distance import cdist
from scipy.stats import energy_distance, norm

from pyro_wae.penalties import PenaltyContext
from pyro_wae.penalties.energy import EnergyDistance


@pytest.mark.parametrize(("n", "m"), [(20, 20), (20, 33), (33, 20), (2, 2)])
def test_in_one_dimension_its_root_is_scipys(n, m):
    codes, prior = 0.5 * rows(n, 1) + 0.3, rows(m, 1)
    value = EnergyDistance(unbiased=False)(codes, prior)
    assert value.sqrt().item() == pytest.approx(energy_distance(codes.ravel(), prior.ravel()), rel=1e-12)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.7])
def test_the_unbiased_one_leaves_out_codes_with_themselves(exponent):
    codes, prior = rows(20, 3) + 1, rows(33, 3)

    def mean(x, y, count):
        return (cdist(x, y) ** exponent).sum() / count

    expected = 2 * mean(codes, prior, 20 * 33) - mean(codes, codes, 20 * 19) - mean(prior, prior, 33 * 32)
    assert EnergyDistance(exponent)(codes, prior).item() == pytest.approx(expected, rel=1e-12)


def test_particles_of_one_datum_do_not_meet():
    codes, prior = rows(3, 10, 2), rows(25, 2)
    flat = codes.flatten(0, 1).numpy()
    other = np.tile(np.arange(10), 3)[:, None] != np.tile(np.arange(10), 3)
    qq, pp = cdist(flat, flat)[other].mean(), cdist(prior, prior)[~np.eye(25, dtype=bool)].mean()
    expected = 2 * cdist(flat, prior).mean() - qq - pp
    assert EnergyDistance()(codes, prior).item() == pytest.approx(expected, rel=1e-12)


def test_it_averages_to_twice_the_squared_l2_distance_of_distribution_functions():
    # The identity of one dimension. Null: the mean over 300 batches is it; size 1/2000 (3.5 standard errors), seed 0.
    squared = quad(lambda t: (norm.cdf(t) - norm.cdf(t, 0.5, 0.7)) ** 2, -10, 10)[0]
    values = [EnergyDistance()(0.5 + 0.7 * rows(20, 1), rows(30, 1)) - 2 * squared for _ in range(300)]
    assert mean_is_zero(values)


def test_null_has_mean_0_with_particles_too_and_pooling_them_or_the_biased_one_has_not():
    # Null: the mean over 300 batches of 10 data of 5 particles is 0; size 1/2000, seed 0.
    apart, pooled, biased = [], [], []
    for _ in range(300):
        codes = math.sqrt(0.8) * rows(1, 10, 2) + math.sqrt(0.2) * rows(5, 10, 2)
        prior = rows(25, 2)
        apart.append(EnergyDistance()(codes, prior))
        pooled.append(EnergyDistance()(codes.flatten(0, 1), prior))
        biased.append(EnergyDistance(unbiased=False)(codes[0], prior))
    assert mean_is_zero(apart)
    assert not mean_is_zero(pooled)
    assert not mean_is_zero(biased)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.7])
def test_gradients_agree_with_finite_differences(exponent):
    prior = rows(7, 2)
    assert torch.autograd.gradcheck(lambda codes: EnergyDistance(exponent)(codes, prior), rows(5, 2).requires_grad_())


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.7])
def test_gradients_stay_finite_where_codes_coincide(exponent):
    codes = rows(4, 2).repeat(2, 1).requires_grad_()
    EnergyDistance(exponent)(codes, codes.detach()).backward()
    assert codes.grad.isfinite().all()


def test_it_shares_data_as_mmd_does():
    codes = rows(20, 2)
    assert EnergyDistance()(codes, codes, PenaltyContext(shared_data=True)).abs() < 1e-12
    with pytest.raises(ValueError, match="multiples of the 20 data, found 30"):
        EnergyDistance()(codes, rows(30, 2), PenaltyContext(shared_data=True))
