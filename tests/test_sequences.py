"""The chain penalty, by itself and on sequences of latent sites, ragged ones and Pyro's deep Markov model included."""

from __future__ import annotations

import functools
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import around, delta, normal, sites
from pyro import poutine
from pyro.infer import SVI
from references import Seen, nested, program
from torch import nn

from pyro_wae import WAELoss
from pyro_wae.costs import NegativeLogLikelihood
from pyro_wae.kernels import Gaussian
from pyro_wae.penalties import (
    MMD,
    Chain,
    EnergyDistance,
    JensenShannon,
    KernelStein,
    LogVarianceL1,
    PenaltyContext,
    Sinkhorn,
    SlicedWasserstein,
)

TUTORIAL = Path(__file__).parents[1] / "tutorials" / "sequences.py"
D = 2


def data_count(codes):
    """The number of data."""
    return codes.new_tensor(float(codes.shape[1]))


def mmd_by_hand(q, p, bandwidth):
    """The U-statistic by direct differences in float64."""

    def k(x, y):
        return torch.exp(-(x[:, None] - y).square().sum(-1) / (2 * bandwidth**2))

    def within(x):
        gram = k(x, x)
        return (gram.sum() - gram.diagonal().sum()) / (len(x) * (len(x) - 1))

    return within(q) + within(p) - 2 * k(q, p).mean()


def rows(n, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, steps, D, dtype=torch.float64, generator=generator)


# By itself


@pytest.mark.parametrize("order", [1, 2, 3, 5, 9])
def test_the_value_is_the_mean_over_runs_of_consecutive_steps(order):
    """An order of all steps or more is the joint code."""
    q, p = 1.5 * rows(12, 5), rows(30, 5, 1)
    starts = range(max(1, 6 - order))
    by_hand = [mmd_by_hand(q[:, t : t + order].flatten(1), p[:, t : t + order].flatten(1), 2.0) for t in starts]
    value = Chain(MMD(Gaussian(2.0)), order=order, step_size=D)(q.flatten(1), p.flatten(1))
    assert value.item() == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-9)


@pytest.mark.parametrize(
    ("make", "half_mean_square"),
    [(lambda: MMD(Gaussian()), lambda mmd: mmd.kernel.squared_length), (Sinkhorn, lambda it: it.spread**2 / 2)],
    ids=["kernel's length", "blur"],
)
def test_an_unset_length_comes_from_all_runs_about_their_own_means(make, half_mean_square):
    """Steps that drift apart and spread: not the first pair's spread, and not that of the pooled steps."""
    if make is Sinkhorn:
        pytest.importorskip("geomloss")
    p = rows(50, 4, 1) * torch.tensor([0.1, 1.0, 2.0, 5.0]).double()[:, None] + 100 * torch.arange(4.0)[:, None]
    chain = Chain(make(), step_size=D)
    chain(rows(50, 4).flatten(1), p.flatten(1))
    runs = [p[:, t : t + 2].flatten(1) for t in range(3)]
    total = sum((run - run.mean(0)).square().sum() for run in runs)
    assert half_mean_square(chain.penalty).item() == pytest.approx(total.item() / (3 * 49), rel=1e-9)


def test_a_number_of_runs_is_drawn_afresh_and_right_in_the_mean():
    q, p = 1.5 * rows(12, 6).flatten(1), rows(12, 6, 1).flatten(1)
    record = Seen(data_count)
    chain = Chain(record, step_size=D, runs=2)
    for _ in range(20):
        chain(q, p)
    assert len(record.calls) == 40
    assert len({codes.sum().item() for codes, _, _ in record.calls}) == 5
    whole = Chain(MMD(Gaussian(2.0)), step_size=D)(q, p).item()
    some = Chain(MMD(Gaussian(2.0)), step_size=D, runs=2)
    values = torch.stack([some(q, p) for _ in range(400)])
    # Null: its mean over random choices is that over all runs; 4 standard errors.
    assert abs(values.mean().item() - whole) < 4 * values.std().item() / 20
    assert Chain(MMD(Gaussian(2.0)), step_size=D, runs=99)(q, p).item() == pytest.approx(whole)


@pytest.mark.parametrize("runs", [1, 2])
def test_the_mean_over_choices_of_runs_is_that_of_all_runs_where_fewer_data_reach_the_later_ones(runs, monkeypatch):
    """Every choice once, by a function whose value is known for each run."""
    steps, total = torch.tensor([4, 4, 3, 2, 2, 2]), 4
    kept = (torch.arange(total) < steps[:, None])[None]
    codes = torch.arange(total, dtype=torch.float64).square().expand(6, total).contiguous()
    context = PenaltyContext(shared_data=True, kept=lambda: kept)
    make = functools.partial(Chain, lambda q, p: q.mean(), order=1, step_size=1)
    values = []
    for choice in itertools.permutations(range(total)):
        monkeypatch.setattr(torch, "randperm", lambda *_, choice=choice, **__: torch.tensor(choice))
        values.append(make(runs=runs)(codes, codes, context).item())
    assert sum(values) / len(values) == pytest.approx(make()(codes, codes, context).item())


def test_functions_sums_and_multiples_work_inside_and_outside():
    q, p = rows(12, 3).flatten(1), rows(12, 3, 1).flatten(1)

    def gap(codes, prior):
        return (codes.mean(0) - prior.mean(0)).square().sum()

    expected = sum(gap(q[:, s], p[:, s]) for s in (slice(0, 4), slice(2, 6))) / 2
    for penalty in (
        Chain(gap, step_size=D),
        0.5 * Chain(gap, step_size=D) + Chain(0.25 * (MMD() * 0.0 + Chain(gap, order=2, step_size=D) * 2), step_size=D),
    ):
        assert penalty(q, p).item() == pytest.approx(expected.item())


def test_the_default_is_mmd_of_pairs():
    assert repr(Chain()) == repr(Chain(MMD(), order=2))
    assert repr(Chain(EnergyDistance(), order=3, step_size=4, runs=5)) == (
        "Chain(penalty=EnergyDistance(exponent=1.0, unbiased=True), order=3, step_size=4, runs=5)"
    )


def test_plain_codes_without_steps_are_refused():
    with pytest.raises(ValueError, match=r"needs to know the steps.*only its 6 numbers.*step_size=d"):
        Chain(MMD())(torch.randn(10, 6), torch.randn(10, 6))
    with pytest.raises(ValueError, match="A code of 6 numbers is not made of steps of 4"):
        Chain(MMD(), step_size=4)(torch.randn(10, 6), torch.randn(10, 6))


# On latent sites


class Steps:
    """A Markov chain of sites z_1 ... z_T with an element-wise mask, codes given."""

    def __init__(self, mask=None, style=None, size=D):
        self.mask, self.style, self.size = mask, style, size

    def masked(self, fn, t):
        return fn if self.mask is None else fn.mask(self.mask[:, t - 1 : t])

    def model(self, x):
        with pyro.plate("data", len(x)):
            if self.style:
                pyro.sample("style", dist.Normal(x.new_zeros(self.style), 1).to_event(1))
            z = x.new_zeros(len(x), self.size)
            for t in pyro.markov(range(1, x.shape[1] + 1)):
                z = pyro.sample(f"z_{t}", self.masked(dist.Normal(0.5 * z, 1), t).to_event(1))
                pyro.sample(f"obs_x_{t}", self.masked(dist.Normal(2 * z, 1), t).to_event(1), obs=x[:, t - 1])

    def guide(self, x):
        with pyro.plate("data", len(x)):
            if self.style:
                pyro.sample("style", dist.Delta(x.new_zeros(len(x), self.style)).to_event(1))
            for t in pyro.markov(range(1, x.shape[1] + 1)):
                pyro.sample(f"z_{t}", dist.Delta(x[:, t - 1]).to_event(1))


LENGTHS = torch.tensor([5, 3, 3, 1, 5, 2, 4])
MASK = torch.arange(5) < LENGTHS[:, None]


def test_each_site_is_a_step():
    x, steps = rows(12, 4), Steps()
    for order in (1, 2):
        record = Seen(data_count)
        WAELoss(Chain(record, order=order)).loss(steps.model, steps.guide, x)
        assert len(record.calls) == 5 - order
        for t, (codes, prior, context) in enumerate(record.calls):
            torch.testing.assert_close(codes[0], x[:, t : t + order].flatten(1))
            assert prior.shape == (12, order * D)
            assert context.shared_data
            assert context.prior is None


def test_a_datum_that_has_ended_is_left_out_and_steps_weigh_by_their_data():
    x, record = rows(7, 5), Seen(data_count)
    steps = Steps(MASK)
    loss = WAELoss(Chain(record), prior_draws=3)
    loss.loss(steps.model, steps.guide, x.where(MASK[..., None], 1e9))
    # The first pair is of all data, with 0 for the second step of the one that has none.
    first = x[:, :2].clone()
    first[3, 1] = 0
    expected = [first, x[LENGTHS >= 3, 1:3], x[LENGTHS >= 4, 2:4], x[LENGTHS >= 5, 3:5]]
    counts = [7, 5, 3, 2]
    for (codes, prior, context), pair, count in zip(record.calls, expected, counts, strict=True):
        assert context.shared_data
        torch.testing.assert_close(codes[0], pair.flatten(1))
        assert prior.shape == (3 * count, 2 * D)
    assert (record.calls[0][1].unflatten(0, (3, 7))[:, 3, D:] == 0).all()
    assert (record.calls[0][1].unflatten(0, (3, 7))[:, 3, :D] != 0).all()
    assert all((prior != 0).all() for _, prior, _ in record.calls[1:])
    # Each run's value is its number of data, and so is its weight.
    assert loss.terms.penalty.item() == pytest.approx(sum(c * c for c in counts) / sum(counts))


def test_a_draw_stays_with_the_datum_whose_mask_it_shares():
    """Sequences that start at 1000 i: the prior draw of row i is near there in every run."""
    start = 1000.0 * torch.arange(7).double()[:, None]

    latents = {
        f"z_{t}": (
            lambda x, *_, t=t: dist.Normal(x.expand(7, D), 1).mask(MASK[:, t - 1 : t]).to_event(1),
            lambda x: delta(x.expand(7, D)),
        )
        for t in range(1, 6)
    }
    programs = sites(latents, lambda *_: around(start))
    record = Seen(data_count)
    WAELoss(Chain(record, order=1), prior_draws=2, num_particles=2).loss(*programs, start)
    for codes, prior, _ in record.calls:
        assert codes.shape[0] == 2
        torch.testing.assert_close((prior / 1000).round() * 1000, codes[0].repeat(4, 1))


def test_a_step_that_one_datum_reaches_is_left_out_and_none_is_an_error():
    record, x = Seen(data_count), rows(4, 4)
    steps = Steps(torch.arange(4) < torch.tensor([4, 2, 2, 1])[:, None])
    WAELoss(Chain(record, order=1)).loss(steps.model, steps.guide, x)
    assert [codes.shape[1] for codes, _, _ in record.calls] == [4, 3]
    steps = Steps(torch.tensor([[True, False], [False, True]]))
    with pytest.raises(ValueError, match="No step is reached by 2 data of this batch of 2"):
        WAELoss(Chain(Seen(data_count), order=1)).loss(steps.model, steps.guide, rows(2, 2))


def test_no_unmasked_code_is_left_unseen():
    """Masks of any pattern, gaps and late starts: every code has a gradient unless it is alone at its step."""
    x = rows(40, 5)
    mask = torch.rand(40, 5) < 0.5
    mask[0] = False
    z = x.clone().requires_grad_()
    steps = Steps(mask)
    for order in (1, 2, 3):
        (gradient,) = torch.autograd.grad(
            WAELoss(
                Chain(MMD(Gaussian(2.0)), order=order), cost=lambda x, g: 0 * g.detach().sum(-1)
            ).differentiable_loss(steps.model, Steps(mask).guide, z),
            z,
        )
        assert ((gradient != 0).all(-1) == mask).all()


@pytest.mark.parametrize(
    "penalty",
    [MMD(), MMD(standardize=True), SlicedWasserstein(), EnergyDistance(), JensenShannon(), lambda q, p: q.mean()],
    ids=lambda penalty: type(penalty).__name__,
)
def test_the_number_of_steps_may_change_from_batch_to_batch(penalty):
    loss, steps = WAELoss(Chain(penalty), prior_draws=2), Steps()
    svi = SVI(steps.model, steps.guide, pyro.optim.Adam({"lr": 1e-3}), loss=loss)
    for length in (1, 4, 2, 6):
        svi.step(rows(12, length).float())


def test_svi_finds_a_discriminator_at_the_first_step():
    steps, penalty = Steps(), JensenShannon(optimizer=None)
    svi = SVI(steps.model, steps.guide, pyro.optim.Adam({"lr": 0.1}), loss=WAELoss({"z_*": Chain(penalty)}))
    svi.step(rows(12, 1).float())
    names = list(pyro.get_param_store())
    assert len(names) == 8
    before = penalty.discriminator[0].weight.detach().clone()
    assert before.shape[1] == 2 * D
    svi.step(rows(12, 5).float())
    assert (penalty.discriminator[0].weight != before).any()


def test_sites_of_different_sizes_are_refused_with_the_line_to_write():
    steps, x = Steps(style=3), rows(12, 4)
    with pytest.raises(ValueError, match=r"site 'style' has 3 numbers and site 'z_1' 2.*'z_\*': Chain\(MMD\(\)\)"):
        WAELoss(Chain(MMD())).loss(steps.model, steps.guide, x)
    record = Seen(data_count)
    WAELoss({"style": MMD(), "z_*": Chain(record)}).loss(steps.model, steps.guide, x)
    assert len(record.calls) == 3


def test_a_chain_has_no_density_of_whole_codes():
    steps = Steps()
    with pytest.raises(ValueError, match="density of whole codes"):
        WAELoss(Chain(KernelStein(Gaussian(1.0)))).loss(steps.model, steps.guide, rows(12, 3))


@pytest.mark.parametrize("order", [1, 2, 7])
def test_a_guard_sees_the_variances_of_its_run(order):
    """sum of |log s^2| over the steps of a run; 0 where masked or filled up."""
    scale = torch.tensor([0.5, 0.25, 2.0, 0.1, 3.0]).double()
    steps = Steps(MASK)
    _, guide = sites(
        {f"z_{t}": (None, lambda x, t=t: dist.Normal(x[:, t - 1], scale[t - 1]).to_event(1)) for t in range(1, 6)}
    )
    loss = WAELoss(Chain(LogVarianceL1(), order=order))
    loss.loss(steps.model, guide, rows(7, 5))
    pulls = D * (2 * scale.log()).abs() * MASK
    expected, total = 0.0, 0
    for start in range(max(1, 6 - order)):
        stop = start + order
        kept = MASK[:, :stop].any(1) if start == 0 else MASK[:, stop - 1]
        if kept.sum() >= 2:
            expected += pulls[kept, start:stop].sum().item()
            total += kept.sum().item()
    assert loss.terms.penalty.item() == pytest.approx(expected / total, rel=1e-6)


# A sequence in one site


def in_plates(outer, inner):
    sizes = {"data": 7, "time": 5}
    return lambda x: nested(pyro.plate(outer, sizes[outer], dim=-2), pyro.plate(inner, sizes[inner], dim=-1))


# Model and guide, and what makes their data of x and their mask of MASK.
IN_ONE_SITE = {
    "plate": (program(prior=lambda x: normal(x, D), plate=in_plates("data", "time")), lambda x: x),
    "plate, time first": (
        program(prior=lambda x: normal(x, D), plate=in_plates("time", "data")),
        lambda x: x.transpose(0, 1),
    ),
    "event": (
        program(
            lambda x: dist.Delta(x).to_event(2),
            lambda x: dist.Normal(x.new_zeros(x.shape[1:]), 1).mask(MASK[..., None]).to_event(2),
            lambda z: dist.Normal(z, 1).to_event(2),
        ),
        None,
    ),
}


@pytest.mark.parametrize("kind", IN_ONE_SITE)
def test_a_site_that_holds_a_sequence_is_cut_into_steps(kind):
    x, record, ((model, guide), laid_out) = rows(7, 5), Seen(data_count), IN_ONE_SITE[kind]
    given = x if laid_out is None else laid_out(x)
    mask = True if laid_out is None else laid_out(MASK)
    WAELoss(Chain(record, step_size=D), data_plate="data").loss(poutine.mask(model, mask=mask), guide, given)
    assert [codes.shape[1] for codes, _, _ in record.calls] == [7, 5, 3, 2]
    for t, (codes, prior, _) in enumerate(record.calls[1:], 1):
        kept = MASK[:, t + 1]
        torch.testing.assert_close(codes[0], x[kept, t : t + 2].flatten(1))
        assert prior.shape == codes[0].shape


# Pyro's deep Markov model


class Linear(nn.Module):
    """A deep Markov model in Pyro's pattern whose answer is known: z_t = a z_{t-1} + noise, x_t = z_t.

    The emitter is fixed, so that the prior has to take the data's dynamics: a = 0.9, noise of variance 1 - a^2.
    """

    def __init__(self):
        super().__init__()
        self.transition = nn.Parameter(torch.zeros(()))
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.rnn = nn.RNN(1, 8, batch_first=True)
        self.combiner = nn.Linear(9, 1)

    def model(self, x, mask):
        pyro.module("dmm", self)
        with pyro.plate("z_minibatch", len(x)):
            z = x.new_zeros(len(x), 1)
            for t in pyro.markov(range(1, x.shape[1] + 1)):
                here = mask[:, t - 1 : t]
                scale = self.log_scale.exp() if t > 1 else 1.0
                z = pyro.sample(f"z_{t}", dist.Normal(self.transition * z, scale).mask(here).to_event(1))
                pyro.sample(f"obs_x_{t}", dist.Normal(z, 1).mask(here).to_event(1), obs=x[:, t - 1])

    def guide(self, x, mask):
        pyro.module("dmm", self)
        # Right-aligned and reversed, as a packed sequence would be read from its end.
        lengths = mask.sum(1, keepdim=True)
        steps = torch.arange(x.shape[1])
        turned = torch.where(steps < lengths, lengths - 1 - steps, steps)[..., None]
        h, _ = self.rnn(x.gather(1, turned))
        h = h.gather(1, turned.expand_as(h))
        with pyro.plate("z_minibatch", len(x)):
            for t in pyro.markov(range(1, x.shape[1] + 1)):
                loc = self.combiner(torch.cat([x[:, t - 1], h[:, t - 1]], -1))
                pyro.sample(f"z_{t}", dist.Normal(loc, 0.05).mask(mask[:, t - 1 : t]).to_event(1))


@pytest.mark.slow
def test_a_ragged_deep_markov_model_learns_the_datas_dynamics():
    """Data of a stationary chain with a = 0.9, in batches of 2 to 4 steps; the cost is below that of 3 steps at 0."""

    def batch(n=200, steps=4):
        x = [torch.randn(n, 1)]
        for _ in range(steps - 1):
            x.append(0.9 * x[-1] + (1 - 0.81) ** 0.5 * torch.randn(n, 1))
        mask = torch.arange(steps) < torch.randint(2, steps + 1, (n, 1))
        return torch.stack(x, 1), mask

    net = Linear()
    loss = WAELoss(Chain(MMD(Gaussian(1.0))), penalty_weight=10.0)
    svi = SVI(net.model, net.guide, pyro.optim.Adam({"lr": 0.03}), loss=loss)
    for _ in range(200):
        svi.step(*batch())
    assert net.transition.item() == pytest.approx(0.9, abs=0.1)
    assert net.log_scale.exp().item() == pytest.approx((1 - 0.81) ** 0.5, abs=0.12)
    assert loss.terms.cost.item() < 0.2


def test_the_prior_of_a_deep_markov_model_learns_through_its_draws():
    net, x, mask = Linear(), torch.randn(20, 4, 1), torch.ones(20, 4).bool()
    WAELoss(Chain(MMD()), cost=lambda x, g: 0 * g.detach().sum(-1)).loss_and_grads(net.model, net.guide, x, mask)
    for name, parameter in net.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.slow
def test_the_tutorial_runs():
    command = [sys.executable, str(TUTORIAL), "--smoke", "--compare"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    header = finished.stdout.splitlines()[0]
    assert re.findall(r"[a-z ]*[a-z]", header) == [" data", " pairs", " single steps", " joint code", " none"]


EYE, STEP = torch.eye(D), normal(torch.zeros(D), D)


@pytest.mark.usefixtures("single_precision")
@pytest.mark.parametrize(
    "chain",
    [
        lambda start: dist.GaussianHMM(start, EYE / 2, STEP, EYE, STEP),
        lambda start: dist.GaussianHMM(start, EYE / 2, STEP, EYE, STEP).mask(torch.tensor(True)),
        lambda start: dist.GaussianHMM(start, EYE.expand(4, D, D) / 2, STEP, EYE, STEP),
        lambda start: dist.GaussianHMM(start, EYE / 2, STEP, EYE, STEP, duration=4),
    ],
    ids=["homogeneous", "masked", "one matrix a step", "with a duration"],
)
def test_observed_chains_have_the_likelihood_that_pyro_gives_them(chain):
    """A homogeneous one without a duration has an event of one step, and takes data of any number of them."""
    x = torch.randn(20, 4, D)
    programs = program(lambda x: delta(x[:, 0]), lambda x: normal(x, D), lambda z: chain(around(z)))
    found = WAELoss(cost=NegativeLogLikelihood(), penalty_weight=0.0).loss(*programs, x)
    assert found == pytest.approx(-chain(around(x[:, 0])).log_prob(x).mean().item(), rel=1e-5)


def test_a_chain_of_another_number_of_steps_is_refused():
    chain = dist.GaussianHMM(STEP, EYE.expand(4, D, D), STEP, EYE, STEP)
    programs = program(lambda x: delta(x[:, 0]), lambda x: normal(x, D), lambda z: chain.expand([len(z)]))
    with pytest.raises(ValueError, match=r"data of shape \(20, 1, 2\), .* \(GaussianHMM\) is of shape \(20, 4, 2\)"):
        WAELoss(cost=NegativeLogLikelihood()).loss(*programs, torch.randn(20, 1, D))
