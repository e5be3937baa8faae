"""States of optimisers: saved and loaded, Pyro's and ours, in the middle and in part."""

from copy import deepcopy
from functools import partial

import pyro
import pytest
import torch
from optim_trajectories import (
    SCHEDULERS,
    advance,
    assert_identical,
    assert_same,
    by_name,
    scheduled,
    steps,
    trajectory,
)
from pyro.optim.clipped_adam import ClippedAdam
from torch.optim import lr_scheduler

from pyro_wae.optim import SGD, Adam, SharedOptim


@pytest.fixture(autouse=True)
def without_validation():
    with pyro.validation_enabled(False):
        yield


CONTINUED = {
    "Adam": lambda: Adam({"lr": 0.03}),
    "by name": lambda: Adam(by_name, {"clip_norm": 0.5}),
    "SGD": lambda: SGD({"lr": 0.001, "momentum": 0.9}),
    "Adagrad": lambda: SharedOptim(torch.optim.Adagrad, {"lr": 0.1}),
    "RMSprop": lambda: SharedOptim(torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5}),
    "ClippedAdam": lambda: SharedOptim(ClippedAdam, {"lr": 0.03, "lrd": 0.99}),
    **{name: lambda args=args: scheduled(*args, {"lr": 0.03})[0] for name, args in SCHEDULERS.items()},
}


@pytest.mark.parametrize("name", CONTINUED)
def test_continues_bit_for_bit_from_a_file(name, tmp_path):
    stop = 28  # An even step: a parameter that is not used in it has a scheduler that is to advance.
    path, options = str(tmp_path / "optim.pt"), {"after_step": advance} if name in SCHEDULERS else {}
    optim = CONTINUED[name]()
    trajectory(optim, last=stop, **options)
    optim.save(path)
    store = deepcopy(pyro.get_param_store().get_state())
    expected = steps(optim, first=stop, **options)

    pyro.clear_param_store()
    pyro.get_param_store().set_state(store)
    again = CONTINUED[name]()
    again.load(path)
    assert_identical(steps(again, first=stop, **options), expected)
    assert len(again.optimizers) == len(optim.optimizers)


@pytest.mark.parametrize("ours_first", [True, False], ids=["ours, then Pyro's", "Pyro's, then ours"])
@pytest.mark.parametrize("scheduler", [False, True], ids=["", "scheduler"])
def test_state_is_that_of_pyro(ours_first, scheduler, tmp_path):
    path = str(tmp_path / "optim.pt")
    kwargs = {"after_step": advance} if scheduler else {}

    def make():
        if scheduler:
            return scheduled(*SCHEDULERS["StepLR"], {"lr": 0.03})
        return Adam({"lr": 0.03}), pyro.optim.Adam({"lr": 0.03})

    expected = trajectory(make()[1], **kwargs)
    first, second = make() if ours_first else reversed(make())
    history = trajectory(first, last=31, **kwargs)
    first.save(path)
    second.load(path)
    history += steps(second, first=31, **kwargs)
    assert_same(history, expected)


def test_a_loaded_state_keeps_the_fused_kernel():
    pyros, ours = pyro.optim.Adam({"lr": 0.03}), Adam({"lr": 0.03})
    trajectory(pyros, last=3)
    ours.set_state(pyros.get_state())
    steps(ours, 3, 4)
    assert [o.param_groups[0]["fused"] for o in ours.optimizers] == [True]


def test_state_can_be_set_in_the_middle_and_more_than_once():
    optim = Adam({"lr": 0.03})
    trajectory(optim, last=20)
    state, store = optim.get_state(), deepcopy(pyro.get_param_store().get_state()["params"])
    expected = steps(optim, 20)
    for _ in range(2):
        for name, p in pyro.get_param_store().named_parameters():
            if name in store:
                p.data.copy_(store[name])
        optim.set_state(state)
        assert_identical(steps(optim, 20), expected)
        assert len(optim.optimizers) == 1


def test_state_of_some_parameters_leaves_the_others():
    a, b = (pyro.param(name, torch.ones(2)).unconstrained() for name in "ab")
    optim = SGD({"lr": 1.0, "momentum": 0.5})
    for p in (a, b):
        p.grad = torch.ones(2)
    optim([a, b])
    state = optim.get_state()
    optim([a, b])
    optim.set_state({"a": state["a"]})
    optim([a, b])
    # The velocities were 1 and 1.5; b's goes on to 1.75, and a's is again the second.
    torch.testing.assert_close(a, torch.full((2,), 1 - 1 - 1.5 - 1.5))
    torch.testing.assert_close(b, torch.full((2,), 1 - 1 - 1.5 - 1.75))


def test_restart_takes_these_states_and_no_others_at_once():
    a, b = (pyro.param(name, torch.ones(2)).unconstrained() for name in "ab")
    optim = SGD({"lr": 1.0, "momentum": 0.5})
    for p in (a, b):
        p.grad = torch.ones(2)
    optim([a, b])
    saved = optim.get_state()
    saved["a"]["param_groups"][0]["lr"] = 0.25
    optim.restart({"a": saved["a"], "late": saved["b"]})
    assert list(optim.optim_objs) == [a]
    assert [optimizer.param_groups[0]["lr"] for optimizer in optim.optimizers] == [0.25]
    assert optim.get_state().keys() == {"a", "late"}


def test_state_that_waits_is_not_lost():
    optim = Adam({"lr": 0.03})
    trajectory(optim, last=3)
    state = optim.get_state()
    again = Adam({"lr": 0.03})
    again.set_state(state)
    assert again.get_state().keys() == state.keys()


def test_state_leaves_out_what_the_store_has_lost():
    optim = Adam({"lr": 0.03})
    for _ in range(2):
        trajectory(optim, last=1)
    state = optim.get_state()
    assert set(state) == set(pyro.get_param_store().keys())
    # The parameters of the second run are new, and have been stepped once.
    assert state["encoder$$$weight"]["state"][0]["step"] == 1
    pyro.clear_param_store()
    assert optim.get_state() == {}


def test_state_needs_names():
    optim = Adam({"lr": 0.1})
    optim([torch.ones(2, requires_grad=True)])
    with pytest.raises(ValueError, match="not in it"):
        optim.get_state()


@pytest.mark.parametrize("saved", [False, True], ids=["saved without", "saved with"])
def test_state_and_optimiser_agree_on_a_scheduler(saved):
    optims = [Adam({"lr": 0.1}), Adam({"lr": 0.1}, scheduler=partial(lr_scheduler.ExponentialLR, gamma=0.9))]
    trajectory(optims[saved], last=1)
    optims[not saved].set_state(optims[saved].get_state())
    with pytest.raises(ValueError, match=f"saved {'with' if saved else 'without'} a scheduler"):
        steps(optims[not saved], last=1)


def test_state_of_another_shape_is_named():
    optim = Adam({"lr": 0.1})
    trajectory(optim, last=1)
    state = optim.get_state()
    state["encoder$$$weight"]["state"][0]["exp_avg"] = torch.zeros(5, 2)
    again = Adam({"lr": 0.1})
    again.set_state(state)
    with pytest.raises(ValueError, match=r"'encoder\$\$\$weight'.*\(5, 2\).*\(3, 2\)"):
        steps(again, last=1)
