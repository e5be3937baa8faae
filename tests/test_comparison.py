"""How codes differ from prior draws, on plain rows: moments, direction of largest discrepancy, coverage."""

import math

import pytest
import torch

from pyro_wae.diagnostics.comparison import Yardstick, coverage, moments, worst_direction


def data(n, d=3, seed=1):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_moments_are_those_of_the_formulas():
    prior, second = 2 * data(4000, 2, 1) + 7, 2 * data(4000, 2, 2) + 7
    codes = prior * torch.tensor([0.5, 3.0])
    found = moments(codes, prior, second, Yardstick(torch.tensor([7.0, 7.0]), torch.tensor([2.0, 2.0])))
    assert found.spread == pytest.approx(codes.std(0) / 2, rel=1e-4)
    assert found.mean == pytest.approx((codes.mean(0) - 7) / 2, rel=1e-4)
    # Codes are a linear image of the very prior draws: the variance ratios are the squares of the factors.
    assert found.narrowest == pytest.approx(0.25, rel=1e-3)
    assert found.widest == pytest.approx(9.0, rel=1e-3)
    # The eigenvalues of 4 diag(0.25, 9) and of 4 I, within five standard errors sqrt(2 / n) each.
    assert found.eigenvalue_ratio == pytest.approx(36, rel=10 * math.sqrt(2 / 4000))
    assert found.prior_eigenvalue_ratio == pytest.approx(1, abs=10 * math.sqrt(2 / 4000))


def test_a_ratio_of_variances_ignores_where_the_prior_is_constant():
    flat = torch.tensor([1.0, 0.0])
    found = moments(data(500, 2) * flat, data(500, 2, 2) * flat, data(500, 2, 3) * flat, Yardstick.of_draws(data(9, 2)))
    assert found.narrowest > 0.5
    assert found.eigenvalue_ratio is None


def test_few_rows_say_nothing_of_all_lines():
    found = moments(data(8, 4), data(8, 4, 2), data(8, 4, 3), Yardstick.of_draws(data(8, 4, 3)))
    assert found.narrowest is None
    assert found.widest_null is None


def test_the_yardstick_leaves_constant_coordinates_alone():
    draws = torch.cat([5 * data(1000, 1) + 2, torch.full((1000, 1), 3.0)], 1)
    measured = Yardstick.of_draws(draws).measure(draws)
    assert measured[:, 0].std() == pytest.approx(1, rel=1e-5)
    assert (measured[:, 1].abs() < 1e-5).all()


def test_the_worst_direction_of_a_shift_is_the_shift():
    prior, second = data(1000, 4, 2), data(1000, 4, 3)
    shift = torch.tensor([0.6, 0.0, -0.8, 0.0])
    found = worst_direction(prior + 2 * shift, prior, second, Yardstick(torch.zeros(4), torch.ones(4)), seed=0)
    assert found.weights == pytest.approx(shift.tolist(), abs=0.02)
    assert found.distance == pytest.approx(2, rel=1e-3)
    assert found.distance_null < 0.3


def test_holes_are_the_prior_draws_without_codes():
    prior, second = data(4000, 2, 2), data(4000, 2, 3)
    codes = data(8000, 2, 4)
    codes = codes[codes[:, 0] < 0.5][:4000]
    found, in_hole = coverage(codes, prior, second, Yardstick(torch.zeros(2), torch.ones(2)))
    # Draws beyond the edge by more than the radius, and the one percent expected anywhere.
    beyond = 0.5 * math.erfc((0.5 + found.radius) / math.sqrt(2))
    assert found.holes == pytest.approx(beyond, abs=0.04)
    assert prior[in_hole, 0].median() > 0.5
    assert in_hole.double().mean().item() == found.holes


def test_one_percent_is_far_where_codes_are_prior_draws():
    found, _ = coverage(data(4000, 3), data(4000, 3, 2), data(4000, 3, 3), Yardstick(torch.zeros(3), torch.ones(3)))
    # Five standard errors of a share, of which the radius has as much again.
    error = 5 * math.sqrt(2 * 0.01 * 0.99 / 4000)
    assert found.holes == pytest.approx(0.01, abs=error)
    assert found.stray == pytest.approx(0.01, abs=error)
    assert found.outliers == ()


def test_outliers_are_named():
    codes = data(500, 3)
    codes[[17, 400]] = torch.tensor([30.0, 0.0, 0.0])
    found, _ = coverage(codes, data(500, 3, 2), data(500, 3, 3), Yardstick(torch.zeros(3), torch.ones(3)))
    assert found.outliers == (17, 400)


def test_repeated_rows_leave_no_holes_and_no_strays():
    # Codes and both sets of prior samples are the same 50 rows, so that the radius is 0.
    book, generator = data(50, 16), torch.Generator().manual_seed(2)
    codes, prior, second = (book[torch.randint(50, (1500,), generator=generator)] for _ in range(3))
    found, _ = coverage(codes, prior, second, Yardstick.of_draws(second))
    assert (found.radius, found.holes, found.stray) == (0, 0, 0)


def test_a_prior_of_float64_far_from_0_has_its_own_unit():
    prior = 1.7e9 + 1000 * torch.randn(2000, 2, dtype=torch.float64)
    measured = Yardstick.of_draws(prior).measure(prior)
    assert measured.std(0).tolist() == pytest.approx([1.0, 1.0])
