"""Runs of a model that leave the statistics of its BatchNorm layers alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

__all__ = ["batch_norm_at_rest"]


@contextmanager
def batch_norm_at_rest() -> Iterator[None]:
    """Keeps the running statistics of BatchNorm layers as they are through a run beyond the one that a step counts.

    In training mode a layer normalises by the batch all the same, so that no output changes.
    """
    resting: list[_BatchNorm] = []

    def rest(layer: nn.Module, inputs: Any) -> None:
        if isinstance(layer, _BatchNorm) and layer.training and layer.track_running_stats:
            layer.track_running_stats = False
            resting.append(layer)

    def resume(layer: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(layer, _BatchNorm) and layer in resting:
            resting.remove(layer)
            layer.track_running_stats = True

    hooks = register_module_forward_pre_hook(rest), register_module_forward_hook(resume)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in resting:
            layer.track_running_stats = True
