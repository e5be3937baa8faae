"""A loss's life inside Pyro and torch: its module, its state, copies, the parameter store, and Pyro's autoguides."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import AutoEncoder, around, normal, sites
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from pyro.infer.autoguide.effect import AutoHierarchicalNormalMessenger, AutoNormalMessenger
from pyro.nn import PyroModule, PyroParam
from pyro.optim import Adam
from references import Seen, program
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pyro_wae import WAELoss, weights
from pyro_wae.costs import AbsoluteError, Cost, SquaredError
from pyro_wae.kernels import Gaussian, InverseMultiquadratic
from pyro_wae.penalties import MMD, JensenShannon, MaxSlicedWasserstein

N, D, X = 16, 3, 5


def data(n=N, dtype=torch.float64):
    return torch.randn(n, X, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).to(dtype)


def floats(n=N):
    return data(n, torch.get_default_dtype())


@pytest.fixture
def net():
    return AutoEncoder(X, D, code=around).double()


class Part(nn.Module):
    """A model or guide as a module of one net; without pyro.module, whose weak references no pickle takes."""

    def __init__(self, name):
        super().__init__()
        self.add_module(name, (nn.Linear(D, X) if name == "decoder" else nn.Linear(X, D)).double())

    def forward(self, x):
        with pyro.plate("data", len(x)):
            if hasattr(self, "encoder"):
                pyro.sample("z", around(self.encoder(x)))
            else:
                pyro.sample("x", around(self.decoder(pyro.sample("z", normal(x, D)))), obs=x)


def assert_equal_values(*calls):
    values = []
    for call in calls:
        pyro.set_rng_seed(4)
        values.append(torch.as_tensor(call()).item())
    assert len(set(values)) == 1


def test_it_works_after_the_param_store_is_cleared(net):
    svi = SVI(net.model, net.guide, Adam({"lr": 1e-3}), loss=WAELoss())
    svi.step(data())
    pyro.clear_param_store()
    before = net.encoder.weight.clone()
    svi.step(data())
    assert not torch.equal(net.encoder.weight, before)


def test_pickle_gives_a_loss_that_computes_the_same(net):
    loss = WAELoss({"z": MMD(Gaussian())}, cost={"x": AbsoluteError()}, penalty_weight=2.0, prior_draws=2)
    loss.loss(net.model, net.guide, data())
    again = pickle.loads(pickle.dumps(loss))
    assert_equal_values(*(functools.partial(one.loss, net.model, net.guide, data()) for one in (loss, again)))
    assert repr(again) == repr(loss)


def test_the_module_pickles_and_its_state_dict_moves_to_another():
    bound, fresh = (WAELoss()(Part("decoder"), Part("encoder")) for _ in range(2))
    bound(data())
    again = pickle.loads(pickle.dumps(bound))
    fresh.load_state_dict(bound.state_dict())
    assert_equal_values(*(functools.partial(one, data()) for one in (bound, again, fresh)))


def test_parameters_and_state_dict_hold_model_guide_and_the_kernels_length():
    model, guide = Part("decoder"), Part("encoder")
    wae = WAELoss(MMD(InverseMultiquadratic()), penalty_weight=10.0)(model, guide)
    assert set(wae.parameters()) == {*model.parameters(), *guide.parameters()}
    assert wae.terms is None
    wae(data()).backward()
    nets = {"model.decoder.weight", "model.decoder.bias", "guide.encoder.weight", "guide.encoder.bias"}
    assert set(wae.state_dict()) == nets | {"penalty.kernel.squared_length"}
    assert wae.state_dict()["penalty.kernel.squared_length"] > 0
    assert wae.terms.cost > 0
    assert all(parameter.grad is not None for parameter in wae.parameters())


def test_bound_methods_of_one_module_are_its_parameters_once(net):
    wae = WAELoss()(net.model, net.guide)
    parameters = list(wae.parameters())
    assert len(parameters) == len(list(net.parameters()))
    assert {id(p) for p in parameters} == {id(p) for p in net.parameters()}
    wae.eval()
    assert not net.training


def test_a_state_of_a_version_that_held_the_module_twice_is_loaded(net):
    wae, twin = (WAELoss(penalty_weight=1.0)(owner.model, owner.guide) for owner in (net, copy.deepcopy(net)))
    former = wae.state_dict()
    former |= {key.replace("model_owner", "guide_owner"): value for key, value in former.items()}
    with torch.no_grad():
        twin.model_owner.decoder.weight.zero_()
    twin.load_state_dict(former)
    assert torch.equal(twin.model_owner.decoder.weight, net.decoder.weight)


def test_a_file_of_a_bound_module_is_as_large_after_a_batch_as_before():
    wae = WAELoss(MMD(Gaussian(1.0)), penalty_weight=1.0)(Part("decoder"), Part("encoder"))
    wae.encode(data())
    before = len(pickle.dumps(wae))
    wae.encode(data(1000))
    assert len(pickle.dumps(wae)) == before


def test_the_options_of_a_call_of_a_bound_module_are_its_own_and_the_arguments_stay():
    def scaled(x, factor=1.0):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1).to_event(1))
            pyro.sample("x", dist.Normal(factor * z, 100.0).to_event(1), obs=x)

    def encoder(x, factor=1.0):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x).to_event(1))

    wae, z = WAELoss()(scaled, encoder), torch.randn(4, 2)
    wae.reconstruct(torch.zeros(4, 2), random=True, return_sites=("z", "x"))
    torch.testing.assert_close(wae.decode(z), {"x": z})
    wae.sample(3, torch.zeros(4, 2), factor=3.0, return_sites=("z",))
    torch.testing.assert_close(wae.decode(z), {"x": 3 * z})
    wae.decode(z, torch.zeros(4, 2), factor=2.0)
    assert set(wae.sample(3)) == {"x"}
    torch.testing.assert_close(wae.decode(z), {"x": 2 * z})


class Holder(AutoEncoder):
    """A module that keeps the loss of its own model and guide."""

    def __init__(self):
        super().__init__(4, 2)
        self.loss = WAELoss(MMD(Gaussian()), penalty_weight=10.0)(self.model, self.guide)


class ModelItself(AutoEncoder):
    """The same, where the module is the model."""

    def __init__(self):
        super().__init__(4, 2)
        self.loss = WAELoss(MMD(Gaussian()), penalty_weight=10.0)(self, self.guide)

    def forward(self, x):
        self.model(x)


USES = ["train", "eval", "double", "apply", "state_dict", "load_state_dict", "repr", "deepcopy"]


@pytest.mark.parametrize("make", [Holder, ModelItself])
@pytest.mark.parametrize("use", USES)
def test_a_module_may_keep_the_loss_of_its_own_methods(use, make):
    x, holder = torch.randn(20, 4), make()
    calls = {
        "apply": lambda: holder.apply(lambda module: None),
        "load_state_dict": lambda: holder.load_state_dict(make().state_dict(), strict=False),
        "repr": lambda: repr(holder),
        "deepcopy": lambda: copy.deepcopy(holder),
    }
    (calls.get(use) or getattr(holder, use))()
    x = x.double() if use == "double" else x
    optimiser = torch.optim.Adam(holder.parameters(), lr=0.1)
    before = [value.clone() for value in holder.parameters()]
    holder.loss(x).backward()
    optimiser.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, holder.parameters(), strict=True))
    # Twice, because the first step fits what is saved.
    other = make().to(x)
    other.loss(x)
    other.load_state_dict(holder.state_dict())
    torch.testing.assert_close(other.encoder.weight, holder.encoder.weight)
    holder.zero_grad()
    twin = copy.deepcopy(holder)
    twin.loss(x).backward()
    assert twin.encoder.weight.grad is not None
    assert holder.encoder.weight.grad is None


def test_penalties_by_site_own_their_state_under_the_sites_name(net):
    wae = WAELoss({"z": MMD(Gaussian())})(net.model, net.guide)
    wae(data())
    assert "penalty_z.kernel.squared_length" in wae.state_dict()


@pytest.mark.parametrize("local", [True, False])
def test_pyro_modules_train_through_the_torch_route(local):
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.weight = PyroParam(torch.ones(D, X, dtype=torch.float64))

        def forward(self, x):
            program(output=lambda z: around(z @ self.weight), prior=lambda x: normal(x, D))[0](x)

    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = PyroModule[nn.Linear](X, D).double()
            self.scale = PyroParam(torch.ones(D, dtype=torch.float64), dist.constraints.positive)

        def forward(self, x):
            program(lambda x: dist.Normal(self.linear(x), self.scale).to_event(1))[1](x)

    with pyro.settings.context(module_local_params=local):
        wae = WAELoss(penalty_weight=10.0)(Model(), Guide())
        optimiser = torch.optim.SGD(wae.parameters(), lr=1e-3)
        before = {name: value.clone() for name, value in wae.state_dict().items() if "penalty" not in name}
        assert set(before) == {
            "model.weight_unconstrained",
            "guide.linear.weight",
            "guide.linear.bias",
            "guide.scale_unconstrained",
        }
        wae(data()).backward()
        optimiser.step()
        for name, value in before.items():
            assert not torch.equal(wae.state_dict()[name], value), name
        assert (len(pyro.get_param_store()) == 0) == local


def test_repr_is_the_call_that_makes_the_loss(net):
    loss = WAELoss(MMD(Gaussian(1.0)), cost=SquaredError(), data_plate="data", max_plate_nesting=1)
    again = eval(repr(loss), globals() | vars(weights))
    assert again.data_plate == "data"
    assert repr(again) == repr(loss)
    assert "penalty_weight=2.5" in repr(WAELoss(penalty_weight=2.5))
    assert "penalty_weight=Constraint(" in repr(WAELoss())
    assert "encoder" in repr(WAELoss()(net.model, net.guide))


# Autoguides


local_model, _ = sites(
    {
        "z1": (lambda x: normal(x, 2), None),
        "z2": (lambda x, z1: dist.Normal(z1[..., 0], 1), None),
    },
    lambda z1, z2: around(torch.cat([z1, z2[..., None]], -1)),
    observed=lambda x: x[:, :3],
)


@pytest.mark.parametrize(
    "make",
    [AutoNormal, AutoDelta, AutoDiagonalNormal, AutoNormalMessenger, AutoHierarchicalNormalMessenger],
)
@pytest.mark.parametrize(
    "options", [{}, {"num_particles": 2}, {"num_particles": 2, "vectorize_particles": True}], ids=str
)
def test_an_autoguide_over_local_latents_learns_the_codes(make, options):
    """A function is called once for each particle, vectorised or not."""
    shapes = []

    def look(codes, prior):
        shapes.append(tuple(codes.shape))
        return codes.sum() * 0

    svi = SVI(local_model, make(local_model), Adam({"lr": 0.1}), loss=WAELoss(look, **options))
    losses = [svi.step(floats()) for _ in range(26)]
    assert losses[-1] < 0.7 * losses[0]
    assert shapes == [(N, 3)] * 26 * options.get("num_particles", 1)


def test_a_messenger_guide_draws_the_prior_and_not_itself():
    x, seen = floats(2000) + 5, Seen()
    guide = AutoNormalMessenger(local_model, init_scale=0.01)
    svi = SVI(local_model, guide, Adam({"lr": 0.5}), loss=WAELoss(seen))
    for _ in range(20):
        svi.step(x)
    codes, prior = seen.codes, seen.prior
    assert codes.mean() > 2
    # n = 2000 draws: standard errors of 1/sqrt(2000) = 0.022, and sqrt(2) of it for the sum z2 of two Normals.
    assert (prior.mean(0).abs() < 4 * 0.032).all()
    torch.testing.assert_close(prior.var(0), torch.tensor([1.0, 1.0, 2.0]), rtol=0.2, atol=0)


class Learnt(Cost):
    """A squared error with a scale to be learned."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, distribution, value):
        return (value - distribution.mean).square().sum(-1) / self.log_scale.exp() + 3 * self.log_scale


OWNED = {
    "discriminator": lambda: {"penalty": JensenShannon(nn.Linear(2, 1), optimizer=None)},
    "default discriminator": lambda: {"penalty": JensenShannon(optimizer=None)},
    "discriminator of a site": lambda: {"penalty": {"z": 2.0 * JensenShannon(nn.Linear(2, 1), optimizer=None)}},
    "cost": lambda: {"cost": Learnt()},
}


def by_svi(objective):
    def train(loss, net, x):
        svi = SVI(net.model, net.guide, pyro.optim.Adam({"lr": 0.1}), loss=objective(loss))
        for _ in range(2):
            svi.step(x)

    return train


def by_parameters_of_a_trace(loss, net, x):
    """The loop of Pyro's tutorial on objectives of one's own."""
    with poutine.trace(param_only=True) as seen:
        value = loss.differentiable_loss(net.model, net.guide, x)
    value.backward()
    torch.optim.Adam({site["value"].unconstrained() for site in seen.trace.nodes.values()}, lr=0.1).step()


ROUTES_TO_PARAMETERS = {
    "SVI": by_svi(lambda loss: loss),
    "SVI with the method": by_svi(lambda loss: loss.differentiable_loss),
    "SVI with a function": by_svi(lambda loss: lambda *args: loss.differentiable_loss(*args) + 1),
    "parameters of a trace": by_parameters_of_a_trace,
}


@pytest.mark.parametrize("route", ROUTES_TO_PARAMETERS)
@pytest.mark.parametrize("owned", OWNED)
def test_what_a_loss_owns_is_trained_whichever_way_pyro_reads_the_parameters(owned, route):
    loss, net, x = WAELoss(**OWNED[owned](), penalty_weight=1.0), AutoEncoder(3, 2), torch.randn(16, 3)
    loss.loss(net.model, net.guide, x)  # makes what depends on the size of a code
    owns = [module for name, module in loss.named_children() if name != "weight"]
    before = copy.deepcopy([list(module.parameters()) for module in owns])
    ROUTES_TO_PARAMETERS[route](loss, net, x)
    moved = [
        not torch.equal(p, q)
        for was, module in zip(before, owns, strict=True)
        for p, q in zip(was, module.parameters(), strict=True)
    ]
    assert moved
    assert all(moved)


def functions_of(net):
    return lambda x: net.model(x), lambda x: net.guide(x)


@pytest.mark.parametrize(
    "twin",
    [copy.deepcopy, AveragedModel, lambda wae: copy.deepcopy({"wae": wae})["wae"]],
    ids=["copy", "average", "inside"],
)
@pytest.mark.parametrize("bind", ["functions", "partials", "methods", "module"])
def test_a_copy_that_would_run_the_nets_of_the_original_says_so(bind, twin):
    net = AutoEncoder(3, 2)
    programs = {
        "functions": functions_of(net),
        "partials": tuple(functools.partial(f) for f in functions_of(net)),
        "methods": (net.model, net.guide),
        "module": (poutine.scale(net.model, scale=0.5), net.guide),
    }[bind]
    wae = WAELoss(penalty_weight=0.0)(*programs)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        other = twin(wae)
    x = torch.ones(4, 3)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
        is_own = other(x).item() == pytest.approx(3 * (0.5 if bind == "module" else 1))  # nets of zeros reconstruct 0
    assert is_own == (bind in ("methods", "module"))
    assert [str(w.message)[:33] for w in found] == ([] if is_own else ["This copy of a bound module has c"])


@pytest.mark.parametrize("make", [WAELoss, lambda: WAELoss(JensenShannon()), lambda: WAELoss(MaxSlicedWasserstein())])
@pytest.mark.parametrize("of_nets", [True, False], ids=["nets", "bound module"])
def test_torch_averages_nets_from_the_start_and_a_bound_module_from_its_first_step(make, of_nets):
    """The lines of docs/training.md; of two updates at a decay of 0.5 the average is the mean of both."""
    net, x = AutoEncoder(3, 2), torch.randn(16, 3)
    wae = make()(net.model, net.guide)
    if not of_nets:
        wae(x).backward()
    averaged = net if of_nets else wae
    average = AveragedModel(averaged, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimiser, seen = torch.optim.SGD(net.parameters(), lr=0.01), []
    for _ in range(2):
        optimiser.zero_grad()
        wae(x).backward()
        optimiser.step()
        average.update_parameters(averaged)
        seen.append(net.encoder.weight.detach().clone())
    own = average.module if of_nets else average.module.model.__self__
    torch.testing.assert_close(own.encoder.weight.detach(), (seen[0] + seen[1]) / 2)
    assert math.isfinite(WAELoss().loss(own.model, own.guide, x))


@pytest.mark.parametrize(
    "penalty",
    [MMD, JensenShannon, MaxSlicedWasserstein, lambda: {"z": JensenShannon(nn.LazyLinear(1), optimizer=None)}],
)
def test_an_evaluation_in_inference_mode_comes_before_and_between_steps(penalty):
    values = []
    for evaluates in (False, True):
        pyro.set_rng_seed(3)
        net = AutoEncoder(3, 2)
        loss, x = WAELoss(penalty(), penalty_weight=1.0), torch.randn(16, 3)
        loss.loss(net.model, net.guide, x) if not evaluates else None
        for _ in range(2):
            if evaluates:
                with torch.inference_mode():
                    assert math.isfinite(loss.loss(net.model, net.guide, x))
            pyro.set_rng_seed(4)
            values.append(loss.loss_and_grads(net.model, net.guide, x))
    assert values[:2] == pytest.approx(values[2:], rel=1e-4)
