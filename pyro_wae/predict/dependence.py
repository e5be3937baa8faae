"""Which of the unobserved sites that a user names are latent, and which hold data that the model was called without."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor
from torch import Tensor

from pyro_wae._core.distributions import distribution_tensors
from pyro_wae._core.random_state import restored_random_state
from pyro_wae.predict.runs import Node, observed_nodes, run_model
from pyro_wae.step.program import Program, is_random

_DRAWS = 5  # other values that are tried: of a discrete latent some may equal the first, or have the same effect


def latent_among(
    sites: Mapping[str, Node],
    trace: Any,
    model: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    codes: Collection[str] = (),
) -> set[str]:
    """Those of the sites that are drawn before an observed site, or on whose values a later site depends.

    Args:
        sites: Of the trace.
        trace: Of a run of the model.
        model: The model, which fixes the codes that the trace has fixed.
        args: Its arguments.
        kwargs: Its keyword arguments.
        codes: The latent sites that are fixed.
    """
    order = list(trace.nodes)
    last = max((order.index(node["name"]) for node in observed_nodes(trace, codes).values()), default=-1)
    drawn = [name for name, site in sites.items() if is_random(site)]
    return {name for name in drawn if order.index(name) < last or _is_read(name, trace, model, args, kwargs)}


def _is_read(name: str, trace: Any, model: Program, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether other values of a site, in one random state, change a later site; also where no other value is drawn."""
    if not _after(name, trace):
        return False
    before, is_other = _redrawn_run(name, 0, model, args, kwargs), False
    for number in range(1, 1 + _DRAWS):
        other = _redrawn_run(name, number, model, args, kwargs)
        if name not in before or name not in other or not _same(_after(name, before), _after(name, other)):
            return True
        is_other = is_other or not _same([before.nodes[name]["value"]], [other.nodes[name]["value"]])
    return not is_other


def _after(name: str, trace: Any) -> list[Any]:
    """Names, values and distributions' tensors of the later sites, without factors, which are no sites to return."""
    order = list(trace.nodes)
    later = (trace.nodes[key] for key in order[order.index(name) + 1 :])
    nodes = [node for node in later if node["type"] == "sample" and not site_is_factor(node)]
    return [part for node in nodes for part in (node["name"], node["value"], *distribution_tensors(node["fn"]))]


def _same(values: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether all are alike, up to rounding: some kernels of an accelerator do not repeat themselves."""
    return len(values) == len(others) and all(
        value.shape == other.shape and value.dtype == other.dtype and torch.allclose(value, other)
        if isinstance(value, Tensor) and isinstance(other, Tensor)
        else value is other or (isinstance(value, str) and value == other)
        for value, other in zip(values, others, strict=True)
    )


def _redrawn_run(name: str, number: int, model: Program, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The trace of a run in the present random state, which stays as it is; at a site draws are repeated."""
    with restored_random_state(), _Redrawn(name, number):
        return run_model(model, args, kwargs)


class _Redrawn(Messenger):
    """Draws a site again, ``number`` times, and leaves the random state as the first draw has left it."""

    def __init__(self, name: str, number: int) -> None:
        super().__init__()
        self.name = name
        self.number = number

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] == self.name:
            with restored_random_state():
                for _ in range(self.number):
                    msg["value"] = msg["fn"]()
