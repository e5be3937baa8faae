"""Where WAELoss takes a kernel's means from the prior in closed form, and where it takes draws."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import around, normal, sites
from pyro import poutine
from references import PARTICLES, Seen, nested, program, rows
from torch import nn

from pyro_wae import WAELoss
from pyro_wae.kernels import Gaussian, InverseMultiquadratic
from pyro_wae.penalties import MMD, CramerWold, EnergyDistance, KernelStein, PenaltyContext, kernel_mean

N = 12
S = 1.1


def gaussian_mmd(codes, weights, locs, scales):
    """The U-statistic of K particles (K, n, d) against a mixture of diagonal Normals, by Gaussian integrals."""

    def expect(offsets, variances):
        return (S**2 / (S**2 + variances)).sqrt().prod(-1) * (-(offsets**2 / (2 * (S**2 + variances))).sum(-1)).exp()

    particles, n, _ = codes.shape
    flat = codes.flatten(0, 1)
    gram = expect(flat[:, None] - flat, codes.new_zeros(()))
    other = 1 - torch.eye(n, dtype=codes.dtype).repeat(particles, particles)
    value = (gram * other).sum() / other.sum()
    for w, loc, scale in zip(weights, locs, scales, strict=True):
        value = value - 2 * w * expect(flat - loc, scale**2).mean()
        for v, other_loc, other_scale in zip(weights, locs, scales, strict=True):
            value = value + w * v * expect(loc - other_loc, scale**2 + other_scale**2)
    return value


def flat_model(prior):
    return program(lambda x: dist.Normal(x, 0.3).to_event(1), prior)


def inner_plate_model(prior):
    """A code of two steps times two numbers; the step's dimension is left of the data's."""
    return sites(
        {"z": (prior, lambda x: dist.Normal(x.expand(2, -1, -1), 0.3).to_event(1))},
        plate=lambda x: nested(pyro.plate("steps", 2, dim=-2), pyro.plate("data", len(x), dim=-1)),
        observed=lambda x: x.expand(2, -1, -1),
    )


TWO = torch.tensor([[-1.0, 0.5], [1.0, 2.0]], dtype=torch.float64)
SPREADS = torch.tensor([[0.5, 1.0], [2.0, 0.7]], dtype=torch.float64)
SHARES = torch.tensor([0.25, 0.75], dtype=torch.float64)
ONE = torch.ones(1, dtype=torch.float64)


def normal_of_two(x):
    return normal(x, 2)


def standard(x):
    return ONE, x.new_zeros(1, 2), x.new_ones(1, 2)


def diagonal(*_):
    return dist.Normal(TWO[1], SPREADS[1]).to_event(1)


def mixture(*_):
    return dist.MixtureSameFamily(dist.Categorical(SHARES), dist.Normal(TWO, SPREADS).to_event(1))


class Own(dist.Normal):
    """Draws as its family, and is made otherwise."""

    def __init__(self, like):
        super().__init__(torch.zeros_like(like), 1.0)

    def expand(self, batch_shape, _instance=None):
        return super().expand(batch_shape, self._get_checked_instance(Own, _instance))


# Each prior beside weights, means and standard deviations of one code.
FOUND = {
    "zeros(d)": (flat_model, normal_of_two, standard),
    "expanded by hand": (flat_model, lambda x: dist.Normal(x.new_zeros(()), 1).expand([N, 2]).to_event(1), standard),
    "twice independent": (
        flat_model,
        lambda x: dist.Independent(dist.Normal(x.new_zeros(()), 1).expand([2]), 1).expand([N]),
        standard,
    ),
    "a row for each datum": (flat_model, lambda x: dist.Normal(torch.zeros_like(x), 1).to_event(1), standard),
    "a class of its own, drawn as its family": (flat_model, lambda x: Own(x).to_event(1), standard),
    "diagonal": (flat_model, diagonal, lambda x: (ONE, TWO[1:], SPREADS[1:])),
    "mixture": (flat_model, mixture, lambda x: (SHARES, TWO, SPREADS)),
    "inner plate": (inner_plate_model, normal_of_two, lambda x: (ONE, x.new_zeros(1, 4), x.new_ones(1, 4))),
    "inner plate, each step its own": (
        inner_plate_model,
        lambda x: dist.Normal(TWO[:, None], SPREADS[:, None]).to_event(1),
        lambda x: (ONE, TWO.reshape(1, 4), SPREADS.reshape(1, 4)),
    ),
}
every_particles = pytest.mark.parametrize("options", [{"data_plate": "data"} | more for more in PARTICLES], ids=str)


@pytest.mark.parametrize("name", FOUND)
@every_particles
def test_the_prior_is_found_in_the_model(name, options):
    make, prior, law = FOUND[name]
    x, keep = rows(N, 2), []

    class Keeping(MMD):
        def estimate(self, codes, prior, context):
            keep.append(codes)
            return super().estimate(codes, prior, context)

    loss = WAELoss(Keeping(Gaussian(S)), **options)
    loss.loss(*make(prior), x)
    weights, locs, scales = law(x)
    expected = gaussian_mmd(keep[0], weights, locs, scales)
    assert loss.terms.penalty.item() == pytest.approx(expected.item(), abs=1e-10)


def test_it_is_found_by_a_penalty_of_the_site_in_a_sum_and_with_standardisation():
    x, values = rows(N, 2), {}
    for name, penalty in {
        "plain": MMD(Gaussian(S)),
        "site": {"z": MMD(Gaussian(S))},
        "sum": MMD(Gaussian(S)) + MMD(Gaussian(S)),
        "scaled": 0.5 * MMD(Gaussian(S)),
        "standardised": MMD(Gaussian(S), standardize=True),
    }.items():
        loss = WAELoss(penalty)
        pyro.set_rng_seed(3)
        loss.loss(*flat_model(diagonal), x)
        values[name] = loss.terms.penalty.item()
    square = kernel_mean(Gaussian(S), diagonal()).centred_square().item()
    assert values["site"] == pytest.approx(values["plain"], abs=1e-12)
    assert values["sum"] == pytest.approx(2 * values["plain"], abs=1e-12)
    assert values["scaled"] == pytest.approx(values["plain"] / 2, abs=1e-12)
    unit = math.sqrt(2 * square / (N * (N - 1)))
    assert values["standardised"] == pytest.approx(values["plain"] / unit, rel=1e-9)


HIERARCHICAL = sites(
    {
        "z1": (lambda x: normal(x, 1), lambda x: dist.Normal(x[:, :1], 0.3).to_event(1)),
        "z2": (lambda x, z1: around(z1), lambda x: dist.Normal(x[:, 1:], 0.3).to_event(1)),
    }
)
HALF = torch.arange(N) % 2 == 0


class Rectified(dist.Normal):
    """Draws otherwise than its family."""

    def rsample(self, sample_shape=()):
        return super().rsample(sample_shape).clamp(min=0)


class Called(dist.Normal):
    def __call__(self, *args):
        return super().__call__(*args).clamp(min=0)


class RectifiedVector(dist.Independent):
    def rsample(self, sample_shape=()):
        return super().rsample(sample_shape).clamp(min=0)


class RectifiedMixture(dist.MixtureOfDiagNormalsSharedCovariance):
    def rsample(self, sample_shape=()):
        return super().rsample(sample_shape).clamp(min=0)


class FirstOnly(dist.Categorical):
    def sample(self, sample_shape=()):
        return 0 * super().sample(sample_shape)


class Doubled(dist.MixtureSameFamily):
    def sample(self, sample_shape=()):
        return 2 * super().sample(sample_shape)


NOT_FOUND_MIXTURE = dist.MixtureSameFamily(dist.Categorical(SHARES), Rectified(TWO, SPREADS).to_event(1))
NOT_FOUND = {
    "a class of its own, drawn otherwise": flat_model(lambda x: Rectified(x.new_zeros(2), 1).to_event(1)),
    "a class of its own, called otherwise": flat_model(lambda x: Called(x.new_zeros(2), 1).to_event(1)),
    "a wrapper of its own": flat_model(lambda x: RectifiedVector(dist.Normal(x.new_zeros(2), 1), 1)),
    "Pyro's mixture, drawn otherwise": flat_model(
        lambda x: RectifiedMixture(TWO, SPREADS[0], torch.zeros(len(TWO), dtype=TWO.dtype))
    ),
    "weights drawn otherwise": flat_model(
        lambda x: dist.MixtureSameFamily(FirstOnly(SHARES), dist.Normal(TWO, SPREADS).to_event(1))
    ),
    "a mixture of its own, drawn otherwise": flat_model(
        lambda x: Doubled(dist.Categorical(SHARES), dist.Normal(TWO, SPREADS).to_event(1))
    ),
    "a mixture of classes drawn otherwise": flat_model(lambda x: NOT_FOUND_MIXTURE),
    "masked data": tuple(poutine.mask(one, mask=HALF) for one in flat_model(normal_of_two)),
    "depends on the data": flat_model(lambda x: dist.Normal(0.5 * x, 1).to_event(1)),
    "a scale for each datum": flat_model(lambda x: dist.Normal(x.new_zeros(2), x.abs() + 1).to_event(1)),
    "hierarchical": HIERARCHICAL,
    "a mixture for each datum": flat_model(
        lambda x: dist.MixtureSameFamily(dist.Categorical(x.abs()), dist.Normal(TWO, SPREADS).to_event(1))
    ),
    "a mixture for each step": inner_plate_model(mixture),  # together a mixture of four
    "correlated": flat_model(lambda x: dist.MultivariateNormal(x.new_zeros(2), torch.eye(2).double())),
}


@pytest.mark.parametrize("name", NOT_FOUND)
@every_particles
def test_where_the_prior_is_not_one_known_law_its_draws_are_used(name, options):
    model, guide = NOT_FOUND[name]
    x, values = rows(N, 2), []
    for penalty in (MMD(Gaussian(S)), MMD(Gaussian(S), closed_form=False)):
        loss = WAELoss(penalty, **options)
        pyro.set_rng_seed(2)
        values.append(loss.loss(model, guide, x))
    assert values[0] == values[1]
    seen = Seen()
    WAELoss(seen, **options).loss(model, guide, x)
    context = seen.context
    assert context.prior is None or context.prior() is None


@pytest.mark.parametrize("prior", [Rectified(torch.zeros(2), 1).to_event(1), NOT_FOUND_MIXTURE], ids=["one", "mixture"])
def test_a_law_that_is_drawn_otherwise_has_no_mean_of_its_family(prior):
    assert kernel_mean(Gaussian(1.0), prior) is None
    codes, draws = prior.sample((2, 50))
    found, drawn = (CramerWold()(codes, draws, context) for context in (PenaltyContext(prior=lambda: prior), None))
    assert found == drawn


def test_a_penalty_of_one_site_of_several_takes_draws():
    x, values = rows(N, 2), []
    for penalty in (MMD(Gaussian(S)), MMD(Gaussian(S), closed_form=False)):
        loss = WAELoss({"z1": penalty, "z2": None})
        pyro.set_rng_seed(2)
        values.append(loss.loss(*HIERARCHICAL, x))
    assert values[0] == values[1]


@pytest.mark.parametrize("make", [MMD, EnergyDistance, CramerWold, KernelStein])
@pytest.mark.parametrize(("d", "size"), [(1, 3), (4, 1), (4, 3)])
def test_a_prior_of_another_size_than_a_code_is_refused_and_the_line_to_write_serves(make, d, size):
    d = 2 if make is CramerWold and d == 1 else d
    codes, draws, prior = rows(20, d), rows(30, d), dist.Normal(torch.zeros(size), 1.0).to_event(1)
    match = rf"codes have {d} numbers, found .* event_shape \({size},\)\. Write "
    with pytest.raises(ValueError, match=match) as raised:
        make()(codes, draws, PenaltyContext(prior=lambda: prior, prior_log_prob=lambda z: -z.square().sum(-1) / 2))
    written = eval(str(raised.value).partition("Write ")[2].removesuffix("."), globals())
    whole = PenaltyContext(prior=written.prior, prior_log_prob=written.prior().log_prob)
    assert make()(codes, draws, whole).isfinite()


@pytest.mark.parametrize("penalty", [MMD(Gaussian(1.0)), EnergyDistance(), CramerWold(0.5)])
@pytest.mark.parametrize(
    "prior",
    [
        dist.Normal(torch.zeros(20, 4), 1.0).to_event(1),
        dist.Normal(torch.zeros(2, 2), 1.0).to_event(2),
        dist.Normal(torch.zeros(20), 1.0),
        dist.Normal(0.0, 1.0),
    ],
    ids=["batch", "matrix", "batch of numbers", "number"],
)
def test_what_is_not_one_law_of_a_row_is_compared_by_its_draws(penalty, prior):
    codes, draws = rows(20, 4), rows(30, 4)
    value = penalty(codes, draws, PenaltyContext(prior=lambda: prior))
    torch.testing.assert_close(value, penalty(codes, draws), rtol=0, atol=0)


def test_a_batch_of_priors_of_single_numbers_is_no_prior_of_a_code_of_one_number():
    codes, draws, context = rows(20, 1), rows(30, 1), PenaltyContext(prior=lambda: dist.Normal(torch.zeros(20), 1.0))
    mmd = MMD(Gaussian(1.0))
    torch.testing.assert_close(mmd(codes, draws, context), mmd(codes, draws), rtol=0, atol=0)


def test_a_stein_kernel_takes_no_length_from_a_batch_of_priors():
    prior = dist.Normal(torch.zeros(20, 4), 1.0).to_event(1)
    with pytest.raises(ValueError, match="no variance of the prior is known"):
        KernelStein()(rows(20, 4), context=PenaltyContext(prior=lambda: prior, prior_log_prob=prior.log_prob))


@pytest.mark.parametrize("options", [{"unbiased": False}, {"unbiased": True}], ids=str)
def test_shared_data_and_closed_form_false_take_draws(options):
    codes, prior = rows(N, 2), rows(N, 2)
    given = PenaltyContext(prior=diagonal)
    shared = PenaltyContext(prior=diagonal, shared_data=True)
    drawn = MMD(Gaussian(S), closed_form=False, **options)(codes, prior)
    assert MMD(Gaussian(S), closed_form=False, **options)(codes, prior, given) == drawn
    assert MMD(Gaussian(S), **options)(codes, prior, given) != drawn
    expected = MMD(Gaussian(S), closed_form=False, **options)(codes, prior, PenaltyContext(shared_data=True))
    assert MMD(Gaussian(S), **options)(codes, prior, shared) == expected


def test_the_biased_estimate_keeps_the_diagonal_of_the_codes_alone():
    codes = rows(N, 2)
    value = MMD(Gaussian(S), unbiased=False)(codes, rows(N, 2), PenaltyContext(prior=diagonal))
    unbiased = MMD(Gaussian(S))(codes, rows(N, 2), PenaltyContext(prior=diagonal))
    gram = torch.exp(-torch.cdist(codes, codes).square() / (2 * S**2))
    qq = (gram.sum() - N) / (N * (N - 1))
    torch.testing.assert_close(value - unbiased, gram.mean() - qq)


# Priors that learn


class Learning(nn.Module):
    """A prior with parameters, around fixed codes and a decoder that is not asked about them."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.logits = nn.Parameter(torch.tensor([0.3, -0.5], dtype=torch.float64))
        self.locs = nn.Parameter(TWO.clone())
        self.log_scales = nn.Parameter(SPREADS.log())

    def forward(self, x):
        pyro.module("prior", self)
        scales = self.log_scales.exp()
        if self.kind == "Normal":
            return dist.Normal(self.locs[0], scales[0]).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), dist.Normal(self.locs, scales).to_event(1))

    def programs(self):
        return program(prior=self, output=lambda z: around(z.detach()))


@pytest.mark.parametrize("kind", ["Normal", "mixture"])
@pytest.mark.parametrize("kernel", [Gaussian(0.8), InverseMultiquadratic.multiscale(2.0)], ids=["gaussian", "authors"])
def test_a_prior_that_learns_gets_the_gradient_of_the_closed_form(kind, kernel):
    net, x = Learning(kind), rows(N, 2)
    loss_fn = WAELoss(MMD(kernel), penalty_weight=1.0)(*net.programs())
    loss_fn(x).backward()
    for parameter in (net.locs, net.log_scales) if kind == "Normal" else net.parameters():
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for i in range(len(flat)):
            ends = []
            for step in (1e-5, -2e-5):
                flat[i] += step
                ends.append(loss_fn(x).item())
            flat[i] += 1e-5
            assert gradient[i].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-9)
        assert gradient.abs().max() > 1e-3


def test_a_mixture_that_learns_moves_to_the_codes_by_svi():
    net = Learning("mixture")
    x = torch.cat([rows(30, 2) * 0.3 - 2, rows(10, 2) * 0.3 + 2])
    svi = pyro.infer.SVI(
        *net.programs(), pyro.optim.Adam({"lr": 0.1}), loss=WAELoss(MMD(Gaussian(1.0)), penalty_weight=100.0)
    )
    for _ in range(100):
        svi.step(x)
    order = net.locs[:, 0].argsort()
    torch.testing.assert_close(net.locs[order].detach(), torch.tensor([[-2.0, -2], [2, 2]]).double(), atol=0.25, rtol=0)
    assert net.logits.softmax(0)[order[0]].item() == pytest.approx(0.75, abs=0.05)
    assert net.log_scales.exp().max() < 0.5


# From one step to the next


def test_the_value_follows_a_prior_and_a_kernel_that_change():
    loc, kernel, codes = torch.zeros(2), 2.0 * InverseMultiquadratic(1.0), torch.ones(4, 2)
    mmd, context = MMD(kernel), PenaltyContext(prior=lambda: around(loc))

    def change_factor():
        kernel.factor = 3.0

    def change_length():
        kernel.kernel = InverseMultiquadratic(2.0)

    for change in (lambda: loc.fill_(1.0), change_factor, change_length):
        before = mmd(codes, torch.zeros(4, 2), context)
        change()
        after = mmd(codes, torch.zeros(4, 2), context)
        assert after != before
        assert after == MMD(eval(repr(kernel)))(codes, torch.zeros(4, 2), context)


def test_a_mean_first_needed_in_inference_can_be_trained_with():
    mmd, codes = MMD(Gaussian(1.0)), torch.ones(4, 2)
    context = PenaltyContext(prior=lambda: around(torch.zeros(2)))
    with torch.inference_mode():
        mmd(codes, torch.randn(4, 2), context)
    mmd(codes.requires_grad_(), torch.randn(4, 2), context).backward()
