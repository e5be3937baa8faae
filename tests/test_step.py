"""A step of WAELoss against a WAE-MMD step written by hand in PyTorch; how often it runs the decoder; its particles."""

from __future__ import annotations

import functools
from contextlib import nullcontext

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.stats
import torch
from programs import AutoEncoder, around, delta, gaussian, normal, sites
from pyro import poutine
from pyro.poutine import runtime
from references import Seen, program
from torch import nn

from pyro_wae import WAELoss
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


def closed_mmd_by_hand(codes, prior, s=1.3):
    """The Gaussian kernel's U-statistic against N(0, I_d), whose means are Gaussian integrals."""
    n, d = codes.shape
    gram = torch.exp(-((codes[:, None] - codes[None]) ** 2).sum(2) / (2 * s**2))
    qq = (gram * (1 - torch.eye(n, dtype=codes.dtype))).sum() / (n * (n - 1))
    qp = (s**2 / (s**2 + 1)) ** (d / 2) * torch.exp(-(codes**2).sum(1) / (2 * (s**2 + 1)))
    return qq + (s**2 / (s**2 + 2)) ** (d / 2) - 2 * qp.mean()


def auto_encoder(*, stochastic=True):
    """In float64; the guide is a Normal, or a Delta for a deterministic encoder."""
    code = gaussian if stochastic else lambda numbers: delta(numbers[..., :D])
    net = AutoEncoder(X, D, encoder=nn.Linear(X, 2 * D), code=code).double()
    net.stochastic = stochastic
    return net


# Each penalty with the options of its loss, and its value by hand.
PENALTIES = {
    "prior draws": (of_draws, {}, mmd_by_hand),
    "three prior draws a code": (of_draws, {"prior_draws": 3}, mmd_by_hand),
    "known prior": (lambda: MMD(Gaussian(1.3)), {}, closed_mmd_by_hand),
}


def codes_and_draws(net, x, prior_draws=1):
    """Drawn in the order: codes, then prior."""
    loc, scale = net.encoder(x).chunk(2, -1)
    z = loc + scale.exp() * torch.randn(len(x), D, dtype=x.dtype) if net.stochastic else loc
    return z, torch.cat([torch.randn(len(x), D, dtype=x.dtype) for _ in range(prior_draws)])


def step_by_hand(net, x, mmd=mmd_by_hand, **options):
    """Cost, penalty and loss."""
    z, prior = codes_and_draws(net, x, **options)
    cost = ((x - net.decoder(z)) ** 2).sum(1).mean()
    penalty = mmd(z, prior)
    return cost, penalty, cost + WEIGHT * penalty


def data(n=N, dtype=torch.float64):
    return torch.randn(n, X, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).to(dtype)


floats = functools.partial(data, dtype=torch.get_default_dtype())


def grads(module):
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    module.zero_grad()
    return found


@pytest.fixture(params=[True, False], ids=["Normal", "Delta"])
def net(request):
    return auto_encoder(stochastic=request.param)


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
    make, options, mmd = PENALTIES[penalty]
    pyro.set_rng_seed(1)
    by_hand = step_by_hand(net, data(), mmd, **options)
    by_hand[2].backward()
    expected = grads(net)
    loss = WAELoss(make(), penalty_weight=WEIGHT, **options)
    pyro.set_rng_seed(1)
    value = route(loss, net, data())
    found = loss.terms.cost.item(), loss.terms.penalty.item(), value
    assert found == pytest.approx([part.item() for part in by_hand], abs=1e-10)
    torch.testing.assert_close(grads(net), expected, rtol=1e-10, atol=1e-10)


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
    net, x = auto_encoder(), data()
    values = []
    for method in ("loss", "differentiable_loss", "loss_and_grads"):
        pyro.set_rng_seed(5)
        value = getattr(WAELoss(**options), method)(net.model, net.guide, x)
        values.append(value.item() if isinstance(value, torch.Tensor) else value)
    assert values[0] == values[1] == values[2]


def test_guessing_the_plate_nesting_leaves_the_random_numbers_alone():
    net, x = auto_encoder(), data()
    loss = WAELoss(num_particles=3, vectorize_particles=True)
    pyro.set_rng_seed(5)
    guessed = loss.loss(net.model, net.guide, x)
    loss.penalty = MMD()
    pyro.set_rng_seed(5)
    assert loss.loss(net.model, net.guide, x) == guessed


def test_the_default_penalty_is_that_of_the_known_prior_by_quadrature(net):
    """|z - p|^2 is noncentral chi-squared and |p - p'|^2 / 2 is chi-squared: integrals over their densities."""
    pyro.set_rng_seed(1)
    z, prior = codes_and_draws(net, data())
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
        a = pyro.sample("a", normal(x, 2))
        b = pyro.sample("b", normal(x, 1))
        pyro.sample("x", around(a), obs=x[:, :2])
        pyro.sample("y", around(b), obs=x[:, 2:3])


_, two_codes = sites({"a": (None, lambda x: delta(x[:, :2] + 1)), "b": (None, lambda x: delta(x[:, 2:3] + 2))})


def test_terms_hold_the_parts_of_the_loss_by_site():
    x = data()
    loss = WAELoss(
        {"a": Seen(torch.mean), "b": Seen(torch.mean)},
        cost={"x": SquaredError(), "y": AbsoluteError()},
        penalty_weight=3.0,
    )
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
    loss = WAELoss(Seen(torch.mean))
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


def single_root(decoder):
    return program(first_numbers, lambda x: normal(x, D), lambda z: around(decoder(z)))


def first_numbers(x):
    return around(x[:, :D])


def hierarchical(decoder):
    latents = {"z1": (lambda x: normal(x, D), first_numbers), "z2": (lambda x, z1: around(z1), first_numbers)}
    return sites(latents, lambda z1, z2: around(decoder(z2)))


def markov(decoder):
    latents = {
        f"z{i}": (lambda x, *z: around(z[-1] if z else x.new_zeros(1)), lambda x, i=i: around(x[:, i : i + 1]))
        for i in range(3)
    }
    return sites(latents, lambda *z: around(decoder(torch.cat(z, -1))))


def interleaved(decoder):
    """Each step is decoded before the next is sampled."""

    def model(x):
        with pyro.plate("data", len(x)):
            last = x.new_zeros(D)
            for i in pyro.markov(range(3)):
                last = pyro.sample(f"z{i}", around(last))
                pyro.sample(f"x{i}", around(decoder(last)), obs=x)

    return model, sites({f"z{i}": (None, first_numbers) for i in range(3)})[1]


PROGRAMS = {"single root": single_root, "hierarchical": hierarchical, "markov": markov}
every_program = pytest.mark.parametrize("name", PROGRAMS)


@every_program
@pytest.mark.parametrize("draws", [1, 3])
def test_the_decoder_runs_once_a_step_and_its_batch_norm_counts_one(name, draws):
    decoder, loss = Counter(), WAELoss(prior_draws=draws)
    model, guide = PROGRAMS[name](decoder)
    for step in (1, 2):
        loss.loss_and_grads(model, guide, floats())
        assert decoder.runs == step
        assert decoder.norm.num_batches_tracked.item() == step


def test_guessing_the_plate_nesting_moves_no_batch_norm_counter():
    decoder = Counter()
    model, guide = single_root(lambda z: decoder(z.flatten(0, -2)).unflatten(0, z.shape[:-1]))
    loss = WAELoss(num_particles=2, vectorize_particles=True)
    for step in (1, 2):
        loss.loss(model, guide, floats())
        assert decoder.norm.num_batches_tracked.item() == step


def test_a_decoder_between_the_latents_moves_its_batch_norm_once_for_each_output():
    """It cannot but run again on the way to the later latents, and its statistics come from the codes alone."""
    decoder, alone, seen = Counter(), Counter(), Seen()
    WAELoss(seen, prior_draws=2).loss_and_grads(*interleaved(decoder), floats())
    for codes in seen.codes[0].split(D, -1):
        alone(codes)
    assert decoder.norm.num_batches_tracked.item() == 3
    assert decoder.norm.track_running_stats
    for _ in range(2):
        torch.testing.assert_close(decoder.norm.running_mean, alone.norm.running_mean)
        torch.testing.assert_close(decoder.norm.running_var, alone.norm.running_var)
        WAELoss().loss(*interleaved(decoder.eval()), floats())


@every_program
def test_a_prior_drawn_inside_other_handlers_leaves_them_in_place(name):
    decoder = Counter()
    model, guide = PROGRAMS[name](decoder)
    with poutine.trace(param_only=True) as outer:
        WAELoss().loss_and_grads(lambda x: (pyro.module("d", decoder), model(x)), guide, floats())
        assert [outer] == runtime._PYRO_STACK
    assert "d$$$out.weight" in outer.trace.nodes


@every_program
@pytest.mark.parametrize("run", [1, 2, 3])
def test_an_error_in_any_run_leaves_no_handler_behind(name, run):
    """That each test ends with a clean stack is asserted in conftest.py."""
    model, guide = PROGRAMS[name](Counter())
    runs = []

    def broken(x):
        runs.append(1)
        with pyro.plate("other", 3, dim=-4):
            if len(runs) == run:
                raise KeyError("broken")
        return model(x)

    # A prior that depends on another site is drawn by runs of the model: one for each of the two draws.
    is_run = run == 1 or name != "single root"
    with pytest.raises(KeyError, match="broken") if is_run else nullcontext():
        WAELoss(prior_draws=2).loss(broken, guide, floats())


@every_program
def test_no_log_prob_is_computed(name, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("log_prob was computed")

    for fn in (torch.distributions.Normal, torch.distributions.Independent, dist.Delta):
        monkeypatch.setattr(fn, "log_prob", refuse)
    for options in ({}, {"num_particles": 2, "vectorize_particles": True}):
        WAELoss(**options).loss_and_grads(*PROGRAMS[name](nn.Linear(D, X)), floats())


# Particles


def test_vectorised_particles_have_the_law_of_sequential_ones():
    net, x = auto_encoder(), data()
    costs = {}
    for vectorize in (False, True):
        seen = Seen()
        loss = WAELoss(seen, num_particles=400, vectorize_particles=vectorize)
        pyro.set_rng_seed(3)
        loss.loss(net.model, net.guide, x)
        assert seen.codes.shape == (400, N, D)
        assert seen.prior.shape == (400 * N, D)
        assert abs(seen.prior.mean()) < 4 / seen.prior.numel() ** 0.5
        costs[vectorize] = loss.terms.cost.item()
        loc, scale = (part.detach() for part in net.encoder(x).chunk(2, -1))
        # 400 draws: each mean lies within 5 standard errors of the encoder's.
        assert ((seen.codes.mean(0) - loc).abs() < 5 * scale.exp() / 20).all()
    assert costs[True] == pytest.approx(costs[False], rel=0.05)


def test_retain_graph_lets_the_graph_be_used_again():
    net, x = auto_encoder(), data()
    kept = []

    def keep(codes, prior):
        kept.append(codes.square().mean())
        return kept[-1]

    WAELoss(keep, retain_graph=True).loss_and_grads(net.model, net.guide, x)
    kept[-1].backward()
    WAELoss(keep).loss_and_grads(net.model, net.guide, x)
    with pytest.raises(RuntimeError, match="second time"):
        kept[-1].backward()
