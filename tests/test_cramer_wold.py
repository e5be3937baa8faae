import math

import mpmath
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from references import rows
from scipy.spatial.distance import cdist
from scipy.special import hyp1f1
from scipy.stats import norm

from pyro_wae.kernels import Gaussian
from pyro_wae.penalties import MMD, PenaltyContext
from pyro_wae.penalties.cramer_wold import CramerWold, projected_gaussian

DIMENSIONS = [2, 3, 8, 64, 512]


def normal(d, loc=0.0, scale=1.0):
    prior = dist.Normal(torch.full((d,), loc, dtype=torch.float64), scale).to_event(1)
    return PenaltyContext(prior=lambda: prior)


def kernel(x, y, gamma):
    d = x.shape[1]
    return hyp1f1(0.5, d / 2, -cdist(x, y, "sqeuclidean") / (4 * gamma)) / (2 * math.sqrt(math.pi * gamma))


def off_diagonal(n):
    return ~np.eye(n, dtype=bool)


def smoothed(points, gamma, t):
    """The density at t of points (..., n) on a line, each smoothed with N(0, gamma)."""
    return norm.pdf(t[:, None], points[..., None, :], math.sqrt(gamma)).mean(-1)


def projected(codes, gamma):
    """Smoothed densities (directions, t) of codes in the plane, on a grid of directions and places, and that grid."""
    angle, t = np.linspace(0, 2 * math.pi, 96, endpoint=False), np.linspace(-12, 12, 600)
    directions = np.stack([np.cos(angle), np.sin(angle)], 1)
    return smoothed(directions @ codes.numpy().T, gamma, t), directions, t


def mean_squared_difference(q, p, t):
    # The trapezoidal rule of a periodic function and of one that dies off at both ends converges geometrically.
    return ((q - p) ** 2).sum(-1).mean() * (t[1] - t[0])


# The special function


def kummer(a, b, s):
    with mpmath.workdps(30):
        return float(mpmath.hyp1f1(a, b, -mpmath.mpf(s)))


@pytest.mark.parametrize("d", [2, 3, 4, 5, 16, 64, 512, 4096])
def test_the_projected_gaussian_is_kummers_function(d):
    s = torch.cat([torch.zeros(1), torch.logspace(-6, 8, 60)]).double().requires_grad_()
    value = projected_gaussian(s, d)
    (slope,) = torch.autograd.grad(value.sum(), s, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), s)
    points = s.tolist()
    expected = torch.tensor([kummer(0.5, d / 2, x) for x in points], dtype=torch.float64)
    expected_slope = torch.tensor([-kummer(1.5, d / 2 + 1, x) / d for x in points], dtype=torch.float64)
    expected_curvature = torch.tensor([3 * kummer(2.5, d / 2 + 2, x) / (d * (d + 2)) for x in points]).double()
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(slope, expected_slope, rtol=2e-12, atol=0)
    torch.testing.assert_close(curvature, expected_curvature, rtol=1e-6, atol=0)


@pytest.mark.parametrize("d", DIMENSIONS)
def test_the_projected_gaussian_in_float32(d):
    s = torch.logspace(-3, 5, 50)
    exact = torch.tensor([kummer(0.5, d / 2, x) for x in s.tolist()])
    torch.testing.assert_close(projected_gaussian(s, d), exact, rtol=2e-6, atol=0)


@pytest.mark.parametrize(("d", "error"), [(2, 0.215), (8, 0.022), (64, 0.002)])
def test_the_documented_error_of_the_papers_approximation(d, error):
    s = torch.logspace(-2, 5, 2000, dtype=torch.float64)
    approximation = (1 + 4 * s / (2 * d - 3)) ** -0.5
    assert (approximation - projected_gaussian(s, d)).abs().max().item() == pytest.approx(error, abs=6e-4)


def test_directions_need_two_dimensions():
    with pytest.raises(ValueError, match="dimension must be a whole number >= 2, found 1"):
        projected_gaussian(torch.ones(2), 1)


# The distance


def test_it_is_the_l2_distance_of_smoothed_projections_averaged_over_directions():
    codes, prior, gamma = rows(20, 2) + 0.5, rows(30, 2), 0.3
    (q, _, t), (p, _, _) = projected(codes, gamma), projected(prior, gamma)
    value = CramerWold(gamma, unbiased=False)(codes, prior)
    assert value.item() == pytest.approx(mean_squared_difference(q, p, t), rel=1e-9)


def test_the_closed_form_is_that_distance_from_a_normal():
    codes, gamma = rows(20, 2) + 0.5, 0.3
    q, directions, t = projected(codes, gamma)
    p = norm.pdf(t, 0.4 * directions.sum(1, keepdims=True), math.sqrt(1.5**2 + gamma))
    value = CramerWold(gamma, unbiased=False)(codes, rows(2, 2), normal(2, 0.4, 1.5))
    assert value.item() == pytest.approx(mean_squared_difference(q, p, t), rel=1e-9)


@pytest.mark.parametrize("d", DIMENSIONS)
@pytest.mark.parametrize(("n", "m"), [(20, 20), (20, 33), (33, 20), (2, 2)])
@pytest.mark.parametrize("unbiased", [True, False])
def test_between_samples_it_is_the_direct_sum(d, n, m, unbiased):
    codes, prior = 0.5 * rows(n, d) + 1, rows(m, d)
    qq, pp, qp = kernel(codes, codes, 0.4), kernel(prior, prior, 0.4), kernel(codes, prior, 0.4)
    if unbiased:
        qq, pp = qq[off_diagonal(n)], pp[off_diagonal(m)]
    value = CramerWold(0.4, unbiased=unbiased)(codes, prior)
    assert value.item() == pytest.approx(qq.mean() + pp.mean() - 2 * qp.mean(), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("d", DIMENSIONS)
def test_against_the_standard_normal_it_is_the_papers_sum(d):
    codes, n, gamma = rows(15, d) + 0.3, 15, 0.4
    squares = cdist(codes, codes, "sqeuclidean")
    expected = (
        hyp1f1(0.5, d / 2, -squares / (4 * gamma)).sum() / math.sqrt(gamma)
        + n**2 / math.sqrt(1 + gamma)
        - 2 * n / math.sqrt(gamma + 0.5) * hyp1f1(0.5, d / 2, -codes.square().sum(1).numpy() / (2 + 4 * gamma)).sum()
    ) / (2 * n**2 * math.sqrt(math.pi))
    value = CramerWold(gamma, unbiased=False)(codes, rows(2, d), normal(d))
    assert value.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("context", [PenaltyContext(), normal(2)])
def test_particles_of_one_datum_do_not_meet(context):
    codes, prior, gamma = rows(3, 10, 2), rows(25, 2), 0.4
    flat = codes.flatten(0, 1)
    same = np.tile(np.arange(10), 3)[:, None] == np.tile(np.arange(10), 3)
    qq = kernel(flat, flat, gamma)
    penalty, reference = CramerWold(gamma), CramerWold(gamma, unbiased=False)
    rest = reference(codes, prior, context).item() - qq.mean()
    if context.prior is None:
        pp = kernel(prior, prior, gamma)
        rest += pp[off_diagonal(25)].mean() - pp.mean()
    assert penalty(codes, prior, context).item() == pytest.approx(qq[~same].mean() + rest, rel=1e-9)
    known = PenaltyContext(prior=context.prior, data_size=40)
    expected = 39 / 40 * qq[~same].mean() + qq[same & off_diagonal(30)].mean() / 40 + rest
    assert penalty(codes, prior, known).item() == pytest.approx(expected, rel=1e-9)


# When the closed form serves


@pytest.mark.parametrize(
    "prior",
    [
        dist.Normal(torch.zeros(3), torch.tensor([1.0, 1.0, 2.0])).to_event(1),
        dist.Laplace(torch.zeros(3), 1.0).to_event(1),
        dist.LogNormal(torch.zeros(3), 1.0).to_event(1),
        dist.MultivariateNormal(torch.zeros(3), torch.eye(3)),
        None,
    ],
)
def test_other_priors_are_compared_by_their_draws(prior):
    codes, draws, penalty = rows(20, 3), rows(30, 3), CramerWold(0.4)
    value = penalty(codes, draws, PenaltyContext(prior=lambda: prior))
    torch.testing.assert_close(value, penalty(codes, draws), rtol=0, atol=0)


@pytest.mark.usefixtures("single_precision")
@pytest.mark.parametrize("scale", [1.5, torch.full((3,), 1.5)])
def test_any_normal_of_one_scale_serves_however_it_is_written(scale):
    codes = rows(20, 3, dtype=torch.float32)
    prior = dist.Normal(torch.zeros(3), scale).to_event(1)
    value = CramerWold(0.4)(codes, torch.full((2, 3), math.nan), PenaltyContext(prior=lambda: prior))
    torch.testing.assert_close(value.double(), CramerWold(0.4)(codes.double(), rows(2, 3), normal(3, 0.0, 1.5)))


def test_data_that_are_shared_with_the_prior_need_its_draws():
    codes, draws, prior = rows(20, 3), rows(20, 3), normal(3).prior
    context = PenaltyContext(prior=prior, shared_data=True)
    expected = CramerWold(0.4)(codes, draws, PenaltyContext(shared_data=True))
    torch.testing.assert_close(CramerWold(0.4)(codes, draws, context), expected, rtol=0, atol=0)
    assert CramerWold(0.4)(codes, codes, context).abs() < 1e-12


# Gradients and numbers


@pytest.mark.parametrize("unbiased", [True, False])
def test_gradients_of_the_closed_form_by_codes_and_prior_agree_with_finite_differences(unbiased):
    def value(codes, loc, scale):
        prior = dist.Normal(loc, scale.expand(3)).to_event(1)
        return CramerWold(0.3, unbiased=unbiased)(codes, rows(2, 3), PenaltyContext(prior=lambda: prior))

    inputs = rows(2, 5, 3), torch.full((3,), 0.5, dtype=torch.float64), torch.tensor(1.5, dtype=torch.float64)
    assert torch.autograd.gradcheck(value, [part.requires_grad_() for part in inputs])


@pytest.mark.parametrize("context", [PenaltyContext(), normal(8)])
@pytest.mark.parametrize("place", [0.0, 1000.0])
def test_float32_keeps_its_digits(context, place):
    codes = (rows(50, 8, dtype=torch.float32) * 64).round() / 64 + place
    prior = (rows(60, 8, dtype=torch.float32) * 64).round() / 64 + place
    values, gradients = [], []
    for dtype in (torch.float32, torch.float64):
        x = codes.to(dtype).requires_grad_()
        values.append(CramerWold()(x, prior.to(dtype), context))
        assert values[-1].dtype == dtype
        gradients.append(torch.autograd.grad(values[-1], x)[0].double())
    torch.testing.assert_close(values[0].double(), values[1], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-12)


# gamma


def test_gamma_follows_silvermans_rule_on_the_priors_scale():
    codes, prior = rows(3, 20, 2), 2 * rows(30, 2)
    rule = (4 / (3 * 20)) ** (2 / 5)
    variance = prior.numpy().var(0, ddof=1).mean()
    torch.testing.assert_close(CramerWold()(codes, prior), CramerWold(rule * variance)(codes, prior))
    context = normal(2, 0.0, 2.0)
    torch.testing.assert_close(CramerWold()(codes, prior, context), CramerWold(rule * 4)(codes, prior, context))


# Errors


def test_one_dimension_is_refused_and_the_line_to_write_is_the_same():
    codes, prior, gamma = rows(20, 1), rows(30, 1), 0.3
    with pytest.raises(ValueError, match=r"d >= 2 numbers, found codes of d = 1\. Write MMD\(Gaussian\(bandwidth="):
        CramerWold(gamma)(codes, prior)
    instead = MMD(Gaussian(bandwidth=math.sqrt(2 * gamma)), unbiased=False)(codes, prior)
    t = np.linspace(-12, 12, 600)
    expected = mean_squared_difference(*(smoothed(z.ravel().numpy(), gamma, t) for z in (codes, prior)), t)
    assert instead.item() / (2 * math.sqrt(math.pi * gamma)) == pytest.approx(expected, rel=1e-9)


def test_a_prior_without_a_spread_is_named():
    with pytest.raises(ValueError, match=r"prior's mean variance, found 0\. Give it, as in CramerWold\(gamma=0\.1\)"):
        CramerWold()(rows(20, 2), torch.zeros(30, 2).double())
