import functools
import itertools

import numpy as np
import pytest
import torch
from references import KERNELS, differences, distances, half_mean_square, off_diagonal, rows
from scipy.spatial.distance import cdist

from pyro_wae.kernels import Gaussian, Laplace
from pyro_wae.penalties import MMD, FunctionPenalty, PenaltyContext, SlicedWasserstein, as_penalty

every_kernel = pytest.mark.parametrize("name", KERNELS)


# float32: the estimate against direct sums is tested in test_pair_sums.py


def far_apart(d):
    return rows(512, d, dtype=torch.float32) + 10, rows(512, d, dtype=torch.float32)


def nearly_equal(d):
    return 1.02 * rows(512, d, dtype=torch.float32) + 0.02, rows(512, d, dtype=torch.float32)


def equal_up_to_noise(d):
    prior = rows(512, d, dtype=torch.float32)
    return prior + 1e-3 * torch.randn_like(prior), prior


def with_mean(mean, d):
    return tuple(x + mean for x in nearly_equal(d))


CASES = {
    "far apart": far_apart,
    "nearly equal": nearly_equal,
    "equal up to noise": equal_up_to_noise,
    "mean 100": functools.partial(with_mean, 100.0),
    "mean 1000": functools.partial(with_mean, 1000.0),
}


@pytest.fixture(scope="module", params=itertools.product(CASES, (8, 64)), ids=lambda p: f"{p[0]}, d={p[1]}")
def float32_case(request):
    """Codes and prior in float32, with what their float64 references share: direct differences and distances."""
    torch.manual_seed(0)
    case, d = request.param
    codes, prior = CASES[case](d)
    pairs = [(delta, delta.square().sum(2).sqrt()) for delta in (differences(codes, codes), differences(codes, prior))]
    return codes, prior, *pairs, distances(prior, prior), half_mean_square(prior)


@every_kernel
def test_float32_values_and_gradients_keep_their_digits(name, float32_case):
    """Against float64 and direct differences on the same numbers; the length too comes from direct differences."""
    codes, prior, (delta_qq, r_qq), (delta_qp, r_qp), r_pp, h = float32_case
    formula, n, m = KERNELS[name][1], len(codes), len(prior)

    def value_and_pull(r, delta, pairs, weight):
        """The weighted sum of k over pairs, and of k'(r) times the unit vector over the pairs of each row."""
        r = r[pairs].requires_grad_()
        value = weight * formula(r, h).sum()
        slope = torch.zeros(pairs.shape, dtype=torch.float64)
        slope[pairs] = torch.autograd.grad(value, r)[0] / r.detach()
        return value.item(), torch.einsum("ij,ijd->id", slope, delta)

    # A code is in a pair with itself twice, as row and as column.
    qq, pull_qq = value_and_pull(r_qq, delta_qq, off_diagonal(n), 1 / (n * (n - 1)))
    qp, pull_qp = value_and_pull(r_qp, delta_qp, torch.ones_like(r_qp, dtype=torch.bool), 1 / (n * m))
    pp = formula(r_pp[off_diagonal(m)], h).mean().item()
    expected, expected_gradient = qq + pp - 2 * qp, 2 * pull_qq - 2 * pull_qp

    codes = codes.clone().requires_grad_()
    value = MMD(KERNELS[name][0]())(codes, prior)
    (gradient,) = torch.autograd.grad(value, codes)
    assert value.dtype == gradient.dtype == torch.float32
    value_error = abs(value.item() - expected) / abs(expected)
    gradient_error = ((gradient - expected_gradient).norm() / expected_gradient.norm()).item()
    assert value_error <= 2e-5
    assert gradient_error <= 5e-6


# Expectations without sampling: every outcome of a discrete encoder is enumerated.

ATOMS = torch.tensor(
    [[[0.0, 0.1], [1.0, -0.4]], [[2.0, 0.3], [0.5, 1.9]], [[-1.0, 0.7], [-0.2, -2.0]], [[0.4, 0.9], [3.0, 0.0]]],
    dtype=torch.float64,
)
"""Each of 4 data has a code that is one of two atoms, with equal chance."""

PRIOR_ATOMS = ATOMS.flip(0) * 0.7 + 0.2


def gaussian_mean(x, y, pairs=None):
    """The mean of exp(-r^2 / 2) over pairs of the rows of x and y, by scipy's distances."""
    values = np.exp(-(cdist(x.reshape(-1, 2), y.reshape(-1, 2)) ** 2) / 2)
    return values.mean() if pairs is None else values[pairs].mean()


def outcomes(atoms, count):
    """All equally likely (count, n, d) draws of `count` particles of n data with two atoms each."""
    n = len(atoms)
    for picks in itertools.product((0, 1), repeat=count * n):
        yield atoms[torch.arange(n), torch.tensor(picks).view(count, n)]


def expectation(particles, *, shared_with=None, repeats=1, data_size=None):
    """The exact mean of the estimate over batches of 2 of 4 data, the particles and the prior samples."""
    mmd = MMD(Gaussian(1.0))
    context, values = PenaltyContext(data_size=data_size, shared_data=shared_with is not None), []
    for batch in itertools.combinations(range(4), 2):
        if shared_with is None:
            draws = [torch.stack(pair) for pair in itertools.product(PRIOR_ATOMS[0:2].flatten(0, 1), repeat=2)]
        else:
            draws = [draw.flatten(0, 1) for draw in outcomes(shared_with[list(batch)], repeats)]
        for codes in outcomes(ATOMS[list(batch)], particles):
            values += [mmd(codes, draw, context) for draw in draws]
    return torch.stack(values).mean().item()


DIFFERENT = np.kron(1 - np.eye(4), np.ones((2, 2))) == 1


@pytest.mark.parametrize(
    ("particles", "options", "prior", "pairs"),
    [
        (2, {"data_size": 4}, PRIOR_ATOMS[0:2], None),
        (1, {}, PRIOR_ATOMS[0:2], DIFFERENT),
        (2, {"data_size": 4, "shared_with": PRIOR_ATOMS, "repeats": 2}, PRIOR_ATOMS, None),
    ],
    ids=["MMD++", "no data size", "MMD++ with shared data"],
)
def test_it_averages_to_that_of_the_whole_finite_mixtures_or_of_pairs_of_different_data(
    particles, options, prior, pairs
):
    exact = gaussian_mean(ATOMS, ATOMS, pairs) + gaussian_mean(prior, prior) - 2 * gaussian_mean(ATOMS, prior)
    assert expectation(particles, **options) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize(("particles", "repeats"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_a_prior_that_is_the_encoder_of_every_datum_averages_to_0(particles, repeats, size):
    value = expectation(particles, shared_with=ATOMS, repeats=repeats, data_size=size)
    assert value == pytest.approx(0, abs=1e-14)


# Functions as penalties


def mean_distance(codes, prior):
    return (codes.mean(0) - prior.mean(0)).square().sum()


def test_a_function_sees_one_particle_at_a_time_and_its_values_are_averaged():
    codes, prior, seen = rows(3, 20, 3), rows(60, 3), []

    def spy(codes, prior):
        seen.append((codes, prior))
        return mean_distance(codes, prior)

    penalty = as_penalty(spy)
    assert isinstance(penalty, FunctionPenalty)
    assert as_penalty(penalty) is penalty
    value = penalty(codes, prior)
    expected = (codes.mean(1) - prior.view(3, 20, 3).mean(1)).square().sum(1).mean()
    torch.testing.assert_close(value, expected)
    assert [(tuple(q.shape), tuple(p.shape)) for q, p in seen] == [((20, 3), (20, 3))] * 3
    torch.testing.assert_close(torch.cat([p for _, p in seen]), prior)


def test_a_function_gets_all_prior_draws_where_they_do_not_divide():
    codes, prior = rows(3, 20, 3), rows(25, 3)
    expected = (codes.mean(1) - prior.mean(0)).square().sum(1).mean()
    torch.testing.assert_close(as_penalty(mean_distance)(codes, prior), expected)


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda codes, prior: codes.mean(0), r"shape \(3,\)"),
        (lambda codes, prior: codes.sum().view(1), r"shape \(1,\)"),
        (lambda codes, prior: 0.0, "float"),
    ],
)
def test_a_function_that_gives_no_scalar_is_refused(function, found):
    with pytest.raises(
        ValueError, match=rf"must return a scalar tensor of floats, found {found}\. Reduce it over the codes"
    ):
        as_penalty(function)(rows(5, 3), rows(5, 3))


# Errors


SHAPES = r"codes of shape \(n, d\), or \(K, n, d\).*found \(.*codes\.flatten\(1\)"
TWO = r"at least 2 data and 2 prior samples, found {}\. .*drop_last=True"
ROWS, SHARED = rows(5, 3), PenaltyContext(shared_data=True)
REFUSED = [
    (rows(5), rows(5), None, SHAPES),
    (ROWS, rows(5, 2), None, SHAPES),
    (ROWS, rows(2, 5, 3), None, SHAPES),
    (rows(2, 2, 5, 3), ROWS, None, SHAPES),
    (ROWS, rows(3), None, SHAPES),
    (rows(1, 3), ROWS, None, TWO.format("1 and 5")),
    (ROWS, rows(1, 3), None, TWO.format("5 and 1")),
    (rows(4, 1, 3), ROWS, None, TWO.format("1 and 5")),
    (rows(0, 3), ROWS, None, TWO.format("0 and 5")),
    (ROWS, ROWS.float(), None, r"one floating dtype, found torch\.float64 and torch\.float32\..*x\.new_zeros"),
    (ROWS.long(), ROWS.long(), None, r"one floating dtype, found torch\.int64 and torch\.int64"),
    (ROWS.to_sparse(), ROWS, None, r"must be dense, found torch\.sparse_coo and .*Write codes\.to_dense\(\)"),
    (ROWS, ROWS.to("meta"), None, r"on one device, found cpu and meta\..*x\.new_zeros"),
    (rows(10, 3), ROWS, SHARED, r"multiples of the 10 data, found 5\. Draw the prior once or several times"),
    (rows(10, 3), rows(25, 3), SHARED, r"multiples of the 10 data, found 25\. Draw the prior once or several times"),
]


@pytest.mark.parametrize(("codes", "prior", "context", "message"), REFUSED)
def test_rows_that_do_not_fit_are_refused(codes, prior, context, message):
    with pytest.raises(ValueError, match=message):
        MMD()(codes, prior, context)


# State


def test_the_default_kernel_is_a_sum_of_laplace_kernels():
    codes, prior = rows(20, 3) + 1, rows(30, 3)
    torch.testing.assert_close(MMD()(codes, prior), MMD(Laplace.multiscale())(codes, prior))
    assert repr(MMD().kernel) == repr(Laplace.multiscale())


@pytest.mark.parametrize(("n", "m"), [(200, 300), (300, 200), (256, 257)])
def test_a_set_of_few_rows_beside_a_larger_one(n, m):
    codes, prior = torch.randn(n, 4).double(), torch.randn(m, 4).double()
    kernel = Gaussian(1.0)
    within = [(kernel(x, x).sum() - len(x)) / (len(x) * (len(x) - 1)) for x in (codes, prior)]
    expected = sum(within) - 2 * kernel(codes, prior).mean()
    assert MMD(kernel)(codes, prior).item() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize(("codes", "prior"), [((0, 5, 3), (5, 3)), ((5, 0), (5, 0))])
def test_codes_without_a_particle_or_a_number_are_refused(codes, prior):
    for penalty in (MMD(), SlicedWasserstein()):
        with pytest.raises(ValueError, match="A penalty takes codes of shape"):
            penalty(torch.zeros(codes), torch.zeros(prior))
