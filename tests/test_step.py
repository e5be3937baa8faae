"""A step of WAELoss against a WAE-MMD step written by hand in PyTorch, and its life inside Pyro and torch."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from pyro.infer.autoguide.effect import AutoHierarchicalNormalMessenger, AutoNormalMessenger
from pyro.nn import PyroModule, PyroParam
from pyro.optim import Adam
from pyro.poutine import runtime
from torch import nn

from pyro_wae import WAELoss, weights
from pyro_wae.costs import AbsoluteError, SquaredError
from pyro_wae.kernels import Gaussian, InverseMultiquadratic
from pyro_wae.penalties import MMD

N, D, X = 16, 3, 5
WEIGHT = 10.0
LENGTHS = (0.05, 0.15, 0.5, 5.0)  # of Laplace.multiscale(), the default
SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def kernel_by_hand(x, y, length):
    squares = ((x[:, None, :] - y[None, :, :]) ** 2).sum(2)
    return sum(factor * length / (factor * length + squares) for factor in SCALES)


def mmd_by_hand(codes, prior):
    n, m = len(codes), len(prior)
    # The mean squared distance of two independent draws: 2 d sigma^2 for N(0, sigma^2 I).
    length = ((prior[:, None] - prior[None]) ** 2).sum(2).sum().detach() / (m * (m - 1))
    qq, pp = kernel_by_hand(codes, codes, length), kernel_by_hand(prior, prior, length)
    off_n, off_m = 1 - torch.eye(n, dtype=codes.dtype), 1 - torch.eye(m, dtype=codes.dtype)
    within = (qq * off_n).sum() / (n * (n - 1)) + (pp * off_m).sum() / (m * (m - 1))
    return within - 2 * kernel_by_hand(codes, prior, length).mean()


def of_draws():
    """The penalty that mmd_by_hand computes."""
    return MMD(InverseMultiquadratic.multiscale(), closed_form=False)


class AutoEncoder(nn.Module):
    """Encoder and decoder in float64; the guide is a Normal, or a Delta for a deterministic encoder."""

    def __init__(self, *, stochastic=True):
        super().__init__()
        self.stochastic = stochastic
        self.encoder = nn.Linear(X, 2 * D)
        self.decoder = nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, X))
        self.double()

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(D), 1).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        loc, scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            fn = dist.Normal(loc, scale.exp()) if self.stochastic else dist.Delta(loc)
            pyro.sample("z", fn.to_event(1))


def closed_mmd_by_hand(codes, s=1.3):
    """The Gaussian kernel's U-statistic against N(0, I_d), whose means are Gaussian integrals."""
    n, d = codes.shape
    gram = torch.exp(-((codes[:, None] - codes[None]) ** 2).sum(2) / (2 * s**2))
    qq = (gram * (1 - torch.eye(n, dtype=codes.dtype))).sum() / (n * (n - 1))
    qp = (s**2 / (s**2 + 1)) ** (d / 2) * torch.exp(-(codes**2).sum(1) / (2 * (s**2 + 1)))
    return qq + (s**2 / (s**2 + 2)) ** (d / 2) - 2 * qp.mean()


PENALTIES = {
    "prior draws": (of_draws, mmd_by_hand),
    "known prior": (lambda: MMD(Gaussian(1.3)), lambda codes, prior: closed_mmd_by_hand(codes)),
}


def step_by_hand(net, x, mmd=mmd_by_hand):
    """Cost, penalty and loss, drawing in the order: codes, then prior."""
    loc, scale = net.encoder(x).chunk(2, -1)
    z = loc + scale.exp() * torch.randn(len(x), D, dtype=x.dtype) if net.stochastic else loc
    prior = torch.randn(len(x), D, dtype=x.dtype)
    cost = ((x - net.decoder(z)) ** 2).sum(1).mean()
    penalty = mmd(z, prior)
    return cost, penalty, cost + WEIGHT * penalty


def data(n=N):
    return torch.randn(n, X, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def grads(module):
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    module.zero_grad()
    return found


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value is not None
        torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=1e-10)


@pytest.fixture(params=[True, False], ids=["Normal", "Delta"])
def net(request):
    return AutoEncoder(stochastic=request.param)


def by_loss_and_grads(loss, net, x):
    value = loss.loss_and_grads(net.model, net.guide, x)
    assert isinstance(value, float)
    return value


def by_differentiable_loss(loss, net, x):
    value = loss.differentiable_loss(net.model, net.guide, x)
    assert value.shape == ()
    value.backward()
    return value.item()


def by_module(loss, net, x):
    value = loss(net.model, net.guide)(x)
    value.backward()
    return value.item()


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("route", [by_loss_and_grads, by_differentiable_loss, by_module])
def test_a_step_equals_the_step_by_hand(net, route, penalty):
    make, mmd = PENALTIES[penalty]
    pyro.set_rng_seed(1)
    by_hand = step_by_hand(net, data(), mmd)
    by_hand[2].backward()
    expected = grads(net)
    loss = WAELoss(make(), penalty_weight=WEIGHT)
    pyro.set_rng_seed(1)
    value = route(loss, net, data())
    found = loss.terms.cost.item(), loss.terms.penalty.item(), value
    assert found == pytest.approx([part.item() for part in by_hand], abs=1e-10)
    assert_same(grads(net), expected)


def train_by_svi(loss, net, x):
    SVI(net.model, net.guide, Adam({"lr": 0.1}), loss=loss).step(x)


def train_by_module(loss, net, x):
    module = loss(net.model, net.guide)
    optimiser = torch.optim.Adam(module.parameters(), lr=0.1)
    module(x).backward()
    optimiser.step()


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("train", [train_by_svi, train_by_module])
def test_an_optimiser_trains_as_on_the_step_by_hand(net, train, penalty):
    make, mmd = PENALTIES[penalty]
    other = copy.deepcopy(net)
    pyro.set_rng_seed(1)
    train(WAELoss(make(), penalty_weight=WEIGHT), net, data())
    optimiser = torch.optim.Adam(other.parameters(), lr=0.1)
    pyro.set_rng_seed(1)
    step_by_hand(other, data(), mmd)[2].backward()
    optimiser.step()
    for actual, wanted in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_particles": 3},
        {"num_particles": 3, "vectorize_particles": True},
        {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1},
        {"prior_draws": 4},
    ],
    ids=str,
)
def test_the_three_ways_to_the_loss_agree_on_their_first_call(options):
    net, x = AutoEncoder(), data()
    values = []
    for method in ("loss", "differentiable_loss", "loss_and_grads"):
        pyro.set_rng_seed(5)
        value = getattr(WAELoss(**options), method)(net.model, net.guide, x)
        values.append(value.item() if isinstance(value, torch.Tensor) else value)
    assert values[0] == values[1] == values[2]


def test_guessing_the_plate_nesting_leaves_the_random_numbers_alone():
    net, x = AutoEncoder(), data()
    loss = WAELoss(num_particles=3, vectorize_particles=True)
    pyro.set_rng_seed(5)
    guessed = loss.loss(net.model, net.guide, x)
    loss.penalty = MMD()
    pyro.set_rng_seed(5)
    assert loss.loss(net.model, net.guide, x) == guessed


def test_evaluate_loss_is_the_loss_without_gradients(net):
    pyro.set_rng_seed(1)
    expected = step_by_hand(net, data())[2].item()
    svi = SVI(net.model, net.guide, Adam({}), loss=WAELoss(of_draws(), penalty_weight=WEIGHT))
    pyro.set_rng_seed(1)
    assert svi.evaluate_loss(data()) == pytest.approx(expected, abs=1e-10)
    assert all(gradient is None for gradient in grads(net).values())


def test_a_number_of_prior_draws_per_code(net):
    x = data()
    pyro.set_rng_seed(2)
    loc, scale = net.encoder(x).chunk(2, -1)
    z = loc + scale.exp() * torch.randn(N, D, dtype=x.dtype) if net.stochastic else loc
    prior = torch.cat([torch.randn(N, D, dtype=x.dtype) for _ in range(3)])
    loss = WAELoss(of_draws(), penalty_weight=WEIGHT, prior_draws=3)
    pyro.set_rng_seed(2)
    loss.loss(net.model, net.guide, x)
    assert loss.terms.penalty.item() == pytest.approx(mmd_by_hand(z, prior).item(), abs=1e-10)


def test_the_default_penalty_is_that_of_the_known_prior_by_quadrature(net):
    """|z - p|^2 is noncentral chi-squared and |p - p'|^2 / 2 is chi-squared: integrals over their densities."""
    pyro.set_rng_seed(1)
    loc, scale = net.encoder(data()).chunk(2, -1)
    z = loc + scale.exp() * torch.randn(N, D, dtype=torch.float64) if net.stochastic else loc
    prior = torch.randn(N, D, dtype=torch.float64)
    length = (((prior[:, None] - prior[None]) ** 2).sum() / (N * (N - 1))).item()

    def kernel(squares):
        return sum(np.exp(-np.sqrt(squares) / (factor * (length / 2) ** 0.5)) for factor in LENGTHS)

    def mean(law):
        # In the root of the squared distance, at 0 of which the kernel has a kink.
        pieces = [(0, 0.1), (0.1, 1), (1, 3), (3, 10), (10, 30)]
        return sum(
            scipy.integrate.quad(lambda r: kernel(r**2) * law.pdf(r**2) * 2 * r, *piece, epsabs=1e-12, epsrel=1e-11)[0]
            for piece in pieces
        )

    squares = ((z[:, None] - z[None]) ** 2).sum(2).detach().numpy()
    qq = (kernel(squares) * (1 - np.eye(N))).sum() / (N * (N - 1))
    qp = sum(mean(scipy.stats.ncx2(D, square)) for square in (z.detach() ** 2).sum(1).tolist()) / N
    pp = mean(scipy.stats.chi2(D, scale=2))
    loss = WAELoss()
    pyro.set_rng_seed(1)
    loss.loss(net.model, net.guide, data())
    assert loss.terms.penalty.item() == pytest.approx(qq + pp - 2 * qp, abs=5e-9)


# Terms


def two_sites(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(x.new_zeros(2), 1).to_event(1))
        b = pyro.sample("b", dist.Normal(x.new_zeros(1), 1).to_event(1))
        pyro.sample("x", dist.Normal(a, 1).to_event(1), obs=x[:, :2])
        pyro.sample("y", dist.Normal(b, 1).to_event(1), obs=x[:, 2:3])


def two_codes(x):
    with pyro.plate("data", len(x)):
        pyro.sample("a", dist.Delta(x[:, :2] + 1).to_event(1))
        pyro.sample("b", dist.Delta(x[:, 2:3] + 2).to_event(1))


def mean_gap(codes, prior):
    return codes.mean() + 0 * prior.mean()


def test_terms_hold_the_parts_of_the_loss_by_site():
    x = data()
    loss = WAELoss({"a": mean_gap, "b": mean_gap}, cost={"x": SquaredError(), "y": AbsoluteError()}, penalty_weight=3.0)
    assert loss.terms is None
    value = loss.loss(two_sites, two_codes, x)
    terms = loss.terms.as_dict()
    assert terms["cost/x"] == pytest.approx(2)  # two elements, each off by 1
    assert terms["cost/y"] == pytest.approx(2)  # one element off by 2
    assert terms["cost"] == pytest.approx(4)
    assert terms["penalty/a"] == pytest.approx(x[:, :2].mean().item() + 1)
    assert terms["penalty/b"] == pytest.approx(x[:, 2].mean().item() + 2)
    assert terms["penalty"] == pytest.approx(terms["penalty/a"] + terms["penalty/b"])
    assert terms["weight"] == 3
    assert value == pytest.approx(terms["cost"] + 3 * terms["penalty"])
    assert "cost=4" in repr(loss.terms)
    assert not loss.terms.cost.requires_grad
    assert not loss.terms.penalty.requires_grad


def test_a_joint_penalty_has_no_penalties_by_site():
    loss = WAELoss(mean_gap)
    loss.loss(two_sites, two_codes, data())
    assert loss.terms.penalties == {}
    assert set(loss.terms.costs) == {"x", "y"}


# The decoder runs once


class Counter(nn.Module):
    """A decoder that counts its runs and holds a BatchNorm layer."""

    def __init__(self, size=D):
        super().__init__()
        self.norm = nn.BatchNorm1d(size)
        self.out = nn.Linear(size, X)
        self.runs = 0

    def forward(self, z):
        self.runs += 1
        return self.out(self.norm(z))


def single_root(decoder, x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(D), 1).to_event(1))
        pyro.sample("x", dist.Normal(decoder(z), 1).to_event(1), obs=x)


def single_root_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, :D], 1).to_event(1))


def hierarchical(decoder, x):
    with pyro.plate("data", len(x)):
        z1 = pyro.sample("z1", dist.Normal(x.new_zeros(D), 1).to_event(1))
        z2 = pyro.sample("z2", dist.Normal(z1, 1).to_event(1))
        pyro.sample("x", dist.Normal(decoder(z2), 1).to_event(1), obs=x)


def hierarchical_guide(x):
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Normal(x[:, :D], 1).to_event(1))
        pyro.sample("z1", dist.Normal(z2, 1).to_event(1))


def markov(decoder, x):
    with pyro.plate("data", len(x)):
        last, z = x.new_zeros(1), []
        for i in pyro.markov(range(D)):
            last = pyro.sample(f"z{i}", dist.Normal(last, 1).to_event(1))
            z.append(last)
        pyro.sample("x", dist.Normal(decoder(torch.cat(z, -1)), 1).to_event(1), obs=x)


def markov_guide(x):
    with pyro.plate("data", len(x)):
        for i in pyro.markov(range(D)):
            pyro.sample(f"z{i}", dist.Normal(x[:, i : i + 1], 1).to_event(1))


def interleaved(decoder, x):
    """Each step is decoded before the next is sampled."""
    with pyro.plate("data", len(x)):
        last = x.new_zeros(D)
        for i in pyro.markov(range(3)):
            last = pyro.sample(f"z{i}", dist.Normal(last, 1).to_event(1))
            pyro.sample(f"x{i}", dist.Normal(decoder(last), 1).to_event(1), obs=x)


def interleaved_guide(x):
    with pyro.plate("data", len(x)):
        for i in pyro.markov(range(3)):
            pyro.sample(f"z{i}", dist.Normal(x[:, :D], 1).to_event(1))


PROGRAMS = {
    "single root": (single_root, single_root_guide),
    "hierarchical": (hierarchical, hierarchical_guide),
    "markov": (markov, markov_guide),
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("draws", [1, 3])
def test_the_decoder_runs_once_a_step_and_its_batch_norm_counts_one(name, draws):
    decoder = Counter()
    model, guide = PROGRAMS[name]
    loss = WAELoss(prior_draws=draws)
    for step in (1, 2):
        loss.loss_and_grads(lambda x: model(decoder, x), guide, data().to(torch.get_default_dtype()))
        assert decoder.runs == step
        assert decoder.norm.num_batches_tracked.item() == step
        assert runtime._PYRO_STACK == []
        assert runtime._DIM_ALLOCATOR._stack == []


def test_guessing_the_plate_nesting_moves_no_batch_norm_counter():
    decoder = Counter()

    def flat(z):
        return decoder(z.flatten(0, -2)).unflatten(0, z.shape[:-1])

    loss = WAELoss(num_particles=2, vectorize_particles=True)
    for step in (1, 2):
        loss.loss(lambda x: single_root(flat, x), single_root_guide, data().to(torch.get_default_dtype()))
        assert decoder.norm.num_batches_tracked.item() == step


def test_a_decoder_between_the_latents_moves_its_batch_norm_once_for_each_output():
    """It cannot but run again on the way to the later latents, and its statistics come from the codes alone."""
    decoder, alone = Counter(), Counter()
    x = data().to(torch.get_default_dtype())
    capture = Capture()
    WAELoss(capture, prior_draws=2).loss_and_grads(lambda x: interleaved(decoder, x), interleaved_guide, x)
    codes, _ = capture.calls[0]
    for i in range(3):
        alone(codes[:, i * D : (i + 1) * D])
    assert decoder.norm.num_batches_tracked.item() == 3
    torch.testing.assert_close(decoder.norm.running_mean, alone.norm.running_mean)
    torch.testing.assert_close(decoder.norm.running_var, alone.norm.running_var)
    assert decoder.norm.track_running_stats
    decoder.eval()
    WAELoss().loss(lambda x: interleaved(decoder, x), interleaved_guide, x)
    torch.testing.assert_close(decoder.norm.running_mean, alone.norm.running_mean)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_prior_drawn_inside_other_handlers_leaves_them_in_place(name):
    decoder = Counter()
    model, guide = PROGRAMS[name]
    with poutine.trace(param_only=True) as outer:
        WAELoss().loss_and_grads(
            lambda x: (pyro.module("d", decoder), model(decoder, x)), guide, data().to(torch.get_default_dtype())
        )
        assert [outer] == runtime._PYRO_STACK
    assert "d$$$out.weight" in outer.trace.nodes


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("draw", [1, 2, 3])
def test_the_stack_is_clean_after_an_error_in_any_run(name, draw):
    model, guide = PROGRAMS[name]
    calls = 0

    def broken(x):
        nonlocal calls
        calls += 1
        if calls == draw:
            with pyro.plate("other", 3, dim=-4):
                raise KeyError("broken")
        return model(Counter(), x)

    runs_again = name != "single root"
    if draw <= 1 + 2 * runs_again:
        with pytest.raises(KeyError, match="broken"):
            WAELoss(prior_draws=2).loss(broken, guide, data().to(torch.get_default_dtype()))
    else:
        WAELoss(prior_draws=2).loss(broken, guide, data().to(torch.get_default_dtype()))
    assert runtime._PYRO_STACK == []
    assert runtime._DIM_ALLOCATOR._stack == []


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_log_prob_is_computed(name, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("log_prob was computed")

    for fn in (torch.distributions.Normal, torch.distributions.Independent, dist.Delta):
        monkeypatch.setattr(fn, "log_prob", refuse)
    model, guide = PROGRAMS[name]
    for options in ({}, {"num_particles": 2, "vectorize_particles": True}):
        WAELoss(**options).loss_and_grads(
            lambda x: model(nn.Linear(D, X), x), guide, data().to(torch.get_default_dtype())
        )


# Particles


def subsampled(x, size):
    with pyro.plate("data", len(x), subsample_size=size) as index:
        z = pyro.sample("z", dist.Normal(x.new_zeros(X), 1).to_event(1))
        pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x[index])


def subsampled_guide(x, size):
    with pyro.plate("data", len(x), subsample_size=size) as index:
        pyro.sample("z", dist.Normal(x[index], 1e-3).to_event(1))


class Capture(nn.Module):
    """A function penalty that keeps what reached it."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, codes, prior):
        self.calls.append((codes.detach(), prior.detach()))
        return codes.sum() * 0 + prior.sum() * 0


@pytest.mark.parametrize("vectorize", [False, True])
def test_particles_share_one_subsample(vectorize):
    x, capture = data(40), Capture()
    loss = WAELoss(capture, num_particles=3, vectorize_particles=vectorize)
    loss.loss(subsampled, subsampled_guide, x, 6)
    first, *others = (codes for codes, _ in capture.calls)
    assert len(others) == 2
    assert first.shape == (6, X)
    for other in others:
        # The encoder's scale is 1e-3 and the data are several apart.
        torch.testing.assert_close(other, first, rtol=0, atol=0.02)
        assert not torch.equal(other, first)
    assert len({tuple(prior.flatten().tolist()) for _, prior in capture.calls}) == 3


def test_vectorised_particles_have_the_law_of_sequential_ones():
    net, x = AutoEncoder(), data()
    means, costs = {}, {}
    for vectorize in (False, True):
        capture = Capture()
        loss = WAELoss(capture, num_particles=400, vectorize_particles=vectorize)
        pyro.set_rng_seed(3)
        loss.loss(net.model, net.guide, x)
        assert [codes.shape for codes, _ in capture.calls] == [(N, D)] * 400
        assert [prior.shape for _, prior in capture.calls] == [(N, D)] * 400
        codes = torch.stack([codes for codes, _ in capture.calls])
        prior = torch.stack([prior for _, prior in capture.calls])
        assert abs(prior.mean()) < 4 / prior.numel() ** 0.5
        means[vectorize], costs[vectorize] = codes.mean(0), loss.terms.cost.item()
        loc, scale = (part.detach() for part in net.encoder(x).chunk(2, -1))
        # 400 draws: each mean lies within 5 standard errors of the encoder's.
        assert ((means[vectorize] - loc).abs() < 5 * scale.exp() / 20).all()
    assert costs[True] == pytest.approx(costs[False], rel=0.05)


def test_retain_graph_lets_the_graph_be_used_again():
    net, x = AutoEncoder(), data()
    kept = []

    def keep(codes, prior):
        kept.append(codes.square().mean())
        return kept[-1]

    WAELoss(keep, retain_graph=True).loss_and_grads(net.model, net.guide, x)
    kept[-1].backward()
    WAELoss(keep).loss_and_grads(net.model, net.guide, x)
    with pytest.raises(RuntimeError, match="second time"):
        kept[-1].backward()


# Options, modules and state


def test_it_works_after_the_param_store_is_cleared():
    net = AutoEncoder()
    svi = SVI(net.model, net.guide, Adam({"lr": 1e-3}), loss=WAELoss())
    svi.step(data())
    pyro.clear_param_store()
    before = net.encoder.weight.clone()
    svi.step(data())
    assert not torch.equal(net.encoder.weight, before)


def test_pickle_gives_a_loss_that_computes_the_same():
    net = AutoEncoder()
    loss = WAELoss({"z": MMD(Gaussian())}, cost={"x": AbsoluteError()}, penalty_weight=2.0, prior_draws=2)
    loss.loss(net.model, net.guide, data())
    again = pickle.loads(pickle.dumps(loss))
    values = []
    for one in (loss, again):
        pyro.set_rng_seed(4)
        values.append(one.loss(net.model, net.guide, data()))
    assert values[0] == values[1]
    assert repr(again) == repr(loss)


class PlainModule(nn.Module):
    """Without pyro.module, which leaves weak references on the parameters that no pickle takes."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(X, D).double(), nn.Linear(D, X).double()

    def single_root(self, x):
        single_root(self.decoder, x)

    def encode(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 1).to_event(1))


def test_the_module_pickles_and_its_state_dict_moves_to_another():
    loss_fn, fresh = (WAELoss()(net.single_root, net.encode) for net in (PlainModule(), PlainModule()))
    loss_fn(data())
    again = pickle.loads(pickle.dumps(loss_fn))
    fresh.load_state_dict(loss_fn.state_dict())
    values = []
    for one in (loss_fn, again, fresh):
        pyro.set_rng_seed(4)
        values.append(one(data()).item())
    assert values[0] == values[1] == values[2]


def test_parameters_and_state_dict_hold_model_guide_and_the_kernels_length():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = nn.Linear(D, X).double()

        def forward(self, x):
            single_root(self.decoder, x)

    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(X, D).double()

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Delta(self.encoder(x)).to_event(1))

    model, guide = Model(), Guide()
    loss_fn = WAELoss(MMD(InverseMultiquadratic()), penalty_weight=WEIGHT)(model, guide)
    assert set(loss_fn.parameters()) == {*model.parameters(), *guide.parameters()}
    assert loss_fn.terms is None
    loss_fn(data()).backward()
    assert set(loss_fn.state_dict()) == {
        "model.decoder.weight",
        "model.decoder.bias",
        "guide.encoder.weight",
        "guide.encoder.bias",
        "penalty.kernel.squared_length",
    }
    assert loss_fn.state_dict()["penalty.kernel.squared_length"] > 0
    assert loss_fn.terms.cost > 0
    assert all(parameter.grad is not None for parameter in loss_fn.parameters())


def test_bound_methods_of_one_module_are_its_parameters_once():
    net = AutoEncoder()
    loss_fn = WAELoss()(net.model, net.guide)
    parameters = list(loss_fn.parameters())
    assert len(parameters) == len(list(net.parameters()))
    assert {id(p) for p in parameters} == {id(p) for p in net.parameters()}
    loss_fn.eval()
    assert not net.training


def test_penalties_by_site_own_their_state_under_the_sites_name():
    net = AutoEncoder()
    loss_fn = WAELoss({"z": MMD(Gaussian())})(net.model, net.guide)
    loss_fn(data())
    assert "penalty_z.kernel.squared_length" in loss_fn.state_dict()


@pytest.mark.parametrize("local", [True, False])
def test_pyro_modules_train_through_the_torch_route(local):
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.weight = PyroParam(torch.ones(D, X, dtype=torch.float64))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(D), 1).to_event(1))
                pyro.sample("x", dist.Normal(z @ self.weight, 1).to_event(1), obs=x)

    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = PyroModule[nn.Linear](X, D).double()
            self.scale = PyroParam(torch.ones(D, dtype=torch.float64), dist.constraints.positive)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.linear(x), self.scale).to_event(1))

    with pyro.settings.context(module_local_params=local):
        model, guide = Model(), Guide()
        loss_fn = WAELoss(penalty_weight=WEIGHT)(model, guide)
        optimiser = torch.optim.SGD(loss_fn.parameters(), lr=1e-3)
        before = {name: value.clone() for name, value in loss_fn.state_dict().items() if "penalty" not in name}
        assert set(before) == {"model.weight_unconstrained", "guide.linear.weight", "guide.linear.bias"} | {
            "guide.scale_unconstrained"
        }
        loss_fn(data()).backward()
        optimiser.step()
        after = loss_fn.state_dict()
        for name, value in before.items():
            assert not torch.equal(after[name], value), name
        assert (len(pyro.get_param_store()) == 0) == local


def test_repr_is_the_call_that_makes_the_loss():
    loss = WAELoss(MMD(Gaussian(1.0)), cost=SquaredError(), data_plate="data", max_plate_nesting=1)
    again = eval(repr(loss), globals() | vars(weights))
    assert again.data_plate == "data"
    assert repr(again) == repr(loss)
    assert "penalty_weight=2.5" in repr(WAELoss(penalty_weight=2.5))
    assert "penalty_weight=Constraint(" in repr(WAELoss())
    net = AutoEncoder()
    assert "encoder" in repr(WAELoss()(net.model, net.guide))


# Autoguides


def local_model(x):
    with pyro.plate("data", len(x)):
        z1 = pyro.sample("z1", dist.Normal(x.new_zeros(2), 1).to_event(1))
        z2 = pyro.sample("z2", dist.Normal(z1[..., 0], 1))
        mean = torch.cat([z1, z2[..., None]], -1)
        pyro.sample("x", dist.Normal(mean, 1).to_event(1), obs=x[:, :3])


@pytest.mark.parametrize(
    "make",
    [AutoNormal, AutoDelta, AutoDiagonalNormal, AutoNormalMessenger, AutoHierarchicalNormalMessenger],
)
@pytest.mark.parametrize(
    "options", [{}, {"num_particles": 2}, {"num_particles": 2, "vectorize_particles": True}], ids=str
)
def test_an_autoguide_over_local_latents_learns_the_codes(make, options):
    x, capture = data().to(torch.get_default_dtype()), Capture()
    guide = make(local_model)
    svi = SVI(local_model, guide, Adam({"lr": 0.1}), loss=WAELoss(capture, **options))
    first = svi.step(x)
    for _ in range(25):
        last = svi.step(x)
    assert last < 0.7 * first
    assert [codes.shape for codes, _ in capture.calls] == [(N, 3)] * 26 * options.get("num_particles", 1)


def test_a_messenger_guide_draws_the_prior_and_not_itself():
    x, capture = data(2000).to(torch.get_default_dtype()) + 5, Capture()
    guide = AutoNormalMessenger(local_model, init_scale=0.01)
    svi = SVI(local_model, guide, Adam({"lr": 0.5}), loss=WAELoss(capture))
    for _ in range(20):
        svi.step(x)
    codes, prior = capture.calls[-1]
    assert codes.mean() > 2
    # n = 2000 draws: standard errors of 1/sqrt(2000) = 0.022, and sqrt(2) of it for the sum z2 of two Normals.
    assert (prior.mean(0).abs() < 4 * 0.032).all()
    torch.testing.assert_close(prior.var(0), torch.tensor([1.0, 1.0, 2.0]), rtol=0.2, atol=0)


@pytest.mark.parametrize("make", [AutoNormal, AutoDelta, AutoNormalMessenger])
def test_an_autoguide_serves_a_subsampled_plate(make):
    x, capture = data(40).to(torch.get_default_dtype()), Capture()

    def create_plates(x):
        return pyro.plate("data", len(x), subsample_size=8)

    def model(x):
        with create_plates(x) as index:
            z = pyro.sample("z", dist.Normal(x.new_zeros(X), 1).to_event(1))
            pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x[index])

    guide = make(model) if make is AutoNormalMessenger else make(model, create_plates=create_plates)
    svi = SVI(model, guide, Adam({"lr": 0.2}), loss=WAELoss(capture, num_particles=2))
    first = svi.step(x)
    for _ in range(60):
        last = svi.step(x)
    assert capture.calls[0][0].shape == (8, X)
    assert last < 0.5 * first
