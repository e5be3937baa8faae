"""The joint of codes and conditions as penalties estimate it: its kernels, its value, and its mean and variance."""

from __future__ import annotations

import itertools
import math

import pyro.distributions as dist
import pytest
import torch
from references import every_particles, mean_is_zero, program, rows
from torch import nn

from pyro_wae import WAELoss
from pyro_wae.kernels import Conditional, Energy, Gaussian, Laplace, SameLabel, UnitMean
from pyro_wae.penalties import MMD, CramerWold, EnergyDistance, PenaltyContext, SlicedWasserstein

N, D = 12, 2


def by_pairs(kernel, condition_kernel, codes, prior, y):
    """The U-statistic over pairs of different data, pair by pair: codes (K, n, d), prior (J, n, d), y (n, c)."""
    total, n = 0.0, len(y)
    for sign, a, b in ((1, codes, codes), (1, prior, prior), (-2, codes, prior)):
        pairs = [
            kernel(a[s, i] - b[t, j]) * condition_kernel(y[i], y[j])
            for s in range(len(a))
            for t in range(len(b))
            for i in range(n)
            for j in range(n)
            if i != j
        ]
        total = total + sign * sum(pairs) / len(pairs)
    return total


def gaussian(difference, squared_length=1.0):
    return math.exp(-difference.square().sum().item() / (2 * squared_length))


# Kernels


def test_same_label_is_equality_of_whole_rows():
    x = torch.tensor([[0.0, 1.0], [0.0, 2.0], [5.0, 1.0]])
    torch.testing.assert_close(SameLabel()(x, x), torch.eye(3))
    torch.testing.assert_close(SameLabel()(x, x[1:2]), torch.tensor([[0.0], [1.0], [0.0]]))


def test_unit_mean_divides_by_the_mean_of_the_first_rows_and_adds_a_constant():
    labels = torch.tensor([0.0, 0.0, 0.0, 1.0])[:, None]
    kernel = UnitMean(SameLabel(), constant=1.0)
    kernel.fit(labels)
    kernel.fit(torch.zeros(4, 1))
    # Of 12 pairs of two rows 6 are of one label.
    torch.testing.assert_close(kernel(labels[:1], labels), torch.tensor([[3.0, 3.0, 3.0, 1.0]]) / 2)
    values = kernel(labels, labels)
    assert (values.sum() - values.trace()) / 12 == pytest.approx(1)
    alone = UnitMean(SameLabel())
    alone.fit(torch.arange(4.0)[:, None])
    torch.testing.assert_close(alone(labels[:1], labels), torch.tensor([[4.0, 4.0, 4.0, 0.0]]))


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("labels", [2, 10, 20])
def test_the_default_for_labels_is_the_mean_over_pairs_of_one_label(labels, draws):
    q, p, y = 1.5 * rows(40, D), rows(40 * draws, D), torch.arange(40) % labels
    value = MMD(Gaussian(1.0))(q, p, PenaltyContext(condition=y[:, None]))
    same = (y[:, None] == y) & ~torch.eye(40, dtype=torch.bool)
    k, blocks = Gaussian(1.0), p.split(40)
    within = torch.stack([k(a, b)[same].mean() for a in blocks for b in blocks]).mean()
    across = torch.stack([k(q, a)[same].mean() for a in blocks]).mean()
    assert value.item() == pytest.approx((k(q, q)[same].mean() + within - 2 * across).item(), rel=1e-9)


def test_unit_mean_refuses_what_has_no_positive_mean():
    with pytest.raises(ValueError, match="no mean yet"):
        UnitMean(SameLabel())(torch.zeros(2, 1), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="found -"):
        UnitMean(Energy()).fit(rows(5, 1))
    with pytest.raises(ValueError, match="constant must be a finite number >= 0, found -1"):
        UnitMean(SameLabel(), constant=-1)


def test_conditional_kernel_is_the_product_over_its_columns():
    x, y = rows(5, 4), rows(6, 4)
    k, other = Gaussian(1.3), Laplace(0.7)
    expected = k(x[:, :3], y[:, :3]) * other(x[:, 3:], y[:, 3:])
    torch.testing.assert_close(Conditional(k, other, 1)(x, y), expected)
    assert (Conditional(k, other, 1)(x, x).diagonal() == 1).all()


def test_conditional_kernel_takes_each_length_from_its_own_columns():
    x = torch.cat([rows(500, 3), 10 * rows(500, 1)], 1)
    kernel = Conditional(Gaussian(), Gaussian(), 1)
    kernel.fit(x)
    torch.testing.assert_close(kernel.kernel.squared_length, x[:, :3].var(0).sum())
    torch.testing.assert_close(kernel.condition_kernel.squared_length, x[:, 3].var())


def test_energy_compares_codes_but_not_conditions():
    Conditional(Energy(), SameLabel(), 1)
    with pytest.raises(ValueError, match=r"positive definite.*Laplace\(\)"):
        Conditional(SameLabel(), Energy(), 1)


# The estimate


@pytest.mark.parametrize("repeats", [(1, 1), (2, 1), (1, 3), (2, 2)], ids=str)
def test_mmd_of_labels_is_the_product_kernels_mean_over_pairs_of_different_data(repeats):
    n = 5
    codes, prior = rows(repeats[0], n, D), rows(repeats[1], n, D)
    y = torch.tensor([3, 3, 10**9, 10**9 + 1, 10**9])[:, None]  # which a float32 cannot tell apart
    # 2 + 2 of 20 pairs of two data are of one label.
    expected = by_pairs(gaussian, lambda a, b: (a == b).item() * 20 / 4, codes, prior, y)
    value = MMD(Gaussian(1.0))(codes, prior.flatten(0, 1), PenaltyContext(condition=y))
    assert value.item() == pytest.approx(expected, abs=1e-12)
    as_float32 = MMD(Gaussian(1.0))(codes.float(), prior.flatten(0, 1).float(), PenaltyContext(condition=y))
    assert as_float32.item() == pytest.approx(expected, abs=1e-5)


def test_mmd_of_floats_is_the_product_kernels_mean_over_pairs_of_different_data():
    codes, prior, y = rows(1, 6, D), rows(1, 6, D), 5 * rows(6, 3)
    half = y.var(0).sum().item()
    mean = sum(gaussian(a - b, half / 4) for a, b in itertools.permutations(y, 2)) / 30
    expected = by_pairs(gaussian, lambda a, b: gaussian(a - b, half / 4) / mean, codes, prior, y)
    value = MMD(Gaussian(1.0))(codes, prior[0], PenaltyContext(condition=y))
    assert value.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kernel", [Laplace(0.7), lambda a, b: torch.exp(-torch.cdist(a, b) / 0.7)], ids=["own", "f"])
def test_mmd_takes_a_condition_kernel_as_it_is(kernel):
    codes, prior, y = rows(1, 6, D), rows(1, 6, D), rows(6, 3)
    expected = by_pairs(gaussian, lambda a, b: math.exp(-(a - b).norm().item() / 0.7), codes, prior, y)
    value = MMD(Gaussian(1.0), condition_kernel=kernel)(codes, prior[0], PenaltyContext(condition=y))
    assert value.item() == pytest.approx(expected, abs=1e-7)


TABLE = torch.tensor([[1.0, 0.5, 0.2], [0.5, 1.0, 0.3], [0.2, 0.3, 1.0]])


@pytest.mark.parametrize(
    ("kernel", "by_hand"),
    [
        (Gaussian(1.0), lambda a, b: gaussian(a - b)),
        (lambda a, b: a @ b.mT + 1, lambda a, b: (a @ b).item() + 1),
        (lambda a, b: TABLE.to(a)[a.long(), b.long().mT], lambda a, b: TABLE[int(a), int(b)].item()),
    ],
    ids=["ordered", "polynomial", "table"],
)
def test_a_condition_kernel_receives_labels_as_they_are(kernel, by_hand):
    codes, prior, y = rows(1, 7, D), rows(1, 7, D), torch.tensor([2, 0, 0, 1, 2, 1, 0])[:, None]
    expected = by_pairs(gaussian, lambda a, b: by_hand(a.double(), b.double()), codes, prior, y)
    value = MMD(Gaussian(1.0), condition_kernel=kernel)(codes, prior[0], PenaltyContext(condition=y))
    assert value.item() == pytest.approx(expected, abs=1e-7)


def test_a_condition_kernel_is_not_given_labels_that_coincide():
    context = PenaltyContext(condition=torch.tensor([2**24, 2**24 + 1, 0])[:, None])
    codes, prior = rows(3, D).float(), rows(3, D).float()
    with pytest.raises(ValueError, match=r"labels .* up to 16777217, are not exact in torch.float32.*return_inverse"):
        MMD(condition_kernel=SameLabel())(codes, prior, context)
    MMD(condition_kernel=SameLabel())(codes.double(), prior.double(), context)


def test_the_v_statistic_of_the_joint_is_never_negative_and_0_for_equal_rows():
    y = torch.arange(6)[:, None] % 2
    codes = rows(6, D)
    penalty = MMD(unbiased=False)
    assert penalty(codes, codes, PenaltyContext(condition=y)).item() == pytest.approx(0, abs=1e-12)
    assert penalty(codes, rows(6, D), PenaltyContext(condition=y)) > 0


PENALTIES = [MMD(), MMD(standardize=True), EnergyDistance(), CramerWold()]


@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda penalty: repr(penalty)[:18])
def test_codes_that_match_the_prior_only_together_are_found_out(penalty):
    labels = torch.arange(400) % 2
    prior = rows(400, 1)
    # Half normal for each label: together they are normal.
    codes = prior.abs() * (2 * labels[:, None] - 1)
    codes, prior = torch.cat([codes, rows(400, 1)], 1), torch.cat([rows(400, 1), rows(400, 1)], 1)
    y = nn.functional.one_hot(labels).double()
    together = penalty(codes, prior)
    context = PenaltyContext(condition=y, condition_scale=torch.tensor(8.0))
    jointly = penalty(codes, prior, context)
    matching = penalty(rows(400, 2), prior, context)
    assert jointly > 5 * max(abs(together), abs(matching))


@pytest.mark.slow
@every_particles
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("kind", ["labels", "floats"])
def test_the_mean_is_zero_where_the_codes_of_each_condition_follow_its_prior(kind, standardize, options):
    # Null: q(z | x) is p(z | y). Size: 3.5 standard errors, two-sided 5e-4. Seed 0.
    y = torch.arange(20) % 3 if kind == "labels" else torch.linspace(-1, 1, 20)

    programs = program(lambda x: dist.Normal(x, 1), lambda x: dist.Normal(x, 1), lambda z: dist.Normal(z, 1))
    loss = WAELoss(MMD(standardize=standardize), condition="y", prior_draws=1 + standardize, **options)
    loss.loss(*programs, y.double(), y=y)  # takes lengths and units from draws of its own
    values = []
    for _ in range(200):
        loss.loss(*programs, y.double(), y=y)
        values.append(loss.terms.penalty)
    assert mean_is_zero(torch.stack(values))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["labels", "floats"])
def test_the_standardised_estimate_has_unit_variance_when_codes_match(kind):
    # Null: codes are samples of the prior. 1000 values have a variance with a standard error of some 0.06 (their law
    # has heavier tails than the normal's); 4 of them are allowed. Seed 0.
    n = 60
    y = (torch.arange(n) % 4)[:, None] if kind == "labels" else rows(n, 1)
    penalty = MMD(standardize=True)
    context = PenaltyContext(condition=y)
    for _ in range(140):
        penalty(rows(n, 4), rows(n, 4), context)  # the unit is averaged over the first draws
    values = torch.stack([penalty(rows(n, 4), rows(n, 4), context) for _ in range(1000)])
    assert values.var().item() == pytest.approx(1, abs=0.25)
    assert mean_is_zero(values)


def test_plain_tensors_of_other_shapes_are_named():
    with pytest.raises(ValueError, match=r"shape \(n, c\).*found \(12,\)"):
        MMD()(rows(N, D), rows(N, D), PenaltyContext(condition=torch.arange(N)))
    with pytest.raises(ValueError, match="12 data found 12 rows of the condition and 13 prior samples"):
        MMD()(rows(N, D), rows(13, D), PenaltyContext(condition=rows(N, 1)))
    with pytest.raises(ValueError, match="12 data found 5 rows of the condition"):
        SlicedWasserstein()(rows(N, D), rows(N, D), PenaltyContext(condition=rows(5, 1)))
