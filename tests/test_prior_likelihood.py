"""Learnable priors that are fitted by likelihood: their gradient, where it takes them, and what is refused."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from learned_priors import PRIORS, Nets, every_prior
from torch import nn

from pyro_wae import WAELoss
from pyro_wae.penalties import MMD, PenaltyContext, PriorLikelihood
from pyro_wae.priors import MixturePrior

SEED = 3
N = 200


@every_prior
def test_likelihood_gives_its_gradient_to_the_prior_and_none_to_the_codes(make):
    nets, x = Nets(make()), torch.randn(N, 4)
    loss = WAELoss(PriorLikelihood(), cost=lambda x, g: 0 * g.sum(-1), penalty_weight=3.0)
    assert loss.loss_and_grads(nets.model, nets.guide, x) == 0
    codes = nets.encoder(x).detach()
    names, parameters = zip(*nets.prior.named_parameters(), strict=True)
    expected = torch.autograd.grad(-3 * nets.prior().log_prob(codes).mean(), parameters)
    for name, parameter, gradient in zip(names, parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5, msg=name)
    assert all(parameter.grad.abs().max() == 0 for parameter in nets.encoder.parameters())


def test_likelihood_leaves_the_other_penalty_and_the_encoder_as_they_are():
    gradients, values = [], []
    for penalty in (MMD(), MMD() + PriorLikelihood()):
        pyro.set_rng_seed(SEED)
        nets = Nets(MixturePrior(5, 2))
        loss = WAELoss(penalty)
        values.append(loss.loss_and_grads(nets.model, nets.guide, torch.randn(N, 4)))
        gradients.append(nets.encoder.weight.grad)
    assert values[0] == pytest.approx(values[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_likelihood_of_a_hierarchical_prior_is_that_of_both_layers():
    lower = nn.Linear(1, 1)
    x = torch.randn(N, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(torch.zeros(1), 1).to_event(1))
            z2 = pyro.sample("z2", dist.Normal(lower(z1), 0.5).to_event(1))
            pyro.sample("x", dist.Normal(torch.cat([z1, z2], -1), 1).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z1", dist.Delta(x[:, :1]).to_event(1))
            pyro.sample("z2", dist.Delta(x[:, 1:]).to_event(1))

    WAELoss(PriorLikelihood(), penalty_weight=1.0).loss_and_grads(model, guide, x)
    # d/d bias of E (z2 - w z1 - b)^2 / (2 * 0.25)
    expected = -(x[:, 1:] - lower(x[:, :1]).detach()).mean() / 0.25
    torch.testing.assert_close(lower.bias.grad, expected[None])


def test_likelihood_is_0_without_gradients():
    assert WAELoss(PriorLikelihood()).loss(Nets(PRIORS["flow"]()).model, Nets(PRIORS["flow"]()).guide, torch.ones(5, 4))
    with torch.no_grad():
        assert PriorLikelihood()(torch.randn(5, 2)) == 0


def test_likelihood_says_when_there_is_no_density_and_when_nothing_learns():
    with pytest.raises(ValueError, match="needs the prior's log density, and there is none here"):
        PriorLikelihood()(torch.randn(5, 2, requires_grad=True))
    nets = Nets(MixturePrior(3, 2).requires_grad_(False))
    with pytest.warns(UserWarning, match="finds nothing to learn in the prior"):
        WAELoss(MMD() + PriorLikelihood())(nets.model, nets.guide)(torch.randn(9, 4))


def test_likelihood_that_is_not_finite_is_reported():
    context = PenaltyContext(prior_log_prob=lambda z: torch.full(z.shape[:2], -math.inf, requires_grad=True))
    assert PriorLikelihood()(torch.randn(5, 2), context=context).isnan()
