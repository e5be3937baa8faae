"""BatchNorm layers in runs beyond the one that a step counts: their running statistics stay as they are."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from pyro_wae._core.private import BatchNorm, RunningNorm


@contextmanager
def batch_norm_at_rest(*, saves_alike: bool = False) -> Iterator[None]:
    """Keeps the running statistics of BatchNorm and InstanceNorm layers through the runs of this thread inside.

    In training mode a layer normalises by its batch all the same, so no output changes.

    Args:
        saves_alike: Whether a layer must save for its gradient just what it saves in a usual run, as activation
            checkpointing needs.
    """
    resting: dict[nn.Module, dict[str, Any]] = {}
    thread = threading.get_ident()

    def rest(layer: nn.Module, inputs: Any) -> None:
        # The hook is the process's; another thread may be training meanwhile.
        if isinstance(layer, RunningNorm) and layer.training and layer.track_running_stats and _is_here(thread):
            quiet: dict[str, Any] = {"momentum": 0.0, "num_batches_tracked": None}
            if not saves_alike:
                # An InstanceNorm updates what it has, whatever it is told.
                of_instances = {"running_mean": None, "running_var": None}
                quiet = {"track_running_stats": False} if isinstance(layer, BatchNorm) else of_instances
            resting[layer] = {name: getattr(layer, name) for name in quiet}
            _set(layer, quiet)

    def resume(layer: nn.Module, inputs: Any = None, output: Any = None) -> None:
        if layer in resting and _is_here(thread):
            _set(layer, resting.pop(layer))

    hooks = register_module_forward_pre_hook(rest), register_module_forward_hook(resume)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in list(resting):
            resume(layer)


@contextmanager
def batch_norm_layers() -> Iterator[list[BatchNorm]]:
    """Collects the BatchNorm layers with running statistics that this thread runs inside, wherever they are kept."""
    layers: list[BatchNorm] = []
    thread = threading.get_ident()

    def record(layer: nn.Module, inputs: Any) -> None:
        if isinstance(layer, BatchNorm) and layer.running_mean is not None and _is_here(thread):
            layers.extend([] if layer in layers else [layer])

    hook = register_module_forward_pre_hook(record)
    try:
        yield layers
    finally:
        hook.remove()


def _is_here(thread: int) -> bool:
    return threading.get_ident() == thread


def _set(layer: nn.Module, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(layer, name, value)
