"""Whether a latent site of the model could have drawn the values that it is given."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints

from pyro_wae._core.distributions import family, support_of
from pyro_wae.step.program import Sample, mask_of

ROUNDING = 1e-5
"""How far a number may lie beyond an edge, relative to its size, or the sum of a simplex from 1."""


class DrawsInSupport(Messenger):
    """Warns at its end of draws of a prior outside the support that the model gives a site, given the sites before.

    Args:
        names: The latent sites that are conditioned on the draws.
    """

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self._values: dict[str, Any] = dict.fromkeys(names)
        self._found: dict[str, tuple[int, int]] = {}
        self._families: dict[str, str] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        name, value = msg["name"], msg["value"]
        # The same draws are run several times, to find out which sites depend on them.
        if name not in self._values or not msg["is_observed"] or value is self._values[name]:
            return
        self._values[name], self._families[name] = value, family(msg["fn"])
        try:
            outside = _outside(Sample(msg))
        except (NotImplementedError, ValueError, RuntimeError):  # nothing says where the support ends
            return
        count, total = self._found.get(name, (0, 0))
        self._found[name] = count + int(outside.sum()), total + outside.numel()

    def __exit__(self, *args: Any) -> Any:
        done = super().__exit__(*args)
        for name, (count, total) in self._found.items():
            if count:
                warnings.warn(
                    f"{count} of {total} draws of prior lie outside the support of latent site '{name}' "
                    f"({self._families[name]}), and are decoded as they are. Leave prior out, or fit one "
                    "with this support: a module whose call returns dist.TransformedDistribution(self.mixture(), "
                    f"[torch.distributions.biject_to(dist.{self._families[name]}(...).support)]), with self.mixture = "
                    "MixturePrior(100, d).",
                    UserWarning,
                    stacklevel=3,
                )
        return done


def _outside(site: Sample) -> Tensor:
    """For each draw whether a part of it that is not masked is outside the support."""
    support = support_of(site.innermost)
    inside = _inside(support, site.value)
    outside = ~inside.reshape(inside.shape + (1,) * support.event_dim)
    mask = mask_of(site)
    outside = outside if mask is None else outside & mask
    return outside.flatten(outside.ndim - site.fn.event_dim).any(-1) if site.fn.event_dim else outside


def _inside(support: Any, value: Tensor) -> Tensor:
    if isinstance(support, type(constraints.simplex)):
        total = value.double().sum(-1, keepdim=True)
        return support.check(value / total) & ((total - 1).abs() < ROUNDING).squeeze(-1)
    slack = ROUNDING * value.abs() if value.is_floating_point() and not support.event_dim else torch.zeros_like(value)
    return support.check(value) | support.check(value - slack) | support.check(value + slack)
