"""Checkpoints: what is resumed ends where it would have ended, and what does not fit is refused whole."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import delta
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from references import program
from torch import nn
from trainings import LOSSES, OPTIMS, ByPyro, ByTorch, D, assert_same, batch, discriminator, run, seed

from pyro_wae import WAELoss
from pyro_wae.checkpoint import load_checkpoint, save_checkpoint
from pyro_wae.costs import NegativeLogLikelihood, SquaredError
from pyro_wae.optim import Adam
from pyro_wae.penalties import MMD, JensenShannon, PriorLikelihood
from pyro_wae.priors import MixturePrior

# The trainings by torch leave pyro.param untrained, which is saved all the same.
pytestmark = [pytest.mark.filterwarnings("ignore:The loss depends on"), pytest.mark.usefixtures("one_thread")]

STEPS = 16


def assert_resumes(make, path, at, before_loading=lambda resumed: None):
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
    before_loading(resumed)
    assert load_checkpoint(path, **resumed.parts) == {"step": at}
    assert run(resumed, at, STEPS) == losses[at:]
    assert_same(resumed.values(), expected)
    assert torch.equal(torch.rand(2), draw)


FITTED = ["standardised", "gan", "gan of the caller", "constraint"]
RESUMED = [
    *((route, loss, 7, torch.float32) for route in (ByPyro, ByTorch) for loss in LOSSES),
    *((ByPyro, loss, at, torch.float32) for at in (0, 1) for loss in (*FITTED, "sliced condition")),
    *((ByPyro, loss, 5, torch.float64) for loss in (*FITTED, "max-sliced", "condition")),
]


@pytest.mark.parametrize(("route", "loss", "at", "dtype"), RESUMED)
def test_a_resumed_training_ends_bit_by_bit_as_an_undisturbed_one(route, loss, at, dtype, tmp_path):
    assert_resumes(lambda: route(LOSSES[loss](), dtype=dtype), tmp_path / "run.pt", at)


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


class ByMethods(ByPyro):
    """Pyro's form without an ELBO object: the loss is a function, here a method or one around it."""

    def __init__(self, way):
        super().__init__(WAELoss(JensenShannon(discriminator())))
        self.svi = SVI(self.net.model, self.net.guide, self.svi.optim, loss=way(self.loss))
        self.parts["svi"] = self.svi


def test_a_method_as_loss_is_resumed_with_the_state_of_its_loss(tmp_path):
    assert_resumes(lambda: ByMethods(lambda loss: loss.differentiable_loss), tmp_path / "run.pt", at=6)


def test_a_function_around_a_loss_is_resumed_with_the_loss_that_the_error_asks_for(tmp_path):
    def make():
        training = ByMethods(lambda loss: lambda *args, **kwargs: 2 * loss.differentiable_loss(*args, **kwargs))
        training.parts["loss"] = training.loss
        return training

    training = make()
    with pytest.raises(ValueError, match=r"around a WAELoss, whose JensenShannon .* save_checkpoint.*, loss=loss"):
        save_checkpoint(tmp_path / "run.pt", svi=training.svi)
    save_checkpoint(tmp_path / "run.pt", svi=training.svi, wae=training.loss(training.net.model, training.net.guide))
    assert_resumes(make, tmp_path / "run.pt", at=6)


def test_the_recipe_with_a_learned_prior_is_saved_and_loaded(tmp_path):
    prior, encoder, decoder = MixturePrior(3, 2), nn.Linear(D, 2), nn.Linear(2, D)
    programs = program(lambda x: delta(encoder(x)), lambda x: prior(), lambda z: dist.Normal(decoder(z), 1).to_event(1))
    wae = WAELoss(MMD() + PriorLikelihood())(*programs)
    x = batch(0)[0]
    value = wae(x)
    save_checkpoint(tmp_path / "run.pt", wae=wae)
    nn.init.zeros_(decoder.weight)
    load_checkpoint(tmp_path / "run.pt", wae=wae)
    torch.testing.assert_close(wae(x), value)


def test_a_training_goes_on_with_a_batch_that_lacks_a_site_of_its_costs(tmp_path):
    net = nn.Linear(2, 2)

    def model(x, y=None):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1).to_event(1), obs=x)
            if y is not None:
                pyro.sample("y", dist.Categorical(logits=net(z)), obs=y)

    _, guide = program()
    x, y, losses = torch.randn(8, 2), torch.arange(8) % 2, []
    for step in (lambda wae: wae(x, y), lambda wae: wae(x)):
        wae = WAELoss(cost={"x": SquaredError(), "y": NegativeLogLikelihood()}, penalty_weight=1.0)(model, guide)
        if losses:
            load_checkpoint(tmp_path / "run.pt", wae=wae)
        losses.append(step(wae).item())
        save_checkpoint(tmp_path / "run.pt", wae=wae)
    assert losses[1] < losses[0]  # without the cost of y


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
    def call(resumed):
        with pytest.raises(ValueError, match=r"evaluate_loss"):
            load_checkpoint(tmp_path / "run.pt", **resumed.parts)
        resumed.svi.evaluate_loss(torch.ones(8, D))

    assert_resumes(ByAutoguide, tmp_path / "run.pt", 5, call)


# Going back in one process


@pytest.mark.parametrize("loss", FITTED)
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
    make = functools.partial(JensenShannon, nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 1)).float())
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
