"""The adversary of WAE-GAN: its value and both players' gradients."""

from __future__ import annotations

import copy
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


PAIRS = [((1.0, 0.7), (0.0, 1.0)), ((2.5, 1.0), (0.0, 1.0)), ((0.0, 0.4), (0.0, 1.0))]


class LogRatio(nn.Module):
    """The optimal logit, log p(z) - log q(z)."""

    def __init__(self, q, p):
        super().__init__()
        self.q, self.p = dist.Normal(*q), dist.Normal(*p)

    def forward(self, z):
        return self.p.log_prob(z) - self.q.log_prob(z)


@pytest.mark.parametrize(("q", "p"), PAIRS)
def test_the_optimal_discriminator_shows_the_divergence(q, p):
    """200,000 draws of each: standard error below 0.002 nats; seed 0."""
    codes, prior = (dist.Normal(*law).sample((200_000, 1)).double() for law in (q, p))
    expected = divergence(scipy.stats.norm(*q), scipy.stats.norm(*p))
    with torch.no_grad():
        assert shared(LogRatio(q, p))(codes, prior).item() == pytest.approx(expected, abs=0.005)
        # Any other discriminator shows less.
        assert shared(LogRatio(q, (p[0] + 1.0, p[1])))(codes, prior).item() < expected - 0.01


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


@pytest.mark.parametrize(("q", "p"), PAIRS[:2])
def test_a_trained_discriminator_reaches_the_divergence_to_2_percent(q, p):
    """Evaluated on 400,000 fresh draws of each; seed 0."""
    laws = dist.Normal(*q), dist.Normal(*p)
    penalty = trained(*laws)
    with torch.no_grad():
        value = penalty(*(law.sample((400_000, 1)).double() for law in laws)).item()
    assert value == pytest.approx(divergence(scipy.stats.norm(*q), scipy.stats.norm(*p)), rel=0.02)


def test_equal_laws_have_no_divergence_and_a_constant_discriminator_shows_none():
    constant = plane()
    nn.init.zeros_(constant.weight)
    nn.init.zeros_(constant.bias)
    assert shared(constant)(rows(N, D) + 5, rows(M, D)).item() == pytest.approx(0, abs=1e-12)
    laws = dist.Normal(0.0, 1.0), dist.Normal(0.0, 1.0)
    penalty = trained(*laws)
    with torch.no_grad():
        assert abs(penalty(*(law.sample((50_000, 1)).double() for law in laws)).item()) < 0.005


@pytest.mark.parametrize("squeeze", [False, True])
@pytest.mark.parametrize("options", [{}, {"saturating": True}, {"gradient_penalty": 2.0}], ids=str)
def test_the_value_is_the_formula_whatever_is_trained(squeeze, options):
    discriminator, q, p = plane(), rows(N, D), rows(M, D)
    model = nn.Sequential(discriminator, nn.Flatten(0)) if squeeze else discriminator
    expected = value_by_hand(discriminator(q), discriminator(p))
    penalty = shared(model, **options)
    assert penalty(q.requires_grad_(), p).item() == pytest.approx(expected, abs=1e-12)
    with torch.no_grad():
        assert penalty(q, p).item() == pytest.approx(expected, abs=1e-12)


def test_particles_are_codes_among_codes():
    discriminator, q, p = plane(), rows(3, N, D), rows(M, D)
    expected = value_by_hand(discriminator(q), discriminator(p))
    assert shared(discriminator)(q, p).item() == pytest.approx(expected, abs=1e-12)


def test_a_large_logit_overflows_nothing():
    discriminator = plane()
    discriminator.weight.data.fill_(1e6)
    q = rows(N, D).requires_grad_()
    penalty = shared(discriminator)
    penalty(q, rows(M, D)).backward()
    assert q.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in discriminator.parameters())


# The two players


@pytest.mark.parametrize("options", [{}, {"gradient_penalty": 3.0}], ids=str)
@pytest.mark.parametrize("saturating", [False, True])
def test_codes_get_the_gradient_of_the_formula_alone(saturating, options):
    """Of E softplus(-T(q)) / 2 with T = w.q + b: -sigmoid(-T(q_i)) w / (2 n).

    Of the value itself, -E softplus(T(q)) / 2: -sigmoid(T(q_i)) w / (2 n).
    """
    discriminator, q, p = plane(), rows(N, D).requires_grad_(), rows(M, D)
    shared(discriminator, saturating=saturating, **options)(q, p).backward()
    w, logits = discriminator.weight.detach()[0], discriminator(q.detach()).detach()
    torch.testing.assert_close(q.grad, -torch.sigmoid(logits if saturating else -logits) * w / (2 * N))


@pytest.mark.parametrize("saturating", [False, True])
def test_a_prior_that_learns_gets_the_gradient_of_the_other_side(saturating):
    discriminator, q, p = plane(), rows(N, D), rows(M, D).requires_grad_()
    shared(discriminator, saturating=saturating)(q, p).backward()
    w, logits = discriminator.weight.detach()[0], discriminator(p.detach()).detach()
    share = torch.sigmoid(-logits) if saturating else torch.sigmoid(logits)
    torch.testing.assert_close(p.grad, share * w / (2 * M))


@pytest.mark.parametrize("saturating", [False, True])
def test_the_discriminator_gets_the_gradient_of_its_own_loss_alone(saturating):
    """Of E softplus(-T(p)) + E softplus(T(q)): -mean sigmoid(-T(p)) p + mean sigmoid(T(q)) q for the weight."""
    discriminator, q, p = plane(), rows(N, D).requires_grad_(), rows(M, D)
    shared(discriminator, saturating=saturating)(q, p).backward()
    with torch.no_grad():
        to_p, to_q = -torch.sigmoid(-discriminator(p)), torch.sigmoid(discriminator(q))
        weight, bias = (to_p * p).mean(0) + (to_q * q).mean(0), to_p.mean(0) + to_q.mean(0)
    torch.testing.assert_close(discriminator.weight.grad[0], weight)
    torch.testing.assert_close(discriminator.bias.grad, bias)


def test_the_gradient_penalty_is_half_the_mean_squared_slope_on_both_sides():
    """For T = a |z|^2 the slope is 2 a z, and the penalty gamma / 2 (4 a^2) (E|q|^2 + E|p|^2)."""

    class Bowl(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

        def forward(self, z):
            return self.a * z.square().sum(1)

    q, p, slopes = rows(N, D).requires_grad_(), rows(M, D), []
    for weight in (0.0, 0.7):
        discriminator = Bowl()
        shared(discriminator, gradient_penalty=weight)(q, p).backward()
        slopes.append(discriminator.a.grad)
    squares = (q.detach().square().sum(1).mean() + p.square().sum(1).mean()).item()
    assert (slopes[1] - slopes[0]).item() == pytest.approx(0.7 / 2 * 8 * 0.3 * squares)


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


# The prior's log density in the logit


def log_density(z):
    """Of N((1, -1), diag(1, 4)), for codes (J, n, d)."""
    return dist.Normal(torch.tensor([1.0, -1.0]).double(), torch.tensor([1.0, 2.0]).double()).log_prob(z).sum(-1)


@pytest.mark.parametrize("m", [N, 2 * N, M])
@pytest.mark.parametrize("flat", [False, True])
def test_the_log_density_is_added_code_by_code(m, flat):
    discriminator, q, p = plane(), rows(N, D), rows(m, D)
    module = nn.Sequential(discriminator, nn.Flatten(0)) if flat else discriminator
    penalty = shared(module, prior_log_prob=True)
    value = penalty(q, p, PenaltyContext(prior_log_prob=log_density))
    logits = [
        torch.stack([discriminator(row)[0] + log_density(row[None, None])[0, 0] for row in points]) for points in (q, p)
    ]
    assert value.item() == pytest.approx(value_by_hand(*logits), abs=1e-12)


def test_the_codes_feel_the_log_density_and_the_discriminators_loss_does_not_reach_them():
    discriminator, q, p = plane(), rows(N, D).requires_grad_(), rows(N, D)
    penalty = shared(discriminator, prior_log_prob=True)
    penalty(q, p, PenaltyContext(prior_log_prob=log_density)).backward()
    z = q.detach().requires_grad_()
    weight, bias = discriminator.weight.detach(), discriminator.bias.detach()
    logits = z @ weight[0] + bias + log_density(z[None])[0]
    (expected,) = torch.autograd.grad(softplus(-logits).mean() / 2, z)
    torch.testing.assert_close(q.grad, expected)
    other = copy.deepcopy(discriminator)
    other.zero_grad()
    logits_q, logits_p = (other(v)[:, 0] + log_density(v[None])[0] for v in (q.detach(), p))
    (softplus(-logits_p).mean() + softplus(logits_q).mean()).backward()
    torch.testing.assert_close(discriminator.weight.grad, other.weight.grad)


def test_the_slope_that_is_held_down_is_that_of_the_whole_logit():
    """With T = w.z + log p(z), standard Normal, the slope is w - z."""
    q, p, slopes = rows(N, D).requires_grad_(), rows(M, D), []
    context = PenaltyContext(prior_log_prob=lambda z: -z.square().sum(-1) / 2)
    start = plane()
    for weight in (0.0, 0.7):
        discriminator = copy.deepcopy(start)
        shared(discriminator, prior_log_prob=True, gradient_penalty=weight)(q, p, context).backward()
        slopes.append(discriminator.weight.grad[0])
    w = start.weight.detach()[0]
    expected = 0.7 * ((w - q.detach()).mean(0) + (w - p).mean(0))
    torch.testing.assert_close(slopes[1] - slopes[0], expected)


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


def test_a_log_density_that_is_not_known_is_named():
    with pytest.raises(ValueError, match=r"prior_log_prob=True needs the prior's log density.*Train through WAELoss"):
        shared(plane(), prior_log_prob=True)(rows(N, D), rows(M, D))
