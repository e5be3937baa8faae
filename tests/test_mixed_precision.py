"""Nets in half precision, and everything that is summed over data in float32."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import AutoEncoder
from torch import nn

from pyro_wae import WAELoss
from pyro_wae.costs import AbsoluteError, ExpectedSquaredError, FunctionCost, NegativeLogLikelihood, SquaredError
from pyro_wae.kernels import Gaussian
from pyro_wae.penalties import (
    MMD,
    CramerWold,
    JensenShannon,
    LogVarianceL1,
    MaxSlicedWasserstein,
    SlicedWasserstein,
    UnitVarianceKL,
)
from pyro_wae.weights import Constraint

pytestmark = pytest.mark.usefixtures("single_precision")

N, X, D = 100, 20, 2
UNIT_ROUNDOFF = 2.0**-8
"""Of bfloat16, which keeps 8 bits: the largest relative error of rounding to the nearest."""


def bf16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def mlp(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, outputs))


class Net(AutoEncoder):
    """A deterministic encoder and a decoder, without layers that look at other data."""

    def __init__(self, **options):
        super().__init__(X, D, **{"encoder": mlp(X, D), "decoder": mlp(D, X), **options})


def of_both(numbers):
    loc, log_scale = numbers.chunk(2, -1)
    return dist.Normal(loc, log_scale.exp()).to_event(1)


def random_net():
    """A random encoder, whose scale is in float32 under autocast, where its mean is not."""
    return Net(encoder=mlp(X, 2 * D), code=of_both)


def data(n=N):
    generator = torch.Generator().manual_seed(3)
    signal = torch.randn(n, D, generator=generator) @ torch.randn(D, X, generator=generator)
    return signal + 0.5 * torch.randn(n, X, generator=generator)


# Costs


def half(*shape, dtype=torch.bfloat16):
    return (3 * torch.randn(*shape)).to(dtype)


COSTS = {
    "squared": (SquaredError(), lambda g: dist.Normal(g, 1).to_event(1), lambda x, g, scale: (x - g).square().sum(-1)),
    "absolute": (AbsoluteError(), lambda g: dist.Normal(g, 1).to_event(1), lambda x, g, scale: (x - g).abs().sum(-1)),
    "expected": (
        ExpectedSquaredError(),
        lambda g: dist.Laplace(g, g.abs() + 1).to_event(1),
        lambda x, g, scale: (x - g).square().sum(-1) + 2 * scale.square().sum(-1),
    ),
    "function": (
        FunctionCost(lambda x, g: (x - g).square().sum(-1)),
        lambda g: dist.Normal(g, 1).to_event(1),
        lambda x, g, scale: (x - g).square().sum(-1),
    ),
    "likelihood": (
        NegativeLogLikelihood(),
        lambda g: dist.Laplace(g, 1).to_event(1),
        lambda x, g, scale: (x - g).abs().sum(-1) + g.shape[-1] * torch.tensor(2.0).double().log(),
    ),
}


@pytest.mark.parametrize("autocast", [nullcontext, bf16], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", COSTS)
def test_a_cost_of_half_precision_is_that_of_the_same_numbers_in_float64(name, dtype, autocast):
    """700 squares of sums near 10 000: in bfloat16 the last digit of a sum is 64, and float16 ends at 65 504."""
    cost, make, formula = COSTS[name]
    x, g = half(5, 700, dtype=dtype), half(5, 700, dtype=dtype)
    with autocast():
        value = cost(make(g), x)
    # The Laplace scale |g| + 1 is the distribution's own, rounded before the cost sees it.
    expected = formula(x.double(), g.double(), (g.abs() + 1).double())
    tolerance = 4 * torch.finfo(dtype).eps if name == "expected" else 1e-6  # its variance is the distribution's own
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_codes_and_data_in_eight_bits_are_cast_up(dtype):
    x, y = torch.randn(20, 2).to(dtype), torch.randn(20, 2).to(dtype)
    for penalty in (MMD(Gaussian(1.0)), CramerWold(0.5)):
        value = penalty(x, y)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, penalty(x.float(), y.float()))
    torch.testing.assert_close(
        SquaredError()(dist.Normal(y.float(), 1).to_event(1), x), (x.float() - y.float()).square().sum(1)
    )
    SlicedWasserstein()(x, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_a_likelihood_of_labels_is_summed_in_float32(dtype):
    logits, labels = half(5, 700, 4, dtype=dtype), torch.randint(4, (5, 700))
    site = dist.Categorical(logits=logits).to_event(1)
    log_probs = site.base_dist.logits.double()  # as the distribution has rounded them
    expected = -log_probs.gather(2, labels[..., None]).sum((1, 2))
    value = NegativeLogLikelihood()(site, labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)


def test_a_likelihood_with_a_matrix_product_is_not_rounded_by_autocast():
    loc, factor, x = torch.randn(5, X), torch.randn(5, X, 3), torch.randn(5, X)
    site = dist.LowRankMultivariateNormal(loc, factor, torch.ones(5, X))
    covariance = factor.double() @ factor.double().mT + torch.eye(X)
    expected = -torch.distributions.MultivariateNormal(loc.double(), covariance).log_prob(x.double())
    with bf16():
        value = NegativeLogLikelihood()(site, x)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)


def test_the_distribution_of_a_likelihood_stays_as_it_was():
    site = dist.Laplace(half(5, 3), 1).to_event(1).mask(torch.ones(5).bool())
    NegativeLogLikelihood()(site, torch.zeros(5, 3))
    assert site.base_dist.base_dist.loc.dtype == torch.bfloat16


def test_a_function_gets_float32_and_what_it_returns_in_half_precision_is_averaged_in_float32():
    dtypes = set()

    def cost(x, g):
        dtypes.update([x.dtype, g.dtype])
        return (x - g).square().sum(-1).bfloat16()

    net, x = Net(), data()
    loss = WAELoss(cost=cost, penalty_weight=0.0)
    with bf16():
        found = loss.differentiable_loss(net.model, net.guide, x.bfloat16())
        output = net.decoder(net.encoder(x.bfloat16()))
    expected = (x.bfloat16().float() - output.float()).square().sum(-1).bfloat16().double().mean()
    assert dtypes == {torch.float32}
    assert loss.terms.cost.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


class HalfCost(SquaredError):
    def forward(self, distribution, value):
        return super().forward(distribution, value).bfloat16()


@pytest.mark.parametrize("cost", [None, HalfCost(), lambda x, g: (x - g).square().flatten(1).sum(1)])
def test_inner_plates_and_the_mean_over_data_are_summed_in_float32(cost):
    """700 costs of 1 and 1/256 in each of 50 data, all of which bfloat16 can say, and their sum it cannot."""

    def model(x):
        with pyro.plate("data", 50, dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, D), 1).to_event(1))
            with pyro.plate("inner", 700, dim=-1):
                pyro.sample("x", dist.Normal(x * 0 + z.sum(-1) * 0, 1), obs=x)

    def guide(x):
        with pyro.plate("data", 50, dim=-2):
            pyro.sample("z", dist.Normal(torch.zeros(1, D), 1).to_event(1))

    x = torch.where(torch.rand(50, 700) < 0.5, 1.0, 1 / 16).bfloat16()
    loss = WAELoss(cost=cost, penalty_weight=0.0)
    found = loss.loss(model, guide, x)
    assert loss.terms.cost.dtype == torch.float32
    assert found == pytest.approx(x.double().square().sum(1).mean().item(), rel=1e-6)


# A step


PENALTIES = {
    "MMD": lambda: MMD(),
    "standardised": lambda: MMD(standardize=True),
    "sliced": lambda: SlicedWasserstein(20),
    "max-sliced": lambda: MaxSlicedWasserstein(),
    "adversary": lambda: JensenShannon(nn.Linear(D, 1)),
    "adversary of the caller": lambda: JensenShannon(nn.Linear(D, 1), optimizer=None),
    "guard": lambda: MMD() + LogVarianceL1(),
    "other guard": lambda: MMD() + UnitVarianceKL(),
    "function": lambda: lambda codes, prior: (codes.mean(0) - prior.mean(0)).square().sum(),
}


def test_the_penalty_gets_codes_and_prior_draws_of_float32():
    net, x, seen = Net(), data(), []

    def look(codes, prior):
        seen.extend([codes, prior])
        return (codes @ prior.mT).mean()

    with bf16():
        WAELoss(look, penalty_weight=1.0).differentiable_loss(net.model, net.guide, x)
    codes, prior = seen
    assert codes.dtype == prior.dtype == torch.float32
    assert torch.equal(codes, codes.bfloat16().float())
    assert not torch.equal(prior, prior.bfloat16().float())


def test_a_constraint_measures_the_same_under_autocast():
    states = []
    for context in (nullcontext, bf16):
        weight = Constraint(codes=50)
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            codes, prior = (torch.randn(1, N, D, generator=generator), torch.randn(N, D, generator=generator))
            with context():
                weight.observe(torch.tensor(3.0), codes + 0.3, prior)
        states.append(weight.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in ("weight", "differences", "trace"))


@pytest.mark.parametrize("penalty", [MMD, lambda: SlicedWasserstein(20)], ids=["MMD", "sliced"])
def test_a_condition_of_half_precision_is_compared_as_the_same_numbers_in_float32(penalty):
    def model(x, y):
        net.model(x)

    def guide(x, y):
        net.guide(x)

    net, x = Net(), data()
    y, found = x[:, :1].bfloat16(), []
    for condition in (y, y.float()):
        pyro.set_rng_seed(0)
        found.append(WAELoss(penalty(), penalty_weight=1.0, condition="y").loss(model, guide, x, condition))
    assert found[0] == found[1]


# A precision that is changed between steps


LOSSES = {
    "default": lambda: WAELoss(),
    "max-sliced": lambda: WAELoss(MaxSlicedWasserstein()),
    "default adversary": lambda: WAELoss(JensenShannon()),
    "default adversary of the caller": lambda: WAELoss(JensenShannon(optimizer=None)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)
def test_a_training_goes_on_in_another_precision(make, dtype):
    net, x = Net(), data()
    wae = make()(net.model, net.guide)
    for kind in (torch.float32, dtype, torch.float32):
        wae.to(kind)
        for _ in range(2):
            value = wae(x.to(kind))
            value.backward()
            assert value.isfinite()


@pytest.mark.parametrize("make", [MMD, lambda: MMD(standardize=True), MaxSlicedWasserstein, CramerWold])
def test_a_penalty_in_another_precision_has_the_value_it_had(make):
    """The squared length of codes this wide is infinite in float16."""
    penalty, codes, prior = make(), 600 * torch.randn(50, 8), 300 * torch.randn(50, 8)
    penalty(codes, prior)
    before = copy.deepcopy(penalty.state_dict())
    values = []
    for move in (lambda: penalty, penalty.half, penalty.double):
        pyro.set_rng_seed(0)
        with torch.no_grad():
            values.append(move()(codes, prior))
    assert values[0] > 0
    assert values[1] == values[2] == values[0]
    after = {name: value for name, value in penalty.state_dict().items() if isinstance(value, torch.Tensor)}
    assert all(value.dtype == before[name].dtype and torch.equal(value, before[name]) for name, value in after.items())


def test_what_a_constraint_has_measured_follows_a_device_and_no_precision():
    net, x = Net(), data()
    wae = WAELoss()(net.model, net.guide)
    for _ in range(2):
        wae(x)
    before = dict(wae.weight.named_buffers())
    after = dict(copy.deepcopy(wae).bfloat16().weight.named_buffers())
    assert all(torch.equal(value, after[name]) and value.dtype == after[name].dtype for name, value in before.items())
    away = dict(copy.deepcopy(wae).to("meta", torch.bfloat16).weight.named_buffers())
    assert all(value.is_meta and value.dtype == before[name].dtype for name, value in away.items())


# bfloat16 against float32


@pytest.mark.parametrize("penalty", [MMD(Gaussian(bandwidth=1.5)), SlicedWasserstein(20)], ids=["MMD", "sliced"])
@pytest.mark.slow
def test_over_200_steps_the_loss_in_bfloat16_is_within_its_rounding_of_that_in_float32(penalty):
    """At every step of a training in bfloat16: |loss - float32's| <= u |loss|, what rounding the loss alone would do.

    A net rounds its inputs, weights and outputs by up to u each, three times a layer; 2000 squared differences and the
    pairs of 100 codes average such errors out, and nothing that sums them may add its own.
    """
    net, x = Net(), data(400)
    wae = WAELoss(penalty, penalty_weight=10.0)(net.model, net.guide)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    errors, values = [], []
    for step in range(200):
        rows = x[torch.randperm(len(x))[:N]]
        pyro.set_rng_seed(step)
        with torch.no_grad():
            plain = wae(rows)
        pyro.set_rng_seed(step)
        with bf16():
            mixed = wae(rows)
        optimizer.zero_grad()
        mixed.backward()
        optimizer.step()
        errors.append(abs(mixed.item() / plain.item() - 1))
        values.append(plain.item())
    assert values[-1] < 0.3 * values[0]
    assert 0 < max(errors) <= UNIT_ROUNDOFF


@pytest.mark.parametrize("make_net", [Net, random_net])
def test_autocast_inside_model_and_guide_is_autocast_around_the_step(make_net):
    net, x, found = make_net(), data(), []

    def inside(run):
        return bf16()(run)

    for around, model, guide in ((bf16, net.model, net.guide), (nullcontext, inside(net.model), inside(net.guide))):
        net.zero_grad()
        pyro.set_rng_seed(1)
        with around():
            loss = WAELoss(MMD(Gaussian(bandwidth=1.5)), penalty_weight=10.0)(model, guide)(x)
        loss.backward()
        found.append((loss, gradients(net)))
    torch.testing.assert_close(*found, rtol=0, atol=0)


# With everything else


def gradients(net):
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters()])


@pytest.mark.parametrize("make", PENALTIES.values(), ids=PENALTIES)
def test_svi_under_autocast_goes_backward_without_it_and_every_part_is_float32(make):
    found = []
    for with_svi in (False, True):
        pyro.set_rng_seed(0)
        net, x, loss = random_net(), data(), WAELoss(make(), penalty_weight=10.0)
        with bf16():
            if with_svi:
                loss.loss_and_grads(net.model, net.guide, x)
            else:
                value = loss.differentiable_loss(net.model, net.guide, x)
        if not with_svi:
            value.backward()
            assert value.dtype == torch.float32
        terms = loss.terms
        assert {part.dtype for part in (terms.cost, terms.penalty, *terms.costs.values())} == {torch.float32}
        found.append(gradients(net))
    assert torch.equal(*found)
    assert found[0].isfinite().all()


def test_micro_batches_under_autocast_give_the_gradient_of_the_whole_batch():
    """Sums over data are taken in another order, of numbers rounded to bfloat16: u times a few."""
    net, x = Net(), data()
    found = []
    for rows in (None, 32):
        pyro.set_rng_seed(4)
        net.zero_grad()
        wae = WAELoss(MMD(Gaussian(bandwidth=1.5)), penalty_weight=10.0, micro_batch=rows)(net.model, net.guide)
        with bf16():
            loss = wae(x)
        loss.backward()
        found.append((loss.item(), gradients(net)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-2)
    assert (found[0][1] - found[1][1]).norm() <= 4 * UNIT_ROUNDOFF * found[0][1].norm()


# A GradScaler, on the CPU with float16 as on CUDA


def test_a_grad_scaler_scales_and_unscales_the_gradient():
    net, x = Net(), data()
    wae = WAELoss(MMD(Gaussian(bandwidth=1.5)), penalty_weight=10.0)(net.model, net.guide)
    optimizer = torch.optim.SGD(wae.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for step in range(4):
        found = []
        for scale in (False, True):
            pyro.set_rng_seed(step)
            optimizer.zero_grad()
            loss = wae(x)
            (scaler.scale(loss) if scale else loss).backward()
            if scale:
                scaler.unscale_(optimizer)
            found.append(gradients(net))
        assert torch.equal(*found)  # a power of two changes no digit
        scaler.step(optimizer)
        scaler.update()


def test_fp16_with_a_grad_scaler_trains_through_an_overflow():
    net, x = Net(), data(400)
    wae = WAELoss(MMD(), penalty_weight=10.0)(net.model, net.guide)
    optimizer = torch.optim.Adam(wae.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    before = [parameter.clone() for parameter in net.parameters()]
    losses, scales = [], []
    for _ in range(100):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = wae(x[torch.randperm(len(x))[:N]])
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
        if len(scales) == 1:
            assert scales[0] < 2.0**24
            assert all(map(torch.equal, before, net.parameters()))
    assert scales[-1] == scales[-50] > 0
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])


# Data of whole numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_data_have_the_likelihood_of_the_same_numbers_in_the_decoders_precision(kind, dtype):
    data = torch.tensor([[0, 1, 1], [1, 0, 1]])
    logits = torch.linspace(-2, 2, 6, dtype=torch.float64).reshape(2, 3).to(dtype)
    fn = dist.Bernoulli(logits=logits).to_event(1)
    assert torch.equal(NegativeLogLikelihood()(fn, data.to(kind)), -fn.log_prob(data.to(dtype)))


def test_whole_numbers_are_not_rounded_beside_a_decoder_in_float64():
    seconds = 1_700_000_000 + torch.arange(5)
    fn = dist.Normal(torch.full((5,), 1.7e9, dtype=torch.float64), 2.0)
    assert torch.equal(NegativeLogLikelihood()(fn, seconds), -fn.log_prob(seconds.double()))
