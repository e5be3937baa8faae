import math
import pickle

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from pyro_wae.penalties import PenaltyContext
from pyro_wae.penalties.guards import LogVarianceL1, UnitVarianceKL

GUARDS = [LogVarianceL1, UnitVarianceKL]
every_guard = pytest.mark.parametrize("guard", GUARDS)


def context(variance):
    return PenaltyContext(encoder_variance=lambda: variance)


def variances(*shape, dtype=torch.float64):
    return torch.rand(*shape, dtype=dtype) * 3 + 0.01


def codes(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


@pytest.mark.usefixtures("single_precision")
def test_the_l1_is_the_sum_of_absolute_log_variances_averaged_over_data():
    variance = torch.tensor([[[1.0, math.e], [math.e**-2, 1.0]]])
    torch.testing.assert_close(LogVarianceL1(0.5)(codes(2, 2), context=context(variance)).float(), torch.tensor(0.75))


@pytest.mark.parametrize("particles", [1, 3])
def test_the_divergence_is_that_of_normals_at_one_mean(particles):
    variance, mean = variances(particles, 5, 2), codes(particles, 5, 2)
    divergence = kl_divergence(Normal(mean, variance.sqrt()), Normal(mean, torch.ones_like(mean)))
    value = UnitVarianceKL(2.0)(codes(particles, 5, 2), context=context(variance))
    torch.testing.assert_close(value, 2 * divergence.sum(-1).mean())


@every_guard
def test_only_unit_variance_costs_nothing(guard):
    assert guard()(codes(5, 2), context=context(torch.ones(1, 5, 2))) == 0
    for variance in (0.5, 2.0, 1e-30, 1e30):
        assert guard()(codes(5, 2), context=context(torch.full((1, 5, 2), variance))) > 0.1


@every_guard
def test_gradients_agree_with_finite_differences(guard):
    assert torch.autograd.gradcheck(
        lambda variance: guard(0.7)(codes(2, 4, 3), context=context(variance)), variances(2, 4, 3).requires_grad_()
    )


@every_guard
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_value_has_the_precision_of_the_codes(guard, dtype):
    variance = variances(1, 20, 3)
    value = guard()(codes(20, 3, dtype=dtype), context=context(variance.to(dtype)))
    assert value.dtype == dtype
    assert value.shape == ()
    torch.testing.assert_close(value.double(), guard()(codes(20, 3), context=context(variance)), rtol=1e-6, atol=0)


@every_guard
def test_repr_and_pickle(guard):
    assert repr(guard(0.1)) == f"{guard.__name__}(weight=0.1)"
    assert repr(pickle.loads(pickle.dumps(guard(0.1)))) == repr(guard(0.1))
    assert guard().state_dict() == {}


# Errors


@every_guard
def test_outside_of_a_loss_the_variance_is_missing(guard):
    message = rf"{guard.__name__} reads the variance .* only inside WAELoss with a stochastic guide, found none"
    with pytest.raises(ValueError, match=message) as caught:
        guard(0.1)(codes(5, 2))
    assert f"Write WAELoss(MMD() + {guard.__name__}(weight=0.1))" in str(caught.value)


@every_guard
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_variance_without_a_logarithm_is_named(guard, value):
    variance = variances(1, 5, 2)
    variance[0, 3, 1] = value
    with pytest.raises(ValueError, match=rf"found a variance of {value:g}\. .*leave {guard.__name__} out\. .*softplus"):
        guard()(codes(5, 2), context=context(variance))


@every_guard
def test_the_refusal_of_a_deterministic_guide_passes(guard):
    def refuse():
        raise ValueError("The guide's site 'z' is a Delta.")

    with pytest.raises(ValueError, match=r"^The guide's site 'z' is a Delta\.$"):
        guard()(codes(5, 2), context=PenaltyContext(encoder_variance=refuse))
