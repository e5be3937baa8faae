"""Steps of parts of the data, or of other particles of them: what they have to agree on, and how they are joined."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.effect import AutoMessenger
from torch import Tensor

from pyro_wae._core.distributions import distribution_tensors
from pyro_wae._core.rows import joined
from pyro_wae.step.records import Step


def join(parts: Sequence[Step], dim: int) -> Step:
    """Joins steps of other particles of the same data (dim 0), or of other data (dim 1).

    Raises:
        ValueError: If they have other sites, or codes of other sizes.
    """
    first = parts[0]
    for part in parts:
        _check_like(part, first, dim)
    changes: dict[str, Any] = {
        name: joined([getattr(part, name) for part in parts], dim)
        for name in ("codes", "prior")
        if getattr(first, name) is not None
    }
    changes["costs"] = {site: joined([part.costs[site] for part in parts], dim) for site in first.costs}
    for name, like in (("kept", "codes"), ("seen", "costs")):
        masks = [getattr(part, name) for part in parts]
        if any(mask is not None for mask in masks):
            wholes = [part.codes if like == "codes" else next(iter(part.costs.values())) for part in parts]
            filled = [
                torch.ones_like(whole, dtype=torch.bool) if mask is None else mask
                for mask, whole in zip(masks, wholes, strict=True)
            ]
            changes[name] = joined(filled, dim)
    if dim == 1:
        check_once(first, "micro_batch")
        changes["condition_is_masked"] = any(part.condition_is_masked for part in parts)
        # Of a single datum it cannot be known, and it counts as one whose prior does.
        changes["prior_varies"] = any(p.prior_varies for p in [p for p in parts if p.data > 1] or parts)
        if first.condition is not None:
            changes["condition"] = joined([part.condition for part in parts if part.condition is not None])
        n = sum(part.data for part in parts)
        changes["data_size"] = None if first.data_size == n else first.data_size
        changes["runs"] = [runs for part in parts for runs in part.runs]
    else:
        changes["once"] = {name: sum(part.once[name] for part in parts) / len(parts) for name in first.once}
        changes["runs"] = [[run for part in parts for runs in part.runs for run in runs]]
    return dataclasses.replace(first, **changes)


def check_once(step: Step, option: str) -> None:
    """Raises ValueError if a factor outside the data plate would be counted in each part of the data."""
    if step.once:
        name = next(iter(step.once))
        raise ValueError(
            f"pyro.factor '{name}' is outside the data plate '{step.first.plate}', and {option} would count it in "
            f"each part of the data. Put it into the plate, or leave {option} out."
        )


def check_guide(guide: Callable[..., Any], step: Step, who: str) -> None:
    """Raises ValueError if the guide has parameters for each datum and cannot distinguish the data of several runs.

    Args:
        guide: The guide.
        step: A step on some of the data.
        who: What would share the parameters.
    """
    guide = poutine.unwrap(guide)
    plate = step.first.plate
    if not isinstance(guide, AutoGuide | AutoMessenger) or plate in getattr(guide, "amortized_plates", ()):
        return
    if step.first.data_size is None:
        raise ValueError(
            f"The guide {type(guide).__name__} has parameters for each datum of the plate '{plate}', and {who} "
            f"would share those of {step.first.data}. Tell it which data it sees: pyro.plate('{plate}', size, "
            "subsample=index), with the indices as an argument."
        )


def prior_values(step: Step) -> list[Tensor]:
    """The tensors of the prior's distributions that can be read without waiting, each without what it only repeats."""
    found = []
    for site in step.first.latents.values():
        for tensor in distribution_tensors(site.distribution):
            if tensor.device.type == "cpu":
                for dim in range(tensor.ndim if tensor.numel() else 0):
                    first = tensor.narrow(dim, 0, 1)
                    # Not by the size alone, which a code may have in common with the data.
                    tensor = first if torch.equal(tensor, first.expand_as(tensor)) else tensor
                found.append(tensor)
    return found


def priors_differ(parts: Sequence[Step]) -> bool:
    """Whether priors that do not vary within any part of the data do so between parts."""
    # On a device that has to be waited for, a tensor counts as varying if it has a row for each datum.
    expected, *others = map(prior_values, parts)
    return any(not torch.equal(value, first) for other in others for value, first in zip(other, expected, strict=True))


def _check_like(step: Step, first: Step, dim: int) -> None:
    found, expected = ({site: (c.start, c.stop) for site, c in s.columns.items()} for s in (step, first))
    if found != expected or step.costs.keys() != first.costs.keys():
        raise ValueError(
            f"{'Runs' if dim == 0 else 'Micro-batches'} of one step gave codes of different sites or sizes: "
            f"{expected} and {found} (site: first and last column), or costs of different sites: "
            f"{list(first.costs)} and {list(step.costs)}. The model and guide must have one structure within a "
            "step: write the choice into the site's distribution, not around the site."
        )
    if dim == 0 and step.data != first.data:
        raise ValueError(
            f"Runs of one step gave codes of different numbers of data: {first.data} and {step.data}. The model "
            "and guide must have one structure within a step."
        )
