"""The classifier test: a guess where codes are draws of the prior, more where they are not."""

from __future__ import annotations

import dataclasses
import math

import pyro.distributions as dist
import pytest
import torch

from pyro_wae.diagnostics import classifier, classifier_test

NORMAL = dist.Normal(torch.zeros(3), 1.0).to_event(1)


def rejections(runs, n, m, *levels):
    """The share of runs that are rejected, at each level."""
    rejected = torch.zeros(len(levels))
    for run in range(runs):
        generator = torch.Generator().manual_seed(10_000 + run)
        codes, prior = torch.randn(n, 2, generator=generator), torch.randn(m, 2, generator=generator)
        found = classifier_test(codes, prior, steps=10, width=16, seed=run)
        rejected += torch.tensor([dataclasses.replace(found, level=level).rejected for level in levels])
    return (rejected / runs).tolist()


def exact_level(held_out, level):
    """The largest binomial tail that is at most the level: the size of the test where every guess is even."""
    tails = [
        sum(math.comb(held_out, k) for k in range(right, held_out + 1)) / 2**held_out for right in range(held_out + 1)
    ]
    return max(tail for tail in tails if tail <= level)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "m"), [(100, 100), (100, 250)])
def test_size_is_at_most_the_level_under_the_null(n, m):
    # Null: codes are draws of the prior, 400 runs. The size is at most that of even guesses, and not half of it;
    # 3.5 binomial standard deviations are allowed (0.05: 0.037, 0.5: 0.087).
    for level, share in zip((0.05, 0.5), rejections(400, n, m, 0.05, 0.5), strict=True):
        size = exact_level(100, level)
        allowed = 3.5 * math.sqrt(size * (1 - size) / 400)
        assert size / 2 - allowed < share < size + allowed


def test_judging_the_rows_it_learnt_from_is_seen_in_the_size(monkeypatch):
    # Null as above, 20 runs. A net that knows its rows by heart guesses the others (more than 4 rejections come by
    # chance once in 400), and is right on every row of its own.
    monkeypatch.setattr(
        classifier, "_trained", lambda codes, draws, **_: ByHeart(torch.cat([codes, draws]), len(codes))
    )
    assert rejections(20, 100, 100, 0.05)[0] <= 4 / 20
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n).remainder(n // 2))
    assert rejections(5, 100, 100, 0.05) == [1]


class ByHeart(torch.nn.Module):
    """Says of a row what the nearest of the rows that it learnt was."""

    def __init__(self, rows, codes):
        super().__init__()
        self.rows, self.codes = rows, codes

    def forward(self, x):
        return torch.where(torch.cdist(x, self.rows).argmin(1) < self.codes, 1.0, -1.0)


@pytest.mark.parametrize(
    "codes",
    [
        pytest.param(lambda: torch.randn(600, 3) + 0.7, id="shift"),
        pytest.param(lambda: 1.6 * torch.randn(600, 3), id="scale"),
        pytest.param(lambda: 1e-3 + 1e-3 * torch.randn(600, 3), id="collapse"),
        pytest.param(lambda: torch.cat([torch.randn(600, 2), torch.zeros(600, 1)], 1), id="one-constant"),
    ],
)
def test_codes_off_the_prior_are_told_from_it(codes):
    found = classifier_test(codes(), NORMAL)
    assert found.rejected
    assert found.low > 0.5
    assert found.held_out == 600


def test_accuracy_nears_the_best_that_is_possible():
    # N(2, 1) against N(0, 1): the best classifier cuts at 1 and is right with probability Phi(1) = 0.8413; 4000
    # held-out rows leave a standard deviation of 0.006.
    found = classifier_test(torch.randn(4000, 1) + 2, torch.randn(4000, 1))
    assert found.accuracy == pytest.approx(0.8413, abs=0.025)


def test_any_scale_of_codes_is_as_good():
    codes, prior = torch.randn(300, 2) + 0.8, torch.randn(300, 2)
    one = classifier_test(codes, prior)
    other = classifier_test(1024 * codes, 1024 * prior)
    assert other.accuracy == pytest.approx(one.accuracy, abs=0.02)


@pytest.mark.parametrize(("right", "trials"), [(0, 7), (4, 7), (7, 7), (60, 100), (540, 1000)])
def test_p_value_is_the_binomial_tail_in_whole_numbers(right, trials):
    exact = sum(math.comb(trials, k) for k in range(right, trials + 1)) / 2**trials
    assert classifier._binomial_tail(right, trials) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize(("right", "trials"), [(0, 20), (13, 20), (20, 20), (540, 1000)])
def test_interval_is_where_the_score_test_does_not_reject(right, trials):
    # Wilson's ends are the p with (share - p)^2 = z^2 p (1 - p) / trials, z = 1.959963984540054 at 95 percent.
    for p in classifier._wilson(right, trials, 0.05):
        assert 0 <= p <= 1
        assert (right / trials - p) ** 2 == pytest.approx(1.959963984540054**2 * p * (1 - p) / trials, abs=1e-9)
    low, high = classifier._wilson(right, trials, 0.05)
    assert low <= right / trials <= high


def test_unequal_numbers_leave_a_guess_at_one_half():
    # A net that always says "prior" would be right on 91 percent of all rows.
    found = classifier_test(torch.zeros(100, 2), torch.zeros(1000, 2))
    assert found.accuracy == 0.5
    assert found.held_out == 100
    assert not found.rejected


def test_net_learns_from_equal_numbers_too():
    # N(2, 1) against N(0, 1) as above: the best is 0.84, with a standard deviation of 0.037 for 100 held-out rows. A
    # net that had seen 20 draws for each code would call most codes draws and be right on 0.62.
    assert classifier_test(torch.randn(100, 1) + 2, torch.randn(2000, 1)).accuracy > 0.73


def test_another_default_device_changes_nothing():
    rows = torch.randn(40, 2), torch.randn(40, 2)
    expected = classifier_test(*rows, width=4, steps=2)
    with torch.device("meta"):
        assert classifier_test(*rows, width=4, steps=2) == expected


def test_another_default_dtype_changes_nothing():
    rows, default = torch.randn(2, 200, 2, dtype=torch.float32), torch.get_default_dtype()
    found = []
    try:
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            found.append(classifier_test(*rows, width=16, steps=10))
    finally:
        torch.set_default_dtype(default)
    assert found[0] == found[1]


def test_too_few_rows_are_named():
    rows = torch.zeros(20, 3)
    with pytest.raises(ValueError, match=r"leave 4 held-out rows.*Give 6 of each"):
        classifier_test(rows[:4], rows)
    assert classifier_test(rows[:6], rows).held_out == 6


@pytest.mark.parametrize(("factor", "shift"), [(1e60, 0.0), (1e-60, 0.0), (1.0, 1e9)])
def test_rows_of_float64_are_put_into_units_before_they_are_cast_down(factor, shift):
    torch.manual_seed(0)
    codes, prior = (spread * torch.randn(400, 2, dtype=torch.float64) for spread in (3.0, 1.0))
    assert classifier_test(factor * codes + shift, factor * prior + shift).p_value < 1e-10
