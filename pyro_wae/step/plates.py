"""What a site of a trace is: its plates, masks and scale, and which of the plates holds the data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_wae._core import checks
from pyro_wae._core.distributions import WRAPPERS, family
from pyro_wae._core.sites import Site

PARTICLE_PLATE = "num_particles_vectorized"
"""The name that ``pyro.infer.ELBO`` gives the plate of its vectorised particles."""

Node = Mapping[str, Any]


class Sample:
    """A sample site of a trace, read once.

    Attributes:
        node: The site's node.
        fn: Its distribution.
        value: Its value.
        innermost: Its distribution without wrappers.
        masks: The masks of ``poutine.mask`` and ``fn.mask``, each with the number of value dimensions to its right.
        is_masked_out: Whether a mask leaves out all of it.
        is_own_point: Whether it is observed at the point of its own Delta.
    """

    def __init__(self, node: Node) -> None:
        self.node, self.fn, self.value = node, node["fn"], node["value"]
        *wrappers, self.innermost = layers(self.fn)
        found = [(node["mask"], getattr(self.fn, "event_dim", 0))]
        found += [(fn._mask, fn.event_dim) for fn in wrappers if isinstance(fn, dist.MaskedDistribution)]
        self.masks = [(mask, event_dim) for mask, event_dim in found if mask is not None and mask is not True]
        self.is_masked_out = any(mask is False for mask, _ in found)
        self.is_own_point = node["is_observed"] and _is_point(self.innermost, self.value)


def samples_of(trace: Any) -> dict[str, Sample]:
    """The sites of a trace that are no subsamples, each read once."""
    nodes = ((name, node) for name, node in trace.nodes.items() if node["type"] == "sample")
    return {name: Sample(node) for name, node in nodes if not site_is_subsample(node)}


def layers(distribution: Any) -> list[Any]:
    """A distribution, what its wrapper (Independent, masked, expanded) holds, and so on to the innermost."""
    found = [distribution]
    while isinstance(found[-1], WRAPPERS):
        found.append(found[-1].base_dist)
    return found


def find_data_plate(latents: Sequence[Node], observed: Sequence[Node], requested: str | None) -> str:
    """Finds the plate whose dimension is the sample dimension of Q_Z.

    Args:
        latents: The nodes of a trace that make up a code.
        observed: The nodes that have a cost.
        requested: The user's choice, or None for the one vectorised plate that holds every site; of several, the
            subsampled one.

    Returns:
        The plate's name.

    Raises:
        ValueError: If a site lies outside, or nothing decides between several plates.
    """
    if requested is not None:
        checks.text("data_plate", requested, "a plate's name", write="data_plate='data'")
    nodes = [*latents, *observed]
    plates = {node["name"]: _vectorised(node) for node in nodes}
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
        # Of two plates that hold as many sites, the one around observed sites is more likely the data's.
        seen = [plates[node["name"]] for node in observed]
        widest = max(known, key=lambda name: sum(name in frames for frames in [*plates.values(), *seen]), default=None)
        _check_inside(latents, observed, plates, widest, known)
    if len(common) > 1:
        subsampled = [name for name in common if data_size(known[name]) is not None]
        if len(subsampled) != 1:
            raise ValueError(
                f"Several plates hold every latent and observed site: {_listing({n: known[n] for n in common})}. "
                f"Say which of them is the data: WAELoss(data_plate='{common[0]}')."
            )
        frames = list(plates[nodes[0]["name"]])
        if frames.index(subsampled[0]) > min(frames.index(name) for name in common):
            warnings.warn(
                f"The subsampled plate '{subsampled[0]}' lies inside another that holds every site, "
                f"{_listing({n: known[n] for n in common})}, and is taken for the data. Say which is: "
                f"WAELoss(data_plate='{subsampled[0]}').",
                UserWarning,
                stacklevel=2,
            )
        common = subsampled
    return common[0]


def layout(node: Node, data_plate: str) -> tuple[tuple[int, ...], int, int | None]:
    """The batch shape that a site's plates give it, the dimension of the data in it, and that of the particles."""
    frames = {frame.name: frame for frame in node["cond_indep_stack"] if frame.dim is not None}
    shape = [1] * max(-frame.dim for frame in frames.values())
    for frame in frames.values():
        shape[frame.dim] = _frame_size(node, frame)
    particles = frames.get(PARTICLE_PLATE)
    return tuple(shape), frames[data_plate].dim, particles.dim if particles else None


def data_frame(node: Node, data_plate: str) -> Any | None:
    """The data plate's frame around a site, or None."""
    return next((frame for frame in node["cond_indep_stack"] if frame.name == data_plate), None)


def _frame_size(node: Node, frame: Any) -> int:
    """The plate's size in this run; one made without a size is as large as the site makes it."""
    if frame.size != -1:
        return frame.size
    batch = node["fn"].batch_shape
    return batch[frame.dim] if len(batch) >= -frame.dim else 1


def data_size(frame: Any) -> int | None:
    """The full size N of a plate from which this run took a part, else None: a batch may be all there is."""
    full = frame.full_size
    return full if full is not None and full != frame.size else None


def subsample_scales(node: Node, data_plate: str) -> tuple[float, float]:
    """The N/B of the data plate, which a mean per datum cancels, and that of all other subsampled plates together."""
    outer = inner = 1.0
    for frame in node["cond_indep_stack"]:
        if data_size(frame) is not None:
            scale = frame.full_size / frame.size
            outer, inner = (scale, inner) if frame.name == data_plate else (outer, inner * scale)
    return outer, inner


def scales(node: Node, plate: str) -> tuple[float | Tensor, float]:
    """The user's scale of a node, and the N/B of subsampled plates inside a datum."""
    outer, inner = subsample_scales(node, plate)
    scale = node["scale"] / (outer * inner)
    if isinstance(scale, Tensor):
        return scale.reshape(()) if scale.numel() == 1 else scale, inner
    # N/B divided out again leaves a rounding error, which must not look like a scale of the user's.
    return 1.0 if abs(scale - 1) < 1e-9 else scale, inner


def mask_of(sample: Sample) -> Tensor | None:
    """Where all masks of a site are true: a tensor that broadcasts to batch and event dimensions, or None."""
    total: Tensor | None = None
    for mask, event_dim in sample.masks:
        mask = torch.as_tensor(mask, dtype=torch.bool, device=sample.value.device)
        mask = mask.reshape(mask.shape + (1,) * event_dim)
        _check_mask(sample, mask, event_dim)
        total = mask if total is None else total & mask
    return total


def _check_guide_mask(name: str, mask: Tensor | None, in_guide: Tensor | None) -> None:
    """Raises ValueError if the guide masks what the model keeps: its mask may depend on the code."""
    if in_guide is None:
        return
    if mask is not None:
        places = [(found.data_ptr(), found.shape, found.stride()) for found in (mask, in_guide)]
        if places[0] == places[1]:
            return  # the same values, without a wait for an accelerator
        in_guide = in_guide | ~mask
    if not bool(in_guide.all()):
        raise ValueError(
            f"Latent site '{name}' has a mask in the guide that leaves out what the model keeps: codes that the guide "
            "selects would be compared with prior draws that nothing selects. Write poutine.mask(mask=...) with a mask "
            f"that is computed from the data, around site '{name}' in model and guide."
        )


def _check_mask(sample: Sample, mask: Tensor, event_dim: int) -> None:
    shape = torch.broadcast_shapes(sample.value.shape, sample.fn.shape())
    sizes = zip(reversed(mask.shape), reversed(shape), strict=False)
    if mask.ndim > len(shape) or any(size not in (1, given) for size, given in sizes):
        batch, found = tuple(shape[: len(shape) - event_dim]), tuple(mask.shape[: mask.ndim - event_dim])
        raise ValueError(
            f"The mask at site '{sample.node['name']}' has shape {found}, which does not fit its batch shape {batch}. "
            "Write poutine.mask(mask=...) with one truth value for each datum of this batch."
        )


def latent_site(name: str, sample: Sample, in_guide: Sample, plate: str) -> Site:
    """The site of a part of a code.

    Raises:
        ValueError: If its scale, its mask or its plates are not those that the guide gives it.
    """
    shape, data_dim, particle_dim = layout(sample.node, plate)
    value, fn = sample.value, sample.fn
    batch = tuple(value.shape[: value.ndim - fn.event_dim])
    aligned = (1,) * (len(shape) - len(batch)) + batch[max(0, len(batch) - len(shape)) :]
    (scale, _), (guide_scale, _) = scales(sample.node, plate), scales(in_guide.node, plate)
    if guide_scale is not scale and not _is_alike(scale, guide_scale):
        raise ValueError(
            f"Latent site '{name}' has a poutine.scale in the guide that it has not in the model. A penalty compares "
            "codes with prior draws at once and has one scale: write poutine.scale around both, or around the model."
        )
    mask = mask_of(sample)
    _check_guide_mask(name, mask, mask_of(in_guide))
    site = Site(name, fn, value, shape, data_dim, particle_dim, mask, scale)
    if aligned != shape and not any(size not in (1, planned) for size, planned in zip(aligned, shape, strict=True)):
        raise ValueError(
            f"Latent site '{name}' has batch shape {batch} in the guide and {shape} in the model: several data or "
            "particles would share one code. Write the guide's pyro.sample("
            f"'{name}', ...) inside the same plates as the model's."
        )
    event = tuple(value.shape[value.ndim - fn.event_dim :])
    if event != fn.event_shape:
        raise ValueError(
            f"Latent site '{name}' has values of shape {event} in the guide and {tuple(fn.event_shape)} in the model, "
            "and codes are compared with prior draws number by number. Give both distributions one event shape: "
            f"write the model's as dist.Normal(x.new_zeros({event}), 1).to_event({len(event)})."
        )
    if isinstance(site.scale, Tensor) and site.scale.numel() != 1:
        raise ValueError(
            f"Latent site '{name}' has a poutine.scale of shape {tuple(site.scale.shape)}, and a penalty compares "
            "all data at once: a latent site takes one number. Write poutine.scale(scale=0.5)."
        )
    return site


def observed_site(name: str, sample: Sample, plate: str) -> Site:
    """The site of data.

    Raises:
        TypeError: If they are no dense tensor of real numbers.
        ValueError: If all data are one event, or their shape is not that of the distribution.
    """
    fn, value = sample.fn, sample.value
    shape, data_dim, particle_dim = layout(sample.node, plate)
    if not isinstance(value, Tensor) or value.is_complex() or value.layout is not torch.strided:
        found = f"a tensor ({value.dtype}, {value.layout})" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(
            f"The data of observed site '{name}' are {found}, and costs take dense tensors of real numbers. Write "
            f"pyro.sample('{name}', ..., obs=x.to_dense()), a batch at a time, or obs=torch.as_tensor(x)."
        )
    if value.ndim == fn.event_dim > 0 and value.shape[0] == shape[data_dim] > 1:
        write = f"Write .to_event({fn.event_dim - 1}), which leaves the first dimension to the data plate."
        if fn.event_dim == 1:
            write = "Write obs=x.unsqueeze(-1), or for labels obs=torch.nn.functional.one_hot(x, classes)."
        raise ValueError(
            f"Observed site '{name}' has data of shape {tuple(value.shape)}, all of them one event: the whole batch "
            f"would be the datum of each of {shape[data_dim]} data. {write}"
        )
    if value.shape != fn.shape():
        try:
            value = value.expand(torch.broadcast_shapes(value.shape, fn.shape()))
            fits = value.shape[: value.ndim - fn.event_dim] == fn.batch_shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"Observed site '{name}' has data of shape {tuple(sample.value.shape)}, and its distribution "
                f"({family(fn)}) is of shape {tuple(fn.shape())}. Give the decoder's output the shape of the data."
            )
    return Site(name, fn, value, shape, data_dim, particle_dim, mask_of(sample), *scales(sample.node, plate))


def _is_alike(scale: float | Tensor, guide_scale: float | Tensor) -> bool:
    """Whether the guide's scale is the model's, or none."""
    if isinstance(guide_scale, Tensor) or isinstance(scale, Tensor):
        # Looking at a value on an accelerator would wait for it.
        tensors = [value for value in (scale, guide_scale) if isinstance(value, Tensor)]
        return any(value.device.type != "cpu" for value in tensors) or bool(
            torch.all((torch.as_tensor(guide_scale) == 1) | (torch.as_tensor(guide_scale) == torch.as_tensor(scale)))
        )
    return guide_scale in (1.0, scale) or abs(guide_scale - scale) <= 1e-9 * abs(scale)


def _is_point(fn: Any, value: Tensor) -> bool:
    """Whether a value is the very tensor that is the point of a Delta."""
    if not isinstance(fn, dist.Delta) or not isinstance(value, Tensor) or fn.v.shape != value.shape:
        return False
    # A plate may have expanded the distribution, whose point is then a view. Values are not compared, which would wait.
    base, its_base = (tensor if tensor._base is None else tensor._base for tensor in (fn.v, value))
    return base is its_base and fn.v.stride() == value.stride() and fn.v.storage_offset() == value.storage_offset()


def _vectorised(node: Node) -> dict[str, Any]:
    stack = node["cond_indep_stack"]
    return {frame.name: frame for frame in stack if frame.dim is not None and frame.name != PARTICLE_PLATE}


def _check_inside(
    latents: Sequence[Node],
    observed: Sequence[Node],
    plates: Mapping[str, Mapping[str, Any]],
    data_plate: str | None,
    known: Mapping[str, Any],
) -> None:
    size = None if data_plate is None else known[data_plate].size
    around_data = {name for node in observed for name in plates[node["name"]]}
    for kind, nodes in (("Latent", latents), ("Observed", observed)):
        for node in nodes:
            own = plates[node["name"]]
            if data_plate is None or data_plate not in own:
                # A plate as large as the data's is rather the data under another name.
                has_own_plate = any(frame.size != size for frame in own.values())
                if kind == "Latent":
                    has_own_plate = has_own_plate and not around_data & own.keys()
                raise ValueError(_outside(node, kind, data_plate, size, has_own_plate=has_own_plate))


def _outside(node: Node, kind: str, data_plate: str | None, size: int | None, *, has_own_plate: bool) -> str:
    name = node["name"]
    batch = _batch_shape(node)
    where = f"outside the data plate '{data_plate}'" if data_plate else "in no plate"
    statement = f"pyro.sample('{name}', ...)"
    sequential = [frame.name for frame in node["cond_indep_stack"] if frame.dim is None]
    if sequential and data_plate is None:
        return (
            f"{kind} site '{name}' is only inside the sequential plate '{sequential[0]}', and the data plate must be "
            f"vectorised. Write, for all data at once: with pyro.plate('{sequential[0]}', n): {statement}."
        )
    if kind == "Latent" and (math.prod(batch) == 1 or has_own_plate):
        values = "one value" if math.prod(batch) == 1 else f"one set of values, of batch shape {batch},"
        # A name with a dot is that of a module's attribute, to which no line of the model assigns a pyro.param.
        line = f"self.{name} = nn.Parameter(...)" if "." in name else f"{name} = pyro.param('{name}', ...)"
        place = "of the module, in place of PyroSample" if "." in name else "in the model"
        return (
            f"Latent site '{name}' is global ({where}): it has {values} for all data, and a WAE compares the codes "
            f"of data. Make it a parameter {place}, {line}, and leave it out of the guide."
            + (f" {_PAIRS}" if has_own_plate else "")
            + _swallowed(node, data_plate)
        )
    plate = f"'{data_plate}', {size}" if data_plate else f"'data', {batch[-1] if batch else 'n'}"
    return (
        f"{kind} site '{name}' of batch shape {batch} is {where}. It is ambiguous which of its dimensions is the data. "
        f"Write, in model and guide: with pyro.plate({plate}): {statement}."
        + (f" {_PAIRS}" if kind == "Observed" and has_own_plate else "")
    )


def _swallowed(node: Node, data_plate: str | None) -> str:
    """What to write if the batch is in the event of a site, and there is no plate."""
    event = tuple(node["fn"].event_shape)
    if data_plate is not None or len(event) < 2:
        return ""
    return (
        f" If the first dimension of its event, of shape {event}, is the data, write .to_event({len(event) - 1}) "
        f"inside pyro.plate('data', {event[0]})."
    )


_PAIRS = (
    "If what is observed are pairs of data, such as edges of a graph, let each datum observe a row of its own pairs in "
    "its plate: pyro.sample('pairs', dist.Bernoulli(logits=logits).to_event(1), obs=pairs), with logits (n, k)."
)
"""What to write for observations of two data each."""


def _batch_shape(node: Node) -> tuple[int, ...]:
    """The batch shape without the dimension of vectorised particles and what stands left of it."""
    value = node["value"]
    batch = tuple(value.shape[: value.ndim - getattr(node["fn"], "event_dim", 0)])
    particle = [frame.dim for frame in node["cond_indep_stack"] if frame.name == PARTICLE_PLATE]
    return batch[max(0, len(batch) + particle[0] + 1) :] if particle else batch


def _listing(frames: Mapping[str, Any]) -> str:
    if not frames:
        return "none"
    return ", ".join(f"'{f.name}' (dim={f.dim}, size {f.size})" for f in frames.values())
