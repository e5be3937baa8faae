"""What does not suit a checkpoint is named and refused as a whole, before anything is changed."""

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.optim import lr_scheduler
from trainings import OPTIMS, ByPyro, D, Net, assert_same, discriminator, optimised, run, state_of

from pyro_wae import WAELoss
from pyro_wae.checkpoint import load_checkpoint, save_checkpoint
from pyro_wae.kernels import Gaussian
from pyro_wae.optim import SGD, Adam
from pyro_wae.penalties import MMD, JensenShannon, SlicedWasserstein

# Another training


def saved(tmp_path, steps=2, **kwargs):
    training = ByPyro(**kwargs)
    run(training, 0, steps)
    save_checkpoint(tmp_path / "run.pt", **training.parts)
    pyro.clear_param_store()
    return tmp_path / "run.pt"


class Wider(Net):
    def __init__(self):
        super().__init__()
        self.encoder[0], self.encoder[1] = nn.Linear(D, 7).to(torch.float32), nn.BatchNorm1d(7)
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
    pyro.param("a", torch.zeros(2, dtype=torch.float32))
    save_checkpoint(tmp_path / "run.pt", network=network)
    pyro.clear_param_store()
    pyro.param("a", torch.zeros(3, dtype=torch.float32))
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


# All or nothing


class Refusing(nn.Linear):
    """A module whose extra state is of the size that it has been given."""

    def __init__(self, size):
        super().__init__(3, 2)
        self.size = size

    def get_extra_state(self):
        return self.size

    def set_extra_state(self, state):
        if state != self.size:
            raise RuntimeError("another size")


class Counter:
    """An object with a state that empties what it reads."""

    def __init__(self, keys=("count",)):
        self.keys, self.values = keys, dict.fromkeys(keys, 0)

    def state_dict(self):
        return dict(self.values)

    def load_state_dict(self, state):
        self.values = {key: state.pop(key) for key in self.keys}


class Uncopied(Counter):
    def __deepcopy__(self, memo):
        raise TypeError("cannot be copied")


def sequential(*factors):
    def make(optimizer):
        schedulers = [lr_scheduler.ConstantLR(optimizer, factor) for factor in factors]
        return lr_scheduler.SequentialLR(optimizer, schedulers, list(range(1, len(factors))))

    return make


def by_svi(optim):
    net = nn.Linear(3, 2)
    svi = SVI(net.forward, net.forward, optim, loss=WAELoss())
    p = pyro.module("net", net).weight
    p.grad = torch.ones_like(p)
    svi.optim([p])
    return {"svi": svi}


def scaler(**options):
    return torch.amp.GradScaler("cpu", **options)


REFUSED = {
    "scaler that was disabled": (lambda: {"s": scaler(enabled=False)}, lambda: {"s": scaler()}, "enabled: False"),
    "scaler that is disabled": (lambda: {"s": scaler()}, lambda: {"s": scaler(enabled=False)}, "enabled: True"),
    "sequence of fewer": (
        lambda: optimised(sequential(1.0, 0.5)), lambda: optimised(sequential(1.0, 0.5, 0.1)), "class: SequentialLR",
    ),
    "sequence of others": (
        lambda: optimised(sequential(1.0)),
        lambda: optimised(lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.ExponentialLR(o, 0.9)], [])),
        r"SequentialLR\(ConstantLR\) in the checkpoint, SequentialLR\(ExponentialLR\) here",
    ),
    "sequence of SVI": (
        lambda: by_svi(Adam({}, scheduler=sequential(1.0, 0.5))), lambda: by_svi(Adam({}, scheduler=sequential(1.0))),
        r"with SequentialLR\(ConstantLR, ConstantLR\) in the checkpoint, Adam with SequentialLR\(ConstantLR\) here",
    ),
    "groups": (
        optimised,
        lambda: (net := nn.Linear(3, 2)) and {"net": net, "optimizer": torch.optim.Adam([net.weight])},
        r"group 0: (float\d\d) \(2, 3\), \1 \(2,\) in the checkpoint, \1 \(2, 3\) here",
    ),
    "class of optimiser": (
        optimised,
        lambda: (net := nn.Linear(3, 2)) and {"net": net, "optimizer": torch.optim.SGD(net.parameters())},
        "class: Adam in the checkpoint, SGD here",
    ),
    "extra state of a module": (
        lambda: {"net": Refusing(3)}, lambda: {"net": Refusing(4)}, "net does not take its state.*another size",
    ),
    "object": (
        lambda: {"c": Counter()}, lambda: {"c": Counter(("count", "more"))}, "c does not take its state.*KeyError",
    ),
    "object that cannot be copied": (
        lambda: {"c": Uncopied()}, lambda: {"c": Uncopied(("count", "more"))}, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings(
    "ignore:Detected call of `lr_scheduler.step:UserWarning", "ignore:torch.cuda.amp:UserWarning"
)
def test_what_does_not_suit_leaves_everything_as_it_was(name, path):
    make, make_here, message = REFUSED[name]
    first = nn.Linear(2, 2)
    save_checkpoint(path, a=first, **make(), z=nn.Linear(2, 2))
    pyro.clear_param_store()
    here = {"a": nn.Linear(2, 2), **make_here(), "z": nn.Linear(2, 2)}
    state, draws = state_of(here), torch.get_rng_state()
    store = {name: value.clone() for name, value in pyro.get_param_store().items()}
    with pytest.raises((ValueError, KeyError), match=message):
        load_checkpoint(path, **here)
    assert state_of(here) == state
    assert torch.equal(torch.get_rng_state(), draws)
    assert all(torch.equal(pyro.param(name), value) for name, value in store.items())


@pytest.mark.parametrize("make", [Counter, Uncopied, lambda: scaler(init_scale=8.0)])
def test_what_suits_is_loaded_whether_it_can_be_copied_or_not(make, path):
    part = make()
    if isinstance(part, Counter):
        part.values["count"] = 3
    save_checkpoint(path, part=part)
    again = make()
    load_checkpoint(path, part=again)
    assert again.state_dict() == part.state_dict()
