"""Private names of torch and Pyro that this package reads, each with the reason.

They are what has to be looked at for a new version of either. Methods that a subclass overrides are named there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pyro.optim import PyroOptim
from pyro.poutine import runtime
from torch import Tensor, nn
from torch.distributions import transforms
from torch.nn.modules import batchnorm
from torch.optim import Optimizer

# A micro-batch runs again in the backward pass, after SVI's handlers have been left, and must run under them.
# Where there are none, nobody reads which parameters a loss has.
HANDLERS = runtime._PYRO_STACK

# The plate that `pyro.infer.ELBO` makes for its vectorised particles.
PARTICLE_PLATE = "num_particles_vectorized"

# What `pyro.sample(..., obs_mask=...)` adds to the name of a site, for the two parts of its value.
OBSERVED, UNOBSERVED = "_observed", "_unobserved"

# The one base of BatchNorm1d, 2d, 3d and SyncBatchNorm, and that of these and InstanceNorm, which may keep running
# statistics, too; torch has no public names for them.
BatchNorm = batchnorm._BatchNorm
RunningNorm = batchnorm._NormBase


def is_compiled(module: nn.Module) -> bool:
    """Whether it is the result of ``torch.compile``, or compiled in place: under global hooks it runs other code."""
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")


# Whether a transform of torch.func is active, in which every gradient is one that may be differentiated again.
is_transforming = torch._C._are_functorch_transforms_active


def without_graph(value: Tensor) -> Tensor:
    """A detached tensor; of one made under ``torch.func.grad`` what stays when the transform has ended."""
    value = value.detach()
    while torch._C._functorch.is_gradtrackingtensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value


# What the `inv` of a transform is.
InverseTransform = transforms._InverseTransform


def waiting_states(optim: PyroOptim) -> dict[str, Any]:
    """The states of parameters that have not appeared yet: ``get_state`` leaves them out, and a checkpoint may not."""
    return optim._state_waiting_to_be_consumed


def without_states(optim: PyroOptim) -> PyroOptim:
    """An optimiser of the same arguments that knows no parameter: Pyro's have no common way to be made again."""
    twin = copy.copy(optim)
    for name in ("optim_objs", "grad_clip", "_state_waiting_to_be_consumed", "_names", "_shared"):
        if hasattr(twin, name):
            setattr(twin, name, type(getattr(twin, name))())
    return twin


def new_optimizer(optim: PyroOptim, parameter: Tensor) -> Any:
    """The torch optimiser or scheduler of a parameter: Pyro makes it only in the parameter's own first step."""
    return optim._get_optim(parameter)


def new_clip(optim: PyroOptim, parameter: Tensor) -> Any:
    """What clips a parameter's gradient, made along with :func:`new_optimizer`."""
    return optim._get_grad_clip(parameter)


def schedulers_within(scheduler: Any) -> list[Any]:
    """The schedulers that a ``SequentialLR`` or ``ChainedScheduler`` is made of: it has no other name for them."""
    return [] if isinstance(scheduler, Optimizer) else list(getattr(scheduler, "_schedulers", ()))


def kept_tensors(module: nn.Module, *, buffers: bool) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and buffers that are in its state, which ``named_buffers`` does not say."""
    for name, value in [*module._parameters.items(), *(module._buffers.items() if buffers else ())]:
        if value is not None and name not in module._non_persistent_buffers_set:
            yield name, value


def is_part(name: str, suffix: str, nodes: Mapping[str, Any]) -> bool:
    """Whether ``obs_mask`` has made the site of a part: Pyro masks both, and computes the whole under their stem."""
    parts = [name.removesuffix(suffix) + part for part in ("", OBSERVED, UNOBSERVED)]
    if any(part not in nodes for part in parts):
        return False
    whole, *halves = (nodes[part] for part in parts)
    return "_deterministic" in whole["infer"] and all(half["mask"] is not None for half in halves)
