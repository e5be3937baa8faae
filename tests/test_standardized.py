"""MMD(standardize=True): mean 0 and deviation 1 when Q_Z = P_Z, so that a weight means the same everywhere."""

from __future__ import annotations

import itertools
import math
import re

import pyro.distributions as dist
import pytest
import torch
from programs import normal
from references import mean_is_zero, program, rows

from pyro_wae import WAELoss
from pyro_wae.kernels import Gaussian, InverseMultiquadratic, Laplace
from pyro_wae.penalties import MMD, PenaltyContext
from pyro_wae.penalties.null_variance import NullVariance, centred_square, pair_variance

KERNELS = {"gaussian": Gaussian, "authors": InverseMultiquadratic.multiscale, "laplace": Laplace}
ENOUGH = 8192


def standard_normal(d):
    return PenaltyContext(prior=lambda: dist.Normal(torch.zeros(d).double(), 1.0).to_event(1))


def null_values(penalty, d, n, m, *, context=None, codes=None, replicates=400):
    """Values of the penalty on codes that are samples of the prior, once its unit rests on enough draws."""
    for _ in range(math.ceil(ENOUGH / m)):
        penalty(rows(4, d), rows(m, d), context)
    return torch.stack(
        [penalty(rows(n, d) if codes is None else codes(), rows(m, d), context) for _ in range(replicates)]
    )


def deviation_is(values, expected, *, standard_errors=4.0, share=0.02):
    """Whether the mean square is that of the expected deviation, within standard errors and a share for the unit's."""
    squares = values.square()
    error = squares.std() / math.sqrt(len(squares))
    return abs(squares.mean() - expected**2) < standard_errors * error + 2 * share * expected**2


def assert_standard(values, *, seen=2**0.5):
    """Sees a mean that is off by 0.3 and a deviation that is off by the factor `seen`."""
    assert mean_is_zero(values)
    assert deviation_is(values, 1.0)
    assert not mean_is_zero(values + 0.3)
    assert not deviation_is(values / seen, 1.0)
    assert not deviation_is(values * seen, 1.0)


# The null


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("closed_form", [True, False])
@pytest.mark.parametrize("m", [64, 100])
def test_null_has_mean_0_and_deviation_1(kernel, closed_form, m):
    """Null: Q_Z = P_Z = N(0, I_8), n = 64; 500 batches, seed 0. For the Laplace kernel both take draws."""
    penalty = MMD(KERNELS[kernel](), standardize=True, closed_form=closed_form)
    assert_standard(null_values(penalty, 8, 64, m, context=standard_normal(8), replicates=500))


SIZES = [(2, 64, 64), (64, 64, 64), (8, 256, 256), (2, 64, 256), (8, 64, 256), (8, 256, 64), (64, 256, 64)]
# Where value and unit are known in closed form, m has no influence: each d and n once, of which 8 and 64 stand above.
KNOWN = [(2, 64, 64), (64, 64, 64), (8, 256, 256), (64, 256, 64)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "closed_form", "d", "n", "m"),
    [
        (kernel, closed_form, *size)
        for kernel in KERNELS
        for closed_form in (True, False)
        for size in (KNOWN if closed_form and kernel != "laplace" else SIZES)
    ],
)
def test_null_has_mean_0_and_deviation_1_for_every_size(kernel, closed_form, d, n, m):
    """Null: Q_Z = P_Z = N(0, I_d); 500 batches, seed 0. Of d = 8 with n = 64 see the test above."""
    penalty = MMD(KERNELS[kernel](), standardize=True, closed_form=closed_form)
    assert_standard(null_values(penalty, d, n, m, context=standard_normal(d), replicates=500), seen=2.0)


def test_null_of_a_mixture_takes_its_means_in_closed_form_and_its_unit_from_draws():
    """Null: Q_Z = P_Z = a mixture of two Normals, n = 64; 1000 batches, seed 0."""
    components = dist.Normal(torch.tensor([[-2.0, 0.0], [2.0, 1.0]]).double(), 0.7).to_event(1)
    prior = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7]).double()), components)
    context, penalty = PenaltyContext(prior=lambda: prior), MMD(Gaussian(1.0), standardize=True)
    for _ in range(ENOUGH // 64):
        penalty(rows(4, 2), prior.sample((64,)), context)
    values = torch.stack([penalty(prior.sample((64,)), prior.sample((64,)), context) for _ in range(1000)])
    assert_standard(values)
    codes, draws = prior.sample((64,)), prior.sample((64,))
    assert penalty(codes, draws, context) == penalty(codes, draws.flip(1), context)


@pytest.mark.parametrize("repeats", [2, 3])
@pytest.mark.parametrize("kind", ["centres", "masks", "labels"])
def test_null_of_data_that_differ_has_mean_0_and_deviation_1(kind, repeats):
    """Null: each code has the law of its own datum's prior samples; n = 40, 500 batches, seed 0.

    In the unit of prior samples that are pooled over the data it is not 1.
    """
    n, d = 40, 4
    centres, keep = 3 * rows(n, d), torch.ones(n, d).double()
    labels = (torch.arange(n) % 3)[:, None]
    if kind == "masks":
        centres, keep = 0 * centres + 3, rows(n, d) > 0
    if kind == "labels":
        centres = 3 * labels.expand(n, d)

    def drawn(blocks):
        return torch.cat([(centres + rows(n, d)) * keep for _ in range(blocks)])

    penalty = MMD(Gaussian(1.0), standardize=True)
    context = PenaltyContext(shared_data=True, condition=labels if kind == "labels" else None)
    for _ in range(math.ceil(ENOUGH / (repeats * n))):
        penalty(drawn(1), drawn(repeats), context)
    assert_standard(torch.stack([penalty(drawn(1), drawn(repeats), context) for _ in range(500)]))


def test_one_prior_sample_of_each_of_data_that_differ_gives_no_unit():
    model, guide = program(prior=lambda x: dist.Normal(3 * x, 1).to_event(1))
    with pytest.raises(
        ValueError, match=r"found 40 of 40 data\. Write WAELoss\(MMD\(standardize=True\), prior_draws=2\)"
    ):
        WAELoss(MMD(standardize=True)).loss(model, guide, rows(40, 2))
    assert math.isfinite(WAELoss(MMD(standardize=True), prior_draws=2).loss(model, guide, rows(40, 2)))


@pytest.mark.parametrize("closed_form", [True, False])
def test_particles_that_agree_count_once(closed_form):
    """A deterministic encoder gives every particle of a datum one code, and the value of one particle."""
    penalty = MMD(Gaussian(2.0), standardize=True, closed_form=closed_form)
    codes, prior, context = rows(64, 4), rows(100, 4), standard_normal(4)
    once = penalty(codes, prior, context)
    torch.testing.assert_close(penalty(codes.expand(3, 64, 4), prior, context), once)


@pytest.mark.parametrize("closed_form", [True, False])
def test_null_of_particles_has_mean_0_and_a_deviation_that_counts_data(closed_form):
    """Null: half a code's variance is its datum's, n = 64, K = 3, d = 4; 400 batches, seed 0."""
    penalty = MMD(Gaussian(2.0), standardize=True, closed_form=closed_form)

    def codes():
        return rows(64, 4) * 0.5**0.5 + rows(3, 64, 4) * 0.5**0.5

    values = null_values(penalty, 4, 64, 64, context=standard_normal(4), codes=codes)
    assert mean_is_zero(values)
    assert 1 / 3 < values.std() < 1


# The estimate of the variance


@pytest.mark.parametrize("m", [4, 5])
def test_the_centred_square_averages_to_its_definition(m):
    """All m-tuples of a law on three atoms, with a kernel that is any symmetric matrix."""
    table = rows(3, 3)
    table, probs = table + table.T, torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    means = table @ probs
    centred = table - means[:, None] - means + probs @ means
    expected = probs @ centred.square() @ probs
    total = 0.0
    for atoms in itertools.product(range(3), repeat=m):
        index = torch.tensor(atoms)
        total += probs[index].prod() * centred_square(table[index][:, index])
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize(("n", "m"), [(2, 2), (2, 3), (3, 2)])
def test_the_variance_of_the_estimate_is_that_of_its_pairs(n, m):
    """All codes and all draws of a law on three atoms; the mean over the draws is the estimate with known means."""
    atoms, probs = rows(3, 1), torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    table = Gaussian(1.0).gram(atoms, atoms)
    means = table @ probs
    square = probs @ (table - means[:, None] - means + probs @ means).square() @ probs
    codes, draws = (torch.tensor(list(itertools.product(range(3), repeat=k))) for k in (n, m))
    penalty = MMD(Gaussian(1.0))
    values = torch.stack([torch.stack([penalty(atoms[q], atoms[p]) for p in draws]) for q in codes])
    of_codes, of_draws = probs[codes].prod(1), probs[draws].prod(1)
    torch.testing.assert_close(of_codes @ values @ of_draws, torch.zeros(()).double(), rtol=0, atol=1e-14)
    torch.testing.assert_close(of_codes @ values.square() @ of_draws, pair_variance(n, m) * square)
    torch.testing.assert_close(of_codes @ (values @ of_draws).square(), pair_variance(n, None) * square)


def test_draws_that_coincide_give_no_nan():
    penalty, codes = MMD(Gaussian(1.0), standardize=True), rows(8, 2).requires_grad_()
    penalty(codes, torch.zeros(6, 2, dtype=torch.float64)).backward()
    assert codes.grad.isfinite().all()


def test_the_centred_square_of_a_nearly_constant_kernel_keeps_its_digits():
    """A kernel 1 + c g has the centred square of c g."""
    gram = torch.rand(20, 20, dtype=torch.float64)
    gram = gram + gram.T
    torch.testing.assert_close(centred_square(1 + 1e-6 * gram) * 1e12, centred_square(gram), rtol=1e-8, atol=0)


def test_the_unit_averages_the_first_draws_by_their_numbers_and_then_stays(monkeypatch):
    monkeypatch.setattr(NullVariance, "enough_draws", 150)
    penalty, seen, sizes = MMD(Gaussian(1.0), standardize=True), [], (10, 40, 100)
    for m in sizes:
        prior = rows(m, 2)
        seen.append(m * centred_square(Gaussian(1.0).gram(prior, prior)))
        penalty(rows(8, 2), prior)
        torch.testing.assert_close(penalty.null.square, sum(seen) / sum(sizes[: len(seen)]))
    kept = penalty.null.square.clone()
    penalty(rows(8, 2), 5 * rows(100, 2))
    assert penalty.null.square == kept


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 1])
def test_draws_that_are_not_finite_are_left_out(bad, at):
    kernel, batches = Gaussian(1.0), [rows(20, 2) for _ in range(3)]
    wrong = torch.full((20, 2), bad, dtype=torch.float64)
    found, usual = NullVariance(), NullVariance()
    for prior in (*batches[:at], wrong, *batches[at:]):
        found.of_draws(kernel, prior)
    for prior in batches:
        usual.of_draws(kernel, prior)
    assert torch.equal(found.square, usual.square)
    assert found.draws == usual.draws == 60


def test_the_unit_is_the_closed_form_at_once():
    """The Gaussian kernel of bandwidth 1 against N(0, 1), whose integrals are those of Gaussians."""
    penalty = MMD(Gaussian(1.0), standardize=True)
    penalty(rows(8, 1), rows(8, 1), standard_normal(1))
    # E k^2 = 5^-1/2; E k(x, p) = 2^-1/2 exp(-x^2 / 4), whose square has mean 2^-1 2^-1/2; E k(p, p') = 3^-1/2.
    expected = 5**-0.5 - 2 * 0.5 * 2**-0.5 + 1 / 3
    assert penalty.null.square.item() == pytest.approx(expected, rel=1e-12)


# The unit is no part of what is learnt


def test_the_gradient_is_that_of_the_plain_estimate_in_the_unit():
    for context in (PenaltyContext(), standard_normal(3)):
        penalty, codes = MMD(Gaussian(1.5), standardize=True), rows(20, 3).requires_grad_()
        prior = rows(30, 3).requires_grad_()
        value = penalty(codes, prior, context)
        plain = MMD(Gaussian(1.5))(codes, prior, context)
        inputs = (codes, prior) if context.prior is None else (codes,)
        for actual, expected in zip(
            torch.autograd.grad(value, inputs), torch.autograd.grad(plain, inputs), strict=True
        ):
            torch.testing.assert_close(actual, expected * (value / plain).detach())
        assert not penalty.null.square.requires_grad


def test_a_prior_that_learns_does_not_move_the_unit():
    scale = torch.ones(2, dtype=torch.float64, requires_grad=True)
    context = PenaltyContext(prior=lambda: dist.Normal(torch.zeros(2).double(), scale).to_event(1))
    penalty, codes = MMD(Gaussian(1.0), standardize=True), rows(20, 2)
    value = penalty(codes, rows(20, 2), context)
    (slope,) = torch.autograd.grad(value, scale)
    (plain,) = torch.autograd.grad(MMD(Gaussian(1.0))(codes, rows(20, 2), context), scale)
    kept = penalty.null.square.clone()
    torch.testing.assert_close(slope, plain / (kept * 2 / (20 * 19)).sqrt())
    scale.data.mul_(2)
    penalty(codes, rows(20, 2), context)
    assert penalty.null.square == kept


# State


def test_only_a_standardised_estimate_has_a_unit():
    assert MMD(Gaussian(1.0)).state_dict() == {}
    assert "null.square" in MMD(Gaussian(1.0), standardize=True).state_dict()


# Through the loss


@pytest.mark.parametrize("d", [2, 16])
def test_the_loss_of_matching_codes_has_mean_0_and_deviation_1(d):
    """Null: the guide is the prior, n = 50; 300 steps, seed 0."""

    model, guide = program(lambda x: normal(x, d), lambda x: normal(x, d), lambda z: dist.Normal(z[..., 0], 1))
    loss, values = WAELoss(MMD(standardize=True)), []
    for _ in range(300):
        loss.loss(model, guide, torch.zeros(50))
        values.append(loss.terms.penalty)
    assert_standard(torch.stack(values).double())


# Errors


@pytest.mark.parametrize("m", [2, 3])
def test_fewer_than_four_draws_are_refused_unless_the_prior_is_known(m):
    line = re.escape("WAELoss(MMD(standardize=True), prior_draws=4)")
    with pytest.raises(ValueError, match=rf"at least 4 prior samples, found {m}\. .* or write {line}"):
        MMD(Gaussian(1.0), standardize=True)(rows(8, 2), rows(m, 2))
    assert MMD(Gaussian(1.0), standardize=True)(rows(8, 2), rows(m, 2), standard_normal(2)).isfinite()
    assert MMD(Gaussian(1.0), standardize=True)(rows(8, 2), rows(4, 2)).isfinite()


def test_an_evaluation_adds_no_prior_samples_to_the_unit():
    penalty = MMD(Gaussian(), standardize=True, closed_form=False)
    penalty(torch.randn(40, 2), torch.randn(40, 2))
    before = penalty.null.square.clone(), penalty.null.draws
    with torch.no_grad():
        penalty(torch.randn(8, 2), torch.randn(8, 2))
    assert (penalty.null.square, penalty.null.draws) == before
    penalty(torch.randn(8, 2), torch.randn(8, 2))
    assert penalty.null.draws == before[1] + 8
