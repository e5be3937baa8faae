"""Priors with parameters to learn: the gradients that they get, and where likelihood takes them."""

from __future__ import annotations

import copy
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from learned_priors import PRIORS, Nets, every_prior, mixture
from pyro.infer import SVI
from pyro.optim import Adam
from references import Seen
from torch import nn

from pyro_wae import WAELoss
from pyro_wae.kernels import InverseMultiquadratic
from pyro_wae.penalties import MMD, PenaltyContext, PriorLikelihood
from pyro_wae.priors import MixturePrior, VampPrior

SEED = 3
N = 200


# The modules


@pytest.mark.parametrize("full", [False, True])
def test_a_standardized_mixture_has_mean_0_and_variance_1_whatever_its_parameters(full):
    prior = MixturePrior(4, 3, full_covariance=full).double()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter))
        prior.locs.mul_(30).add_(100)
    whole = prior()
    weights = whole.mixture_distribution.probs[:, None]
    components = whole.component_distribution
    mean = (weights * components.mean).sum(0)
    second = (weights * (components.variance + components.mean.square())).sum(0)
    torch.testing.assert_close(mean, torch.zeros(3).double())
    torch.testing.assert_close(second, torch.ones(3).double())


def test_a_standardized_mixture_is_the_free_one_in_other_units():
    free = MixturePrior(4, 2, full_covariance=True, standardized=False).double()
    with torch.no_grad():
        free.lower.normal_()
        free.logits.normal_()
    bound = MixturePrior(4, 2, full_covariance=True).double()
    bound.load_state_dict(free.state_dict())
    plain = free()
    weights, components = plain.mixture_distribution.probs[:, None], plain.component_distribution
    mean = (weights * components.mean).sum(0)
    unit = ((weights * (components.variance + components.mean.square())).sum(0) - mean.square()).sqrt()
    z = torch.randn(10, 2).double()
    # The density of (y - mean) / unit at z.
    torch.testing.assert_close(bound().log_prob(z), plain.log_prob(mean + unit * z) + unit.log().sum())


def test_a_new_mixture_spreads_over_the_prior_that_it_replaces():
    prior = MixturePrior(50, 8)
    draws = prior().sample((4000,))
    assert draws.mean(0).abs().max() < 0.1
    assert (draws.var(0) - 1).abs().max() < 0.15
    assert len(torch.unique(prior.locs.detach().round(decimals=2), dim=0)) == 50


def test_initialise_puts_a_component_onto_every_heap_of_codes():
    """Ten heaps 20 apart and 0.1 wide: k-means++ misses one with a chance below 1e-3."""
    heaps = 20.0 * torch.arange(10.0)[:, None] * torch.tensor([1.0, -1.0])
    prior = MixturePrior(10, 2, standardized=False)
    with torch.no_grad():
        prior.logits.normal_()
    prior.initialise((heaps[:, None] + 0.1 * torch.randn(10, 30, 2)).flatten(0, 1))
    found = prior()
    distances = torch.cdist(found.component_distribution.mean, heaps)
    assert set(distances.argmin(1).tolist()) == set(range(10))
    assert distances.min(1).values.max() < 1
    assert found.component_distribution.stddev.max() < 0.5
    torch.testing.assert_close(found.mixture_distribution.probs, torch.full((10,), 0.1))


def test_initialise_takes_codes_that_all_coincide():
    prior = MixturePrior(3, 2, full_covariance=True)
    prior.initialise(torch.ones(5, 2))
    assert all(parameter.isfinite().all() for parameter in prior.parameters())


def test_vamp_components_are_the_codes_of_the_pseudo_inputs():
    encoder, inputs = nn.Linear(4, 2), torch.randn(6, 4)
    prior = VampPrior(encoder, inputs, scale=0.3, standardized=False)
    component = prior().component_distribution
    torch.testing.assert_close(component.mean, encoder(inputs))
    torch.testing.assert_close(component.stddev, torch.full((6, 2), 0.3))
    with torch.no_grad():
        encoder.weight.mul_(2)
    torch.testing.assert_close(prior().component_distribution.mean, encoder(inputs))
    inputs.zero_()  # a copy of the data is learnt, not the data
    assert prior.pseudo_inputs.abs().min() > 0


def test_vamp_leaves_the_encoder_to_its_owner_and_trains_it():
    encoder = nn.Linear(4, 2)
    prior = VampPrior(encoder, torch.randn(6, 4))
    assert {name for name, _ in prior.named_parameters()} == {"pseudo_inputs", "logits", "log_scales"}
    prior().log_prob(torch.randn(20, 2)).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in (*prior.parameters(), encoder.weight))


def test_vamp_leaves_the_running_statistics_of_batch_norm_alone():
    encoder = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    before = copy.deepcopy(encoder.state_dict())
    VampPrior(encoder, torch.randn(6, 4))()
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize(
    ("encoder", "message"), [(lambda x: x[None], r"found shape \(1, 5, 4\)"), (lambda x: (x, x), "found tuple")]
)
def test_vamp_names_codes_that_do_not_fit(encoder, message):
    with pytest.raises(ValueError, match=message):
        VampPrior(encoder, torch.randn(5, 4))()


@pytest.mark.parametrize("make", [PRIORS[name] for name in ("mixture", "full mixture", "vamp")])
def test_priors_save_load_and_show_themselves(make):
    prior = make()
    other = copy.deepcopy(prior)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    other.load_state_dict(prior.state_dict())
    z = torch.randn(5, 2)
    assert torch.equal(prior().log_prob(z), other().log_prob(z))
    assert type(prior).__name__ in repr(prior)
    assert "standardized=True" in repr(prior)


# In the loss


@every_prior
def test_every_prior_trains_inside_and_no_gradient_is_lost(make):
    nets, x = Nets(make()), torch.randn(64, 4)
    loss = WAELoss(MMD() + PriorLikelihood())
    svi = SVI(nets.model, nets.guide, Adam({"lr": 1e-2}), loss=loss)
    before = copy.deepcopy(list(nets.parameters()))
    with warnings.catch_warnings(action="error"):
        for _ in range(3):
            svi.step(x)
    for old, new in zip(before, nets.parameters(), strict=True):
        assert new.isfinite().all()
        assert not torch.equal(old, new)


@every_prior
def test_penalty_alone_reaches_every_parameter_through_draws(make):
    nets = Nets(make())
    with warnings.catch_warnings(action="error"):
        WAELoss(MMD(closed_form=False))(nets.model, nets.guide)(torch.randn(64, 4)).backward()
    for name, parameter in nets.prior.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("count", [3, 20])
def test_a_prior_without_rsample_learns_by_likelihood_without_a_warning_and_is_missed_by_draws(count):
    nets = Nets(nn.Identity())
    logits = nn.Parameter(torch.zeros(count))
    components = dist.Normal(torch.randn(count, 2), 1.0).to_event(1)
    nets.prior.forward = lambda: dist.MixtureSameFamily(dist.Categorical(logits=logits), components)
    drawn, x = MMD(closed_form=False), torch.randn(64, 4)
    with pytest.warns(UserWarning, match="prior at site 'z'"):
        WAELoss(drawn)(nets.model, nets.guide)(x).backward()
    assert logits.grad is None
    with warnings.catch_warnings(action="error"):
        WAELoss(drawn + PriorLikelihood())(nets.model, nets.guide)(x).backward()
    assert logits.grad.abs().max() > 0


def test_prior_has_a_rate_of_its_own_by_name():
    nets, rates = Nets(MixturePrior(3, 2)), {}

    def optim_args(name):
        rates[name] = 1e-2 if name.startswith("prior.") else 1e-3
        return {"lr": rates[name]}

    SVI(nets.model, nets.guide, Adam(optim_args), loss=WAELoss(MMD() + PriorLikelihood())).step(torch.randn(9, 4))
    assert {name for name, rate in rates.items() if rate == 1e-2} == {"prior.logits", "prior.locs", "prior.log_scales"}


LOGITS_3 = torch.tensor([0.3, -0.4, 0.1])
LOCS_3 = torch.tensor([[0.0, 1.0], [2.0, -1.0], [-1.0, 0.5]])
SCALES_3 = torch.tensor([[0.5, 1.0], [0.8, 0.4], [1.2, 0.7]])
PYRO_MIXTURES = {
    "MixtureOfDiagNormals": (lambda: dist.MixtureOfDiagNormals(LOCS_3, SCALES_3, LOGITS_3), SCALES_3),
    "MixtureOfDiagNormalsSharedCovariance": (
        lambda: dist.MixtureOfDiagNormalsSharedCovariance(LOCS_3, SCALES_3[0], LOGITS_3),
        SCALES_3[:1].expand(3, 2),
    ),
    "NormalMixture": (lambda: mixture(LOGITS_3, LOCS_3, SCALES_3), SCALES_3),
}


@pytest.mark.parametrize(("make", "scales"), PYRO_MIXTURES.values(), ids=PYRO_MIXTURES.keys())
def test_penalties_are_told_of_a_mixture(make, scales):
    nets, penalty = Nets(nn.Identity()), Seen()
    nets.prior.forward = make
    WAELoss(penalty)(nets.model, nets.guide)(torch.randn(10, 4))
    prior = penalty.context.prior()
    assert prior.batch_shape == ()
    assert prior.event_shape == (2,)
    expected = dist.MixtureSameFamily(dist.Categorical(logits=LOGITS_3), dist.Normal(LOCS_3, scales).to_event(1))
    z = torch.randn(7, 2)
    torch.testing.assert_close(prior.log_prob(z), expected.log_prob(z))


@pytest.mark.slow
def test_a_learned_standardized_prior_keeps_the_unit_of_the_codes():
    """A cost that only spreads codes apart: a free prior runs after them, a standardised one holds them."""
    spreads = {}
    for standardized in (False, True):
        pyro.set_rng_seed(SEED)
        pyro.clear_param_store()
        nets, x = Nets(MixturePrior(5, 2, standardized=standardized)), torch.randn(100, 4)
        loss = WAELoss(
            MMD(InverseMultiquadratic.multiscale(), closed_form=False) + PriorLikelihood(),
            cost=lambda x, g, nets=nets: -0.3 * nets.encoder(x).square().sum(-1).sqrt(),
            penalty_weight=100.0,
        )
        svi = SVI(nets.model, nets.guide, Adam({"lr": 2e-2}), loss=loss)
        for _ in range(300):
            svi.step(x)
        spreads[standardized] = nets.encoder(x).var(0).mean().sqrt().item()
    assert spreads[True] < 1.5, spreads
    assert spreads[False] > 1.5 * spreads[True], spreads


def test_a_mixture_of_as_many_components_as_data_is_one_prior_for_all_of_them():
    # A component's parameters are then as long as the data, and are not theirs.
    net = Nets(MixturePrior(N, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        WAELoss(MMD() + PriorLikelihood(), penalty_weight=1.0).loss_and_grads(net.model, net.guide, torch.randn(N, 4))
    assert net.prior.locs.grad is not None


def test_of_a_mixture_with_many_components_mmd_takes_draws():
    prior = MixturePrior(33, 2)()
    context, codes, draws = PenaltyContext(prior=lambda: prior), torch.randn(20, 2), prior.sample((30,))
    assert MMD()(codes, draws, context) == MMD(closed_form=False)(codes, draws)
    few = MixturePrior(32, 2)()
    assert MMD()(codes, draws, PenaltyContext(prior=lambda: few)) != MMD(closed_form=False)(codes, draws)


@pytest.mark.parametrize(("components", "is_drawn"), [(20, False), (32, False), (33, True)])
def test_a_loss_takes_draws_of_as_many_components_as_mmd_does(components, is_drawn):
    net, x, loss = Nets(MixturePrior(components, 2)), torch.randn(N, 4), WAELoss(MMD(), penalty_weight=1.0)
    loss.loss(net.model, net.guide, x)  # takes the kernel's length from draws
    first, second = (loss.loss(net.model, net.guide, x) for _ in range(2))
    assert (first != second) == is_drawn
