"""Values as a checkpoint holds them, and as texts by which two trainings are compared."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_wae._core.repr import CallRepr, argument_names

PLAIN: tuple[Any, ...] = (bool, int, float, complex, str, bytes)


def describe(value: Any) -> str:
    """A text that is the same in every process, and the same before and after the first step: class and arguments."""
    if isinstance(value, CallRepr):
        arguments = [f"{name}={describe(getattr(value, name))}" for name in argument_names(type(value))]
        if isinstance(value, nn.Module):  # the parts of a sum, which are its ``*args``
            arguments += [describe(list(child)) for child in value.children() if isinstance(child, nn.ModuleList)]
        return f"{type(value).__name__}({', '.join(arguments)})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe(option)}" for key, option in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(describe, value))}]"
    if isinstance(value, nn.Module):
        return type(value).__name__
    if isinstance(value, Tensor):
        return f"tensor of {shape_of(value)}"
    if isinstance(value, functools.partial):
        return f"partial({describe(value.func)})"
    if callable(value) and hasattr(value, "__qualname__"):
        return str(value.__qualname__)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def plain(value: Any, where: str) -> Any:
    """The value in such types as ``torch.load`` reads without running code.

    Raises:
        TypeError: If there is anything else in it; `where` begins the name of it.
    """
    if value is None or isinstance(value, torch.dtype | torch.device):
        return value
    if isinstance(value, Tensor):
        if hasattr(value, "full_tensor"):
            raise TypeError(
                f"A checkpoint holds whole tensors, and {where} is a part of one that other processes share (DTensor). "
                "Write torch.distributed.checkpoint.save(wae.state_dict(), checkpoint_id=folder)."
            )
        return value.detach()
    if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    for kind in PLAIN:
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        items = {plain(key, where): plain(item, f"{where}[{key!r}]") for key, item in value.items()}
        return Counter(items) if isinstance(value, Counter) else items
    for sequence in (list, tuple, set):
        if isinstance(value, sequence):
            return sequence(plain(item, f"{where}[{number}]") for number, item in enumerate(value))
    raise TypeError(
        f"A checkpoint holds tensors, numbers, texts, and lists and dicts of them, because reading it runs no code; "
        f"{where} is {type(value).__name__}. Keep it apart, or write it as one of these."
    )


def shape_of(value: Tensor) -> str:
    """The type and shape of a tensor."""
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
