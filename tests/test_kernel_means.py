"""Means of kernels against priors in closed form, against quadrature and Monte Carlo, and their registry."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.stats
import torch
from references import mean_is_zero, program, rows

from pyro_wae import WAELoss
from pyro_wae.kernels import Energy, Gaussian, InverseMultiquadratic, Laplace, Matern, MultiScale, RationalQuadratic
from pyro_wae.penalties import MMD, kernel_mean, kernel_means, register_kernel_mean


@pytest.fixture
def registry(monkeypatch):
    """Lets a test register what it likes and takes it back."""
    monkeypatch.setattr(kernel_means, "_REGISTRY", dict(kernel_means._REGISTRY))


# Each kernel beside its value at a squared distance, written once more.
KERNELS = {
    "gaussian": (lambda: Gaussian(0.8), lambda r: np.exp(-r / (2 * 0.8**2))),
    "imq": (lambda: InverseMultiquadratic(1.5**0.5), lambda r: 1.5 / (1.5 + r)),
    "authors": (
        lambda: InverseMultiquadratic.multiscale(4.0**0.5),
        lambda r: sum(4 * c / (4 * c + r) for c in (0.1, 0.2, 0.5, 1, 2, 5, 10)),
    ),
    "multiscale": (lambda: MultiScale(Gaussian(1.0), (0.5, 3.0)), lambda r: np.exp(-r) + np.exp(-r / 6)),
    "sum": (
        lambda: Gaussian(0.5) + 0.3 * InverseMultiquadratic(2.0**0.5),
        lambda r: np.exp(-r / 0.5) + 0.3 * 2 / (2 + r),
    ),
    "multiple": (lambda: 2.5 * (Gaussian(1.0) + Gaussian(2.0)), lambda r: 2.5 * (np.exp(-r / 2) + np.exp(-r / 8))),
}
# Weights, means and standard deviations in one dimension.
LAWS = {
    "standard": ([1.0], [0.0], [1.0]),
    "normal": ([1.0], [0.7], [1.7]),
    "narrow": ([1.0], [-2.0], [0.2]),
    "mixture": ([0.3, 0.7], [-3.0, 1.0], [0.5, 1.2]),
}

every_kernel = pytest.mark.parametrize("name", KERNELS)


def known(name, prior):
    return kernel_mean(KERNELS[name][0](), prior)


def on_a_line(weights, locs, scales, dtype=torch.float64):
    weights, locs, scales = (torch.tensor(values, dtype=dtype) for values in (weights, locs, scales))
    if len(weights) == 1:
        return dist.Normal(locs, scales).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(locs[:, None], scales[:, None]).to_event(1))


def density(law, x):
    return sum(
        w * np.exp(-(((x - loc) / scale) ** 2) / 2) / (scale * math.sqrt(2 * math.pi))
        for w, loc, scale in zip(*LAWS[law], strict=True)
    )


def grid(law):
    """Points and trapezoidal weights of the law; the rule is exact to rounding for densities this smooth."""
    _, locs, scales = LAWS[law]
    x = np.arange(
        min(m - 10 * s for m, s in zip(locs, scales, strict=True)),
        max(m + 10 * s for m, s in zip(locs, scales, strict=True)),
        min(0.02, min(scales) / 20),
    )
    return x, density(law, x) * (x[1] - x[0])


# On a line, against quadrature


def matern(two_nu, r):
    t = np.sqrt(two_nu * r) / 0.8
    return {1: 1, 3: 1 + t, 5: 1 + t + t**2 / 3}[two_nu] * np.exp(-t)


NOT_SMOOTH = {
    "laplace": (lambda: Laplace(0.8), lambda r: matern(1, r)),
    "matern 1/2": (lambda: Matern(0.5, 0.8), lambda r: matern(1, r)),
    "matern 3/2": (lambda: Matern(1.5, 0.8), lambda r: matern(3, r)),
    "matern 5/2": (lambda: Matern(2.5, 0.8), lambda r: matern(5, r)),
    "four lengths": (
        lambda: Laplace.multiscale(2.0),
        lambda r: sum(np.exp(-np.sqrt(r) / length) for length in (0.1, 0.3, 1.0, 10.0)),
    ),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float64) for name in KERNELS | NOT_SMOOTH] + [(name, torch.float32) for name in NOT_SMOOTH],
)
@pytest.mark.parametrize("law", LAWS)
def test_the_mean_at_a_point_is_the_integral_over_the_prior(name, dtype, law):
    make, k = (KERNELS | NOT_SMOOTH)[name]
    points, (p, weights) = [-4.0, 0.0, 0.9, 7.0], grid(law)
    locs = LAWS[law][1]
    expected = [
        scipy.integrate.quad(
            lambda y, x=x: k((x - y) ** 2) * density(law, y),
            *(p[0], p[-1]),
            points=sorted({x, *locs, *(loc + h for h in (-0.3, 0.3) for loc in locs)}),
            epsabs=1e-12,
            limit=500,
        )[0]
        for x in points
    ]
    actual = kernel_mean(make(), on_a_line(*LAWS[law], dtype=dtype)).at(torch.tensor(points, dtype=dtype)[:, None])
    if name in KERNELS:
        # The multiquadratic's own quadrature leaves out a mass of e^-22 for each scale.
        np.testing.assert_allclose(actual, expected, rtol=1e-8, atol=3e-9)
        np.testing.assert_allclose([(k((x - p) ** 2) * weights).sum() for x in points], expected, rtol=1e-9)
    else:
        # The quadrature of a kernel with a kink leaves out a mass of e^-17.
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=3e-7 if dtype == torch.float32 else 5e-8)


@pytest.mark.parametrize("name", NOT_SMOOTH)
@pytest.mark.parametrize("d", [2, 8, 64])
def test_the_norm_of_a_kernel_with_a_kink_is_an_integral_over_distances(name, d):
    # The squared distance of two draws of N(0, 1.3^2 I) over 2 * 1.3^2 has a chi-squared distribution.
    make, k = NOT_SMOOTH[name]
    law = scipy.stats.chi2(d)
    expected = scipy.integrate.quad(lambda u: k(2 * 1.69 * u) * law.pdf(u), 0, law.ppf(1 - 1e-14), limit=500)[0]
    prior = dist.Normal(torch.zeros(d, dtype=torch.float64), 1.3).to_event(1)
    assert kernel_mean(make(), prior).norm().item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@every_kernel
@pytest.mark.parametrize("law", LAWS)
def test_the_norm_is_the_double_integral_over_the_prior_and_so_is_the_centred_square_where_it_is_known(name, law):
    (p, weights), found = grid(law), known(name, on_a_line(*LAWS[law]))
    gram = KERNELS[name][1]((p[:, None] - p) ** 2)
    means = gram @ weights
    assert found.norm().item() == pytest.approx(weights @ means, rel=1e-8)
    if law == "mixture":
        assert found.centred_square() is None
    else:
        expected = weights @ (gram - means[:, None] - means + weights @ means) ** 2 @ weights
        assert found.centred_square().item() == pytest.approx(expected, rel=1e-7)


# In many dimensions

LOCS = np.array([0.3, -1.0, 0.0, 2.0])
SCALES = np.array([0.4, 1.0, 2.0, 1.3])


def diagonal_normal(locs=LOCS, scales=SCALES):
    return dist.Normal(torch.tensor(locs), torch.tensor(scales)).to_event(1)


def test_a_gaussian_kernel_has_the_product_of_its_means_in_each_dimension():
    s, x = 0.9, rows(5, 4).numpy()
    at, norm, squares, crossed = np.ones(5), 1.0, 1.0, 1.0
    for j in range(4):
        p = np.arange(LOCS[j] - 10 * SCALES[j], LOCS[j] + 10 * SCALES[j], SCALES[j] / 40)
        weights = scipy.stats.norm(LOCS[j], SCALES[j]).pdf(p) * (p[1] - p[0])
        gram = np.exp(-((p[:, None] - p) ** 2) / (2 * s**2))
        at = at * (np.exp(-((x[:, j, None] - p) ** 2) / (2 * s**2)) @ weights)
        norm = norm * (weights @ gram @ weights)
        squares = squares * (weights @ gram**2 @ weights)
        crossed = crossed * (weights @ (gram @ weights) ** 2)
    means = kernel_mean(Gaussian(s), diagonal_normal())
    np.testing.assert_allclose(means.at(torch.tensor(x)), at, rtol=1e-10)
    assert means.norm().item() == pytest.approx(norm, rel=1e-10)
    assert means.centred_square().item() == pytest.approx(squares - 2 * crossed + norm**2, rel=1e-9)


def noncentral_mean(freedom, square, scale):
    """E C / (C + R), R of the noncentral chi-squared law of |x - p|^2 for p ~ N(0, I) and |x|^2 = square."""
    law = scipy.stats.ncx2(freedom, square) if square else scipy.stats.chi2(freedom)
    middle, spread = law.mean(), law.std()
    edges = sorted({0.0, *(max(0.0, middle + i * spread) for i in (-12, -6, -3, -1, 0, 1, 3, 6, 12, 30))})
    return sum(
        scipy.integrate.quad(lambda r: scale / (scale + r) * law.pdf(r), *piece, epsabs=0, epsrel=1e-11)[0]
        for piece in itertools.pairwise(edges)
    )


@pytest.mark.parametrize("d", [2, 8, 64])
@pytest.mark.parametrize("factor", [0.1, 1.0, 10.0])
def test_the_multiquadratic_is_right_near_and_far_from_the_prior(d, factor):
    """Up to |x|^2 = 100 d and beyond; at these distances few quadrature nodes would see nothing."""
    scale = 2 * d * factor
    means = kernel_mean(InverseMultiquadratic(scale**0.5), diagonal_normal(np.zeros(d), np.ones(d)))
    squares = np.array([0.0, 0.5 * d, 4.0 * d, 100.0 * d, 1000.0 * d])
    x = torch.zeros(5, d, dtype=torch.float64)
    x[:, 0] = torch.tensor(squares).sqrt() * 0.6
    x[:, 1] = torch.tensor(squares).sqrt() * -0.8
    expected = [noncentral_mean(d, square, scale) for square in squares]
    np.testing.assert_allclose(means.at(x), expected, rtol=1e-5 if d < 64 else 2e-5)
    np.testing.assert_allclose(means.at(x)[:3], expected[:3], rtol=1e-8)


@pytest.mark.parametrize("d", [2, 8])
def test_the_multiquadratics_gradient_is_that_of_the_noncentral_law(d):
    """d/dx E f(R) = x (E f(R'') - E f(R)) with R'' of two more degrees of freedom than R, noncentrality |x|^2."""
    x = rows(4, d).mul(torch.tensor([0.3, 1.0, 3.0, 10.0]).double()[:, None]).requires_grad_()
    kernel_mean(InverseMultiquadratic((1.0 * d) ** 0.5), diagonal_normal(np.zeros(d), np.ones(d))).at(
        x
    ).sum().backward()
    for row, gradient in zip(x.detach(), x.grad, strict=True):
        square = row.square().sum().item()
        slope = noncentral_mean(d + 2, square, 1.0 * d) - noncentral_mean(d, square, 1.0 * d)
        torch.testing.assert_close(gradient, row * slope, rtol=1e-5, atol=1e-12)


def many_dimensions(kind):
    if kind == "diagonal":
        return diagonal_normal()
    locs = torch.tensor([[0.0, -2.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, -3.0]], dtype=torch.float64)
    components = dist.Normal(locs, torch.tensor([[0.3, 1.0, 2.0, 1.0], [1.0] * 4, [0.5] * 4])).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)), components)


def of_squares(k, x, y):
    return torch.from_numpy(k((x - y).square().sum(1).numpy()))


@every_kernel
@pytest.mark.parametrize("kind", ["diagonal", "mixture"])
def test_the_means_agree_with_monte_carlo(name, kind):
    """Size: 40,000 draws, 4 standard errors, missed by chance once in 16,000; seed 0."""
    prior, k = many_dimensions(kind), KERNELS[name][1]
    means = known(name, prior)
    p, other = prior.sample((40_000,)).double(), prior.sample((40_000,)).double()
    for x in (rows(1, 4), 0.5 * rows(1, 4)):
        assert mean_is_zero(of_squares(k, x, p) - means.at(x), standard_errors=4)
    pairs = of_squares(k, p, other)
    assert mean_is_zero(pairs - means.norm(), standard_errors=4)
    assert not mean_is_zero(pairs - 1.2 * means.norm(), standard_errors=4)
    square = means.centred_square()
    if kind == "diagonal":
        centred = pairs - means.at(p) - means.at(other) + means.norm()
        assert mean_is_zero(centred**2 - square, standard_errors=4)


def test_float32_priors_and_codes_are_computed_in_float64():
    prior = dist.Normal(torch.tensor(LOCS).float(), torch.tensor(SCALES).float()).to_event(1)
    x = rows(5, 4).float()
    actual = known("authors", prior).at(x)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, known("authors", diagonal_normal()).at(x.double()), rtol=1e-6, atol=0)


# The registry


class Narrower(Gaussian):
    pass


class Shifted(dist.Normal):
    pass


class Known:
    """Means that are told apart by their number."""

    def __init__(self, value):
        self.value = torch.tensor(value, dtype=torch.float64)

    def at(self, x):
        return self.value.expand(len(x)) + 0 * x.sum(1)

    def norm(self):
        return 3 * self.value

    def centred_square(self):
        return None


def test_the_most_specific_pair_wins_and_of_one_pair_the_later(registry):
    for value, types in enumerate([(Gaussian, Shifted), (Narrower, Shifted), (Narrower, dist.Normal)]):
        register_kernel_mean(*types)(lambda kernel, prior, value=value: Known(float(value)))
    normal, shifted = (cls(torch.zeros(2), torch.ones(2)).to_event(1) for cls in (dist.Normal, Shifted))
    assert kernel_mean(Gaussian(1.0), shifted).value == 0
    assert kernel_mean(Narrower(1.0), shifted).value == 1
    assert kernel_mean(Narrower(1.0), normal).value == 2
    assert isinstance(kernel_mean(Gaussian(1.0), normal), kernel_means.NormalMixtureMean)
    for value in (5.0, 6.0):
        register_kernel_mean(Gaussian, dist.Normal)(lambda kernel, prior, value=value: Known(value))
    assert kernel_mean(Gaussian(1.0), normal).value == 6


def test_the_function_is_handed_the_kernel_and_the_prior_and_stays_a_function(registry):
    @register_kernel_mean(Laplace, dist.Laplace)
    def find(kernel, prior):
        seen.append((kernel, prior))

    seen, kernel, prior = [], Laplace(1.0), dist.Laplace(torch.zeros(2), 1.0).to_event(1)
    assert kernel_mean(kernel, prior) is None
    assert seen == [(kernel, prior)]
    assert find(kernel, prior) is None


@pytest.mark.parametrize(
    ("kernel", "prior"),
    [
        (RationalQuadratic(1.5, 1.0), diagonal_normal()),
        (Energy(), diagonal_normal()),
        (Gaussian(1.0) + RationalQuadratic(1.5, 1.0), diagonal_normal()),
        (MultiScale(RationalQuadratic(1.5, 1.0), (1.0, 2.0)), diagonal_normal()),
        (2.0 * RationalQuadratic(1.5, 1.0), diagonal_normal()),
        (Gaussian(1.0) * Gaussian(1.0), diagonal_normal()),
        (Gaussian(1.0), dist.Laplace(torch.zeros(2), 1.0).to_event(1)),
        (Gaussian(1.0), dist.MultivariateNormal(torch.zeros(2), torch.eye(2))),
        (
            Gaussian(1.0),
            dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Laplace(torch.zeros(2, 3), 1.0).to_event(1)),
        ),
        # A scalar, a batch, a matrix, and a mixture for each coordinate by itself are not the prior of one code.
        (Gaussian(1.0), dist.Normal(0.0, 1.0)),
        (Gaussian(1.0), dist.Normal(torch.zeros(5, 2), 1.0).to_event(1)),
        (Gaussian(1.0), dist.Normal(torch.zeros(5, 2), 1.0).to_event(2)),
        (Gaussian(1.0), dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), 1.0))),
        (
            Gaussian(1.0),
            dist.MixtureSameFamily(dist.Categorical(torch.ones(3, 2)), dist.Normal(torch.zeros(3, 2), 1.0)).to_event(1),
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_known_is_none(kernel, prior):
    assert kernel_mean(kernel, prior) is None


@pytest.mark.parametrize("arguments", [(Gaussian(1.0), dist.Normal), (Gaussian, dist.Normal(0.0, 1.0)), ("k", "p")])
def test_what_is_no_class_is_refused(arguments):
    with pytest.raises(TypeError, match=r"_type must be a class, found .* Write @register_kernel_mean\(Gaussian"):
        register_kernel_mean(*arguments)


def test_a_users_own_means_are_used_by_the_loss(registry):
    register_kernel_mean(Laplace, dist.Normal)(lambda kernel, prior: Known(0.25))
    loss, x = WAELoss(MMD(Laplace(1.0))), rows(12, 2)
    pyro.set_rng_seed(1)
    loss.loss(*program(lambda x: dist.Normal(x, 0.3).to_event(1)), x)
    pyro.set_rng_seed(1)
    z = x + 0.3 * torch.randn(12, 2, dtype=torch.float64)
    gram = (-torch.cdist(z, z)).exp()
    qq = (gram.sum() - gram.diagonal().sum()) / (12 * 11)
    assert loss.terms.penalty.item() == pytest.approx(qq.item() + 0.75 - 0.5, abs=1e-10)
