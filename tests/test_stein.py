import copy
import math
import pickle

import pyro.distributions as dist
import pytest
import torch
from references import KERNELS, mean_is_zero, rows

from pyro_wae.kernels import (
    Energy,
    Gaussian,
    InverseMultiquadratic,
    Laplace,
    Matern,
    MultiScale,
    RationalQuadratic,
)
from pyro_wae.penalties import PenaltyContext
from pyro_wae.penalties.stein import KernelStein

# Kernels with two derivatives, each beside its value at distance r where half the prior's mean squared distance is h.
SMOOTH = {name: entry for name, entry in KERNELS.items() if entry[0]().is_smooth} | {
    "smooth sum": (
        lambda: Gaussian() + 0.5 * InverseMultiquadratic(),
        lambda r, h: torch.exp(-(r**2) / (2 * h)) + h / (2 * h + r**2),
    )
}
every_kernel = pytest.mark.parametrize("name", SMOOTH)


def fitted(name):
    """A kernel with h = 2."""
    kernel = SMOOTH[name][0]()
    kernel.fit(torch.tensor([[-1.0], [1.0]], dtype=torch.float64))
    return kernel


def standard_normal(z):
    return -z.square().sum(-1) / 2


def normal_context(d, scale=1.0, **options):
    prior = dist.Normal(torch.zeros(d, dtype=torch.float64), scale).to_event(1)
    return PenaltyContext(prior=lambda: prior, prior_log_prob=prior.log_prob, **options)


def mixture(z):
    """Two Normals of unequal width and weight, unnormalised."""
    near = -(z - 1).square().sum(-1) / 2
    far = -(z + 1).square().sum(-1) / 4 - 0.4
    return torch.logaddexp(near, far)


def mixture_score(z):
    share = torch.sigmoid(-(z - 1).square().sum(-1) / 2 + (z + 1).square().sum(-1) / 4 + 0.4)[..., None]
    return -share * (z - 1) - (1 - share) * (z + 1) / 2


def stein_kernel(name, score, x, y):
    """The definition for one pair, with the kernel's derivatives taken one number at a time."""

    def k(x, y):
        return SMOOTH[name][1]((x - y).norm(), 2.0)

    by_x, by_y = torch.func.grad(k, 0), torch.func.grad(k, 1)
    trace = torch.func.jacrev(by_x, 1)(x, y).diagonal().sum()
    return score(x) @ score(y) * k(x, y) + score(x) @ by_y(x, y) + score(y) @ by_x(x, y) + trace


def mean_over_pairs(name, codes, score, pairs):
    values = [stein_kernel(name, score, codes[i], codes[j]) for i, j in pairs]
    return torch.stack(values).mean()


def gaussian_stein(mean, scale, bandwidth):
    """The squared discrepancy of N(mean, scale^2 I) from N(0, I) under a Gaussian kernel.

    With D = |x - y|^2, l the bandwidth and scores -x, -y: h = exp(-D / 2l^2) (x.y + (d - D) / l^2 - D / l^4). In each
    dimension x - y and (x + y) / 2 are independent Normals, of variances 2 scale^2 and scale^2 / 2, and
    x y = ((x + y) / 2)^2 - (x - y)^2 / 4.
    """
    square, width = bandwidth**2, 2 * scale**2
    height = (1 + width / square) ** -0.5
    tilted = width * square / (width + square)  # mean of (x - y)^2 under the exponential's weight
    d = len(mean)
    sides = mean.square() + scale**2 / 2 - tilted / 4 - tilted / square - tilted / square**2 + 1 / square
    return height**d * sides.sum()


# The estimate against the definition


@every_kernel
def test_it_is_the_mean_of_the_stein_kernel_over_pairs(name):
    codes = rows(5, 3)
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    value = KernelStein(fitted(name), log_prob=mixture)(codes)
    torch.testing.assert_close(value, mean_over_pairs(name, codes, mixture_score, pairs), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [None, 8])
def test_particles_of_one_datum_meet_with_the_weight_of_the_data_size_alone(size):
    codes, weight = rows(3, 4, 2), 1 / size if size else 0
    between = [(i, j) for i in range(12) for j in range(12) if i % 4 != j % 4]
    within = [(i, j) for i in range(12) for j in range(12) if i % 4 == j % 4 and i != j]
    means = [mean_over_pairs("gaussian", codes.flatten(0, 1), mixture_score, pairs) for pairs in (between, within)]
    value = KernelStein(fitted("gaussian"), log_prob=mixture)(codes, context=PenaltyContext(data_size=size))
    torch.testing.assert_close(value, (1 - weight) * means[0] + weight * means[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.4, 1.0), (0.0, 0.6), (-0.3, 1.5)])
def test_it_averages_to_the_closed_form_of_two_gaussians(shift, scale):
    # Null: the mean over 200 batches of 40 codes is the closed form; size 1/2000 (3.5 standard errors), seed 0.
    penalty = KernelStein(Gaussian(1.3), log_prob=standard_normal)
    mean = torch.full((3,), shift, dtype=torch.float64)
    truth = gaussian_stein(mean, scale, 1.3)
    errors = [penalty(mean + scale * rows(40, 3)) - truth for _ in range(200)]
    assert mean_is_zero(errors)
    assert (truth > 0.03) == (shift != 0 or scale != 1)


# The score


def test_the_density_need_not_be_normalised():
    codes = rows(20, 2)
    values = [KernelStein(Gaussian(1.0), log_prob=lambda z, c=c: standard_normal(z) + c)(codes) for c in (0.0, 7.0)]
    torch.testing.assert_close(*values)


def test_the_given_density_takes_the_place_of_the_contexts():
    codes, context = rows(20, 2), normal_context(2, 3.0)
    given = KernelStein(Gaussian(1.0), log_prob=standard_normal)(codes, context=context)
    torch.testing.assert_close(given, KernelStein(Gaussian(1.0), log_prob=standard_normal)(codes))
    torch.testing.assert_close(given, KernelStein(Gaussian(1.0))(codes, context=normal_context(2)))


@every_kernel
@pytest.mark.parametrize("log_prob", [standard_normal, mixture])
def test_gradients_agree_with_finite_differences(name, log_prob):
    penalty = KernelStein(fitted(name), log_prob=log_prob)
    assert torch.autograd.gradcheck(penalty, rows(2, 4, 2).requires_grad_())


def test_gradients_pass_through_codes_that_depend_on_each_other():
    penalty = KernelStein(Gaussian(1.3), log_prob=mixture)
    x = rows(6, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: penalty((x - x.mean(0)) / x.std(0)), x)
    with torch.no_grad():
        apart = penalty((x - x.mean(0)) / x.std(0))
    torch.testing.assert_close(penalty((x - x.mean(0)) / x.std(0)), apart)


def test_a_value_without_anything_to_learn_has_no_graph():
    assert not KernelStein(Gaussian(1.0), log_prob=mixture)(rows(4, 2)).requires_grad


def test_gradients_reach_a_prior_that_learns():
    loc = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    codes = rows(50, 2) + 3
    KernelStein(Gaussian(3.0), log_prob=lambda z: standard_normal(z - loc))(codes).backward()
    assert (loc.grad < 0).all()


@every_kernel
def test_codes_that_coincide_are_the_limit_of_codes_that_nearly_do_and_have_finite_gradients(name):
    penalty, codes = KernelStein(fitted(name), log_prob=mixture), rows(4, 2).requires_grad_()
    values = [penalty(torch.cat([codes, codes + shift])) for shift in (0.0, 1e-7)]
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
    values[0].backward()
    assert codes.grad.isfinite().all()


# Numbers


@every_kernel
@pytest.mark.parametrize("place", [0.0, 100.0])
def test_float32_keeps_its_digits(name, place):
    # Codes that float32 holds exactly, so that the difference is the arithmetic's.
    codes = (rows(50, 3, dtype=torch.float32) * 256).round() / 256 + place
    penalty = KernelStein(fitted(name), log_prob=lambda z: standard_normal(z - place))
    gradients, values = [], []
    for dtype in (torch.float32, torch.float64):
        x = codes.to(dtype).requires_grad_()
        values.append(penalty(x))
        assert values[-1].dtype == dtype
        gradients.append(torch.autograd.grad(values[-1], x)[0].double())
    torch.testing.assert_close(values[0].double(), values[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_far_from_0_it_keeps_its_digits():
    # Shifted by a power of 2, which float64 holds exactly: the value must stay.
    codes, place = (rows(50, 3) * 256).round() / 256, 2.0**30
    values = [KernelStein(Gaussian(1.0), log_prob=lambda z, c=c: mixture(z - c))(codes + c) for c in (0.0, place)]
    torch.testing.assert_close(*values, rtol=1e-12, atol=0)


# The length


@pytest.mark.parametrize(
    ("unset", "given"),
    [
        (None, RationalQuadratic(0.5, bandwidth=math.sqrt(12))),
        (Gaussian(), Gaussian(math.sqrt(12))),
        (InverseMultiquadratic.multiscale(), InverseMultiquadratic.multiscale(24.0**0.5)),
    ],
)
def test_a_length_is_taken_from_the_priors_variance(unset, given):
    codes, context = rows(20, 3), normal_context(3, 2.0)
    torch.testing.assert_close(KernelStein(unset)(codes, context=context), KernelStein(given)(codes, context=context))


def test_a_length_stays_and_is_saved():
    codes, penalty = rows(20, 3), KernelStein()
    value = penalty(codes, context=normal_context(3, 2.0))
    context = PenaltyContext(prior_log_prob=normal_context(3, 2.0).prior_log_prob)
    loaded = KernelStein()
    loaded.load_state_dict(penalty.state_dict())
    for same in (penalty, loaded, copy.deepcopy(penalty), pickle.loads(pickle.dumps(penalty))):
        torch.testing.assert_close(same(codes, context=context), value)


# Errors

FIX = r"Write KernelStein\(log_prob=lambda z: \.\.\.\)"


@pytest.mark.parametrize(
    "kernel", [Laplace(), Matern(0.5), Energy(), Gaussian() + Laplace(), 2.0 * Energy(), MultiScale(Laplace(), (1.0,))]
)
def test_a_kernel_without_two_derivatives_is_refused(kernel):
    with pytest.raises(
        TypeError, match=r"twice differentiable, found .*Write KernelStein\(RationalQuadratic\(0\.5\)\)"
    ):
        KernelStein(kernel)


def test_a_prior_without_a_density_is_named():
    penalty = KernelStein(Gaussian(1.0))
    with pytest.raises(ValueError, match=rf"log density is needed, found none\. {FIX}"):
        penalty(rows(4, 2))

    def raises(z):
        raise NotImplementedError

    with pytest.raises(ValueError, match=rf"log density is needed, but the prior has none\. {FIX}"):
        penalty(rows(4, 2), context=PenaltyContext(prior_log_prob=raises))


DETACHED = "must be differentiable, found one that is constant or detached"


@pytest.mark.parametrize(
    ("log_prob", "found"),
    [
        (lambda z: -z.square(), r"one number for each code, shape \(3,\), found shape \(3, 2\)"),
        (lambda z: -z.square().sum(), r"one number for each code, shape \(3,\), found shape \(\)"),
        (lambda z: 0.0, r"one number for each code, shape \(3,\), found float"),
        (lambda z: torch.zeros(len(z), dtype=z.dtype), DETACHED),
        (lambda z: standard_normal(z.detach()), DETACHED),
        (lambda z: torch.zeros(len(z), dtype=z.dtype, requires_grad=True), DETACHED),
        (lambda z: z.log().sum(1), r"found nan and .* at the code \[-1\.0, 1\.0\]"),
        (lambda z: torch.where(z[:, 0] > 0, standard_normal(z), -math.inf), "found -inf and"),
        (lambda z: -(z[:, 0] + 1).abs().sqrt(), r"found -0 and \[nan, 0\.0\] at the code \[-1\.0, 1\.0\]"),
    ],
)
@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_density_that_does_not_serve_is_named(log_prob, found, requires_grad):
    codes = torch.tensor([[1.0, 2.0], [-1.0, 1.0], [2.0, 1.0]], requires_grad=requires_grad)
    with pytest.raises(ValueError, match=rf"(?s){found}.*{FIX}"):
        KernelStein(Gaussian(1.0), log_prob=log_prob)(codes)


def test_a_density_of_another_shape_is_named_with_its_particles():
    context = PenaltyContext(prior_log_prob=lambda z: -z.square())
    with pytest.raises(ValueError, match=r"shape \(1, 4\), found"):
        KernelStein(Gaussian(1.0))(rows(4, 2), context=context)


@pytest.mark.parametrize(
    ("prior", "found"),
    [
        (None, "no variance of the prior is known"),
        (dist.Cauchy(torch.zeros(2), 1.0).to_event(1), "the prior's is (inf|nan)"),
        (
            dist.TransformedDistribution(
                dist.Normal(torch.zeros(2), 1.0).to_event(1), [dist.transforms.ExpTransform()]
            ),
            "no variance of the prior is known",
        ),
    ],
)
def test_a_length_that_cannot_be_taken_is_named(prior, found):
    for context in (PenaltyContext(prior=lambda: prior), *([PenaltyContext()] if prior is None else [])):
        with pytest.raises(ValueError, match=rf"{found}\. Give the length, as in KernelStein\(RationalQuadratic\("):
            KernelStein(log_prob=standard_normal)(rows(4, 2), context=context)


def test_each_code_may_have_its_own_datums_density():
    """Against the same sum with each row's own score."""
    loc, codes = 3 * rows(1, 20, 3), rows(20, 3)
    context = PenaltyContext(shared_data=True, prior_log_prob=lambda z: -(z - loc).square().sum(2) / 2)
    value = KernelStein(Gaussian(1.0))(codes, context=context)
    score, total = loc[0] - codes, 0.0
    for i in range(20):
        for j in set(range(20)) - {i}:
            gap = codes[i] - codes[j]
            square = gap @ gap
            inner = score[i] @ score[j] + (score[i] - score[j]) @ gap + 3 - square
            total = total + torch.exp(-square / 2) * inner / (20 * 19)
    torch.testing.assert_close(value, total)
