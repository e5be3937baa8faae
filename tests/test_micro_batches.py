"""A step in micro-batches against the same step on all data at once, which is drawn with the same noise."""

from __future__ import annotations

import copy
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoDelta, AutoNormal, init_to_sample
from torch import nn

from pyro_wae import WAELoss
from pyro_wae.kernels import Gaussian
from pyro_wae.optim import Adam
from pyro_wae.penalties import (
    MMD,
    Chain,
    JensenShannon,
    KernelStein,
    LogVarianceL1,
    SlicedWasserstein,
)
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


def conditions(kind):
    y = torch.arange(N) // ROWS % 3  # alike within a micro-batch, so that only all together show that it varies
    return y if kind == "labels" else y.double() / 2


CASES = {
    "mmd": (Net, {}, {}, dict),
    "deterministic": (Net, {"is_random": False}, {}, dict),
    "closed form off": (Net, {}, {}, lambda: {"penalty": MMD(closed_form=False)}),
    "standardised": (Net, {}, {}, lambda: {"penalty": MMD(standardize=True)}),
    "sliced": (Net, {}, {}, lambda: {"penalty": SlicedWasserstein()}),
    "several terms": (Net, {}, {}, lambda: {"penalty": MMD() + 0.3 * SlicedWasserstein()}),
    "function": (Net, {}, {}, lambda: {"penalty": lambda q, p: (q.mean(0) - p.mean(0)).square().sum()}),
    "gan, shared optimiser": (
        Net,
        {},
        {},
        lambda: {"penalty": JensenShannon(discriminator(), optimizer=None)},
    ),
    "gan, own optimiser": (Net, {}, {}, lambda: {"penalty": JensenShannon(discriminator(), steps=2)}),
    "gan, log density": (
        Net,
        {"learns": True},
        {},
        lambda: {"penalty": JensenShannon(discriminator(), optimizer=None, prior_log_prob=True)},
    ),
    "stein": (Net, {}, {}, lambda: {"penalty": KernelStein()}),
    "stein, hierarchical": (Stack, {"learns": True}, {}, lambda: {"penalty": KernelStein(Gaussian(1.0))}),
    "guard": (Net, {}, {}, lambda: {"penalty": MMD() + 0.1 * LogVarianceL1()}),
    "guard and mask": (
        Net,
        {},
        {"mask": mask},
        lambda: {"penalty": MMD() + 0.1 * LogVarianceL1()},
    ),
    "hierarchical": (Stack, {}, {}, dict),
    "hierarchical, learnt": (Stack, {"learns": True}, {}, dict),
    "site by site": (Stack, {}, {}, lambda: {"penalty": {"z1": MMD(), "z2": SlicedWasserstein()}}),
    "one site free": (Stack, {}, {}, lambda: {"penalty": {"z1": None, "z2": MMD() + LogVarianceL1(0.1)}}),
    "chain": (Stack, {}, {}, lambda: {"penalty": Chain(MMD())}),
    "chain and mask": (Net, {}, {"mask": mask}, lambda: {"penalty": Chain(MMD(), step_size=1)}),
    "prior learnt from draws": (
        Net,
        {"learns": True},
        {},
        lambda: {"penalty": MMD(Gaussian(1.0), closed_form=False)},
    ),
    "prior learnt in closed form": (
        Net,
        {"learns": True},
        {},
        lambda: {"penalty": MMD(Gaussian(1.0), closed_form=True)},
    ),
    "prior varies": (Net, {"learns": True}, {"y": lambda: conditions("floats")}, dict),
    "prior varies between micro-batches": (Net, {}, {"y": lambda: conditions("floats")}, dict),
    "labels": (Net, {}, {"y": lambda: conditions("labels")}, lambda: {"condition": "y"}),
    "floats": (
        Net,
        {},
        {"y": lambda: conditions("floats")},
        lambda: {"penalty": SlicedWasserstein(), "condition": "y"},
    ),
    "mask": (Net, {}, {"mask": mask}, dict),
    "particles": (Net, {}, {}, lambda: {"num_particles": K}),
    "particles, more draws, hierarchical": (Stack, {}, {}, lambda: {"num_particles": K, "prior_draws": 2}),
    "particles, guard": (Net, {}, {}, lambda: {"num_particles": K, "penalty": MMD() + LogVarianceL1(0.1)}),
    "particles at once": (Net, {}, {}, lambda: {"num_particles": K, "vectorize_particles": True}),
    "particles at once, mask": (
        Net,
        {},
        {"mask": mask},
        lambda: {"num_particles": K, "vectorize_particles": True},
    ),
    "subsample": (
        Net,
        {"plate_size": 40},
        {"index": lambda: torch.arange(N) + 5},
        lambda: {"num_particles": K},
    ),
    "whole data in a plate with indices": (
        Net,
        {"plate_size": N},
        {"index": lambda: torch.arange(N)},
        lambda: {"num_particles": K},
    ),
    "constraint": (Net, {}, {}, lambda: {"penalty_weight": Constraint(initial=3.0)}),
}


def one_step(case, **options):
    """Value, terms, gradients and state of a step through the torch route."""
    make, settings, more, loss_options = CASES[case]
    torch.manual_seed(5)
    net = make(**settings)
    net.particles = loss_options().get("num_particles", 1)
    loss_fn = WAELoss(**{"penalty_weight": 2.0, **loss_options(), **options})(net.model, net.guide)
    torch.manual_seed(6)
    value = loss_fn(**arguments(**{name: make_value() for name, make_value in more.items()}))
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
    net, given = Net(), arguments(y=conditions("floats"))
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


def mixture_programs():
    torch.manual_seed(5)
    net, prior = Net(is_random=False), MixturePrior(3, D).double()

    def model(x):
        pyro.module("decoder", net.decoder)
        pyro.module("prior", prior)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(net.decoder(z), 1).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", net.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(net.encoder(x)[:, :D]).to_event(1))

    return model, guide, [*net.parameters(), *prior.parameters()]


def test_svi_steps_are_those_of_all_data_at_once_with_a_learnt_mixture():
    trained = []
    for rows in (None, ROWS):
        pyro.clear_param_store()
        model, guide, parameters = mixture_programs()
        loss = WAELoss(MMD(Gaussian(1.0), closed_form=True), penalty_weight=5.0, micro_batch=rows)
        svi = SVI(model, guide, Adam({"lr": 0.01}), loss=loss)
        losses = [svi.step(arguments()["x"]) for _ in range(3)]
        trained.append((losses, parameters))
    assert trained[1][0] == pytest.approx(trained[0][0], rel=1e-10)
    for split, whole in zip(trained[1][1], trained[0][1], strict=True):
        assert_close(split, whole, 1e-8)


class Noisy(nn.Module):
    """A stochastic guide and dropout, whose noise torch draws; it keeps what it drew."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(X, 2 * D).double(), nn.Linear(D, X).double()
        self.codes, self.seen = [], []

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(D), 1).to_event(1))
            self.codes.append(z.detach())
            hidden = nn.functional.dropout(self.decoder(z))
            self.seen.append(hidden.detach())
            pyro.sample("x", dist.Normal(hidden, 1).to_event(1), obs=x)

    def guide(self, x):
        loc, scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))


def test_runs_of_the_backward_pass_draw_what_the_first_drew():
    net = Noisy()
    loss_fn = WAELoss(micro_batch=ROWS)(net.model, net.guide)
    loss_fn(arguments()["x"]).backward()
    net.codes.clear()
    net.seen.clear()
    value = loss_fn(arguments()["x"])
    torch.randn(7)  # the backward pass may come later
    later = torch.get_rng_state()
    value.backward()
    assert torch.equal(torch.get_rng_state(), later)
    for drawn in (net.codes, net.seen):
        assert len(drawn) == 8
        for first, second in zip(drawn[:4], reversed(drawn[4:]), strict=True):
            assert torch.equal(first, second)
    assert not torch.equal(net.codes[0], net.codes[1])


def test_gradient_with_torchs_noise_is_that_of_all_codes_by_hand():
    net = Noisy()
    x = arguments()["x"]
    weight = 2.0
    loss_fn = WAELoss(MMD(Gaussian(1.0)), penalty_weight=weight, micro_batch=ROWS)(net.model, net.guide)
    torch.manual_seed(1)
    value = loss_fn(x)
    value.backward()
    grads = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    torch.manual_seed(1)
    codes, costs = [], []
    for rows in x.split(ROWS):
        loc, scale = net.encoder(rows).chunk(2, -1)
        codes.append(loc + scale.exp() * torch.randn(len(rows), D, dtype=torch.float64))
        costs.append((rows - nn.functional.dropout(net.decoder(codes[-1]))).square().sum(1))
        torch.randn(len(rows), D, dtype=torch.float64)  # the prior draws, which the closed form does not read
    z = torch.cat(codes)
    d = D
    kernel = torch.exp(-((z[:, None] - z[None]) ** 2).sum(2) / 2)
    cross = (2**-0.5) ** d * torch.exp(-z.square().sum(1) / 4)
    penalty = (kernel.sum() - N) / (N * (N - 1)) - 2 * cross.mean() + (3**-0.5) ** d
    expected = torch.cat(costs).mean() + weight * penalty
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-10)
    for name, parameter in net.named_parameters():
        assert_close(grads[name], parameter.grad)


@pytest.mark.parametrize("method", ["loss", "loss_and_grads"])
def test_the_ways_to_the_loss_agree(method):
    net, x = Noisy(), arguments()["x"]
    pyro.set_rng_seed(2)
    expected = WAELoss(micro_batch=ROWS).differentiable_loss(net.model, net.guide, x).item()
    pyro.set_rng_seed(2)
    assert getattr(WAELoss(micro_batch=ROWS), method)(net.model, net.guide, x) == expected


def test_loss_runs_each_micro_batch_once():
    net = Noisy()
    WAELoss(micro_batch=ROWS).loss(net.model, net.guide, arguments()["x"])
    assert [len(codes) for codes in net.codes] == [6, 6, 6, 4]


def test_a_batch_that_fits_runs_as_it_is():
    net = Noisy()
    WAELoss(micro_batch=N).loss_and_grads(net.model, net.guide, arguments()["x"])
    assert [len(codes) for codes in net.codes] == [N]


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


def test_batch_norm_normalises_each_micro_batch_and_moves_once_for_each():
    class Normed(Net):
        def __init__(self):
            super().__init__(is_random=False)
            self.encoder = nn.Sequential(nn.Linear(X, 2 * D), nn.BatchNorm1d(2 * D)).double()

    net = Normed()
    other = copy.deepcopy(net)
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
    norm = net.encoder[1]
    assert norm.num_batches_tracked == 4
    assert norm.momentum == 0.1


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
    def model(x):
        loc = pyro.param("loc", lambda: torch.randn(D, X, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(D), 1).to_event(1))
            pyro.sample("x", dist.Normal(z @ loc, 1).to_event(1), obs=x)

    def guide(x):
        weight = pyro.param("weight", lambda: torch.randn(X, D, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ weight, 1).to_event(1))

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
                z = pyro.sample("z", dist.Normal(x.new_zeros(D), 1).to_event(1))
                pyro.sample("x", dist.Normal(decoder(z), 1).to_event(1), obs=x)

        guide = AutoDelta(model, init_loc_fn=init_to_sample, create_plates=plate)
        x, index = arguments()["x"], torch.arange(N) + 5
        guide(x, index)
        WAELoss(MMD(Gaussian(1.0)), micro_batch=rows).loss_and_grads(model, guide, x, index)
        grads.append([p.grad for p in (*guide.parameters(), *decoder.parameters())])
    assert grads[0][0].shape == (40, D)
    for whole, split in zip(*grads, strict=True):
        assert_close(split, whole)


def test_an_autoguide_that_would_share_its_parameters_between_micro_batches_is_an_error():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(D), 1).to_event(1))
            pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x[:, :D])

    with pytest.raises(ValueError, match=r"AutoNormal has parameters for each datum of the plate 'data'.*those of 11"):
        WAELoss(micro_batch=N // 2).loss_and_grads(model, AutoNormal(model), arguments()["x"])


def test_something_made_late_is_an_error_and_no_wrong_gradient():
    net = Noisy()
    loss = WAELoss(micro_batch=ROWS)
    loss.loss_and_grads(net.model, net.guide, arguments()["x"])

    def model(x):
        pyro.param("late", lambda: torch.randn(3))
        net.model(x)

    with pytest.raises(ValueError, match="other random numbers"):
        loss.loss_and_grads(model, net.guide, arguments()["x"])


def test_nan_is_named_and_leaves_no_gradient():
    net = Net(is_random=False)
    given = arguments()
    given["x"][20] = torch.nan
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="codes of latent site 'z' hold NaN"):
        WAELoss(micro_batch=ROWS).loss_and_grads(net.model, net.guide, **given)
    assert all(p.grad is None for p in net.parameters())


def test_a_plate_that_draws_its_indices_is_an_error():
    def program(x, observed):
        with pyro.plate("data", 100, subsample_size=len(x)):
            z = pyro.sample(
                "z", dist.Normal(x.new_zeros(D), 1).to_event(1) if observed else dist.Delta(x[:, :D], event_dim=1)
            )
            if observed:
                pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x[:, :D])

    with pytest.raises(ValueError, match=r"plate 'data' draws 6 of 100 by itself.*subsample=index\)"):
        WAELoss(micro_batch=ROWS).loss(lambda x: program(x, True), lambda x: program(x, False), arguments()["x"])


def test_data_that_are_not_split_are_an_error():
    net = Net()

    def model(first, given):
        net.model(**dict(given))

    def guide(first, given):
        net.guide(**dict(given))

    with pytest.raises(ValueError, match=r"plate 'data' has 22 data in a micro-batch of 6.*first tensor argument"):
        WAELoss(micro_batch=ROWS).loss(model, guide, torch.zeros(N), list(arguments().items()))
    with pytest.raises(ValueError, match=r"of the arguments \(list\) none is a tensor.*svi.step\(x\)"):
        WAELoss(micro_batch=ROWS).loss(lambda given: None, lambda given: None, list(arguments().items()))


def test_micro_batches_of_different_structure_are_an_error():
    def size(x):
        return D + int(len(x) < ROWS)  # the last micro-batch

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(size(x)), 1).to_event(1))
            pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x[:, : size(x)])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x[:, : size(x)]).to_event(1))

    with pytest.raises(ValueError, match=r"different sites or sizes: \{'z': \(0, 2\)\} and \{'z': \(0, 3\)\}"):
        WAELoss(micro_batch=ROWS).loss(model, guide, arguments()["x"])


def test_arguments_of_another_length_are_passed_whole():
    net, seen = Noisy(), []

    def model(x, table, *, scale, y, name):
        seen.append((len(table), scale.ndim, len(y), name))
        net.model(x)

    def guide(x, table, *, scale, y, name):
        net.guide(x)

    x = arguments()["x"]
    WAELoss(micro_batch=ROWS).loss(model, guide, x, torch.zeros(9, N), scale=torch.tensor(1.0), y=x[:, 0], name="a")
    assert seen == [(9, 0, 6, "a")] * 3 + [(9, 0, 4, "a")]


def test_a_batch_that_is_a_dict_is_split_by_its_tensors():
    x, sizes = torch.randn(N, X, dtype=torch.float64), []
    net = nn.Linear(X, D).double()

    def model(batch):
        sizes.append((len(batch["x"]), len(batch["other"]["y"]), len(batch["table"]), batch["name"]))
        with pyro.plate("data", len(batch["x"])):
            z = pyro.sample("z", dist.Normal(x.new_zeros(D), 1).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(1, keepdim=True).expand(-1, X), 1).to_event(1), obs=batch["x"])

    def guide(batch):
        with pyro.plate("data", len(batch["x"])):
            pyro.sample("z", dist.Delta(net(batch["x"])).to_event(1))

    batch = {"name": "a", "x": x, "other": {"y": x[:, 0]}, "table": torch.zeros(9, N)}
    values = []
    for micro_batch in (None, ROWS):
        net.zero_grad()
        wae = WAELoss(KernelStein(Gaussian(1.0)), penalty_weight=2.0, micro_batch=micro_batch)(model, guide)
        loss = wae(batch)
        loss.backward()
        values.append([loss.detach(), net.weight.grad])
        if micro_batch is None:
            assert sizes == [(N, N, 9, "a")]
    assert set(sizes[1:]) == {(6, 6, 9, "a"), (4, 4, 9, "a")}
    assert_close(*values)


def test_a_plate_of_a_fixed_size_says_which_data_it_met():
    net = Noisy()

    def guide(x):
        with pyro.plate("data", N):
            pyro.sample("z", dist.Delta(net.encoder(x)[:, :D]).to_event(1))

    with pytest.raises(ValueError, match="plate") as raised:
        WAELoss(micro_batch=ROWS).loss(net.model, guide, arguments()["x"])
    assert any("data 0 to 5" in note and "pyro.plate('data', len(x))" in note for note in raised.value.__notes__)
