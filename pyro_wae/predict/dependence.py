"""Which of the sites that a user names are latent: those on whose values a later site's distribution depends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro.ops.gaussian import Gaussian
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch.overrides import TorchFunctionMode

from pyro_wae._core.batch_norm import batch_norm_at_rest
from pyro_wae._core.private import InverseTransform
from pyro_wae.predict.runs import Node
from pyro_wae.step.program import Program, is_random


def latent_among(sites: Mapping[str, Node], model: Program, args: Sequence[Any], kwargs: Mapping[str, Any]) -> set[str]:
    """Those of the sites that are drawn, and whose values a later site's distribution depends on.

    Raises:
        ValueError: If the model does not run on values that carry the names of their sites.
    """
    drawn = [name for name, site in sites.items() if is_random(site)]
    if not drawn:
        return set()
    read: set[str] = set()
    try:
        with torch.no_grad(), batch_norm_at_rest(), _Readers(read), _LostTrack(read):
            model(*args, **kwargs)
    except Exception as error:
        raise ValueError(
            f"return_sites names site '{drawn[0]}', which has no data, and whether later sites depend on its value "
            "could not be found out. Write random=True, which returns the values that were drawn."
        ) from error
    return read.intersection(drawn)


class _Readers(Messenger):
    """Notes in ``read`` the sites that a later site's distribution depends on."""

    def __init__(self, read: set[str]) -> None:
        super().__init__()
        self.read = read

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) or msg["infer"].get("_deterministic") or site_is_factor(msg):
            return
        self.read |= _sources(msg["fn"])
        if not msg["is_observed"]:
            self.read |= get_provenance(msg["value"])
            msg["value"] = track_provenance(detach_provenance(msg["value"]), frozenset({msg["name"]}))


def _sources(value: Any) -> frozenset[str]:
    """The sites whose values a distribution was made of, through all that it holds."""
    if isinstance(value, list | tuple | Mapping):
        parts = list(value.values() if isinstance(value, Mapping) else value)
    elif isinstance(value, torch.distributions.Distribution | torch.distributions.Transform | Gaussian):
        parts = [part for name, part in vars(value).items() if name != "_inv" or isinstance(value, InverseTransform)]
    else:
        return get_provenance(value)
    return frozenset().union(*map(_sources, parts))


class _LostTrack(TorchFunctionMode):
    """Notes in ``read`` the sites whose values go where none can follow them: out of torch, or into another tensor."""

    def __init__(self, read: set[str]) -> None:
        super().__init__()
        self.read = read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _OUT_OF_TORCH or (name.endswith("_") and not name.endswith("__")):
            self.read |= get_provenance(args)
        return func(*args, **(kwargs or {}))


_OUT_OF_TORCH = {"tolist", "numpy", "item", "__array__", "__bool__", "__float__", "__int__", "__index__", "__setitem__"}
