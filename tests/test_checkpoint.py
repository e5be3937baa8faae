"""Checkpoints: what is resumed ends where it would have ended, and what does not fit is refused whole."""

import functools
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import nn
from torch.optim import lr_scheduler

from pyro_wae import WAELoss
from pyro_wae.checkpoint import load_checkpoint, save_checkpoint
from pyro_wae.kernels import Gaussian, InverseMultiquadratic
from pyro_wae.optim import SGD, Adam
from pyro_wae.penalties import MMD, JensenShannon, MaxSlicedWasserstein, SlicedWasserstein
from pyro_wae.weights import Constraint, Linear

STEPS = 16
D = 4


@pytest.fixture(autouse=True)
def fresh_process():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()
    torch.set_num_threads(threads)


class Net(nn.Module):
    """An auto-encoder with batch statistics, dropout, a parameter outside all modules and one that comes late."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        layers = [nn.Linear(D, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 4)]
        self.encoder = nn.Sequential(*layers).to(dtype)
        self.decoder = nn.Linear(2, D).to(dtype)
        self.dtype = dtype

    def model(self, x, step=0, y=None):
        pyro.module("decoder", self.decoder)
        scale = pyro.param("scale", x.new_ones(()), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1).to_event(1))
            mean = self.decoder(z) * scale
            if step % 3 == 2:
                mean = mean + pyro.param("at times", x.new_zeros(D), constraint=constraints.interval(-1.0, 2.0))
            pyro.sample("x", dist.Normal(mean, 1).to_event(1), obs=x)

    def guide(self, x, step=0, y=None):
        pyro.module("encoder", self.encoder)
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def batch(step, dtype=torch.float32):
    """Data that depend on all three random states."""
    x = torch.randn(8 + random.randrange(3), D, dtype=dtype) + np.random.randn()  # noqa: NPY002
    return x, step, x[:, :1].clone()


class ByPyro:
    def __init__(self, loss=None, optim=None, dtype=torch.float32):
        self.net = Net(dtype)
        self.loss = loss or WAELoss()
        self.svi = SVI(self.net.model, self.net.guide, optim or Adam({"lr": 1e-2}), loss=self.loss)
        self.parts = {"svi": self.svi}
        self.dtype = dtype

    def step(self, step):
        value = self.svi.step(*batch(step, self.dtype))
        if hasattr(self.svi.optim, "step") and getattr(self.svi.optim, "scheduler", True) is not None:
            self.svi.optim.step()
        return value

    def values(self):
        modules = [("net", self.net), *self.loss.modules()]
        states = {f"{name}.{key}": value for name, module in modules for key, value in module.state_dict().items()}
        return states | dict(pyro.get_param_store().items())


class ByTorch(ByPyro):
    def __init__(self, loss=None, dtype=torch.float32):
        self.net = Net(dtype)
        self.loss = loss or WAELoss()
        self.wae = self.loss(self.net.model, self.net.guide)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-2)
        self.scheduler = lr_scheduler.StepLR(self.optimizer, 3, gamma=0.5)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=4)
        self.order = torch.Generator().manual_seed(3)
        self.parts = {
            "wae": self.wae,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "order": self.order,
        }
        self.dtype = dtype

    def step(self, step):
        x, step, y = batch(step, self.dtype)
        x = x[torch.randperm(len(x), generator=self.order)]
        self.optimizer.zero_grad()
        loss = self.wae(x, step, y)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        return loss.item()


def seed(number):
    pyro.set_rng_seed(number)


def run(training, first, last):
    return [training.step(step) for step in range(first, last)]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name].nan_to_num(-7.0), value.nan_to_num(-7.0)), name
            assert found[name].dtype == value.dtype, name
        else:
            assert repr(found[name]) == repr(value), name


def assert_resumes(make, path, at):
    """A training that is left at one of its steps, and goes on from new objects, ends bit by bit as if it had not."""
    seed(0)
    undisturbed = make()
    losses = run(undisturbed, 0, STEPS)
    expected, draw = undisturbed.values(), torch.rand(2)

    pyro.clear_param_store()
    seed(0)
    left = make()
    before = run(left, 0, at)
    save_checkpoint(path, **left.parts, extra={"step": at})
    assert before == losses[:at]

    pyro.clear_param_store()
    seed(99)
    resumed = make()
    assert load_checkpoint(path, **resumed.parts) == {"step": at}
    assert run(resumed, at, STEPS) == losses[at:]
    assert_same(resumed.values(), expected)
    assert torch.equal(torch.rand(2), draw)


def discriminator():
    return nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.Linear(5, 1))


LOSSES = {
    "mmd": WAELoss,
    "standardised": lambda: WAELoss(
        MMD(Gaussian(), standardize=True, closed_form=False), penalty_weight=Linear(0, 9, steps=9)
    ),
    "gan": lambda: WAELoss(JensenShannon(discriminator())),
    "gan of the caller": lambda: WAELoss(JensenShannon(discriminator(), optimizer=None)),
    "constraint": lambda: WAELoss(SlicedWasserstein(5), penalty_weight=Constraint(100, pool=4)),
    "max-sliced": lambda: WAELoss(0.5 * MaxSlicedWasserstein() + MMD(InverseMultiquadratic())),
    "by site": lambda: WAELoss({"z": MMD()}),
    "condition": lambda: WAELoss(condition="y"),
    "sliced condition": lambda: WAELoss(SlicedWasserstein(5), condition="y"),
    "particles": lambda: WAELoss(num_particles=2, vectorize_particles=True, prior_draws=2),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("route", [ByPyro, ByTorch])
def test_a_resumed_training_ends_bit_by_bit_as_an_undisturbed_one(route, loss, tmp_path):
    assert_resumes(lambda: route(LOSSES[loss]()), tmp_path / "run.pt", at=7)


@pytest.mark.parametrize("loss", ["standardised", "gan", "gan of the caller", "constraint", "sliced condition"])
@pytest.mark.parametrize("at", [0, 1])
def test_the_first_steps_can_be_resumed_as_well(loss, at, tmp_path):
    assert_resumes(lambda: ByPyro(LOSSES[loss]()), tmp_path / "run.pt", at=at)


@pytest.mark.parametrize("loss", ["standardised", "gan", "gan of the caller", "constraint", "max-sliced", "condition"])
def test_double_precision_is_not_rounded(loss, tmp_path):
    assert_resumes(lambda: ByPyro(LOSSES[loss](), dtype=torch.float64), tmp_path / "run.pt", at=5)


OPTIMS = {
    "pyro": lambda: pyro.optim.Adam({"lr": 1e-2}, {"clip_norm": 0.5}),
    "pyro clipped": lambda: pyro.optim.ClippedAdam({"lr": 1e-2, "lrd": 0.9}),
    "pyro by name": lambda: pyro.optim.Adam(lambda name: {"lr": 0.1 if name.startswith("encoder.") else 1e-2}),
    "pyro scheduler": lambda: PyroLRScheduler(
        lr_scheduler.ExponentialLR, {"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-2}, "gamma": 0.9}
    ),
    "pyro milestones": lambda: PyroLRScheduler(
        lr_scheduler.MultiStepLR,
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-2}, "milestones": [5, 9], "gamma": 0.5},
    ),
    "shared": lambda: Adam({"lr": 1e-2}, {"clip_value": 0.1}),
    "shared momentum": lambda: SGD({"lr": 1e-3, "momentum": 0.9}),
    "shared scheduler": lambda: Adam({"lr": 1e-2}, scheduler=lambda o: lr_scheduler.CosineAnnealingLR(o, 10)),
}


@pytest.mark.parametrize("at", [2, 3, 10])
@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
def test_optimisers_and_schedulers_of_svi_go_on(optim, at, tmp_path):
    # A scheduler steps in every step, also for the parameter that only some steps use.
    assert_resumes(lambda: ByPyro(optim=OPTIMS[optim]()), tmp_path / "run.pt", at=at)


def functions():
    """The form of the README: functions that use modules from around them."""
    encoder, decoder = nn.Sequential(nn.Linear(D, 2), nn.BatchNorm1d(2)), nn.Linear(2, D)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(encoder(x)).to_event(1))

    return model, guide, encoder, decoder


class ByFunctions(ByPyro):
    def __init__(self):
        model, guide, encoder, decoder = functions()
        self.net, self.loss = nn.ModuleList([encoder, decoder]), WAELoss()
        self.svi = SVI(model, guide, Adam({"lr": 1e-2}), loss=self.loss)
        self.parts = {"svi": self.svi, "encoder": encoder, "decoder": decoder}

    def step(self, step):
        return self.svi.step(batch(step)[0])


def test_functions_are_resumed_with_the_modules_they_use(tmp_path):
    assert_resumes(ByFunctions, tmp_path / "run.pt", at=6)


def test_a_module_that_the_checkpoint_cannot_see_is_named(tmp_path):
    training = ByFunctions()
    training.step(0)
    with pytest.raises(ValueError, match=r"encoder\$\$\$0.weight.*encoder=encoder") as error:
        save_checkpoint(tmp_path / "run.pt", svi=training.svi, decoder=training.parts["decoder"])
    assert "'decoder$$$weight'" not in str(error.value)
    assert not list(tmp_path.iterdir())


class OfPyro(PyroModule):
    def __init__(self):
        super().__init__()
        self.decoder = PyroModule[nn.Linear](2, D)
        self.scale = PyroParam(torch.tensor(0.7), constraint=constraints.positive)
        self.encoder = PyroModule[nn.Linear](D, 2)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z) * self.scale, 1).to_event(1), obs=x)


class ByPyroModule(ByPyro):
    def __init__(self, wrap=lambda guide: guide):
        self.net = OfPyro()
        self.encoder, self.loss = nn.Linear(D, 2), WAELoss()
        self.svi = SVI(self.net, wrap(self.guide), pyro.optim.Adam({"lr": 1e-2}), loss=self.loss)
        self.parts = {"svi": self.svi, "encoder": self.encoder}

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(self.encoder(x)).to_event(1))

    def step(self, step):
        return self.svi.step(batch(step)[0])


@pytest.mark.parametrize(
    "wrap",
    [lambda guide: guide, functools.partial, lambda guide: pyro.poutine.scale(guide, 1.0)],
    ids=["plain", "partial", "messenger"],
)
def test_pyro_modules_are_resumed(wrap, tmp_path):
    assert_resumes(lambda: ByPyroModule(wrap), tmp_path / "run.pt", at=6)


class ByAutoguide(ByPyro):
    def __init__(self):
        self.net = OfPyro()
        self.guide, self.loss = AutoNormal(self.net), Trace_ELBO()
        self.svi = SVI(self.net, self.guide, Adam({"lr": 1e-2}), loss=self.loss)
        self.parts = {"svi": self.svi}

    def step(self, step):
        torch.rand(())
        return self.svi.step(torch.ones(8, D))

    def values(self):
        return {**self.net.state_dict(), **self.guide.state_dict(), **dict(pyro.get_param_store().items())}


def test_an_autoguide_is_resumed_once_it_has_been_called(tmp_path):
    seed(0)
    undisturbed = ByAutoguide()
    losses = run(undisturbed, 0, STEPS)
    pyro.clear_param_store()
    seed(0)
    left = ByAutoguide()
    run(left, 0, 5)
    save_checkpoint(tmp_path / "run.pt", **left.parts)
    pyro.clear_param_store()
    seed(99)
    resumed = ByAutoguide()
    with pytest.raises(ValueError, match=r"evaluate_loss"):
        load_checkpoint(tmp_path / "run.pt", **resumed.parts)
    resumed.svi.evaluate_loss(torch.ones(8, D))
    load_checkpoint(tmp_path / "run.pt", **resumed.parts)
    assert run(resumed, 5, STEPS) == losses[5:]


# Going back in one process


@pytest.mark.parametrize("loss", ["standardised", "gan", "gan of the caller", "constraint"])
@pytest.mark.parametrize("optim", ["pyro", "shared", "pyro scheduler", "shared scheduler"])
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
def test_a_training_goes_back_to_its_own_checkpoint(loss, optim, tmp_path):
    seed(0)
    training = ByPyro(LOSSES[loss](), OPTIMS[optim]())
    run(training, 0, 5)
    save_checkpoint(tmp_path / "run.pt", **training.parts)
    losses, expected = run(training, 5, STEPS), training.values()
    load_checkpoint(tmp_path / "run.pt", **training.parts)
    assert run(training, 5, STEPS) == losses
    assert_same(training.values(), expected)


def test_a_training_goes_back_to_before_its_first_step(tmp_path):
    seed(0)
    make = functools.partial(JensenShannon, nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 1)))
    training = ByPyro(WAELoss(make()))
    save_checkpoint(tmp_path / "run.pt", **training.parts)
    losses = run(training, 0, STEPS)
    with pytest.raises(ValueError, match=r"pyro.clear_param_store\(\)"):
        load_checkpoint(tmp_path / "run.pt", **training.parts)
    pyro.clear_param_store()
    load_checkpoint(tmp_path / "run.pt", **training.parts)
    assert run(training, 0, STEPS) == losses


@pytest.mark.parametrize("optim", ["pyro", "shared"])
def test_an_optimiser_forgets_the_parameters_of_before(optim, tmp_path):
    seed(0)
    training = ByPyro(optim=OPTIMS[optim]())
    run(training, 0, 3)
    save_checkpoint(tmp_path / "run.pt", **training.parts)
    pyro.clear_param_store()
    load_checkpoint(tmp_path / "run.pt", **training.parts)
    parameters = [p for _, p in pyro.get_param_store().named_parameters()]
    assert {id(p) for p in training.svi.optim.optim_objs} == set(map(id, parameters))
    save_checkpoint(tmp_path / "again.pt", **training.parts)


def test_parameters_are_loaded_in_place(tmp_path):
    training = ByPyro()
    run(training, 0, 3)
    save_checkpoint(tmp_path / "run.pt", **training.parts)
    store = pyro.get_param_store()
    held = [training.net.decoder.weight, store["scale"].unconstrained()]
    values = [p.detach().clone() for p in held]
    run(training, 3, 6)
    load_checkpoint(tmp_path / "run.pt", **training.parts)
    assert store["decoder$$$weight"] is held[0]
    assert store["scale"].unconstrained() is held[1]
    assert all(torch.equal(p, value) for p, value in zip(held, values, strict=True))


def test_new_modules_take_the_place_of_old_ones_in_the_store(tmp_path):
    training = ByPyro()
    run(training, 0, 3)
    save_checkpoint(tmp_path / "run.pt", **training.parts)
    again = ByPyro()
    load_checkpoint(tmp_path / "run.pt", **again.parts)
    assert pyro.get_param_store()["decoder$$$weight"] is again.net.decoder.weight
    assert torch.equal(again.net.decoder.weight, training.net.decoder.weight)


def test_constraints_come_back(tmp_path):
    given = {
        "positive": constraints.positive,
        "interval": constraints.interval(torch.tensor(-1.0), 2.0),
        "simplex": constraints.simplex,
        "independent": constraints.independent(constraints.unit_interval, 1),
        "ordered": constraints.ordered_vector,
        "softplus": constraints.softplus_positive,
    }
    for name, constraint in given.items():
        pyro.param(name, torch.tensor([0.2, 0.3, 0.5]), constraint=constraint)
    expected = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    network = nn.Linear(1, 1)
    save_checkpoint(tmp_path / "run.pt", network=network)
    pyro.clear_param_store()
    load_checkpoint(tmp_path / "run.pt", network=network)
    store = pyro.get_param_store()
    assert {name: type(found) for name, found in store.get_state()["constraints"].items()} == {
        name: type(constraint) for name, constraint in given.items()
    }
    for name, value in expected.items():
        assert torch.equal(pyro.param(name), value)


class Odd(type(constraints.positive)):
    """A constraint that is nobody's but the user's."""


def test_a_parameter_with_a_constraint_of_the_users_own_has_to_exist(tmp_path):
    torch.distributions.transform_to.register(Odd, lambda constraint: torch.distributions.transforms.ExpTransform())
    pyro.param("odd", torch.tensor(3.0), constraint=Odd(0.0))
    network = nn.Linear(1, 1)
    save_checkpoint(tmp_path / "run.pt", network=network)
    pyro.clear_param_store()
    with pytest.raises(ValueError, match=r"'odd'.*Odd"):
        load_checkpoint(tmp_path / "run.pt", network=network)
    pyro.param("odd", torch.tensor(1.0), constraint=Odd(0.0))
    load_checkpoint(tmp_path / "run.pt", network=network)
    assert pyro.param("odd").item() == pytest.approx(3.0)


# What does not fit


def saved(tmp_path, steps=2, **kwargs):
    training = ByPyro(**kwargs)
    run(training, 0, steps)
    save_checkpoint(tmp_path / "run.pt", **training.parts)
    pyro.clear_param_store()
    return tmp_path / "run.pt"


class Wider(Net):
    def __init__(self):
        super().__init__()
        self.encoder[0], self.encoder[1] = nn.Linear(D, 7), nn.BatchNorm1d(7)
        self.encoder[3] = nn.Linear(7, 4)


class Other(Net):
    def __init__(self):
        super().__init__()
        self.encoder[2] = nn.Dropout(0.9)
        self.encoder.append(nn.Tanh())


def with_net(net):
    training = ByPyro()
    training.svi.model, training.svi.guide = net.model, net.guide
    training.net = net
    return training


@pytest.mark.parametrize(
    ("make", "messages"),
    [
        (lambda: ByPyro(WAELoss(SlicedWasserstein())), ["penalty: MMD(", "SlicedWasserstein(projections="]),
        (lambda: ByPyro(WAELoss(MMD(Gaussian()))), ["penalty: MMD(", "kernel=Gaussian("]),
        (lambda: ByPyro(WAELoss(penalty_weight=3.0)), ["Constant(weight=3.0) here"]),
        (lambda: ByPyro(WAELoss(num_particles=2)), ["num_particles: 1 in the checkpoint, 2 here"]),
        (lambda: ByPyro(Trace_ELBO()), ["svi.loss: class: WAELoss in the checkpoint, Trace_ELBO here"]),
        (lambda: ByPyro(optim=SGD({"lr": 0.1})), ["svi.optim: scale: Adam in the checkpoint, SGD here"]),
        (lambda: ByPyro(optim=OPTIMS["shared scheduler"]()), ["Adam with CosineAnnealingLR here"]),
        (
            lambda: with_net(Wider()),
            ["svi.model: encoder.0.weight: float32 (6, 4) in the checkpoint, float32 (7, 4) here"],
        ),
        (lambda: with_net(Other()), ["p=0.2, inplace=False in the checkpoint, p=0.9", "encoder.4: missing in the"]),
        (lambda: with_net(Net(torch.float64)), ["decoder.weight: float32 (4, 2) in the checkpoint, float64 (4, 2)"]),
    ],
    ids=["penalty", "kernel", "weight", "particles", "loss", "optim", "scheduler", "shape", "layers", "dtype"],
)
def test_a_checkpoint_of_another_training_says_what_differs_and_changes_nothing(make, messages, tmp_path):
    path = saved(tmp_path)
    training = make()
    if isinstance(training.loss, Trace_ELBO):
        training.values = lambda: training.net.state_dict()
    expected = {key: value.clone() for key, value in training.values().items() if isinstance(value, torch.Tensor)}
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="another training, and nothing was loaded") as error:
        load_checkpoint(path, **training.parts)
    for message in messages:
        assert message in str(error.value)
    assert torch.__version__ in str(error.value)
    found = {key: value for key, value in training.values().items() if isinstance(value, torch.Tensor)}
    assert_same(found, expected)
    assert not pyro.get_param_store()
    assert not training.svi.optim.optim_objs
    assert torch.equal(torch.get_rng_state(), state)


def test_parts_that_are_missing_or_too_many_are_named(tmp_path):
    a, b = nn.Linear(1, 1), nn.Linear(1, 1)
    save_checkpoint(tmp_path / "run.pt", a=a, only_there=b)
    with pytest.raises(ValueError, match=r"only_there: in the checkpoint, missing here\n  only_here: missing in the c"):
        load_checkpoint(tmp_path / "run.pt", a=a, only_here=b)


def test_a_parameter_of_another_shape_is_named(tmp_path):
    network = nn.Linear(1, 1)
    pyro.param("a", torch.zeros(2))
    save_checkpoint(tmp_path / "run.pt", network=network)
    pyro.clear_param_store()
    pyro.param("a", torch.zeros(3))
    with pytest.raises(ValueError, match=r"'a': torch.float32 \(2,\) in the checkpoint, torch.float32 \(3,\) here"):
        load_checkpoint(tmp_path / "run.pt", network=network)


def test_functions_and_layers_made_late_compare_equal_in_every_process(tmp_path):
    """A description holds no address, and a layer that has seen its codes counts as what it was."""

    def make():
        return ByPyro(WAELoss(JensenShannon(discriminator()), cost=lambda x, g: (x - g).square().sum(1)))

    training = make()
    run(training, 0, 2)
    save_checkpoint(tmp_path / "run.pt", **training.parts)
    load_checkpoint(tmp_path / "run.pt", **training.parts)
    pyro.clear_param_store()
    fresh = make()
    load_checkpoint(tmp_path / "run.pt", **fresh.parts)
    save_checkpoint(tmp_path / "again.pt", **fresh.parts)  # before the layer has been called
    load_checkpoint(tmp_path / "again.pt", **fresh.parts)
    load_checkpoint(tmp_path / "run.pt", **fresh.parts)


@pytest.mark.parametrize("function", [save_checkpoint, load_checkpoint])
def test_nothing_to_save_is_refused(function, tmp_path):
    with pytest.raises(TypeError, match=rf"Write {function.__name__}\(path, svi=svi\)"):
        function(tmp_path / "run.pt")


def test_parameters_without_a_name_are_refused(tmp_path):
    for optim in (Adam({"lr": 0.1}), pyro.optim.Adam({"lr": 0.1})):
        training = ByPyro(optim=optim)
        with pyro.settings.context(module_local_params=True):
            training.step(0)
        pyro.clear_param_store()
        with pytest.raises(ValueError, match="module_local_params off"):
            save_checkpoint(tmp_path / "run.pt", **training.parts)
