import functools
import itertools
import math
import os
import subprocess
import sys

import pyro.contrib.gp.kernels as pyro_kernels
import pyro.distributions as dist
import pytest
import torch
from references import KERNELS, LargestTensor, distances, half_mean_square, off_diagonal, rows

from pyro_wae.kernels import (
    Energy,
    Gaussian,
    InverseMultiquadratic,
    Kernel,
    Laplace,
    Matern,
    MultiScale,
    RadialKernel,
    RationalQuadratic,
)
from pyro_wae.kernels.base import SCRATCH
from pyro_wae.kernels.function import as_kernel
from pyro_wae.penalties import MMD, CramerWold, EnergyDistance, KernelStein, PenaltyContext, kernel_mean, pair_sums
from pyro_wae.penalties.null_variance import NullVariance, centred_square

every_kernel = pytest.mark.parametrize("name", KERNELS)


def take_small_blocks(monkeypatch):
    monkeypatch.setattr(pair_sums, "MOST_PAIRS", 0)
    monkeypatch.setattr(pair_sums, "MOST_RADIAL_PAIRS", 0)
    monkeypatch.setattr(pair_sums, "MOST_ROWS_AT_ONCE", 0)
    monkeypatch.setattr(pair_sums, "BLOCK", {"cpu": (7, 10)})


@pytest.fixture
def small_blocks(monkeypatch):
    """Sums by blocks of 7 x 10 pairs, however few rows there are."""
    take_small_blocks(monkeypatch)


@pytest.fixture(params=[False, True], ids=["whole", "by blocks"])
def any_blocks(request, monkeypatch):
    """The whole matrix of pairs at once, or sums by small blocks."""
    if request.param:
        take_small_blocks(monkeypatch)


def mean(name, x, y, h, pairs=None):
    """The mean of the formula over pairs, by direct differences that pass gradients."""
    r = (x[:, None] - y).square().sum(2).clamp(min=1e-300).sqrt()
    values = KERNELS[name][1](r, h)
    return values.mean() if pairs is None else values[pairs].mean()


def gaussian(x, y):
    return (-(x[:, None] - y).square().sum(2) / 2).exp()


def value_and_gradients(function, *arguments):
    arguments = [argument.detach().clone().requires_grad_() for argument in arguments]
    value = function(*arguments)
    return value.detach(), *torch.autograd.grad(value, arguments)


def assert_same(function, expected, *arguments):
    torch.testing.assert_close(
        value_and_gradients(function, *arguments),
        value_and_gradients(expected, *arguments),
        rtol=1e-9,
        atol=1e-12,
    )


# Values and gradients against direct sums


def weighted(name, x, y, h, of_x, of_y, size):
    """The mean over pairs of different data; of one datum pairs of two rows have the share 1/N, where N is known."""
    other = of_x[:, None] != of_y
    same = ~other & off_diagonal(len(x)) if x is y else ~other
    share = 1 / size if size and same.any() else 0
    total = (1 - share) * mean(name, x, y, h, other)
    return total + share * mean(name, x, y, h, same) if share else total


DRAWN = {
    "20 and 20": (1, 20, 20, {}, {}),
    "33 and 14": (1, 33, 14, {}, {}),
    "2 and 30": (1, 2, 30, {}, {}),
    "all pairs": (1, 20, 33, {"unbiased": False}, {}),
    **{f"4 particles, N = {size}": (4, 9, 20, {}, {"data_size": size}) for size in (None, 50)},
    **{
        f"{k} and {j} of shared data, N = {size}": (k, 9, 9 * j, {}, {"shared_data": True, "data_size": size})
        for k, j in ((1, 1), (1, 5), (3, 1), (3, 3))
        for size in (None, 50)
    },
}
"""Particles, data and prior draws, with options of the estimate and what its context says."""


@every_kernel
@pytest.mark.parametrize("drawn", DRAWN)
def test_the_estimate_is_the_direct_sum(name, drawn, any_blocks):
    particles, n, m, options, known = DRAWN[drawn]
    codes, prior, context = 0.5 * rows(particles, n, 3) + 1, rows(m, 3), PenaltyContext(**known)
    h = half_mean_square(prior)
    mmd = MMD(KERNELS[name][0](), **options)
    mmd.kernel.fit(prior)
    of_q = torch.arange(n).repeat(particles)
    of_p = torch.arange(n).repeat(m // n) if context.shared_data else n + torch.arange(m)
    # Pairs of one shared datum enter all three means or none.
    size = None if context.shared_data and min(particles, m // n) == 1 else context.data_size

    def expected(q, p):
        q = q.flatten(0, 1)
        if options:
            return mean(name, q, q, h) + mean(name, p, p, h) - 2 * mean(name, q, p, h)
        sets = (q, q, of_q, of_q), (p, p, of_p, of_p), (q, p, of_q, of_p)
        qq, pp, qp = (weighted(name, x, y, h, of_x, of_y, size) for x, y, of_x, of_y in sets)
        return qq + pp - 2 * qp

    assert_same(functools.partial(mmd, context=context), expected, codes, prior)


@every_kernel
@pytest.mark.parametrize("size", [None, 50])
@pytest.mark.parametrize("particles", [1, 3])
def test_few_rows_of_one_set_at_once_are_the_direct_sum(name, particles, size, monkeypatch):
    monkeypatch.setattr(pair_sums, "MOST_RADIAL_PAIRS", 0)
    codes, prior = 0.5 * rows(particles * 9, 3) + 1, rows(33, 3)
    h, data = half_mean_square(prior), torch.arange(9).repeat(particles)
    kernel = KERNELS[name][0]()
    kernel.fit(prior)
    term = pair_sums.within(len(codes), particles, size)
    assert_same(
        lambda q: pair_sums.pair_total(kernel, (q,), (term,)),
        lambda q: weighted(name, q, q, h, data, data, size),
        codes,
    )


@pytest.mark.parametrize("particles", [1, 3])
def test_closed_forms_by_blocks_are_those_of_the_whole_matrix(particles, monkeypatch):
    mmd, draws = MMD(InverseMultiquadratic.multiscale(6.0**0.5)), rows(40, 3)

    def value(codes, loc, scale):
        return mmd(codes, draws, PenaltyContext(prior=lambda: dist.Normal(loc, scale).to_event(1)))

    loc, scale = torch.tensor([0.3, 0.0, 1.0]).double(), torch.tensor([1.0, 0.5, 2.0]).double()
    inputs = rows(particles, 30, 3) + 1, loc, scale
    whole = value_and_gradients(value, *inputs)
    take_small_blocks(monkeypatch)
    monkeypatch.setattr("pyro_wae.penalties.mmd.MOST_ROWS", 8)
    torch.testing.assert_close(value_and_gradients(value, *inputs), whole, rtol=1e-10, atol=1e-13)


# Every slope


RADIAL = {
    **{name: make for name, (make, _) in KERNELS.items()},
    "triple product": lambda: Gaussian(2.0) * InverseMultiquadratic() * Matern(1.5),
    "scaled sum": lambda: 0.3 * (Laplace() + 2.0 * Energy(1.5)),
    "multiscale of scales": lambda: MultiScale(RationalQuadratic(0.7), (0.5, 2.0)) + MultiScale(Gaussian(), (1.0, 3.0)),
}


@pytest.mark.parametrize("name", RADIAL)
@pytest.mark.parametrize("scratch", [False, True])
def test_slopes_are_those_of_automatic_differentiation(name, scratch):
    kernel = RADIAL[name]()
    kernel.fit(rows(30, 3))
    assert kernel.is_radial
    u = torch.logspace(-6, 6, 40, dtype=torch.float64).view(5, 8)
    work = tuple(torch.full_like(u, math.nan) for _ in range(SCRATCH)) if scratch else None
    values, slopes = kernel.profile_and_slope(u, work)
    expected_values, expected_slopes = Kernel.profile_and_slope(kernel, u)
    torch.testing.assert_close(values, expected_values, rtol=1e-12, atol=1e-300)
    torch.testing.assert_close(slopes, expected_slopes, rtol=1e-11, atol=1e-300)
    torch.testing.assert_close(u, torch.logspace(-6, 6, 40, dtype=torch.float64).view(5, 8), rtol=0, atol=0)


@pytest.mark.parametrize("name", RADIAL)
def test_where_codes_coincide_the_value_is_the_kernels_and_the_slope_finite(name):
    """Also for kernels with a kink, whose slope is infinite there and counts as 0."""
    kernel = RADIAL[name]()
    kernel.fit(rows(30, 3))
    u = torch.tensor([0.0, 1.0], dtype=torch.float64)
    values, slopes = kernel.profile_and_slope(u)
    torch.testing.assert_close(values, kernel.profile(u), rtol=1e-14, atol=1e-70)
    assert slopes.isfinite().all()
    if not kernel.is_smooth and name not in ("sum", "scaled sum"):
        assert slopes[0] == 0


@pytest.mark.parametrize("name", RADIAL)
def test_profiles_are_the_values_of_pairs(name):
    kernel, x, y = RADIAL[name](), rows(5, 3), rows(6, 3)
    kernel.fit(rows(30, 3))
    torch.testing.assert_close(kernel.profile(distances(x, y) ** 2 / kernel.squared_unit(x)), kernel.gram(x, y))


@pytest.mark.parametrize("n", [20, 70])
@pytest.mark.parametrize("kernel", [Gaussian(1.0), Laplace(1.0), InverseMultiquadratic(1.0)])
def test_values_and_gradients_stay_when_codes_and_prior_move_far_away(kernel, n, any_blocks):
    # |x|^2 + |y|^2 - 2 x.y of rows near 2^27 is off by 2^54 eps, about 4, in float64. The shift itself is exact.
    x, y = ((1024 * rows(n, 3)).round() / 1024 for _ in range(2))
    for sets in (x, y), (x,):
        moved = tuple(part + 2.0**27 for part in sets)
        terms = (pair_sums.within(n, 1), -2 * pair_sums.every(n, n, 0, 1))[: len(sets)]
        here, there = (
            value_and_gradients(lambda *parts: pair_sums.pair_total(kernel, parts, terms), *parts)  # noqa: B023
            for parts in (sets, moved)
        )
        torch.testing.assert_close(here, there, rtol=1e-7, atol=1e-9)


# Kernels of users


class Cauchy(RadialKernel):
    """1 / (1 + u)^2, its slope not written out."""

    def __init__(self, bandwidth):
        super().__init__(bandwidth, name="bandwidth")
        self.bandwidth = bandwidth

    def profile(self, u):
        return (1 + u) ** -2


class OverriddenGram(Cauchy):
    """A radial kernel that is more than its profile."""

    def gram(self, x, y):
        return super().gram(x, y) * (1 + x[:, :1]) * (1 + y[:, 0])


class Cubed:
    """Another profile than that of the class beside it."""

    def profile(self, u):
        return (1 + u) ** -3


class CubedMultiquadratic(Cubed, InverseMultiquadratic):
    pass


class Stretched(Gaussian):
    """A Gaussian kernel of other lengths in each dimension."""

    def gram(self, x, y):
        lengths = x.new_tensor([1.0, 3.0, 0.5])
        return super().gram(x / lengths, y / lengths)


def bilinear(x, y):
    return (1 + x @ y.mT) ** 2


def pyro_matern():
    return pyro_kernels.Matern32(3, lengthscale=torch.tensor(1.3).double())


USERS = {
    "slope not written out": lambda: Cauchy(1.5),
    "sum with it": lambda: Cauchy(1.5) + Laplace(1.0),
    "gram overridden": lambda: OverriddenGram(1.5),
    "another profile": lambda: CubedMultiquadratic(1.5),
    "another profile at scales": lambda: MultiScale(CubedMultiquadratic(1.5), (0.5, 2.0)),
    "another gram": lambda: Stretched(1.5),
    "another gram in a sum": lambda: Stretched(1.5) + 2.0 * Stretched(0.5),
    "function": lambda: bilinear,
    "function in a sum": lambda: Gaussian(1.0) + 0.5 * as_kernel(bilinear),
    "pyro": pyro_matern,
}


@pytest.mark.parametrize("name", USERS)
@pytest.mark.parametrize(
    "context", [PenaltyContext(), PenaltyContext(shared_data=True, data_size=40)], ids=["", "shared"]
)
def test_kernels_of_users_by_blocks_are_those_of_the_whole_matrix(name, context, monkeypatch):
    codes, prior = rows(2, 14, 3) + 0.5, rows(28, 3)
    mmd = functools.partial(MMD(USERS[name]()), context=context)
    whole = value_and_gradients(mmd, codes, prior)
    take_small_blocks(monkeypatch)
    torch.testing.assert_close(value_and_gradients(mmd, codes, prior), whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "kernel", [CubedMultiquadratic(1.5), MultiScale(CubedMultiquadratic(1.5), (2.0,)), Stretched(1.5)], ids=repr
)
@pytest.mark.parametrize("compose", [lambda k: k, lambda k: k + k, lambda k: 3.0 * k], ids=["alone", "sum", "multiple"])
def test_a_closed_form_is_not_inherited_by_another_kernel(kernel, compose):
    prior = dist.Normal(torch.zeros(3).double(), 1.0).to_event(1)
    assert kernel_mean(compose(kernel), prior) is None


def test_a_kernel_at_scales_is_one_of_the_distance_alone():
    with pytest.raises(TypeError, match=r"Stretched has a gram of its own.* k1 \+ k2"):
        MultiScale(Stretched(1.5), (1.0,))


def test_a_function_receives_blocks_of_its_own_precision(small_blocks):
    seen = []

    def spy(x, y):
        seen.append((tuple(x.shape), tuple(y.shape), x.dtype))
        return bilinear(x, y)

    MMD(spy)(rows(15, 3, dtype=torch.float32), rows(20, 3, dtype=torch.float32))
    assert {dtype for *_, dtype in seen} == {torch.float32}
    assert max(x[0] * y[0] for x, y, _ in seen) == 70


def test_a_function_with_a_parameter_that_learns_keeps_its_gradient(small_blocks):
    codes, prior = rows(15, 3), rows(20, 3)

    def value(width):
        return MMD(lambda x, y: torch.exp(-(torch.cdist(x, y) ** 2) / width))(codes, prior)

    assert torch.autograd.gradcheck(value, torch.tensor(1.3).double().requires_grad_())


# Graphs


def test_only_what_asks_for_a_gradient_gets_one(small_blocks):
    for q, p in itertools.product((True, False), repeat=2):
        codes, prior = rows(20, 3).requires_grad_(q), rows(20, 3).requires_grad_(p)
        value = MMD(Gaussian(1.0))(codes, prior)
        assert value.requires_grad == (q or p)
        if q or p:
            value.backward()
        assert (codes.grad is not None, prior.grad is not None) == (q, p)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "kernel", [Gaussian(1.0), Cauchy(1.0), OverriddenGram(1.0), InverseMultiquadratic.multiscale(2.0**0.5)], ids=repr
)
def test_without_gradients_the_value_is_the_same(guard, kernel, small_blocks):
    codes, prior = rows(20, 3).requires_grad_(), rows(30, 3)
    expected = MMD(kernel)(codes, prior).detach()
    with guard():
        value = MMD(kernel)(codes, prior)
    assert not value.requires_grad
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    "prior", [None, lambda: dist.Normal(torch.zeros(3).double(), 1.0).to_event(1)], ids=["draws", "closed form"]
)
def test_second_derivatives_are_those_of_the_whole_matrix(prior, small_blocks, monkeypatch):
    monkeypatch.setattr("pyro_wae.penalties.mmd.MOST_ROWS", 3)
    mmd, draws, context = MMD(Gaussian(1.0)), rows(9, 3), PenaltyContext(prior=prior)
    assert torch.autograd.gradgradcheck(lambda q: mmd(q, draws, context), rows(8, 3).requires_grad_())


def test_second_derivatives_count_pairs_of_equal_codes():
    # The formula is of direct differences: rounding makes some squared distances of equal codes negative.
    codes = torch.cat([rows(9, 3)] * 2)
    different = off_diagonal(len(codes))

    def by_hand(q):
        return gaussian(q, q)[different].mean() - 2 * gaussian(q, codes[:9]).mean()

    found = torch.autograd.functional.hessian(lambda q: MMD(Gaussian(1.0))(q, codes[:9]), codes)
    right = torch.autograd.functional.hessian(by_hand, codes)
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)


def test_the_gradient_is_multiplied_by_what_comes_from_above(small_blocks):
    codes, prior = rows(20, 3).requires_grad_(), rows(30, 3)
    (plain,) = torch.autograd.grad(MMD(Gaussian(1.0))(codes, prior), codes)
    (cube,) = torch.autograd.grad(MMD(Gaussian(1.0))(codes, prior) ** 3, codes)
    torch.testing.assert_close(cube, 3 * MMD(Gaussian(1.0))(codes, prior).detach() ** 2 * plain)


@pytest.mark.parametrize(("most", "whole"), [(400, True), (399, False)])
def test_few_pairs_are_taken_at_once(most, whole, monkeypatch):
    monkeypatch.setattr(pair_sums, "MOST_RADIAL_PAIRS", most)
    value = MMD(Gaussian(1.0))(rows(20, 3).requires_grad_(), rows(20, 3))
    names, node = [], [value.grad_fn]
    while node:
        here = node.pop()
        names.append(type(here).__name__)
        node += [above for above, _ in here.next_functions if above is not None]
    assert ("_PairTotalBackward" in names) != whole


# Memory


PENALTIES = {
    **{f"MMD of {name}": lambda name=name: MMD(KERNELS[name][0]()) for name in KERNELS},
    "MMD of a function": lambda: MMD(bilinear),
    "standardised": lambda: MMD(standardize=True),
    "EnergyDistance": EnergyDistance,
    "CramerWold": CramerWold,
    "KernelStein": lambda: KernelStein(Gaussian(1.0), log_prob=lambda z: -z.square().sum(1) / 2),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_no_tensor_is_larger_than_a_block_or_the_codes(name, small_blocks):
    n, d = 80, 3
    codes, prior = rows(n, d).requires_grad_(), rows(n, d)
    PENALTIES[name]()(codes[:2], prior[:4])  # a table is made once
    with LargestTensor() as largest:
        PENALTIES[name]()(codes, prior).backward()
    assert largest.numel <= n * 2 * d  # a code beside its score


@pytest.mark.parametrize("name", ["EnergyDistance", "CramerWold", "KernelStein"])
@pytest.mark.parametrize("particles", [1, 3])
def test_other_penalties_by_blocks_are_those_of_the_whole_matrix(name, particles, monkeypatch):
    penalty, prior = PENALTIES[name](), rows(30, 3)
    codes = rows(particles, 20, 3) + 0.5
    penalty(codes, prior)
    whole = value_and_gradients(lambda q: penalty(q, prior), codes)
    take_small_blocks(monkeypatch)
    torch.testing.assert_close(value_and_gradients(lambda q: penalty(q, prior), codes), whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "kernel", [Gaussian(1.5), as_kernel(bilinear), 2.0 * Energy()], ids=["gaussian", "function", "energy"]
)
def test_the_unit_of_a_standardised_estimate_by_blocks_is_that_of_the_whole_matrix(kernel, small_blocks):
    prior = rows(37, 3)
    torch.testing.assert_close(NullVariance().of_draws(kernel, prior), centred_square(kernel.gram(prior, prior)))


PEAK = """
import resource, sys, torch
from pyro_wae.penalties import MMD
torch.set_num_threads(1)
n = int(sys.argv[1])
codes, prior = torch.randn(n, 64), torch.randn(n, 64)
MMD()(codes[:600].clone().requires_grad_(), prior[:600]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
codes.requires_grad_()
MMD()(codes, prior).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_16384_codes_take_64_mebibytes_at_most():
    finished = subprocess.run(
        [sys.executable, "-c", PEAK, "16384"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr
    assert float(finished.stdout) <= 64


# Compiling


@pytest.mark.slow
def test_a_compiled_kernel_gives_the_same():
    codes, prior = rows(700, 5) + 0.3, rows(800, 5)
    kernel = InverseMultiquadratic.multiscale() + 0.5 * Laplace()
    mmd = MMD(kernel)
    plain = value_and_gradients(mmd, codes, prior)
    kernel.compile_profile()
    assert kernel.compiles
    torch.testing.assert_close(value_and_gradients(mmd, codes, prior), plain, rtol=1e-9, atol=1e-13)


def test_only_a_radial_kernel_compiles():
    with pytest.raises(TypeError, match=r"a kernel of the distance alone, found FunctionKernel"):
        as_kernel(bilinear).compile_profile()
