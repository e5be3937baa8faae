"""Buffers whose values are decided by the first step of a training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyro_wae._core.private import without_graph


class FittedBuffers(nn.Module):
    """A module with buffers that are unset at first, such as the length of a kernel.

    A saved value is assigned and not copied: precision and shape of an unset buffer are no decision, and a float64
    length would be rounded to a float32 placeholder. Whether a buffer is set is kept as a plain bool, because reading a
    tensor on an accelerator waits for it. ``module.to(dtype)`` leaves these buffers in their precision: they are no
    weights, and a squared length may be infinite in half precision.
    """

    counts: tuple[str, ...] = ()
    """Plain attributes that say how far a buffer is set."""

    def __init__(self) -> None:
        super().__init__()
        self._is_fitted: dict[str, bool] = {}
        self._any_shape: set[str] = set()

    def register_fitted(self, name: str, value: Tensor | None = None, *, any_shape: bool = False) -> None:
        """Registers a buffer.

        Args:
            name: Its name.
            value: What it holds while unset. Default: a scalar NaN.
            any_shape: Whether a saved value may have another shape.
        """
        self._is_fitted[name] = False
        if any_shape:
            self._any_shape.add(name)
        self.register_buffer(name, torch.tensor(math.nan) if value is None else value)

    def is_fitted(self, name: str) -> bool:
        """Whether a buffer has been set, by :meth:`set_fitted` or from a saved value that is not NaN or empty."""
        return self._is_fitted[name]

    def set_fitted(self, name: str, value: Tensor) -> None:
        """Keeps a copy of a value, without its graph."""
        with torch.inference_mode(False):  # what is first needed there could otherwise never be trained with
            setattr(self, name, without_graph(value.clone()))
        self._is_fitted[name] = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FittedBuffers:
        before = {name: getattr(self, name) for name in self._is_fitted}
        super()._apply(fn, recurse)
        for name, value in before.items():
            moved = getattr(self, name)
            if moved.dtype != value.dtype:
                # MPS has no float64.
                dtype = torch.float32 if moved.device.type == "mps" else value.dtype
                self._buffers[name] = value.to(moved.device, dtype)
        return self

    def _snapshot(self) -> dict[str, Any]:
        # Buffers are replaced and never written into, so the dicts are all that has to be copied.
        counts = {name: getattr(self, name) for name in self.counts}
        return {"_buffers": dict(self._buffers), "_is_fitted": dict(self._is_fitted), **counts}

    def before_loading(self, saved: dict[str, Any]) -> None:
        """Makes what a saved state needs in order to be loaded; ``saved`` is the part below this module."""

    def after_loading(self) -> None:
        """Reads what is kept beside the buffers once they are loaded."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        self.before_loading(saved)
        for name in self._is_fitted:
            value, own = saved.get(name), getattr(self, name)
            if isinstance(value, Tensor) and (value.shape == own.shape or name in self._any_shape):
                self.set_fitted(name, value if own.is_meta else value.to(own.device))
                self._is_fitted[name] = value.numel() > 0 and not bool(value.isnan().any())
            elif isinstance(value, Tensor) and own.ndim == 0 and value.ndim == 1 and len(value) != 1:
                # torch 2.6 would take the first of several numbers.
                args[-1].append(f"size mismatch for {prefix}{name}: {tuple(value.shape)} saved, one number expected.")
        self.after_loading()
        super()._load_from_state_dict(state_dict, prefix, *args)


@contextmanager
def unset_if_it_fails(modules: Callable[[], Iterator[nn.Module]]) -> Iterator[None]:
    """Runs a first step; if it raises, what it has fitted is unset again, because it comes from numbers that are bad.

    Args:
        modules: Gives the modules that the step may fit, those that it makes included.
    """
    before = {part: part._snapshot() for part in _fitted_parts(modules())}
    try:
        yield
    except Exception:
        for part in _fitted_parts(modules()):
            vars(part).update(before.get(part) or {"_is_fitted": dict.fromkeys(part._is_fitted, False)})
        raise


def _fitted_parts(modules: Iterator[nn.Module]) -> Iterator[FittedBuffers]:
    return (part for module in modules for part in module.modules() if isinstance(part, FittedBuffers))
