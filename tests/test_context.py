"""What a penalty learns beyond draws: the prior's density, the encoder's variance, and who uses them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import around, delta
from pyro import poutine
from pyro.infer import SVI
from references import PARTICLES, Seen, every_particles, mean_is_zero, nested, program, rows
from torch import nn

from pyro_wae import WAELoss
from pyro_wae.kernels import Gaussian, RationalQuadratic
from pyro_wae.penalties import (
    MMD,
    Chain,
    FunctionPenalty,
    KernelStein,
    LogVarianceL1,
    PenaltyContext,
    PosteriorKL,
    Sinkhorn,
    UnitVarianceKL,
)

N = 12

# What a conditional prior is compared with is the subject of another file.
pytestmark = pytest.mark.filterwarnings("ignore:The prior of latent site")


def seen_by(model, guide, x, penalty=None, **options):
    contexts = Seen()
    WAELoss(contexts if penalty is None else {penalty: contexts}, data_plate="data", **options).differentiable_loss(
        model, guide, x
    )
    ((codes, _, context),) = contexts.calls
    return codes, context


PRIOR_OF_ROOT = dist.Normal(torch.tensor([1.0, -1.0]).double(), 0.7).to_event(1)
root, root_guide = program(lambda x: dist.Normal(x, 0.3).to_event(1), lambda x: PRIOR_OF_ROOT)
conditional, _ = program(prior=lambda x: dist.Normal(2 * x, x.abs() + 1).to_event(1))


def hierarchical(x):
    with pyro.plate("data", len(x)):
        z1 = pyro.sample("z1", dist.Normal(x.new_zeros(1), 1.5).to_event(1))
        z2 = pyro.sample("z2", dist.Normal(2 * z1, 0.5).to_event(1))
        pyro.sample("x", around(torch.cat([z1, z2], -1)), obs=x)


def hierarchical_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z1", dist.Normal(x[:, :1], 0.3).to_event(1))
        pyro.sample("z2", dist.Normal(x[:, 1:], 0.2).to_event(1))


def time_series():
    """Inner plates: two steps, each of two numbers, whose prior differs from step to step."""
    loc = torch.tensor([[[1.0, 2.0]], [[-1.0, 0.0]]]).double()
    model, guide = program(
        lambda x: dist.Normal(x, torch.tensor([0.3, 0.5]).double()).to_event(1),
        lambda x: dist.Normal(loc, 0.7).to_event(1),
        plate=lambda x: nested(pyro.plate("steps", 2, dim=-2), pyro.plate("data", N, dim=-1)),
    )
    return lambda x: model(x.expand(2, -1, -1)), lambda x: guide(x.expand(2, -1, -1))


def two_data_levels():
    """The data plate left of the inner one."""
    return program(
        lambda x: dist.Normal(x, 0.3),
        lambda x: dist.Normal(torch.tensor([0.5, -2.0]).double(), 0.7),
        lambda z: dist.Normal(z, 1),
        plate=lambda x: nested(pyro.plate("data", N, dim=-2), pyro.plate("parts", 2, dim=-1)),
    )


PROGRAMS = {
    "root": (root, root_guide),
    "conditional": (conditional, root_guide),
    "hierarchical": (hierarchical, hierarchical_guide),
    "inner plate": time_series(),
    "inner plate at the right": two_data_levels(),
}


def sites_of(name, code):
    """The values of the latent sites, from one run's codes (n, d), written for each program."""
    if name == "hierarchical":
        return {"z1": code[:, :1], "z2": code[:, 1:]}
    if name == "inner plate":
        return {"z": torch.stack([code[:, :2], code[:, 2:]])}
    return {"z": code}


def pyros_log_prob(name, code, x):
    """One number a datum: the log_prob of the latent sites of the model conditioned on the codes."""
    values = sites_of(name, code)
    trace = poutine.trace(poutine.condition(PROGRAMS[name][0], data=values)).get_trace(x)
    trace.compute_log_prob()
    total = 0
    for site in values:
        log_prob = trace.nodes[site]["log_prob"]
        if name == "inner plate":
            log_prob = log_prob.sum(0)
        if name == "inner plate at the right":
            log_prob = log_prob.sum(1)
        total = total + log_prob
    return total


@pytest.mark.parametrize("name", PROGRAMS)
@every_particles
def test_the_log_density_is_pyros(name, options):
    x = rows(N, 2)
    codes, context = seen_by(*PROGRAMS[name], x, **options)
    more = rows(2 * len(codes), *codes.shape[1:])
    for z in (codes, more):
        values = context.prior_log_prob(z)
        assert values.shape == z.shape[:2]
        for value, code in zip(values, z, strict=True):
            torch.testing.assert_close(value, pyros_log_prob(name, code, x))


@every_particles
def test_its_derivatives_are_partial_ones_of_the_joint_density(options):
    """log p = -z1^2 / (2 1.5^2) - (z2 - 2 z1)^2 / (2 0.5^2), where z2 is held fixed when z1 moves."""
    codes, context = seen_by(hierarchical, hierarchical_guide, rows(N, 2), **options)
    z = codes.clone().requires_grad_()
    (score,) = torch.autograd.grad(context.prior_log_prob(z).sum(), z)
    z1, z2 = codes[..., 0], codes[..., 1]
    residual = (z2 - 2 * z1) / 0.25
    torch.testing.assert_close(score, torch.stack([-z1 / 2.25 + 2 * residual, -residual], -1))


def test_the_log_density_of_a_learnt_prior_has_a_gradient():
    loc = nn.Parameter(torch.zeros(2).double())

    codes, context = seen_by(program(prior=lambda x: around(loc))[0], root_guide, rows(N, 2))
    (slope,) = torch.autograd.grad(context.prior_log_prob(codes).sum(), loc)
    torch.testing.assert_close(slope, codes.detach().sum((0, 1)))


def test_a_subsampled_plates_n_over_b_is_no_part_of_it():
    programs = program(
        lambda x: delta(2 * x), lambda x: around(2 * x), plate=lambda x: pyro.plate("data", N, subsample_size=len(x))
    )
    codes, context = seen_by(*programs, rows(4, 2))
    # Each code is its own prior's mean, so that the log density is the normaliser for the data of this very step.
    expected = dist.Normal(0.0, 1.0).log_prob(torch.zeros(())).double() * 2
    torch.testing.assert_close(context.prior_log_prob(codes), expected.expand(1, 4), rtol=1e-6, atol=0)
    assert context.data_size == N


def test_under_a_mask_and_for_one_of_several_sites_no_density_is_known():
    x = rows(N, 2)
    with poutine.mask(mask=torch.arange(N) < 7):
        _, context = seen_by(root, root_guide, x)
    assert context.prior is None
    assert context.prior_log_prob is None
    contexts = Seen()
    WAELoss({"z1": contexts, "z2": None}).loss(hierarchical, hierarchical_guide, x)
    assert contexts.context.prior_log_prob is None


# The encoder's variance


@every_particles
def test_the_encoders_variance_is_laid_out_as_the_codes(options):
    x = rows(N, 2)
    for name, expected in {
        "root": torch.tensor([0.09, 0.09]),
        "hierarchical": torch.tensor([0.09, 0.04]),
        "inner plate": torch.tensor([0.09, 0.25, 0.09, 0.25]),
        "inner plate at the right": torch.tensor([0.09, 0.09]),
    }.items():
        codes, context = seen_by(*PROGRAMS[name], x, **options)
        torch.testing.assert_close(context.encoder_variance(), expected.double().expand_as(codes), check_stride=False)


def test_masked_numbers_count_as_unit_variance_and_masked_data_are_left_out():
    mask = torch.ones(N, 2, dtype=torch.bool)
    mask[3] = False
    mask[5, 1] = False

    model, guide = (poutine.mask(run, mask=mask) for run in two_data_levels())
    codes, context = seen_by(model, guide, rows(N, 2))
    assert codes.shape == (1, N - 1, 2)
    expected = torch.full((1, N - 1, 2), 0.09).double()
    expected[0, 4, 1] = 1
    torch.testing.assert_close(context.encoder_variance(), expected)


# Guards through the loss


@pytest.mark.parametrize("guard", [LogVarianceL1, UnitVarianceKL])
@every_particles
def test_a_guard_alone_trains_the_variance_to_1(guard, options):
    # One log-deviation for each number, and no pull on it from the cost.
    start = torch.tensor([-3.0, 2.0]).double()
    model, guide = program(
        lambda x: dist.Normal(x, pyro.param("log_scale", start).exp()).to_event(1), output=lambda z: around(z.detach())
    )
    loss = WAELoss(guard(0.1), **options)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss=loss)
    svi.step(rows(N, 2))
    # |2 log s| is 6 and 4; (s^2 - 2 log s - 1) / 2 is (e^-6 + 5) / 2 and (e^4 - 5) / 2.
    expected = 10 if guard is LogVarianceL1 else (math.exp(-6) + math.exp(4)) / 2
    assert loss.terms.penalty.item() == pytest.approx(0.1 * expected)
    for _ in range(120):
        svi.step(rows(N, 2))
    torch.testing.assert_close(pyro.param("log_scale").exp().detach(), torch.ones(2).double(), atol=0.15, rtol=0)


@pytest.mark.parametrize("guard", [LogVarianceL1, UnitVarianceKL])
@pytest.mark.parametrize("penalty", [lambda g: g, lambda g: MMD() + 0.1 * g, lambda g: {"z": g}])
def test_a_guard_of_a_deterministic_guide_is_refused_by_the_sites_name(guard, penalty):
    _, guide = program(lambda x: delta(x).mask(True))
    with pytest.raises(ValueError, match=r"guide is deterministic at site 'z' \(Delta\).*Leave the guard out"):
        WAELoss(penalty(guard())).loss(root, guide, rows(N, 2))


# The Stein discrepancy through the loss


class Unsampled(dist.TorchDistribution):
    """A density without a sampler: N(loc, 1), unnormalised."""

    arg_constraints: dict = {}  # noqa: RUF012
    support = dist.constraints.real_vector

    def __init__(self, loc, batch_shape=()):
        self.loc = loc
        super().__init__(torch.Size(batch_shape), loc.shape, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return Unsampled(self.loc, batch_shape)

    def sample(self, sample_shape=()):
        raise NotImplementedError("This prior cannot be sampled.")

    def log_prob(self, value):
        return -(value - self.loc).square().sum(-1) / 2


@pytest.mark.parametrize("options", PARTICLES[:2], ids=["one", "sequential"])
def test_a_prior_that_cannot_be_sampled_trains_with_kernel_stein(options):
    x, start = rows(60, 2), 0.3 * rows(60, 2)
    model, guide = program(
        lambda x: delta(pyro.param("codes", start)),
        lambda x: Unsampled(torch.tensor([2.0, -1.0]).double()),
        lambda z: around(z.detach()),
    )
    loss = WAELoss(KernelStein(RationalQuadratic(0.5, bandwidth=1.4)), **options)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss=loss)
    svi.step(x)
    first = loss.terms.penalty
    for _ in range(100):
        svi.step(x)
    assert loss.terms.penalty < 0.1 * first
    torch.testing.assert_close(
        pyro.param("codes").mean(0).detach(), torch.tensor([2.0, -1.0]).double(), atol=0.3, rtol=0
    )
    with pytest.raises(ValueError, match=r"prior at site 'z' \(Unsampled\) cannot be drawn"):
        WAELoss(MMD(), penalty_weight=1.0).loss(model, guide, x)


@pytest.mark.parametrize("kind", ["conditional", "hierarchical"])
def test_null_of_kernel_stein_where_the_guide_is_the_prior_has_mean_0(kind):
    """Null: each datum's codes follow its own prior, n = 30; 120 steps, seed 0. It sees a shift by 3."""

    def guide(x, shift):
        with pyro.plate("data", len(x)):
            if kind == "conditional":
                pyro.sample("z", dist.Normal(2 * x + shift, x.abs() + 1).to_event(1))
            else:
                z1 = pyro.sample("z1", dist.Normal(x.new_zeros(1) + shift, 1.5).to_event(1))
                pyro.sample("z2", dist.Normal(2 * z1, 0.5).to_event(1))

    loss, x = WAELoss(KernelStein(RationalQuadratic(0.5, bandwidth=2.0))), rows(30, 2)
    for shift in (0.0, 3.0):
        values = []
        for _ in range(120):
            loss.loss(lambda x, _: PROGRAMS[kind][0](x), guide, x, shift)
            values.append(loss.terms.penalty)
        assert mean_is_zero(torch.stack(values)) == (shift == 0)


def test_kernel_stein_of_incomplete_codes_is_refused():
    x, match = rows(N, 2), "density of whole codes.*mask.*one latent site of several.*Write MMD"
    penalty = KernelStein(Gaussian(1.0), log_prob=lambda z: -z.square().sum(1) / 2)
    with pytest.raises(ValueError, match=match), poutine.mask(mask=torch.arange(N) < 7):
        WAELoss(penalty).loss(root, root_guide, x)
    with pytest.raises(ValueError, match=match):
        WAELoss({"z1": penalty, "z2": None}).loss(hierarchical, hierarchical_guide, x)


class Kept(dist.TorchDistribution):
    """A Normal around each datum that keeps its parameters in a container."""

    arg_constraints: dict = {}  # noqa: RUF012
    has_rsample = True

    def __init__(self, loc, container):
        self.kept = container(loc)
        super().__init__(loc.shape[:1], loc.shape[1:], validate_args=False)

    def loc(self):
        return self.kept["loc"] if isinstance(self.kept, dict) else self.kept.loc

    def rsample(self, sample_shape=()):
        return self.loc() + torch.randn(torch.Size(sample_shape) + self.loc().shape, dtype=self.loc().dtype)


@pytest.mark.parametrize(
    "container", [lambda loc: {"loc": loc}, lambda loc: SimpleNamespace(loc=loc)], ids=["dict", "namespace"]
)
def test_a_prior_that_keeps_its_parameters_in_a_container_is_seen_to_vary(container):
    seen = Seen()
    WAELoss(seen).loss(*program(delta, lambda x: Kept(x, container)), rows(12, 2))
    assert seen.context.shared_data


def gap(codes, prior):
    return (codes.mean(0) - prior.mean(0)).square().sum()


@pytest.mark.parametrize("kind", ["function", "sinkhorn"])
@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_each_particle_is_compared_with_prior_samples_of_all_data(kind, repeats):
    """The data differ: a half of them has another mean."""
    if kind == "sinkhorn":
        pytest.importorskip("geomloss")
    penalty = Sinkhorn(blur=0.01, scaling=0.9) if kind == "sinkhorn" else FunctionPenalty(gap)
    centres = torch.arange(8.0).double()[:, None] * torch.ones(8, 2).double()
    value = penalty(centres.expand(2, 8, 2), centres.repeat(repeats, 1), PenaltyContext(shared_data=True))
    assert value.item() == pytest.approx(0, abs=1e-6)
    # Beside a condition, too: the label of a datum says where its codes lie.
    context = PenaltyContext(condition=centres[:, :1])
    assert penalty(centres.expand(2, 8, 2), centres.repeat(repeats, 1), context).item() == pytest.approx(0, abs=1e-6)


# By itself


@pytest.mark.parametrize(
    ("penalty", "name", "right", "wrong"),
    [
        (lambda: LogVarianceL1(), "encoder_variance", (N, 4), (N,)),
        (lambda: UnitVarianceKL(), "encoder_variance", (4,), (4, N)),
        (lambda: Chain(LogVarianceL1(), step_size=1), "encoder_variance", (N, 4), (2, N, 4)),
        (lambda: PosteriorKL(), "encoder_kl", (N,), (N, 4)),
        (lambda: Chain(MMD(Gaussian(1.0)), step_size=1), "kept", (N, 4), (4, N)),
    ],
)
def test_what_a_function_returns_is_laid_out_as_the_codes_or_refused(penalty, name, right, wrong):
    codes, prior, whole = rows(N, 4), rows(N, 4), {"encoder_kl": (1, N)}.get(name, (1, N, 4))
    values = torch.rand(right) > 0.2 if name == "kept" else torch.rand(right).double() + 0.5

    def value(found):
        return penalty()(codes, prior, PenaltyContext(shared_data=True, **{name: lambda: found}))

    torch.testing.assert_close(value(values), value(values.expand(whole)))
    for found in (torch.rand(wrong), 2.0, None if name != "kept" else [True]):
        with pytest.raises(
            ValueError, match=rf"{name} must return a tensor of shape \({str(whole)[1:-1]}\) here, found"
        ):
            value(found)


def test_a_chain_with_masks_takes_prior_samples_in_multiples_of_the_data():
    context = PenaltyContext(shared_data=True, kept=lambda: torch.ones(1, N, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=f"multiples of the {N} data.*found 15. Draw the prior"):
        Chain(step_size=1)(rows(N, 4), rows(15, 4), context)
