"""What several runs on parts of the data of one step have to agree on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.effect import AutoMessenger
from torch import Tensor

from pyro_wae._core.distributions import distribution_tensors
from pyro_wae.step.records import Step


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
