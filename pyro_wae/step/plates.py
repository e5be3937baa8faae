"""Which plate holds the data, and how the dimensions of a site follow from its plates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pyro_wae.step.records import Layout

__all__ = ["PARTICLE_PLATE", "data_size", "find_data_plate", "plate_scale", "site_layout"]

PARTICLE_PLATE = "num_particles_vectorized"
"""The name that ``pyro.infer.ELBO`` gives the plate of its vectorised particles."""

Site = Mapping[str, Any]


def find_data_plate(latents: Sequence[Site], observed: Sequence[Site], requested: str | None) -> str:
    """Finds the plate whose dimension is the sample dimension of Q_Z.

    Args:
        latents: The sites that make up a code.
        observed: The sites that have a cost.
        requested: The user's choice, or None for the one vectorised plate that holds every site; of several, the
            subsampled one.

    Returns:
        The plate's name.

    Raises:
        ValueError: If a site lies outside, or nothing decides between several plates.
    """
    sites = [*latents, *observed]
    plates = {site["name"]: _vectorised(site) for site in sites}
    known = {name: frame for frames in plates.values() for name, frame in frames.items()}
    if requested is not None:
        if requested not in known:
            raise ValueError(
                f"data_plate='{requested}' is no vectorised plate around the latent and observed sites; "
                f"there is {_listing(known)}. " + (f"Write data_plate='{next(iter(known))}'." if known else "")
            )
        _check_inside(latents, observed, plates, requested, known)
        return requested
    common = [name for name in known if all(name in frames for frames in plates.values())]
    if not common:
        widest = max(known, key=lambda name: sum(name in frames for frames in plates.values()), default=None)
        _check_inside(latents, observed, plates, widest, known)
    if len(common) > 1:
        subsampled = [name for name in common if data_size(known[name]) is not None]
        if len(subsampled) != 1:
            raise ValueError(
                f"Several plates hold every latent and observed site: {_listing({n: known[n] for n in common})}. "
                f"Say which of them is the data: WAELoss(data_plate='{common[0]}')."
            )
        common = subsampled
    return common[0]


def site_layout(site: Site, data_plate: str) -> Layout:
    """The layout that a site's plates give it."""
    frames = {frame.name: frame for frame in site["cond_indep_stack"] if frame.dim is not None}
    shape = [1] * max(-frame.dim for frame in frames.values())
    for frame in frames.values():
        shape[frame.dim] = _frame_size(site, frame)
    particles = frames.get(PARTICLE_PLATE)
    return Layout(site["name"], tuple(shape), frames[data_plate].dim, particles.dim if particles else None)


def _frame_size(site: Site, frame: Any) -> int:
    """The plate's size in this run; one made without a size is as large as the site makes it."""
    if frame.size != -1:
        return frame.size
    batch = site["fn"].batch_shape
    return batch[frame.dim] if len(batch) >= -frame.dim else 1


def data_size(frame: Any) -> int | None:
    """The full size N of a plate from which this run took a part, else None: a batch may be all there is."""
    full = frame.full_size
    return full if full is not None and full != frame.size else None


def plate_scale(site: Site) -> float:
    """The product of N/B over a site's plates: Pyro's scale, but for what the user added by ``poutine.scale``."""
    scale = 1.0
    for frame in site["cond_indep_stack"]:
        if data_size(frame) is not None:
            scale = scale * frame.full_size / frame.size
    return scale


def _vectorised(site: Site) -> dict[str, Any]:
    stack = site["cond_indep_stack"]
    return {frame.name: frame for frame in stack if frame.dim is not None and frame.name != PARTICLE_PLATE}


def _check_inside(
    latents: Sequence[Site],
    observed: Sequence[Site],
    plates: Mapping[str, Mapping[str, Any]],
    data_plate: str | None,
    known: Mapping[str, Any],
) -> None:
    size = None if data_plate is None else known[data_plate].size
    for kind, sites in (("Latent", latents), ("Observed", observed)):
        for site in sites:
            if data_plate is None or data_plate not in plates[site["name"]]:
                raise ValueError(_outside(site, kind, data_plate, size))


def _outside(site: Site, kind: str, data_plate: str | None, size: int | None) -> str:
    name = site["name"]
    batch = _batch_shape(site)
    where = f"outside the data plate '{data_plate}'" if data_plate else "in no plate"
    statement = f"pyro.sample('{name}', ...)"
    sequential = [frame.name for frame in site["cond_indep_stack"] if frame.dim is None]
    if sequential and data_plate is None:
        return (
            f"{kind} site '{name}' is only inside the sequential plate '{sequential[0]}', and the data plate must be "
            f"vectorised. Write, for all data at once: with pyro.plate('{sequential[0]}', n): {statement}."
        )
    if kind == "Latent" and math.prod(batch) == 1:
        return (
            f"Latent site '{name}' is global ({where}): it has one value for all data, and a WAE compares the codes "
            f"of data. Make it a parameter in the model, {name} = pyro.param('{name}', ...), and leave it out of the "
            "guide."
        )
    plate = f"'{data_plate}', {size}" if data_plate else f"'data', {batch[-1] if batch else 'n'}"
    return (
        f"{kind} site '{name}' of batch shape {batch} is {where}, so that nothing says which dimension is the data. "
        f"Write, in model and guide: with pyro.plate({plate}): {statement}."
    )


def _batch_shape(site: Site) -> tuple[int, ...]:
    """The batch shape without the dimension of vectorised particles and what stands left of it."""
    value = site["value"]
    batch = tuple(value.shape[: value.ndim - getattr(site["fn"], "event_dim", 0)])
    particle = [frame.dim for frame in site["cond_indep_stack"] if frame.name == PARTICLE_PLATE]
    return batch[max(0, len(batch) + particle[0] + 1) :] if particle else batch


def _listing(frames: Mapping[str, Any]) -> str:
    if not frames:
        return "none"
    return ", ".join(f"'{f.name}' (dim={f.dim}, size {f.size})" for f in frames.values())
