"""Two-sample tests of codes against the prior: right size, right formula, power where there is a difference."""

from __future__ import annotations

import itertools
import math

import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.gp.kernels import RBF
from references import KERNELS, distances, half_mean_square

from pyro_wae.diagnostics import two_sample, two_sample_test
from pyro_wae.kernels import Gaussian, Laplace

NORMAL = dist.Normal(torch.zeros(3), 1.0).to_event(1)
ROWS = torch.randn(40, 3, generator=torch.Generator().manual_seed(5))


def direct_mmd(gram, codes):
    """The unbiased MMD by loops over the pairs of a kernel matrix, where the rows in ``codes`` are the codes."""
    rest = [i for i in range(len(gram)) if i not in codes]

    def mean(pairs):
        values = [gram[i, j].item() for i, j in pairs]
        return math.fsum(values) / len(values)

    within = [mean(itertools.permutations(rows, 2)) for rows in (codes, rest)]
    return sum(within) - 2 * mean(itertools.product(codes, rest))


def null_p_values(test, runs, n=60, d=3):
    """p-values of codes that are draws of the prior; the draws' seeds and the tests' seeds are the run's number."""
    found = []
    for run in range(runs):
        generator = torch.Generator().manual_seed(10_000 + run)
        found.append(test(torch.randn(n, d, generator=generator), generator, run).p_value)
    return torch.tensor(found)


def is_uniform(p_values, levels=(0.05, 0.1, 0.5), deviations=3.5):
    """Whether the share of p-values up to each level is the level within so many binomial standard deviations."""
    runs = len(p_values)
    return all(
        abs((p_values <= level + 1e-9).double().mean() - level) < deviations * math.sqrt(level * (1 - level) / runs)
        for level in levels
    )


def aggregated(codes, generator, seed):
    # 40 prior draws for 60 codes, so that nothing leans on equal sizes.
    prior = torch.randn(len(codes) - 20, codes.shape[1], generator=generator)
    return two_sample_test(codes, prior, permutations=99, seed=seed)


def single(codes, generator, seed):
    return two_sample_test(codes, NORMAL, kernel=Gaussian(), permutations=99, seed=seed)


@pytest.mark.parametrize("name", list(KERNELS))
def test_statistic_is_the_unbiased_mmd_in_float64_by_direct_differences(name, monkeypatch):
    # Blocks of two rows, so that the sums over blocks are tested too.
    monkeypatch.setattr(two_sample, "BLOCK_NUMBERS", 40)
    make, formula = KERNELS[name]
    codes, prior = 1.5 * torch.randn(9, 3) + 100, torch.randn(11, 3) + 100
    pooled = torch.cat([codes, prior])
    gram = formula(distances(pooled, pooled), half_mean_square(pooled))
    found = two_sample_test(codes, prior, kernel=make())
    assert found.statistic == pytest.approx(direct_mmd(gram, range(9)), rel=1e-7)
    assert (found.n, found.m, found.aggregate) == (9, 11, False)


def test_every_permutation_has_the_statistic_of_its_own_rows(monkeypatch):
    monkeypatch.setattr(two_sample, "BLOCK_NUMBERS", 40)
    rows = torch.randn(12, 2, dtype=torch.float64)
    members = two_sample._memberships(5, 7, 20, torch.Generator().manual_seed(0))
    assert torch.equal(members.sum(0), torch.full((21,), 5.0))
    assert torch.equal(members[:, 0], torch.tensor([1.0] * 5 + [0.0] * 7))
    assert len({tuple(column.tolist()) for column in members.T}) > 15
    found, _ = two_sample._permuted_mmd(Laplace(0.7), rows, members, 5)
    gram = torch.exp(-distances(rows, rows) / 0.7)
    expected = [direct_mmd(gram, column.nonzero()[:, 0].tolist()) for column in members.T]
    assert found.tolist() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_deviation_is_that_over_all_choices_of_rows(n):
    rows = torch.randn(7, 2, dtype=torch.float64)
    gram = torch.exp(-distances(rows, rows).square() / 2)
    values = torch.tensor([direct_mmd(gram, chosen) for chosen in itertools.combinations(range(7), n)])
    _, deviation = two_sample._permuted_mmd(Gaussian(1.0), rows, torch.ones(7, 1), n)
    assert values.mean().item() == pytest.approx(0, abs=1e-8)
    assert deviation == pytest.approx(values.std(correction=0).item(), rel=1e-6)


def test_p_value_is_the_share_of_choices_of_rows_with_so_large_a_statistic():
    # 8 choose 4 = 70 choices, all told; 9999 random ones give a share within 4 sqrt(p (1 - p) / 9999) of it.
    codes, prior = torch.randn(4, 2), torch.randn(4, 2) + 0.7
    pooled = torch.cat([codes, prior])
    gram = torch.exp(-distances(pooled, pooled).square() / 2)
    values = [direct_mmd(gram, chosen) for chosen in itertools.combinations(range(8), 4)]
    exact = sum(value >= values[0] - 1e-12 for value in values) / 70
    found = two_sample_test(codes, prior, kernel=Gaussian(1.0), permutations=9999).p_value
    assert 0.05 < exact < 0.95
    assert abs(found - exact) < 4 * math.sqrt(exact * (1 - exact) / 9999)


@pytest.mark.slow
@pytest.mark.parametrize("test", [aggregated, single], ids=["aggregated", "single"])
def test_p_values_are_uniform_under_the_null(test):
    # Null: codes are draws of the prior, 1000 runs. The shares at 0.05, 0.1 and 0.5 are exact, up to 3.5 binomial
    # standard deviations (0.024, 0.033, 0.055), which are missed once in 700 sets of seeds.
    assert is_uniform(null_p_values(test, 1000))


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(lambda members, n: members[:, :1].expand_as(members), id="no-permutation"),
        pytest.param(lambda members, n: torch.cat([members[:, :1], members[:, 1:].roll(0).sort(0)[0]], 1), id="one"),
        pytest.param(
            lambda members, n: torch.where(torch.arange(len(members))[:, None] < n // 2, members[:, :1], members),
            id="half-of-the-codes-stay",
        ),
    ],
)
def test_broken_permutations_are_seen_in_the_size(broken, monkeypatch):
    # The check of the test above, at 100 runs, passes the permutations as they are and fails broken ones.
    assert is_uniform(null_p_values(single, 100))
    memberships = two_sample._memberships
    monkeypatch.setattr(two_sample, "_memberships", lambda n, *rest: broken(memberships(n, *rest), n))
    assert not is_uniform(null_p_values(single, 100))


def test_no_length_tells_codes_from_prior_draws():
    # Lengths from one of the two sets alone would differ when the sets change places.
    codes, prior = 3 * torch.randn(50, 2), torch.randn(40, 2)
    one, other = two_sample_test(codes, prior), two_sample_test(prior, codes)
    lengths = [two_sample._lengths(torch.cat(pair), torch.Generator()) for pair in ((codes, prior), (prior, codes))]
    assert lengths[0] == lengths[1]
    assert one.kernel == other.kernel
    for kernel in (Gaussian(), None):
        one, other = (
            two_sample_test(*pair, kernel=kernel, aggregate=False) for pair in ((codes, prior), (prior, codes))
        )
        assert one.statistic == pytest.approx(other.statistic, rel=1e-9)


def test_length_of_a_distribution_is_not_from_the_tested_draws():
    # The statistic of the tested draws with a length of their own would be the one that is found.
    drawn = []

    class Recorded:
        def sample(self, shape):
            drawn.append(torch.randn(*shape, 3))
            return drawn[-1]

    codes = torch.randn(30, 3)
    found = two_sample_test(codes, Recorded(), kernel=Gaussian())
    tested, others = drawn
    assert not torch.equal(tested, others)
    kernel = Gaussian()
    kernel.fit(others)
    expected = two_sample_test(codes, tested, kernel=kernel)
    assert found.statistic == pytest.approx(expected.statistic, rel=1e-9)


def test_lengths_span_the_distances_of_the_pooled_rows():
    rows = torch.randn(300, 4)
    r = distances(rows, rows)[tuple(torch.triu_indices(300, 300, 1))]
    lengths = two_sample._lengths(rows, torch.Generator())
    assert len(lengths) == 10
    assert lengths[0] == pytest.approx(r.quantile(0.05).item() / 2, rel=5e-3)
    assert lengths[-1] == pytest.approx(2 * r.quantile(0.95).item(), rel=5e-3)
    assert [b / a for a, b in itertools.pairwise(lengths)] == pytest.approx(
        [(lengths[-1] / lengths[0]) ** (1 / 9)] * 9, rel=0.02
    )


def test_change_of_scale_by_a_tenth_is_seen_at_a_thousand_codes():
    # The unbiased MMD is then some ten null deviations: power 1 in the benchmark.
    found = two_sample_test(1.1 * torch.randn(1000, 8), dist.Normal(torch.zeros(8), 1.0).to_event(1), permutations=19)
    assert found.rejected
    assert found.p_value == 0.05
    assert found.standardized > 5


def test_coarse_lengths_find_what_the_finest_misses():
    codes, prior = torch.randn(150, 1) + 0.5, torch.randn(150, 1)
    finest = two_sample._lengths(torch.cat([codes, prior]), torch.Generator())[0]
    assert two_sample_test(codes, prior).rejected
    assert not two_sample_test(codes, prior, kernel=Gaussian(finest)).rejected


def test_finest_length_finds_what_a_coarse_kernel_misses():
    # Codes on a grid of step 0.2: the same law at a coarse look, another at a fine one.
    codes, prior = (torch.randn(400, 1) / 0.2).round() * 0.2, torch.randn(400, 1)
    assert two_sample_test(codes, prior).rejected
    assert not two_sample_test(codes, prior, kernel=Gaussian(1.0)).rejected


def test_tied_statistics_count_as_large_in_spite_of_rounding():
    # One of five rows is at 0 in either set. Every choice that keeps the two apart, 5 of 9, ties with what was found;
    # the other puts them into one set and has more. So the p-value is 1, but for a rounding of the ties.
    rows = torch.tensor([0.0, 0.1, 0.1, 0.1, 0.1])[:, None]
    assert two_sample_test(rows, rows.clone(), permutations=199).p_value == 1


@pytest.mark.parametrize("aggregate", [True, False])
def test_equal_constants_are_not_told_apart_and_others_are(aggregate):
    same = two_sample_test(torch.ones(20, 3), torch.ones(30, 3), kernel=None if aggregate else Gaussian(1.0))
    assert (same.p_value, same.standardized, same.rejected) == (1.0, 0.0, False)
    assert same.statistic == pytest.approx(0, abs=1e-12)
    assert two_sample_test(torch.ones(20, 3), torch.zeros(30, 3), kernel=None if aggregate else Gaussian(1.0)).rejected


@pytest.mark.parametrize("n", [7, 20, 33])
def test_constant_kernel_sees_nothing_in_spite_of_rounding(n):
    def constant(x, y):
        return torch.full((len(x), len(y)), 0.1, dtype=torch.float64)

    found = two_sample_test(torch.randn(n, 2) + 5, torch.randn(30, 2), kernel=constant)
    assert (found.p_value, found.standardized) == (1.0, 0.0)


def test_draws_and_permutations_are_not_those_of_the_scripts_own_seed():
    # torch.manual_seed(0) before the codes and seed=0 in the test: the draws must be others than the codes.
    torch.manual_seed(0)
    codes = torch.randn(40, 3)
    found = two_sample_test(codes, NORMAL, kernel=Gaussian(1.0), seed=0)
    expected = two_sample_test(codes, codes.clone(), kernel=Gaussian(1.0))
    assert found.statistic != pytest.approx(expected.statistic, abs=1e-6)
    generator, _ = two_sample.new_generator(0)
    assert not torch.equal(
        torch.rand(5, generator=generator), torch.rand(5, generator=torch.Generator().manual_seed(0))
    )


@pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(lambda x, y: torch.exp(-(x[:, None] - y).square().sum(-1) / 2), id="function"),
        pytest.param(RBF(3, lengthscale=torch.tensor(1.0)), id="pyro"),
    ],
)
def test_kernel_may_be_a_function_or_pyros(kernel):
    codes, prior = torch.randn(50, 3) + 0.3, torch.randn(50, 3)
    found, expected = (two_sample_test(codes, prior, kernel=k) for k in (kernel, Gaussian(1.0)))
    assert found.statistic == pytest.approx(expected.statistic, abs=1e-6)
    assert found.p_value == pytest.approx(expected.p_value, abs=0.01)
    assert not isinstance(kernel, torch.nn.Module) or all(p.requires_grad for p in kernel.parameters())


@pytest.mark.parametrize("kernel", [None, Gaussian()], ids=["aggregated", "gaussian"])
def test_a_kernel_is_left_as_it_was(kernel):
    first = two_sample_test(ROWS, NORMAL, kernel=kernel, seed=3)
    assert two_sample_test(ROWS, NORMAL, kernel=kernel, seed=3) == first
    assert kernel is None or not kernel.is_set


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (20, {"permutations": 10}, "never reject.*=19 or more"),
        (3, {}, r"3 codes and 3 prior .*below 0.1 .*Give more"),
        (20, {"kernel": lambda x, y: torch.full((len(x), len(y)), math.nan)}, r"gave a NaN.*kernel\(codes, prior\)"),
    ],
    ids=["permutations", "rows", "kernel"],
)
def test_what_can_never_reject_is_named(rows, options, message):
    with pytest.raises(ValueError, match=message):
        two_sample_test(ROWS[:rows], ROWS[:rows], **options)
