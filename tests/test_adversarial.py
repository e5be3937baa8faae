"""The adversary of WAE-GAN: its value and both players' gradients."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.stats
import torch
from adversaries import net, plane, shared, value_by_hand
from references import rows
from torch import nn
from torch.nn.functional import softplus

from pyro_wae.penalties import JensenShannon, PenaltyContext

N, M, D = 20, 30, 2


# The value


def divergence(q, p):
    """The Jensen-Shannon divergence of two laws on a line, in nats, by quadrature."""

    def integrand(z):
        a, b = q.pdf(z), p.pdf(z)
        middle = (a + b) / 2
        return sum(f * math.log(f / middle) / 2 for f in (a, b) if f > 0)

    return scipy.integrate.quad(integrand, -12, 12, limit=200, epsabs=1e-12)[0]


class Quadratic(nn.Module):
    """The logits that the log-ratio of two Normals can have."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1).double()

    def forward(self, z):
        return self.linear(torch.cat([z, z.square()], 1))


def trained(q, p, *, calls=150, rate=0.1):
    """Trained by its own optimiser, at a rate that falls to 0, on batches of 1000."""
    made = []

    def optimizer(parameters):
        made.append(torch.optim.Adam(parameters, lr=rate))
        return made[0]

    penalty = JensenShannon(Quadratic(), optimizer=optimizer, steps=2, gradient_penalty=0.0)
    for call in range(calls):
        penalty(q.sample((1000, 1)).double(), p.sample((1000, 1)).double())
        made[0].param_groups[0]["lr"] = rate * (1 - call / calls)
    return penalty


@pytest.mark.parametrize(("q", "p"), [((1.0, 0.7), (0.0, 1.0)), ((2.5, 1.0), (0.0, 1.0)), ((0.0, 1.0), (0.0, 1.0))])
def test_a_trained_discriminator_reaches_the_divergence_to_2_percent(q, p):
    """Evaluated on 400,000 fresh draws of each; seed 0."""
    laws = dist.Normal(*q), dist.Normal(*p)
    penalty = trained(*laws)
    with torch.no_grad():
        value = penalty(*(law.sample((400_000, 1)).double() for law in laws)).item()
    assert value == pytest.approx(
        divergence(scipy.stats.norm(*q), scipy.stats.norm(*p)), rel=0.02, abs=0.005 * (q == p)
    )


# The two players


def log_density(z):
    """Of N((1, -1), diag(1, 4)), for codes (J, n, d)."""
    return dist.Normal(torch.tensor([1.0, -1.0]).double(), torch.tensor([1.0, 2.0]).double()).log_prob(z).sum(-1)


@pytest.mark.parametrize(
    "make", [plane, net, lambda: nn.Sequential(net(), nn.Flatten(0))], ids=["plane", "net", "flat"]
)
@pytest.mark.parametrize("saturating", [False, True])
@pytest.mark.parametrize("gradient_penalty", [0.0, 0.7])
@pytest.mark.parametrize("with_density", [False, True], ids=["", "prior_log_prob"])
@pytest.mark.parametrize(("shape", "m"), [((N,), M), ((N,), 2 * N), ((3, N), M)])
def test_value_and_gradients_of_both_players_are_those_of_the_formulas(
    make, saturating, gradient_penalty, with_density, shape, m
):
    """Codes descend E softplus(-T(q)) / 2, or the value itself, and a prior that learns the other side.

    The discriminator descends its own loss with gamma / 2 (E|dT(q)|^2 + E|dT(p)|^2), T the whole logit.
    """
    discriminator, q, p = make(), rows(*shape, D).requires_grad_(), rows(m, D).requires_grad_()
    options = {"saturating": saturating, "gradient_penalty": gradient_penalty, "prior_log_prob": with_density}
    penalty, context = shared(discriminator, **options), PenaltyContext(prior_log_prob=log_density)
    value = penalty(q, p, context)
    value.backward()

    def logit(z):
        return discriminator(z).reshape(-1) + (log_density(z[None])[0] if with_density else 0)

    z, y = (points.detach().flatten(0, -2).requires_grad_() for points in (q, p))
    of_codes, of_prior = logit(z), logit(y)
    to_codes = -softplus(of_codes) if saturating else softplus(-of_codes)
    to_prior = -softplus(-of_prior) if saturating else softplus(of_prior)
    slopes = torch.autograd.grad(of_codes.sum() + of_prior.sum(), (z, y), create_graph=True)
    loss = softplus(-of_prior).mean() + softplus(of_codes).mean()
    loss = loss + gradient_penalty / 2 * sum(slope.square().sum(1).mean() for slope in slopes)
    for points, player, inputs in ((q, to_codes, z), (p, to_prior, y)):
        (slope,) = torch.autograd.grad(player.mean() / 2, inputs, retain_graph=True)
        torch.testing.assert_close(points.grad, slope.view_as(points))
    own = list(discriminator.parameters())
    torch.testing.assert_close([parameter.grad for parameter in own], list(torch.autograd.grad(loss, own)))
    assert value.item() == pytest.approx(value_by_hand(of_codes, of_prior), abs=1e-12)
    with torch.no_grad():
        assert penalty(q, p, context) == value


def test_a_large_logit_overflows_nothing():
    discriminator = plane()
    discriminator.weight.data.fill_(1e6)
    q = rows(N, D).requires_grad_()
    penalty = shared(discriminator)
    penalty(q, rows(M, D)).backward()
    assert q.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in discriminator.parameters())


def test_frozen_parameters_and_codes_without_graph_are_left_alone():
    discriminator = plane().requires_grad_(False)
    q = rows(N, D).requires_grad_()
    shared(discriminator)(q, rows(M, D)).backward()
    assert discriminator.weight.grad is None
    assert q.grad.abs().max() > 0
    q = rows(N, D)
    discriminator = plane()
    shared(discriminator, gradient_penalty=1.0)(q, rows(M, D)).backward()
    assert discriminator.weight.grad is not None
    assert not q.requires_grad


# Training


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"saturating": True}, {"prior_log_prob": True}], ids=str)
def test_codes_that_are_pulled_by_a_trained_discriminator_come_to_the_prior(options):
    """Free codes from 3 away with a tenth of the spread: after 600 steps mean and spread are near those of N(0, I)."""
    codes = nn.Parameter(0.1 * rows(256, D) + 3)
    context = PenaltyContext(prior_log_prob=lambda z: -z.square().sum(-1) / 2 - math.log(2 * math.pi))
    penalty = shared(net(), gradient_penalty=0.1, **options)
    optimisers = [torch.optim.Adam([codes], lr=3e-2), torch.optim.Adam(penalty.parameters(), lr=3e-2)]
    for _ in range(600):
        for optimiser in optimisers:
            optimiser.zero_grad()
        penalty(codes, rows(256, D), context).backward()
        for optimiser in optimisers:
            optimiser.step()
    assert codes.mean(0).abs().max() < 0.5
    assert (codes.std(0) - 1).abs().max() < 0.5


# Errors


class Pair(nn.Linear):
    def forward(self, z):
        return super().forward(z), z


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (Pair(D, 1), "tuple"),
        (nn.Linear(D, 2), r"shape \(20, 2\)"),
        (nn.Sequential(nn.Linear(D, 1), nn.Flatten(0), nn.Unflatten(0, (1, -1))), r"shape \(1, 20\)"),
    ],
)
def test_logits_of_another_shape_are_named(module, found):
    with pytest.raises(
        ValueError, match=rf"one logit for each of 20 codes, of shape \(20,\) .*found {found}.*nn\.Linear"
    ):
        shared(module.double())(rows(N, D), rows(M, D))


@pytest.mark.parametrize(
    "module",
    [nn.Linear(D + 1, 1).double(), nn.Linear(D, 1), nn.Conv1d(D, 1, 1).double()],
    ids=["size", "dtype", "kind"],
)
def test_codes_that_the_discriminator_does_not_take_are_named(module):
    write = rf"codes of shape \(20, {D}\) and dtype float64.*nn\.Linear\({D}, 256, dtype=torch\.float64\)"
    for make in (JensenShannon, shared):
        with pytest.raises(ValueError, match=write) as raised:
            make(module)(rows(N, D), rows(N, D))
        assert str(raised.value.__cause__) in str(raised.value)


def test_a_log_density_that_is_not_known_is_named():
    with pytest.raises(ValueError, match=r"prior_log_prob=True needs the prior's log density.*Train through WAELoss"):
        shared(plane(), prior_log_prob=True)(rows(N, D), rows(M, D))
