"""Recorded steps against the same steps run as usual."""

from __future__ import annotations

import copy
import pickle
import random
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from torch import nn

from pyro_wae import WAELoss, recording
from pyro_wae.penalties import (
    MMD,
    CramerWold,
    EnergyDistance,
    JensenShannon,
    KernelStein,
    LogVarianceL1,
    MaxSlicedWasserstein,
    Sinkhorn,
    SlicedWasserstein,
)
from pyro_wae.recording import graph
from pyro_wae.weights import Constraint, Schedule

N, D, X = 20, 3, 6


@pytest.fixture(autouse=True)
def _clean():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


class Net(nn.Module):
    """Encoder and decoder with BatchNorm and Dropout; the guide draws codes."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(X, 12, bias=False), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 2 * D))
        self.decoder = nn.Sequential(nn.Linear(D, 12), nn.Tanh(), nn.Dropout(0.1), nn.Linear(12, X))

    def encode(self, x):
        loc, scale = self.encoder(x).chunk(2, -1)
        return dist.Normal(loc, scale.exp()).to_event(1)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), D), 1).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.encode(x))


class Hierarchical(Net):
    """z2 ~ p(z2 | z1) with a scale to learn, drawn anew by running the model again."""

    def __init__(self):
        super().__init__()
        self.between = nn.Linear(1, 2)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        pyro.module("between", self.between)
        scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x.new_zeros(1), 1).to_event(1))
            z2 = pyro.sample("z2", dist.Normal(self.between(z1), scale).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(torch.cat([z1, z2], -1)), 1).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        z = self.encoder(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z1", dist.Normal(z[:, :1], 0.5).to_event(1))
            pyro.sample("z2", dist.Delta(z[:, 1:3]).to_event(1))


class Masked(Net):
    """Data whose first number is below -1.5 are masked: none of them in most batches, some in others."""

    def model(self, x):
        with poutine.mask(mask=x[:, 0] > -1.5):
            super().model(x)

    def guide(self, x):
        with poutine.mask(mask=x[:, 0] > -1.5):
            super().guide(x)


class Ragged(Net):
    """Every datum has one to three numbers of a code; the others are masked."""

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x), dim=-2):
            with pyro.plate("time", D, dim=-1), poutine.mask(mask=self.kept(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), D), 1))
            pyro.sample("x", dist.Normal(self.decoder(z)[:, None], 1).to_event(1), obs=x[:, None])

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        loc, scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x), dim=-2), pyro.plate("time", D, dim=-1), poutine.mask(mask=self.kept(x)):
            pyro.sample("z", dist.Normal(loc, scale.exp()))

    @staticmethod
    def kept(x):
        return torch.cat([torch.ones_like(x[:, :1]), x[:, 1:D]], 1) > 0


def batches(steps, n=N):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(steps, n, X, generator=generator)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-3)


def small_discriminator():
    return nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, 1))


PENALTIES = {
    "MMD": MMD,
    "MMD-draws": lambda: MMD(closed_form=False),
    "sliced": SlicedWasserstein,
    "energy": EnergyDistance,
    "GAN": lambda: JensenShannon(small_discriminator(), optimizer=adam, steps=2),
    "GAN-shared": lambda: JensenShannon(small_discriminator(), optimizer=None),
    "GAN-log-prior": lambda: JensenShannon(small_discriminator(), optimizer=None, prior_log_prob=True),
    "Cramer-Wold": CramerWold,
    "Stein": KernelStein,
    "Sinkhorn": Sinkhorn,
    "max-sliced": MaxSlicedWasserstein,
    "guarded": lambda: MMD() + 0.1 * LogVarianceL1(),
}


def train(net_class, penalty, compile, data, **options):
    """Losses and parts of every step, and all that training has changed."""
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    net = net_class()
    loss = WAELoss(penalty() if callable(penalty) else penalty, compile=compile, **{"penalty_weight": 10.0, **options})
    svi = SVI(net.model, net.guide, pyro.optim.Adam({"lr": 1e-3}), loss=loss)
    history = []
    for x in data:
        value = svi.step(x)
        history.append(
            torch.tensor([value, float(loss.terms.cost), float(loss.terms.penalty), float(loss.terms.weight)])
        )
    state = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    for name, module in (("net", net), *loss.modules()):
        state |= {
            f"{name}.{key}": value for key, value in module.state_dict().items() if isinstance(value, torch.Tensor)
        }
    return torch.stack(history), state, loss


def assert_same(actual, expected, **tolerance):
    torch.testing.assert_close(actual[0], expected[0], **tolerance)
    assert actual[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        torch.testing.assert_close(
            actual[1][name], value, **tolerance, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def take_steps(loss, net, arguments):
    for args in arguments:
        loss.loss_and_grads(net.model, net.guide, *args)


def recordings(loss):
    return [entry for entry in loss._recorder._entries.values() if entry.recording is not None]


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_a_hundred_recorded_steps_are_those_that_run_as_usual(penalty):
    data = batches(100)
    actual, expected = train(Net, penalty, graph, data), train(Net, penalty, False, data)
    assert_same(actual, expected, rtol=1e-5, atol=1e-6)
    assert len(recordings(actual[2])) == 1


@pytest.mark.parametrize("net", [Hierarchical, Masked, Ragged])
@pytest.mark.parametrize("particles", [1, 2])
def test_hierarchies_and_masks_are_recorded_too(net, particles):
    data = batches(100) + (3.0 if net is Masked else 0.0)
    data[40, 0, 0] = -2.0  # which drops a datum from one batch
    actual, expected = (train(net, MMD, backend, data, num_particles=particles) for backend in (graph, False))
    assert_same(actual, expected, rtol=1e-5, atol=1e-6)
    assert not any(entry.is_refused for entry in actual[2]._recorder._entries.values())


@pytest.mark.parametrize("net", [Hierarchical, Masked, Ragged])
@pytest.mark.parametrize("penalty", ["sliced", "GAN", "GAN-shared"])
def test_hierarchies_and_masks_are_recorded_with_other_penalties(net, penalty):
    data = batches(100) + (3.0 if net is Masked else 0.0)
    if penalty != "GAN":  # which would take its steps twice then, see docs/speed.md
        data[40, 0, 0] = -2.0
    actual, expected = (train(net, PENALTIES[penalty], backend, data) for backend in (graph, False))
    assert_same(actual, expected, rtol=1e-5, atol=1e-6)
    assert len(recordings(actual[2])) == 1


@pytest.mark.parametrize("weight", [Schedule(lambda step: 1.0 + step), 3.0, Constraint(initial=2.0), Constraint()])
def test_the_weight_is_that_of_the_step(weight):
    data = batches(12)
    actual, expected = (train(Net, MMD, c, data, penalty_weight=copy.deepcopy(weight)) for c in (graph, False))
    assert_same(actual, expected, rtol=1e-5, atol=1e-6)
    assert recordings(actual[2])


COMPILED = [
    *((Net, penalty) for penalty in ("MMD", "MMD-draws", "GAN", "GAN-shared", "sliced")),
    *((net, penalty) for net in (Hierarchical, Ragged) for penalty in ("MMD", "GAN-shared")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("net", "penalty"), COMPILED, ids=[f"{net.__name__}-{name}" for net, name in COMPILED])
def test_compiled_steps_are_those_that_run_as_usual(net, penalty):
    """Losses, their parts, parameters and buffers differ by 3e-7 relatively after 100 steps; 30 times that may pass."""
    data = batches(100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        actual = train(net, PENALTIES[penalty], True, data)
    assert_same(actual, train(net, PENALTIES[penalty], False, data), rtol=1e-5, atol=1e-6)
    assert len(recordings(actual[2])) == 1


def test_noise_is_fresh_in_every_step_and_follows_the_seed():
    net, loss, x = Net(), WAELoss(compile=graph, penalty_weight=1.0), batches(1)[0]
    values = []
    for seed in (0, 0, 0, 1, 2, 1):
        pyro.set_rng_seed(seed)
        values.append([loss.loss(net.model, net.guide, x) for _ in range(2)])
    assert len(recordings(loss)) == 1
    assert values[3] == values[5] != values[4]
    assert len({value for pair in values[3:5] for value in pair}) == 4


def test_the_torch_route_gives_scaled_gradients_by_backward():
    net = Net()
    x = batches(6)
    found = {}
    for backend in (graph, False):
        pyro.set_rng_seed(3)
        copied = copy.deepcopy(net)
        loss_fn = WAELoss(compile=backend, penalty_weight=5.0)(copied.model, copied.guide)
        for batch in x:
            loss_fn.zero_grad()
            (1024.0 * loss_fn(batch)).backward()
        found[backend] = [parameter.grad for parameter in copied.parameters()]
    torch.testing.assert_close(found[graph], found[False])


def test_a_second_backward_needs_retain_graph():
    net, x = Net(), batches(1)[0]
    for retain in (None, True):
        loss_fn = WAELoss(compile=graph, penalty_weight=5.0, retain_graph=retain)(net.model, net.guide)
        for _ in range(3):
            value = loss_fn(x)
        net.zero_grad()
        value.backward()
        first = [parameter.grad.clone() for parameter in net.parameters()]
        if retain:
            value.backward()
            torch.testing.assert_close([p.grad for p in net.parameters()], [2 * gradient for gradient in first])
        else:
            with pytest.raises(RuntimeError, match="retain_graph"):
                value.backward()


def test_gradients_are_added_to_those_that_are_there():
    net, loss, x = Net(), WAELoss(compile=graph, penalty_weight=5.0), batches(1)[0]
    for _ in range(3):
        loss.loss_and_grads(net.model, net.guide, x)
    net.zero_grad()
    pyro.set_rng_seed(0)
    loss.loss_and_grads(net.model, net.guide, x)
    once = [parameter.grad.clone() for parameter in net.parameters()]
    pyro.set_rng_seed(0)
    loss.loss_and_grads(net.model, net.guide, x)
    torch.testing.assert_close([p.grad for p in net.parameters()], [2 * gradient for gradient in once])


def test_another_shape_mode_or_number_makes_another_recording():
    net, loss = Net(), WAELoss(compile=graph, penalty_weight=5.0)
    for n in (20, 20, 20, 7, 7, 7):
        loss.loss_and_grads(net.model, net.guide, torch.randn(n, X))
    assert len(recordings(loss)) == 2
    net.eval()
    before = net.encoder[1].running_mean.clone()
    for _ in range(3):
        loss.loss_and_grads(net.model, net.guide, torch.randn(20, X))
    assert torch.equal(net.encoder[1].running_mean, before)
    net.train()
    for _ in range(3):
        loss.loss_and_grads(net.model, net.guide, torch.randn(20, X))
    assert not torch.equal(net.encoder[1].running_mean, before)


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store")
def test_parameters_that_are_set_or_frozen_are_seen():
    data = batches(12)

    def run(backend):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        net, loss = Hierarchical(), WAELoss(compile=backend, penalty_weight=5.0)
        svi = SVI(net.model, net.guide, pyro.optim.SGD({"lr": 1e-3}), loss=loss)
        values = []
        for step, x in enumerate(data):
            if step == 4:
                pyro.get_param_store()["scale"] = torch.tensor(3.0)
            if step == 6:
                net.load_state_dict({name: 0.5 * value for name, value in net.state_dict().items()})
            if step == 8:
                net.encoder.requires_grad_(False)
            values.append(svi.step(x))
        return torch.tensor(values), net.encoder[0].weight.detach()

    torch.testing.assert_close(run(graph), run(False))


def test_nan_is_reported_with_its_part_and_leaves_no_gradient():
    net, loss = Net(), WAELoss(compile=graph, penalty_weight=5.0)
    for x in batches(3):
        loss.loss_and_grads(net.model, net.guide, x)
    net.zero_grad()
    with pytest.raises(ValueError, match="'z'"):
        loss.loss_and_grads(net.model, net.guide, torch.full((N, X), torch.nan))
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_prior_that_starts_to_vary_between_data_is_noticed():
    class Conditional(Net):
        def model(self, x, y):
            pyro.module("decoder", self.decoder)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(y.expand(D, len(x)).T.contiguous(), 1).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z), 1).to_event(1), obs=x)

        def guide(self, x, y):
            super().guide(x)

    def run(backend):
        pyro.set_rng_seed(1)
        net, loss = Conditional(), WAELoss(compile=backend, penalty_weight=5.0)
        labels = [torch.zeros(N)] * 4 + [torch.arange(float(N))] * 4
        values = [loss.loss_and_grads(net.model, net.guide, x, y) for x, y in zip(batches(8), labels, strict=True)]
        return torch.tensor(values), net.encoder[1].running_var

    torch.testing.assert_close(run(graph), run(False))


@pytest.mark.parametrize("reason", ["random numbers", "data-dependent"])
def test_what_cannot_be_recorded_runs_as_usual_after_one_warning(reason):
    class Odd(Net):
        def guide(self, x):
            if reason == "random numbers":
                random.random()
            elif x.sum() > 0:
                x = 2 * x
            super().guide(x)

    net, loss = Odd(), WAELoss(compile=graph, penalty_weight=5.0)
    with pytest.warns(UserWarning, match=reason) as caught:
        take_steps(loss, net, [(x,) for x in batches(5)])
    assert len(caught) == 1
    pyro.set_rng_seed(1)
    value = loss.loss(net.model, net.guide, batches(1)[0])
    pyro.set_rng_seed(1)
    assert value == WAELoss(loss.penalty, penalty_weight=5.0).loss(net.model, net.guide, batches(1)[0])


def test_a_number_that_changes_with_every_step_is_warned_of(monkeypatch):
    class Annealed(Net):
        def model(self, x, beta):
            super().model(x)

        def guide(self, x, beta):
            super().guide(x)

    monkeypatch.setattr(recording, "MOST_RECORDINGS", 2)
    net, loss = Annealed(), WAELoss(compile=graph, penalty_weight=5.0)
    with pytest.warns(UserWarning, match="give it as a tensor"):
        take_steps(loss, net, [(batches(1)[0], 0.1 * (step // 3)) for step in range(12)])
    assert len(recordings(loss)) == 2


def test_an_attribute_of_a_module_is_read_anew():
    class Scaled(Net):
        factor = 1.0

        def guide(self, x):
            super().guide(self.factor * x)

    found = []
    for backend in (graph, False):
        pyro.set_rng_seed(2)
        net, loss = Scaled(), WAELoss(compile=backend, penalty_weight=5.0)
        net.factor = 1.0
        for step, x in enumerate(batches(8)):
            net.factor = 1.0 if step < 4 else 3.0
            found.append(loss.loss_and_grads(net.model, net.guide, x))
    assert found[:8] == pytest.approx(found[8:])


def test_copies_have_recordings_of_their_own():
    net, loss = Net(), WAELoss(compile=graph, penalty_weight=5.0)
    for x in batches(3):
        loss.loss_and_grads(net.model, net.guide, x)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert recordings(other) == []
        assert other.compile is graph


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"compile": "inductor"}, TypeError, "compile must be"),
        ({"compile": True, "micro_batch": 10}, ValueError, "micro_batch"),
    ],
    ids=["type", "micro_batch"],
)
def test_wrong_options_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        WAELoss(**options)
