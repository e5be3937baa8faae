"""What a penalty learns beyond draws: the prior's density, the encoder's variance, and who uses them."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from references import Seen, mean_is_zero, rows
from torch import nn

from pyro_wae import WAELoss
from pyro_wae.kernels import Gaussian, RationalQuadratic
from pyro_wae.penalties import MMD, KernelStein, LogVarianceL1, UnitVarianceKL

N = 12
PARTICLES = [
    {},
    {"num_particles": 3},
    {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 2},
]
every_particles = pytest.mark.parametrize("options", PARTICLES, ids=["one", "sequential", "vectorised"])

# What a conditional prior is compared with is the subject of another file.
pytestmark = pytest.mark.filterwarnings("ignore:The prior of latent site")


def seen_by(model, guide, x, penalty=None, **options):
    contexts = Seen()
    WAELoss(contexts if penalty is None else {penalty: contexts}, data_plate="data", **options).differentiable_loss(
        model, guide, x
    )
    ((codes, _, context),) = contexts.calls
    return codes, context


def observe(z, x):
    pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x)


def root(x):
    with pyro.plate("data", len(x)):
        observe(pyro.sample("z", dist.Normal(torch.tensor([1.0, -1.0]).double(), 0.7).to_event(1)), x)


def root_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, 0.3).to_event(1))


def conditional(x):
    with pyro.plate("data", len(x)):
        observe(pyro.sample("z", dist.Normal(2 * x, x.abs() + 1).to_event(1)), x)


def hierarchical(x):
    with pyro.plate("data", len(x)):
        z1 = pyro.sample("z1", dist.Normal(x.new_zeros(1), 1.5).to_event(1))
        z2 = pyro.sample("z2", dist.Normal(2 * z1, 0.5).to_event(1))
        observe(torch.cat([z1, z2], -1), x)


def hierarchical_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z1", dist.Normal(x[:, :1], 0.3).to_event(1))
        pyro.sample("z2", dist.Normal(x[:, 1:], 0.2).to_event(1))


def time_series(x):
    """Inner plates: two steps, each of two numbers, whose prior differs from step to step."""
    loc = torch.tensor([[[1.0, 2.0]], [[-1.0, 0.0]]]).double()
    with pyro.plate("steps", 2, dim=-2), pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(loc, 0.7).to_event(1))
        pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x.expand(2, -1, -1))


def time_series_guide(x):
    with pyro.plate("steps", 2, dim=-2), pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(x.expand(2, -1, -1), torch.tensor([0.3, 0.5]).double()).to_event(1))


def two_data_levels(x):
    """The data plate left of the inner one."""
    with pyro.plate("data", len(x), dim=-2), pyro.plate("parts", 2, dim=-1):
        z = pyro.sample("z", dist.Normal(torch.tensor([0.5, -2.0]).double(), 0.7))
        pyro.sample("x", dist.Normal(z, 1), obs=x)


def two_data_levels_guide(x):
    with pyro.plate("data", len(x), dim=-2), pyro.plate("parts", 2, dim=-1):
        pyro.sample("z", dist.Normal(x, 0.3))


PROGRAMS = {
    "root": (root, root_guide),
    "conditional": (conditional, root_guide),
    "hierarchical": (hierarchical, hierarchical_guide),
    "inner plate": (time_series, time_series_guide),
    "inner plate at the right": (two_data_levels, two_data_levels_guide),
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

    def model(x):
        with pyro.plate("data", len(x)):
            observe(pyro.sample("z", dist.Normal(loc, 1).to_event(1)), x)

    codes, context = seen_by(model, root_guide, rows(N, 2))
    (slope,) = torch.autograd.grad(context.prior_log_prob(codes).sum(), loc)
    torch.testing.assert_close(slope, codes.detach().sum((0, 1)))


def test_a_subsampled_plates_n_over_b_is_no_part_of_it():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=4) as index:
            observe(pyro.sample("z", dist.Normal(2 * x[index], 1).to_event(1)), x[index])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=4) as index:
            pyro.sample("z", dist.Delta(2 * x[index], event_dim=1))

    codes, context = seen_by(model, guide, rows(N, 2))
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

    def model(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("parts", 2, dim=-1), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1))
            pyro.sample("x", dist.Normal(z, 1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("parts", 2, dim=-1), poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(x, 0.3))

    codes, context = seen_by(model, guide, rows(N, 2))
    assert codes.shape == (1, N - 1, 2)
    expected = torch.full((1, N - 1, 2), 0.09).double()
    expected[0, 4, 1] = 1
    torch.testing.assert_close(context.encoder_variance(), expected)


# Guards through the loss


class Encoder(nn.Module):
    """One log-deviation for each number, and no pull on it from the cost."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([-3.0, 2.0]).double())

    def model(self, x):
        with pyro.plate("data", len(x)):
            observe(pyro.sample("z", dist.Normal(x.new_zeros(2), 1).to_event(1)).detach(), x)

    def guide(self, x):
        pyro.module("encoder", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, self.log_scale.exp()).to_event(1))


@pytest.mark.parametrize("guard", [LogVarianceL1, UnitVarianceKL])
@every_particles
def test_a_guard_alone_trains_the_variance_to_1(guard, options):
    net = Encoder()
    loss = WAELoss(guard(0.1), **options)
    svi = SVI(net.model, net.guide, pyro.optim.Adam({"lr": 0.1}), loss=loss)
    svi.step(rows(N, 2))
    # |2 log s| is 6 and 4; (s^2 - 2 log s - 1) / 2 is (e^-6 + 5) / 2 and (e^4 - 5) / 2.
    expected = 10 if guard is LogVarianceL1 else (math.exp(-6) + math.exp(4)) / 2
    assert loss.terms.penalty.item() == pytest.approx(0.1 * expected)
    for _ in range(120):
        svi.step(rows(N, 2))
    torch.testing.assert_close(net.log_scale.exp().detach(), torch.ones(2).double(), atol=0.15, rtol=0)


@pytest.mark.parametrize("guard", [LogVarianceL1, UnitVarianceKL])
def test_a_guard_beside_a_penalty_holds_the_variance_up(guard):
    """Codes of the data are matched already, so that MMD alone would have the encoder be deterministic."""
    scales = []
    for penalty in (MMD(Gaussian(1.0)), MMD(Gaussian(1.0)) + guard(1.0)):
        pyro.clear_param_store()
        net, x = Encoder(), rows(200, 2)
        net.log_scale.data.fill_(-1.0)
        svi = SVI(net.model, net.guide, pyro.optim.Adam({"lr": 0.1}), loss=WAELoss(penalty))
        for _ in range(40):
            svi.step(x)
        scales.append(net.log_scale.detach().exp())
    assert (scales[0] < 0.4).all()
    assert (scales[1] > 0.7).all()


@pytest.mark.parametrize("guard", [LogVarianceL1, UnitVarianceKL])
@pytest.mark.parametrize("penalty", [lambda g: g, lambda g: MMD() + 0.1 * g, lambda g: {"z": g}])
def test_a_guard_of_a_deterministic_guide_is_refused_by_the_sites_name(guard, penalty):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x).to_event(1).mask(True))

    with pytest.raises(ValueError, match=r"guide is deterministic at site 'z' \(Delta\).*Leave the guard out"):
        WAELoss(penalty(guard())).loss(root, guide, rows(N, 2))


# The Stein discrepancy through the loss


def stein_by_hand(codes, score, d):
    """The Gaussian kernel of bandwidth 1: h = k (s.s' + (s - s').(z - z') + d - |z - z'|^2) over pairs i != j."""
    n, total = len(codes), 0.0
    for i in range(n):
        for j in range(n):
            if i != j:
                gap = codes[i] - codes[j]
                square = gap.square().sum()
                inner = score[i] @ score[j] + (score[i] - score[j]) @ gap + d - square
                total = total + torch.exp(-square / 2) * inner
    return total / (n * (n - 1))


def test_kernel_stein_of_a_root_prior_is_its_formula():
    loss, x = WAELoss(KernelStein(Gaussian(1.0))), rows(N, 2)
    pyro.set_rng_seed(1)
    loss.loss(root, root_guide, x)
    pyro.set_rng_seed(1)
    z = x + 0.3 * torch.randn(N, 2, dtype=torch.float64)
    score = -(z - torch.tensor([1.0, -1.0])) / 0.7**2
    assert loss.terms.penalty.item() == pytest.approx(stein_by_hand(z, score, 2).item(), rel=1e-6)


def test_kernel_stein_takes_its_length_from_the_priors_variance():
    loss = WAELoss(KernelStein())
    loss.loss(root, root_guide, rows(N, 2))
    (length,) = [v for name, v in loss.penalty.state_dict().items() if name.endswith("squared_length")]
    assert length.item() == pytest.approx(2 * 0.7**2 * RationalQuadratic.squared_length_factor, rel=1e-6)


class Free(nn.Module):
    """Codes that are parameters, one for each datum."""

    def __init__(self, n, d, start):
        super().__init__()
        self.codes = nn.Parameter(start + 0.3 * rows(n, d))

    def guide(self, x):
        pyro.module("codes", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(self.codes, event_dim=1))


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
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Unsampled(torch.tensor([2.0, -1.0]).double()))
            pyro.sample("x", dist.Normal(z.detach(), 1).to_event(1), obs=x)

    net, x = Free(60, 2, 0.0), rows(60, 2)
    loss = WAELoss(KernelStein(RationalQuadratic(0.5, bandwidth=1.4)), **options)
    svi = SVI(model, net.guide, pyro.optim.Adam({"lr": 0.1}), loss=loss)
    svi.step(x)
    first = loss.terms.penalty
    for _ in range(100):
        svi.step(x)
    assert loss.terms.penalty < 0.1 * first
    torch.testing.assert_close(net.codes.mean(0).detach(), torch.tensor([2.0, -1.0]).double(), atol=0.3, rtol=0)
    with pytest.raises(NotImplementedError, match="cannot be sampled"):
        WAELoss(MMD(), penalty_weight=1.0).loss(model, net.guide, x)


def test_kernel_stein_trains_an_encoder_towards_a_hierarchical_prior():
    """Of fresh x ~ N(0, I) the codes (a x1, b x1 + c x2) have the prior's law at a = 1.5, b = a, c = 1."""
    a, b, c = (nn.Parameter(torch.tensor(value).double()) for value in (0.5, 0.0, 0.3))

    def model(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x.new_zeros(1), 1.5).to_event(1))
            z2 = pyro.sample("z2", dist.Normal(z1, 1.0).to_event(1))
            observe(torch.cat([z1, z2], -1), x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z1", dist.Delta(a * x[:, :1], event_dim=1))
            pyro.sample("z2", dist.Delta(b * x[:, :1] + c * x[:, 1:], event_dim=1))

    loss = WAELoss(KernelStein(RationalQuadratic(0.5, bandwidth=2.0)), cost=lambda x, g: 0 * g.sum(-1))
    optimiser = torch.optim.Adam([a, b, c], lr=0.1)
    for _ in range(100):
        optimiser.zero_grad()
        loss.differentiable_loss(model, guide, rows(150, 2)).backward()
        optimiser.step()
    assert a.item() == pytest.approx(1.5, abs=0.3)
    assert b.item() == pytest.approx(1.5, abs=0.3)
    assert abs(c.item()) == pytest.approx(1.0, abs=0.2)


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
