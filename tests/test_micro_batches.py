"""A step in micro-batches against the same step on all data at once, which is drawn with the same noise."""

from __future__ import annotations

import copy
import functools
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from learned_priors import Nets
from programs import AutoEncoder, around, delta, gaussian, normal
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoDelta, init_to_sample
from references import program
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from pyro_wae import WAELoss
from pyro_wae.kernels import Gaussian
from pyro_wae.optim import Adam
from pyro_wae.penalties import MMD, Chain, JensenShannon, KernelStein, LogVarianceL1, PosteriorKL, SlicedWasserstein
from pyro_wae.priors import MixturePrior
from pyro_wae.weights import Constraint

N, D, X, K = 22, 2, 5, 2
ROWS = 6  # 22 = 6 + 6 + 6 + 4: the last micro-batch is smaller


class GivenNoise(dist.Normal):
    """A Normal whose draws come from a table, so that they do not depend on how the data are split."""

    def noise_is(self, table, particle=0):
        self._cache_noise = table, particle  # named as a transform's cache is: it is no parameter of the distribution
        return self

    def expand(self, batch_shape, _instance=None):
        return super().expand(batch_shape, _instance).noise_is(*self._cache_noise)

    def rsample(self, sample_shape=()):
        table, particle = self._cache_noise
        noise = table.movedim(1, 0) if len(self.batch_shape) == 3 else table[:, particle]
        return self.loc + self.scale * noise

    rsample.__module__ = dist.Normal.__module__  # the draws have the law of a Normal, and closed forms hold


class Net(nn.Module):
    """Model and guide in float64. Guide: a Normal, or a Delta; prior: fixed, or with parameters to learn."""

    def __init__(self, *, is_random=True, learns=False, plate_size=None):
        super().__init__()
        self.is_random, self.learns, self.plate_size = is_random, learns, plate_size
        self.encoder = nn.Linear(X, 2 * D)
        self.decoder = nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, X))
        self.loc, self.log_scale = nn.Parameter(torch.full((D,), 0.1)), nn.Parameter(torch.full((D,), -0.2))
        self.runs, self.particles = 0, 1
        self.double()

    def plate(self, x, index):
        if self.plate_size is None:
            return pyro.plate("data", len(x))
        return pyro.plate("data", self.plate_size, subsample=index)

    def prior(self, x, draws, y):
        loc, scale = (self.loc, self.log_scale.exp()) if self.learns else (x.new_zeros(D), x.new_ones(D))
        loc = loc.expand(len(x), D)
        if y is not None:
            loc = loc + y[:, None]
        return GivenNoise(loc, scale.expand(len(x), D)).noise_is(draws, self.runs % self.particles)

    def model(self, x, noise, draws, mask=None, y=None, index=None):
        with self.plate(x, index), poutine.mask(mask=True if mask is None else mask):
            z = pyro.sample("z", self.prior(x, draws, y).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1).to_event(1), obs=x)

    def guide(self, x, noise, draws, mask=None, y=None, index=None):
        loc, scale = self.encoder(x).chunk(2, -1)
        with self.plate(x, index):
            fn = (
                GivenNoise(loc, scale.exp()).noise_is(noise, self.runs % self.particles)
                if self.is_random
                else dist.Delta(loc)
            )
            pyro.sample("z", fn.to_event(1))
        self.runs += 1


class Stack(Net):
    """Two latent sites, the second drawn given the first, by weights to learn."""

    def __init__(self, **options):
        super().__init__(**options)
        self.transition = nn.Linear(D, D).double()
        self.encoder = nn.Linear(X, 4 * D).double()

    def model(self, x, noise, draws, **_):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", self.prior(x, draws, None).to_event(1))
            loc = self.transition(z1)
            fn = GivenNoise(loc, torch.full_like(loc, 0.5)).noise_is(draws.flip(1) ** 2, self.runs % self.particles)
            z2 = pyro.sample("z2", fn.to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z1 + z2), 1).to_event(1), obs=x)

    def guide(self, x, noise, draws, **_):
        locs, scales = self.encoder(x).split(2 * D, -1)
        with pyro.plate("data", len(x)):
            for name, loc, scale in zip(("z1", "z2"), locs.chunk(2, -1), scales.exp().chunk(2, -1), strict=True):
                pyro.sample(name, GivenNoise(loc, scale).noise_is(noise, self.runs % self.particles).to_event(1))
        self.runs += 1


def arguments(**more):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(N, X, dtype=torch.float64, generator=generator)
    noise, draws = torch.randn(2, N, K, D, dtype=torch.float64, generator=generator)
    return {"x": x, "noise": noise, "draws": draws, **more}


def mask():
    keep = torch.ones(N, dtype=torch.bool)
    keep[[0, 7, 8, 20]] = False
    return keep


def discriminator():
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(D, 9), nn.ReLU(), nn.Linear(9, 1)).double()


def case(penalty=None, net=Net, *, plate_size=None, is_random=True, learns=False, options=None, **data):
    """Net and its settings, data beside x, and options of the loss, made afresh for each run."""

    def make():
        made = {name: value() if callable(value) else value for name, value in (options or {}).items()}
        made |= {} if penalty is None else {"penalty": penalty()}
        torch.manual_seed(5)
        nets = net(is_random=is_random, learns=learns, plate_size=plate_size)
        nets.particles = made.get("num_particles", 1)
        return nets, arguments(**{name: value() for name, value in data.items()}), made

    return make


def labels():
    """Alike within a micro-batch, so only all together show that they vary."""
    return torch.arange(N) // ROWS % 3


def floats():
    return labels().double() / 2


AT_ONCE = {"num_particles": K, "vectorize_particles": True}
CASES = {
    "mmd": case(),
    "deterministic": case(is_random=False),
    "closed form off": case(lambda: MMD(closed_form=False)),
    "standardised": case(lambda: MMD(standardize=True)),
    "sliced": case(SlicedWasserstein),
    "several terms": case(lambda: MMD() + 0.3 * SlicedWasserstein()),
    "function": case(lambda: lambda q, p: (q.mean(0) - p.mean(0)).square().sum()),
    "gan, shared optimiser": case(lambda: JensenShannon(discriminator(), optimizer=None)),
    "gan, own optimiser": case(lambda: JensenShannon(discriminator(), steps=2)),
    "gan, log density": case(lambda: JensenShannon(discriminator(), optimizer=None, prior_log_prob=True), learns=True),
    "stein": case(KernelStein),
    "stein, hierarchical": case(lambda: KernelStein(Gaussian(1.0)), Stack, learns=True),
    "guard": case(lambda: MMD() + 0.1 * LogVarianceL1()),
    "guard and mask": case(lambda: MMD() + 0.1 * LogVarianceL1(), mask=mask),
    "hierarchical": case(net=Stack),
    "hierarchical, learnt": case(net=Stack, learns=True),
    "site by site": case(lambda: {"z1": MMD(), "z2": SlicedWasserstein()}, Stack),
    "one site free": case(lambda: {"z1": None, "z2": MMD() + LogVarianceL1(0.1)}, Stack),
    "chain": case(lambda: Chain(MMD()), Stack),
    "chain and mask": case(lambda: Chain(MMD(), step_size=1), mask=mask),
    "prior learnt from draws": case(lambda: MMD(Gaussian(1.0), closed_form=False), learns=True),
    "prior learnt in closed form": case(lambda: MMD(Gaussian(1.0), closed_form=True), learns=True),
    "prior varies": case(learns=True, y=floats),
    "prior varies between micro-batches": case(y=floats),
    "labels": case(options={"condition": "y"}, y=labels),
    "floats": case(SlicedWasserstein, options={"condition": "y"}, y=floats),
    "mask": case(mask=mask),
    "posterior kl": case(PosteriorKL),
    "posterior kl, hierarchical": case(PosteriorKL, Stack),
    "particles": case(options={"num_particles": K}),
    "particles, more draws, hierarchical": case(net=Stack, options={"num_particles": K, "prior_draws": 2}),
    "particles, guard": case(lambda: MMD() + LogVarianceL1(0.1), options={"num_particles": K}),
    "particles at once": case(options=AT_ONCE),
    "particles at once, mask": case(options=AT_ONCE, mask=mask),
    "subsample": case(plate_size=40, options={"num_particles": K}, index=lambda: torch.arange(N) + 5),
    "whole data in a plate with indices": case(
        plate_size=N, options={"num_particles": K}, index=lambda: torch.arange(N)
    ),
    "constraint": case(options={"penalty_weight": lambda: Constraint(initial=3.0)}),
}


def one_step(case, **options):
    """Value, terms, gradients and state of a step through the torch route."""
    net, given, made = CASES[case]()
    loss_fn = WAELoss(**{"penalty_weight": 2.0, **made, **options})(net.model, net.guide)
    torch.manual_seed(6)
    value = loss_fn(**given)
    value.backward()
    grads = {name: p.grad for name, p in loss_fn.named_parameters() if p.requires_grad}
    return value.item(), loss_fn.terms.as_dict(), grads, loss_fn.state_dict()


def assert_close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.filterwarnings("ignore:The prior of latent site 'z' differs between data")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_step_is_that_of_all_data_at_once(case):
    value, terms, grads, state = one_step(case)
    split_value, split_terms, split_grads, split_state = one_step(case, micro_batch=ROWS)
    assert split_value == pytest.approx(value, rel=1e-10)
    assert split_terms == pytest.approx(terms, rel=1e-9, abs=1e-12)
    assert split_grads.keys() == grads.keys()
    for name, expected in grads.items():
        assert (split_grads[name] is None) == (expected is None), name
        if expected is not None:
            assert_close(split_grads[name], expected)
    assert any(g is not None and g.abs().max() > 1e-4 for g in grads.values())
    for name, expected in state.items():
        if isinstance(expected, torch.Tensor):
            # What a weight and an own optimiser keep: a mean over random features in float32, Adam's steps of 1e-3.
            assert_close(split_state[name], expected.to(split_state[name]), 1e-5 if "weight." in name else 1e-8)


def test_a_prior_that_varies_only_between_micro_batches_has_no_one_distribution():
    net, given = Net(), arguments(y=floats())
    for rows in (None, ROWS):
        with pytest.raises(ValueError, match="no variance of the prior is known"):
            WAELoss(KernelStein(), micro_batch=rows).loss(net.model, net.guide, **given)


def test_a_constraint_sees_the_whole_batch_once():
    net, seen = Net(), []

    class Watched(Constraint):
        def observe(self, cost, codes, prior):
            seen.append((cost.shape, codes.shape, prior.shape, codes.requires_grad))
            super().observe(cost, codes, prior)

    weight = Watched(initial=3.0)
    WAELoss(penalty_weight=weight, micro_batch=ROWS).loss_and_grads(net.model, net.guide, **arguments())
    assert seen == [((), (1, N, D), (N, D), False)]
    assert weight.step == 1


def test_svi_steps_are_those_of_all_data_at_once_with_a_learnt_mixture():
    trained = []
    for rows in (None, ROWS):
        pyro.clear_param_store()
        torch.manual_seed(5)
        net = Nets(MixturePrior(3, D), D).double()
        loss = WAELoss(MMD(Gaussian(1.0), closed_form=True), penalty_weight=5.0, micro_batch=rows)
        svi = SVI(net.model, net.guide, Adam({"lr": 0.01}), loss=loss)
        losses = [svi.step(arguments()["x"][:, :4]) for _ in range(3)]
        trained.append((losses, list(net.parameters())))
    assert trained[1][0] == pytest.approx(trained[0][0], rel=1e-10)
    for split, whole in zip(trained[1][1], trained[0][1], strict=True):
        assert_close(split, whole, 1e-8)


def noisy():
    """A stochastic guide and dropout, whose noise torch draws, with the codes and the outputs of each run."""
    decoder = nn.Sequential(nn.Linear(D, X), nn.Dropout())
    net = AutoEncoder(X, D, encoder=nn.Linear(X, 2 * D), decoder=decoder, code=gaussian).double()
    codes, outputs = [], []

    def keep(_, given, output):
        codes.append(given[0].detach())
        outputs.append(output.detach())

    decoder.register_forward_hook(keep)
    return net, codes, outputs


def test_runs_of_the_backward_pass_draw_what_the_first_drew():
    net, codes, outputs = noisy()
    loss_fn = WAELoss(micro_batch=ROWS)(net.model, net.guide)
    loss_fn(arguments()["x"]).backward()
    codes.clear()
    outputs.clear()
    value = loss_fn(arguments()["x"])
    torch.randn(7)  # the backward pass may come later
    later = torch.get_rng_state()
    value.backward()
    assert torch.equal(torch.get_rng_state(), later)
    for drawn in (codes, outputs):
        assert len(drawn) == 8
        for first, second in zip(drawn[:4], reversed(drawn[4:]), strict=True):
            assert torch.equal(first, second)
    assert not torch.equal(codes[0], codes[1])


@pytest.mark.parametrize("method", ["loss", "loss_and_grads"])
def test_the_ways_to_the_loss_agree(method):
    (net, *_), x = noisy(), arguments()["x"]
    pyro.set_rng_seed(2)
    expected = WAELoss(micro_batch=ROWS).differentiable_loss(net.model, net.guide, x).item()
    pyro.set_rng_seed(2)
    assert getattr(WAELoss(micro_batch=ROWS), method)(net.model, net.guide, x) == expected


@pytest.mark.parametrize(("method", "rows", "sizes"), [("loss", ROWS, [6, 6, 6, 4]), ("loss_and_grads", N, [N])])
def test_loss_runs_each_micro_batch_once_and_a_batch_that_fits_as_it_is(method, rows, sizes):
    net, codes, _ = noisy()
    getattr(WAELoss(micro_batch=rows), method)(net.model, net.guide, arguments()["x"])
    assert [len(drawn) for drawn in codes] == sizes


@pytest.mark.parametrize("layer", [1, 2], ids=["hidden", "output"])
def test_activations_of_one_micro_batch_live_at_a_time(layer):
    net = Net()
    alive, most = [], []

    def watch(module, inputs, output):
        alive.append(weakref.ref(output))
        most.append(sum(len(tensor) for ref in alive if (tensor := ref()) is not None))

    net.decoder[layer].register_forward_hook(watch)
    loss_fn = WAELoss(micro_batch=ROWS)(net.model, net.guide)
    loss_fn(**arguments()).backward()
    assert len(most) == 1 + 4 + 4
    assert max(most) == ROWS


def compiled_in_place(net):
    net.compile(backend="eager")
    return net


NORMALISED = {
    "BatchNorm": lambda layer: nn.Sequential(layer, nn.BatchNorm1d(2 * D).double()),
    "spectral": spectral_norm,
}
WAYS = {
    "eager": lambda net: net,
    "compiled": functools.partial(torch.compile, backend="eager"),
    "compiled in place": compiled_in_place,
    "scripted": torch.jit.script,
}


@pytest.mark.parametrize(
    ("kind", "way"), [*(("BatchNorm", way) for way in WAYS), ("spectral", "eager"), ("spectral", "compiled in place")]
)
@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:Using `torch.compile", "ignore:Dynamo does not know how")
def test_what_changes_as_it_runs_normalises_each_micro_batch_and_moves_once_for_each(kind, way):
    net = Net(is_random=False)
    net.encoder = NORMALISED[kind](net.encoder)
    other, net.encoder = copy.deepcopy(net), WAYS[way](net.encoder)
    given = arguments()
    loss_fn = WAELoss(lambda q, p: q.pow(4).mean(), penalty_weight=2.0, micro_batch=ROWS)(net.model, net.guide)
    loss_fn(**given).backward()
    z = torch.cat([other.encoder(rows)[:, :D] for rows in given["x"].split(ROWS)])
    cost = (given["x"] - other.decoder(z)).square().sum(1).mean()
    (cost + 2.0 * z.pow(4).mean()).backward()
    for (name, parameter), (_, expected) in zip(net.named_parameters(), other.named_parameters(), strict=True):
        if expected.grad is not None:
            assert_close(parameter.grad, expected.grad), name
    for buffer, expected in zip(net.buffers(), other.buffers(), strict=True):
        assert_close(buffer, expected)
    if kind == "BatchNorm":
        assert dict(other.named_buffers())["encoder.1.num_batches_tracked"] == 4


class Unsteady(nn.Linear):
    """An encoder whose noise is of a generator of its own, or grows with each call."""

    def __init__(self, noise):
        super().__init__(X, 2 * D)
        self.noise, self.calls, self.own = noise, 0, torch.Generator().manual_seed(1)

    def forward(self, x):
        self.calls += 1
        noise = {"own": lambda: torch.randn(len(x), 1, generator=self.own).double(), "calls": lambda: self.calls}
        return super().forward(x) + noise[self.noise]()


@pytest.mark.parametrize("change", ["own generator", "counter", "data", "parameters"])
def test_a_repeated_run_with_other_codes_is_an_error_and_no_other_gradient(change):
    net, given = Net(is_random=False), arguments()
    if change in ("own generator", "counter"):
        net.encoder = Unsteady("own" if change == "own generator" else "calls").double()
    value = WAELoss(penalty_weight=0.0, micro_batch=ROWS)(net.model, net.guide)(**given)
    with torch.no_grad():
        if change == "data":
            given["x"].neg_()
        if change == "parameters":
            net.encoder.weight.mul_(2)
    with pytest.raises(ValueError, match=r"run again in the backward pass, and their codes.* Write svi.step"):
        value.backward()


def test_backward_after_the_handlers_of_the_forward_pass_are_gone():
    grads = []
    for rows in (None, ROWS):
        torch.manual_seed(5)
        net = Net()
        with poutine.scale(scale=torch.tensor(3.0, dtype=torch.float64)):
            value = WAELoss(micro_batch=rows)(net.model, net.guide)(**arguments())
        value.backward()
        grads.append([p.grad for p in (*net.encoder.parameters(), *net.decoder.parameters())])
    for whole, split in zip(*grads, strict=True):
        assert_close(split, whole)


def test_backward_runs_on_the_default_device_of_the_forward_pass():
    net, given, devices = Net(), arguments(), []
    net.decoder.register_forward_hook(lambda *_: devices.append(torch.empty(0).device.type))
    with torch.device("meta"):
        value = WAELoss(MMD(Gaussian(1.0)), penalty_weight=2.0, micro_batch=ROWS)(net.model, net.guide)(**given)
    value.backward()
    assert devices == ["meta"] * 9
    assert torch.empty(0).device.type == "cpu"


def test_gradients_by_autograd_and_a_second_backward_pass():
    net = Net()
    loss_fn = WAELoss(micro_batch=ROWS)(net.model, net.guide)
    parameters = [*net.encoder.parameters()]
    value = loss_fn(**arguments())
    first = torch.autograd.grad(value, parameters, retain_graph=True)
    value.backward()
    for gradient, parameter in zip(first, parameters, strict=True):
        assert_close(gradient, parameter.grad)


def test_parameters_that_are_made_at_the_first_step_have_the_right_gradient():
    model, guide = program(
        lambda x: around(x @ pyro.param("weight", lambda: torch.randn(X, D, dtype=torch.float64))),
        lambda x: normal(x, D),
        lambda z: around(z @ pyro.param("loc", lambda: torch.randn(D, X, dtype=torch.float64))),
    )
    x = arguments()["x"]
    gradients = []
    for _ in range(2):  # the second time with parameters made before
        pyro.set_rng_seed(3)
        WAELoss(MMD(closed_form=False), micro_batch=ROWS).loss_and_grads(model, guide, x)
        gradients.append([p.grad.clone() for p in pyro.get_param_store().values()])
        for p in pyro.get_param_store().values():
            p.grad = None
    for first, second in zip(*gradients, strict=True):
        assert_close(first, second)


def test_an_autoguide_on_local_latents_trains_the_parameters_of_the_data_it_sees():
    grads = []
    for rows in (None, ROWS):
        torch.manual_seed(5)
        decoder = nn.Linear(D, X).double()

        def plate(x, index):
            return pyro.plate("data", 40, subsample=index)

        def model(x, index, decoder=decoder):
            with plate(x, index):
                pyro.sample("x", around(decoder(pyro.sample("z", normal(x, D)))), obs=x)

        guide = AutoDelta(model, init_loc_fn=init_to_sample, create_plates=plate)
        x, index = arguments()["x"], torch.arange(N) + 5
        guide(x, index)
        WAELoss(MMD(Gaussian(1.0)), micro_batch=rows).loss_and_grads(model, guide, x, index)
        grads.append([p.grad for p in (*guide.parameters(), *decoder.parameters())])
    assert grads[0][0].shape == (40, D)
    for whole, split in zip(*grads, strict=True):
        assert_close(split, whole)


def test_one_datum_left_over_does_not_make_the_prior_vary():
    """One code shows no prior that is common to all; five data in runs of four and one have the loss of all at once."""
    encoder, decoder, loc = nn.Linear(3, 2), nn.Linear(2, 3), nn.Parameter(torch.tensor([0.3, -0.2]))

    programs = program(lambda x: delta(encoder(x)), lambda x: around(loc), lambda z: around(decoder(z)))
    x = torch.randn(5, 3)
    losses = []
    for size in (None, 4):
        pyro.set_rng_seed(0)
        losses.append(WAELoss(penalty_weight=10.0, micro_batch=size).loss(*programs, x))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
