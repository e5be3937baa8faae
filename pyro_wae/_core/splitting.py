"""Arguments of model and guide for a part of the data: tensors cut along their first dimension, in dicts too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors with a dimension among arguments and in dicts of them, in order."""
    if isinstance(value, Tensor):
        if value.ndim:
            yield value
    elif isinstance(value, Mapping):
        for own in value.values():
            yield from tensors_of(own)


def part_of(value: Any, rows: slice, length: int) -> Any:
    """The rows of a tensor of the given length, and of those in a dict; anything else as it is."""
    if isinstance(value, Mapping):
        return {name: part_of(own, rows, length) for name, own in value.items()}
    return value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == length else value
