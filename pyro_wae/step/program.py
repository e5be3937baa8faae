"""Runs model and guide, and reads from their traces which sites are codes and which are costs."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor, site_is_subsample
from pyro.util import check_if_enumerated, check_model_guide_match
from torch import Tensor, nn

from pyro_wae._core.distributions import is_a, layers
from pyro_wae.costs import Observation
from pyro_wae.step.plates import data_size, find_data_plate, plate_scale, site_layout
from pyro_wae.step.records import Codes, Layout

__all__ = [
    "Particle",
    "ReplaySubsamples",
    "Structure",
    "gather_codes",
    "gather_observations",
    "is_random",
    "observed_sites",
    "read_structure",
    "run",
    "user_name",
]

Program = Callable[..., Any]
Site = Mapping[str, Any]


@dataclass(frozen=True)
class Particle:
    """One run of the guide with the model replayed against it.

    Args:
        model: The model's trace.
        guide: The guide's trace.
        rerun: Calls the model again as it was called, in the plate of vectorised particles if there is one.
    """

    model: Any
    guide: Any
    rerun: Callable[[], Any]

    @functools.cached_property
    def latents(self) -> dict[str, Site]:
        """The sites that make up a code, by their name."""
        return dict(_latent_sites(self.model, self.guide))

    @functools.cached_property
    def observed(self) -> dict[str, Site]:
        """The sites that may have a cost, by the name the user gave them."""
        return {user_name(name, self.model): site for name, site in observed_sites(self.model)}


@dataclass(frozen=True)
class Structure:
    """What the sites of a run are to a WAE.

    Args:
        latents: Layout of each site of the code, in the order of the model.
        observed: Layout of each site that has a cost, by the name the user gave it.
        is_root: Whether the code is one site that no other random choice precedes.
        prior_varies: Whether the prior of a datum's code may depend on the datum, so far as can be seen.
        data_size: Number of data, where the data plate takes a part of them; else None.
        scale: The user's scale of each latent site.
    """

    latents: Mapping[str, Layout]
    observed: Mapping[str, Layout]
    is_root: bool
    prior_varies: bool
    data_size: int | None
    scale: Mapping[str, float | Tensor]


def run(
    model: Program,
    guide: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    max_plate_nesting: float,
    subsample_of: Particle | None = None,
) -> Particle:
    """Runs the guide and replays the model against it; no log_prob is computed.

    Args:
        model: A Pyro model.
        guide: Its guide, a messenger guide included.
        args: Arguments of both.
        kwargs: Keyword arguments of both.
        max_plate_nesting: Bound on nested plates, for Pyro's check that model and guide match.
        subsample_of: An earlier run of the same step, whose data this one takes too.
    """
    with ReplaySubsamples(subsample_of.model if subsample_of else None):
        unwrapped = poutine.unwrap(guide)
        if isinstance(unwrapped, poutine.messenger.Messenger):
            guide(*args, **kwargs)
            model_trace, guide_trace = unwrapped.get_traces()
        else:
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    if is_validation_enabled():
        check_model_guide_match(model_trace, guide_trace, max_plate_nesting)
        check_if_enumerated(guide_trace)
    return Particle(model_trace, guide_trace, functools.partial(model, *args, **kwargs))


def read_structure(particle: Particle, data_plate: str | None) -> Structure:
    """Tells codes, costs and plates of a run apart.

    Args:
        particle: A run of model and guide.
        data_plate: Name of the data plate, or None to find it.

    Raises:
        ValueError: If a latent cannot be part of a code, there is no code or no observed site, or the data plate is
            in doubt.
    """
    latents, observed = particle.latents, particle.observed
    if not latents:
        raise ValueError(
            "Model and guide share no latent site, so that there are no codes. Sample one under the same name in "
            "both, inside the data plate: z = pyro.sample('z', ...)."
        )
    if not observed:
        raise ValueError(
            "The model has no observed site, so that nothing is reconstructed. Write pyro.sample('x', ..., obs=x); "
            "pyro.factor and pyro.deterministic are not costs."
        )
    plate = find_data_plate(list(latents.values()), list(observed.values()), data_plate)
    first = next(iter(latents.values()))
    frame = next(frame for frame in first["cond_indep_stack"] if frame.name == plate)
    random = [name for name, site in particle.model.nodes.items() if is_random(site)]
    layouts = {name: site_layout(site, plate) for name, site in latents.items()}
    is_root = len(latents) == 1 and random[0] in latents
    return Structure(
        latents=layouts,
        observed={name: site_layout(site, plate) for name, site in observed.items()},
        is_root=is_root,
        prior_varies=not is_root or _varies(first["fn"], layouts[first["name"]].data),
        data_size=data_size(frame),
        scale={name: _latent_scale(site) for name, site in latents.items()},
    )


def gather_codes(particle: Particle, structure: Structure) -> Codes:
    """The codes of one run, one row for each particle and datum.

    Raises:
        ValueError: If the run has other sites than the structure, or its guide samples a site outside a plate that
            the model has it in.
    """
    latents = particle.latents
    changed = (latents.keys() ^ structure.latents.keys()) | (particle.observed.keys() ^ structure.observed.keys())
    if changed:
        raise ValueError(
            f"Site '{min(changed)}' is in one particle's run of model and guide and not in another's. WAELoss needs "
            "the same sites in every run: write the choice into the site's distribution, not around the site."
        )
    rows, kept = {}, {}
    for name, layout in structure.latents.items():
        site, guide_site = latents[name], particle.guide.nodes[name]
        rows[name] = layout.rows(site["value"], site["fn"].event_dim)
        _check_own_codes(site, layout)
        mask = _mask(site, guide_site)
        if mask is not None:
            shape = torch.broadcast_shapes(layout.shape + site["fn"].event_shape, mask.shape)
            kept[name] = layout.rows(mask.expand(shape), site["fn"].event_dim).expand(rows[name].shape)
    return Codes.of_sites(rows, kept)


def _check_own_codes(site: Site, layout: Layout) -> None:
    value, event_dim = site["value"], site["fn"].event_dim
    batch = tuple(value.shape[: value.ndim - event_dim])
    aligned = (1,) * (len(layout.shape) - len(batch)) + batch[max(0, len(batch) - len(layout.shape)) :]
    if aligned != layout.shape:
        raise ValueError(
            f"Latent site '{site['name']}' has batch shape {batch} in the guide and {layout.shape} in the "
            "model, so that several data or particles would share one code. Write the guide's pyro.sample("
            f"'{site['name']}', ...) inside the same plates as the model's."
        )


def gather_observations(particle: Particle, structure: Structure) -> Iterator[Observation]:
    """The observed sites of one run."""
    for name, site in particle.observed.items():
        fn, value = site["fn"], site["value"]
        yield Observation(
            name=name,
            distribution=fn,
            value=_expanded(value, fn.shape()),
            layout=structure.observed[name],
            mask=_mask(site),
            scale=_user_scale(site),
        )


def _expanded(value: Tensor, shape: torch.Size) -> Tensor:
    return value if value.shape == shape else value.expand(torch.broadcast_shapes(value.shape, shape))


class ReplaySubsamples(Messenger):
    """Gives every plate the subsample that it had in a trace."""

    def __init__(self, trace: Any | None) -> None:
        super().__init__()
        self.trace = trace

    def _pyro_sample(self, msg: Any) -> None:
        if self.trace is not None and site_is_subsample(msg) and msg["value"] is None and msg["name"] in self.trace:
            msg["value"] = self.trace.nodes[msg["name"]]["value"]


def is_random(site: Site) -> bool:
    """Whether a site of a trace is drawn, neither observed nor a subsample."""
    return site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)


def _latent_sites(model_trace: Any, guide_trace: Any) -> Iterator[tuple[str, Site]]:
    for name, site in model_trace.nodes.items():
        if not is_random(site) or site["infer"].get("is_auxiliary") or _is_imputed(name, model_trace):
            continue
        in_guide = name in guide_trace.nodes
        fn = guide_trace.nodes[name]["fn"] if in_guide else site["fn"]
        if in_guide and not getattr(fn, "has_rsample", False):
            _raise_not_reparameterised(name, fn)
        if not in_guide and site["infer"].get("enumerate"):
            raise ValueError(
                f"Latent site '{name}' of the model is to be enumerated, and WAELoss does not enumerate. Sum it out "
                "in the likelihood (dist.MixtureSameFamily), or sample it in the guide through a relaxation."
            )
        if in_guide and not any(mask is False for mask, _ in _masks(site)):
            yield name, site


def _raise_not_reparameterised(name: str, fn: Any) -> None:
    support = getattr(fn, "support", None)
    if getattr(support, "is_discrete", False):
        raise ValueError(
            f"Latent site '{name}' is discrete in the guide ({type(fn).__name__}): no gradient of the penalty reaches "
            "the encoder, and WAELoss does not enumerate. Write dist.OneHotCategoricalStraightThrough or "
            "dist.RelaxedOneHotCategorical, or a Delta on a continuous code."
        )
    raise ValueError(
        f"Latent site '{name}' cannot be reparameterised in the guide ({type(fn).__name__} has no rsample): no "
        "gradient of the penalty reaches the encoder. Write dist.Normal(loc, scale), or dist.Delta(loc) for a "
        "deterministic encoder."
    )


def observed_sites(model_trace: Any) -> Iterator[tuple[str, Site]]:
    """The sites of a model's trace that may have a cost."""
    for name, site in model_trace.nodes.items():
        if site["type"] != "sample" or not site["is_observed"] or site_is_factor(site):
            continue
        if not site["infer"].get("_deterministic") and not site["infer"].get("is_auxiliary"):
            yield name, site


def _is_imputed(name: str, model_trace: Any) -> bool:
    """Whether the site holds the part of an observed value that ``obs_mask`` left to be imputed."""
    stem = name.removesuffix("_unobserved")
    return stem != name and f"{stem}_observed" in model_trace.nodes and stem in model_trace.nodes


def user_name(name: str, model_trace: Any) -> str:
    """The name that the user gave an observed site, whose part that ``obs_mask`` leaves has another."""
    stem = name.removesuffix("_observed")
    return stem if stem != name and f"{stem}_unobserved" in model_trace.nodes else name


def _user_scale(site: Site) -> float | Tensor:
    scale = site["scale"] / plate_scale(site)
    # N/B divided out again leaves a rounding error, which must not look like a scale of the user's.
    return 1.0 if not isinstance(scale, Tensor) and abs(scale - 1) < 1e-9 else scale


def _latent_scale(site: Site) -> float | Tensor:
    scale = _user_scale(site)
    if isinstance(scale, Tensor) and scale.numel() != 1:
        raise ValueError(
            f"Latent site '{site['name']}' has a poutine.scale of shape {tuple(scale.shape)}, and a penalty compares "
            "all data at once: a latent site takes one number. Write poutine.scale(scale=0.5)."
        )
    return scale.reshape(()) if isinstance(scale, Tensor) else scale


def _mask(*sites: Site) -> Tensor | None:
    """Where all masks of the sites are true: a tensor that broadcasts to batch and event dimensions, or None."""
    total: Tensor | None = None
    for site in sites:
        for mask, event_dim in _masks(site):
            mask = torch.as_tensor(mask, dtype=torch.bool, device=site["value"].device)
            mask = mask.reshape(mask.shape + (1,) * event_dim)
            _check_mask(site, mask, event_dim)
            total = mask if total is None else total & mask
    return total


def _check_mask(site: Site, mask: Tensor, event_dim: int) -> None:
    shape = torch.broadcast_shapes(site["value"].shape, site["fn"].shape())
    sizes = zip(reversed(mask.shape), reversed(shape), strict=False)
    if mask.ndim > len(shape) or any(size not in (1, given) for size, given in sizes):
        batch, found = tuple(shape[: len(shape) - event_dim]), tuple(mask.shape[: mask.ndim - event_dim])
        raise ValueError(
            f"The mask at site '{site['name']}' has shape {found}, which does not fit its batch shape {batch}. "
            "Write poutine.mask(mask=...) with one truth value for each datum of this batch."
        )


def _masks(site: Site) -> Iterator[tuple[Tensor | bool, int]]:
    """The masks of ``poutine.mask`` and ``fn.mask``, each with the number of value dimensions to its right."""
    found = [(site["mask"], site["fn"].event_dim)]
    found += [(fn._mask, fn.event_dim) for fn in layers(site["fn"]) if is_a(type(fn), dist.MaskedDistribution)]
    yield from ((mask, event_dim) for mask, event_dim in found if mask is not None and mask is not True)


def _varies(value: Any, n: int, depth: int = 5) -> bool:
    """Whether a distribution may differ between n data: it holds a function, or a tensor with n values.

    A false alarm is harmless: the pairs that it leaves out of a penalty cost a little variance and no bias.
    """
    if isinstance(value, Tensor):
        dims = [dim for dim, size in enumerate(value.shape) if size == n and value.stride(dim)]
        if value.requires_grad or value.device.type != "cpu":  # where looking at the values would wait, or miss a graph
            return bool(dims)
        return any(bool((value != value.narrow(dim, 0, 1)).any()) for dim in dims)
    if isinstance(value, list | tuple):
        return depth == 0 or any(_varies(item, n, depth - 1) for item in value)
    if is_a(type(value), dist.Distribution, torch.distributions.Distribution, torch.distributions.Transform):
        # A transform keeps its last draw, which is as long as the data and says nothing about them.
        parts = [part for name, part in vars(value).items() if not name.startswith("_cache")]
        return depth == 0 or any(_varies(part, n, depth - 1) for part in parts)
    return callable(value) and not isinstance(getattr(value, "__self__", value), nn.Module | type | weakref.ref)
