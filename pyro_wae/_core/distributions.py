"""What lies inside a distribution's wrappers: Independent, masked and expanded distributions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution

__all__ = ["innermost", "is_a", "layers"]

_KNOWN: dict[tuple[type, ...], bool] = {}


def is_a(kind: type, *bases: type) -> bool:
    """Whether a class is a subclass of one of others, which Pyro's metaclass takes long to tell."""
    known = _KNOWN.get((kind, *bases))
    if known is None:
        known = _KNOWN[kind, *bases] = issubclass(kind, bases)
    return known


def layers(distribution: Any) -> Iterator[Any]:
    """A distribution, what lies inside it, and so on to the innermost."""
    yield distribution
    while is_a(type(distribution), torch.distributions.Independent, dist.MaskedDistribution, ExpandedDistribution):
        distribution = distribution.base_dist
        yield distribution


def innermost(distribution: Any) -> Any:
    """What lies inside all wrappers."""
    *_, inner = layers(distribution)
    return inner
