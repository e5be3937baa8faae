"""A noisy loss whose parameters come and go, and where optimisers take them."""

import pyro
import torch
from pyro.distributions import constraints
from pyro.infer import SVI
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch.optim import lr_scheduler

from pyro_wae.optim import Adam

STEPS = 50
LATE = 17


def param(name, value, dtype=torch.float64, **kwargs):
    value = torch.full(value, 0.5, dtype=dtype) if isinstance(value, tuple) else torch.tensor(value, dtype=dtype)
    return pyro.param(name, value, **kwargs)


def objective(model, guide, step):
    """A noisy loss of matrices, scalars, positive numbers, another dtype, and parameters that are not always used."""
    x = torch.randn(7, 3, dtype=torch.float64) + 2
    z = x @ param("encoder$$$weight", (3, 2)) + torch.randn(7, 2) * param("encoder$$$scale", (2,))
    mean = z @ param("decoder$$$weight", (2, 3)) + param("decoder$$$bias", (3,))
    scale = param("scale", 1.5, constraint=constraints.positive)
    at_times = param("with a gradient at times", 1.0)
    if step % 3 == 0:
        mean = mean + at_times
    if step % 2:
        mean = mean + param("used at times", 2.0)
    if step >= LATE:
        mean = mean + param("late", (3,))
    # Apart from all others, which would take part in its rounding.
    single = (param("single precision", (3,), torch.float32) - 3).square().sum()
    return ((x - mean) / scale).square().sum(1).mean() + scale.log() + single


def values():
    return {name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()}


def steps(optim, first=0, last=STEPS, after_step=lambda optim, loss: None):
    """The parameters after each of the steps."""
    svi = SVI(None, None, optim, loss=objective)
    history = []
    for step in range(first, last):
        pyro.set_rng_seed(step)
        loss = svi.step(step)
        after_step(optim, loss)
        history.append(values())
    return history


def trajectory(optim, **kwargs):
    pyro.clear_param_store()
    return steps(optim, **kwargs)


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            tolerance = 1e-9 if a[name].dtype == torch.float64 else 1e-5
            torch.testing.assert_close(
                a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
            )


def assert_identical(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), name


def by_name(name):
    return {"lr": 0.05, "betas": (0.5, 0.9)} if name.startswith("encoder.") else {"lr": 0.01}


def by_module_and_name(module, name):
    return {"lr": 0.05 if (module, name) == ("encoder", "weight") else 0.01}


def clip_by_name(module, name):
    return {"clip_norm": 0.3} if (module, name) == ("encoder", "weight") else {}


SCHEDULERS = {
    "ExponentialLR": (lr_scheduler.ExponentialLR, {"gamma": 0.9}),
    "StepLR": (lr_scheduler.StepLR, {"step_size": 5, "gamma": 0.5}),
    "MultiStepLR": (lr_scheduler.MultiStepLR, {"milestones": [4, 20], "gamma": 0.5}),
    "LambdaLR": (lr_scheduler.LambdaLR, {"lr_lambda": lambda epoch: 1 / (1 + epoch)}),
    "OneCycleLR": (lr_scheduler.OneCycleLR, {"max_lr": 0.05, "total_steps": 60}),
    "ReduceLROnPlateau": (lr_scheduler.ReduceLROnPlateau, {"patience": 1, "factor": 0.7}),
}


def scheduled(make_scheduler, kwargs, optim_args):
    ours = Adam(optim_args, scheduler=lambda optimizer: make_scheduler(optimizer, **kwargs))
    pyros = PyroLRScheduler(make_scheduler, {"optimizer": torch.optim.Adam, "optim_args": optim_args, **kwargs})
    return ours, pyros


def advance(optim, loss):
    plateau = any(isinstance(o, lr_scheduler.ReduceLROnPlateau) for o in optim.optim_objs.values())
    optim.step(*([loss] if plateau else []))
