"""Reads the traces of model and guide: what each site is to a WAE, and which plate holds the data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor

from pyro_wae._core import checks
from pyro_wae._core.distributions import WRAPPERS, family, has_event, is_learnable
from pyro_wae._core.private import OBSERVED, PARTICLE_PLATE, UNOBSERVED, is_part
from pyro_wae._core.rows import Site
from pyro_wae.step import refusals

Program = Callable[..., Any]
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
        if not hasattr(self.fn, "event_dim"):
            raise ValueError(refusals.not_of_pyro(node["name"], self.fn))
        *wrappers, self.innermost = layers(self.fn)
        found = [(node["mask"], self.fn.event_dim)]
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


class Run:
    """One run of the guide with the model replayed against it, as a WAE reads it.

    Args:
        model: The model's trace.
        guide: The guide's trace.
        rerun: Calls the model again as it was called, in the plate of vectorised particles if there is one.
        data_plate: Name of the data plate, or None to find it.

    Attributes:
        plate: Name of the data plate.
        latents: The sites that make up a code, in the order of the model.
        observed: The sites that may have a cost.
        factors: The nodes of ``pyro.factor`` in model and guide, which are terms of the loss, each with its sign in it.
        data_size: Number of data, where the data plate takes a part of them; else None.
        left_out: The sites that a mask leaves out as a whole.
        points: The observed sites that are a point: their density is known, and their cost may not read it.
        is_root: Whether the code is one site that no other random choice precedes.

    Raises:
        ValueError: If a latent cannot be part of a code, there is no code, or the data plate is ambiguous.
    """

    def __init__(self, model: Any, guide: Any, rerun: Callable[[], Any], data_plate: str | None) -> None:
        self.model, self.guide, self.rerun = model, guide, rerun
        samples, in_guide = samples_of(model), samples_of(guide)
        for sample in samples.values():
            _check_point(sample)
        latents = dict(_latents(samples, in_guide))
        _check_guide(in_guide)
        observed = dict(observed_samples(samples))
        if not latents:
            own = [[name for name, s in found.items() if not s.node["is_observed"]] for found in (samples, in_guide)]
            raise ValueError(refusals.nothing_shared(*own))
        nodes = [sample.node for sample in latents.values()]
        self.plate = plate = find_data_plate(nodes, [sample.node for sample in observed.values()], data_plate)
        self.data_size = data_size(data_frame(nodes[0], plate))
        self.latents = {name: latent_site(name, sample, in_guide[name], plate) for name, sample in latents.items()}
        self.observed = {name: observed_site(name, sample, plate) for name, sample in observed.items()}
        self.factors = [(node, sign) for trace, sign in ((model, -1.0), (guide, 1.0)) for node in _factors(trace)]
        self.points = [name for name, sample in observed.items() if isinstance(sample.innermost, dist.Delta)]
        self.left_out = [name for name, s in samples.items() if s.is_masked_out and not s.is_own_point]
        first = next(name for name, sample in samples.items() if not sample.node["is_observed"])
        self.is_root = len(latents) == 1 and first in latents

    @property
    def data(self) -> int:
        """Number of data in this run."""
        return next(iter(self.latents.values())).data


def is_random(node: Node) -> bool:
    """Whether a node of a trace is drawn, neither observed nor a subsample."""
    return node["type"] == "sample" and not node["is_observed"] and not site_is_subsample(node)


def is_imputed(name: str, nodes: Mapping[str, Node]) -> bool:
    """Whether the site holds the part of an observed value that ``obs_mask`` left to be imputed."""
    return name.endswith(UNOBSERVED) and is_part(name, UNOBSERVED, nodes)


def observed_samples(samples: Mapping[str, Sample]) -> Iterator[tuple[str, Sample]]:
    """The sites of a model that may have a cost, by the names that the user gave them."""
    nodes = {name: sample.node for name, sample in samples.items()}
    for name, sample in samples.items():
        if not sample.node["is_observed"] or site_is_factor(sample.node):
            continue
        is_computed = sample.node["infer"].get("_deterministic") or _is_reparametrised(name, samples)
        # What is masked as a whole is a value that was computed, as by a reparametrisation, or counts for nothing.
        if not is_computed and not sample.is_masked_out:
            is_half = name.endswith(OBSERVED) and is_part(name, OBSERVED, nodes)
            yield name.removesuffix(OBSERVED) if is_half else name, sample


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
    plates = {node["name"]: _vectorised(node) for node in (*latents, *observed)}
    known = {name: frame for frames in plates.values() for name, frame in frames.items()}
    common = [name for name in known if all(name in frames for frames in plates.values())]
    if requested is not None:
        checks.text("data_plate", requested, "a plate's name", write="data_plate='data'")
        if requested not in common:
            raise ValueError(refusals.not_the_data_plate(requested, latents, observed, plates))
        return requested
    if not common:
        raise ValueError(refusals.no_data_plate(latents, observed, plates))
    if len(common) > 1:
        subsampled = [name for name in common if data_size(known[name]) is not None]
        listing = refusals.listing({name: known[name] for name in common})
        if len(subsampled) != 1:
            raise ValueError(
                f"Several plates hold every latent and observed site: {listing}. "
                f"Say which of them is the data: data_plate='{common[0]}', as in WAELoss(data_plate='{common[0]}')."
            )
        frames = list(next(iter(plates.values())))
        if frames.index(subsampled[0]) > min(frames.index(name) for name in common):
            warnings.warn(
                f"The subsampled plate '{subsampled[0]}' lies inside another that holds every site, {listing}, and is "
                f"taken for the data. Say which is: data_plate='{subsampled[0]}', as in WAELoss(data_plate=...).",
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
        size, batch = frame.size, node["fn"].batch_shape
        if size == -1:  # made without a size, a plate is as large as the site makes it
            size = batch[frame.dim] if len(batch) >= -frame.dim else 1
        shape[frame.dim] = size
    particles = frames.get(PARTICLE_PLATE)
    return tuple(shape), frames[data_plate].dim, particles.dim if particles else None


def data_frame(node: Node, data_plate: str) -> Any | None:
    """The data plate's frame around a site, or None."""
    return next((frame for frame in node["cond_indep_stack"] if frame.name == data_plate), None)


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
    # N/B divided out again leaves a rounding error, which must not look like another scale.
    return float(f"{scale:.12g}"), inner


def mask_of(sample: Sample) -> Tensor | None:
    """Where all masks of a site are true: a tensor that broadcasts to batch and event dimensions, or None."""
    total: Tensor | None = None
    for mask, event_dim in sample.masks:
        mask = torch.as_tensor(mask, dtype=torch.bool, device=sample.value.device)
        mask = mask.reshape(mask.shape + (1,) * event_dim)
        _check_mask(sample, mask, event_dim)
        total = mask if total is None else total & mask
    return total


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
            "codes with prior samples at once and has one scale: write poutine.scale around both, or around the model."
        )
    mask = mask_of(sample)
    _check_guide_mask(name, mask, mask_of(in_guide))
    if aligned != shape and not any(size not in (1, planned) for size, planned in zip(aligned, shape, strict=True)):
        raise ValueError(
            f"Latent site '{name}' has batch shape {batch} in the guide and {shape} in the model: several data or "
            "particles would share one code. Write the guide's pyro.sample("
            f"'{name}', ...) inside the same plates as the model's."
        )
    event = tuple(value.shape[value.ndim - fn.event_dim :])
    if event != fn.event_shape:
        raise ValueError(refusals.event_of_another_shape(name, event, tuple(fn.event_shape)))
    if isinstance(scale, Tensor) and scale.numel() != 1:
        raise ValueError(
            f"Latent site '{name}' has a poutine.scale of shape {tuple(scale.shape)}, and a penalty compares "
            "all data at once: a latent site takes one number. Write poutine.scale(scale=0.5)."
        )
    return Site(name, fn, value, shape, data_dim, particle_dim, mask, scale)


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
            f"pyro.sample('{name}', ..., obs=x.to_dense()), a batch at a time, torch.as_tensor(x) or view_as_real(x)."
        )
    if value.ndim == fn.event_dim > 0 and value.shape[0] == shape[data_dim] > 1:
        raise ValueError(refusals.all_data_one_event(name, tuple(value.shape), shape[data_dim], fn.event_dim))
    if value.shape != fn.shape():
        try:
            value = value.expand(torch.broadcast_shapes(value.shape, fn.shape()))
            fits = value.shape[: value.ndim - fn.event_dim] == fn.batch_shape and has_event(fn, sample.value.shape)
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"Observed site '{name}' has data of shape {tuple(sample.value.shape)}, and its distribution "
                f"({family(fn)}) is of shape {tuple(fn.shape())}. Give the decoder's output the shape of the data."
            )
    return Site(name, fn, value, shape, data_dim, particle_dim, mask_of(sample), *scales(sample.node, plate))


def _factors(trace: Any) -> list[Node]:
    nodes = (node for node in trace.nodes.values() if node["type"] == "sample" and site_is_factor(node))
    return [node for node in nodes if node["mask"] is not False]


def _latents(samples: Mapping[str, Sample], guide: Mapping[str, Sample]) -> Iterator[tuple[str, Sample]]:
    nodes = {name: sample.node for name, sample in samples.items()}
    for name, sample in samples.items():
        if sample.node["is_observed"] or is_imputed(name, nodes):
            continue
        in_guide = name in guide
        if in_guide and not getattr(guide[name].fn, "has_rsample", False):
            raise ValueError(refusals.not_reparameterised(name, guide[name].fn))
        if not in_guide and sample.node["infer"].get("enumerate"):
            raise ValueError(
                f"Latent site '{name}' of the model is to be enumerated, and WAELoss does not enumerate. Sum it out "
                "in the likelihood (dist.MixtureSameFamily), or sample it in the guide through a relaxation."
            )
        if in_guide and not sample.is_masked_out:
            yield name, sample


def _check_guide(samples: Mapping[str, Sample]) -> None:
    """Raises ValueError if the guide observes a site, a term of an ELBO, or draws one beside the codes untrained."""
    for name, sample in samples.items():
        if sample.is_masked_out:
            continue
        if sample.node["is_observed"]:
            if not site_is_factor(sample.node) and not sample.node["infer"].get("_deterministic"):
                raise ValueError(refusals.observed_by_guide(name, sample.fn))
        # A code that cannot be reparameterised has been refused by now, whatever it is drawn from.
        elif not getattr(sample.fn, "has_rsample", False) and is_learnable(sample.fn):
            raise ValueError(refusals.untrained_beside_codes(name, sample.fn))


def _check_point(sample: Sample) -> None:
    """Raises ValueError if a site that was computed has a density, as some reparametrisations give it."""
    if not sample.is_own_point or sample.is_masked_out:
        return
    if bool((sample.innermost.log_density != 0).any()):  # waits for an accelerator, at such a site alone
        raise ValueError(refusals.point_with_a_density(sample.node["name"]))


def _is_reparametrised(name: str, samples: Mapping[str, Sample]) -> bool:
    """Whether a reparametrisation has computed a site, which is then observed at the point of its own Delta."""
    # A user's own site may be given its own value, as a condition that is no random choice: nothing is drawn for it.
    names = list(samples)
    return samples[name].is_own_point and names[max(names.index(name) - 1, 0)].startswith(f"{name}_")


def _is_point(fn: Any, value: Tensor) -> bool:
    """Whether a value is the very tensor that is the point of a Delta."""
    if not isinstance(fn, dist.Delta) or not isinstance(value, Tensor) or fn.v.shape != value.shape:
        return False
    # A plate may have expanded the distribution, whose point is then a view. Values are not compared, which would wait.
    base, its_base = (tensor if tensor._base is None else tensor._base for tensor in (fn.v, value))
    return base is its_base and fn.v.stride() == value.stride() and fn.v.storage_offset() == value.storage_offset()


def _is_alike(scale: float | Tensor, guide_scale: float | Tensor) -> bool:
    """Whether the guide's scale is the model's, or none."""
    if isinstance(guide_scale, Tensor) or isinstance(scale, Tensor):
        of_guide, of_model = (torch.as_tensor(value, dtype=torch.float64) for value in (guide_scale, scale))
        # Looking at a value on an accelerator would wait for it.
        is_read = of_guide.device.type == of_model.device.type == "cpu"
        return not is_read or bool(torch.all((of_guide == 1) | torch.isclose(of_guide, of_model)))
    return guide_scale in (1.0, scale)


def _vectorised(node: Node) -> dict[str, Any]:
    stack = node["cond_indep_stack"]
    return {frame.name: frame for frame in stack if frame.dim is not None and frame.name != PARTICLE_PLATE}


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
        raise ValueError(refusals.masked_by_guide(name))


def _check_mask(sample: Sample, mask: Tensor, event_dim: int) -> None:
    shape = torch.broadcast_shapes(sample.value.shape, sample.fn.shape())
    sizes = zip(reversed(mask.shape), reversed(shape), strict=False)
    if mask.ndim > len(shape) or any(size not in (1, given) for size, given in sizes):
        batch, found = shape[: len(shape) - event_dim], mask.shape[: mask.ndim - event_dim]
        raise ValueError(refusals.mask_of_another_shape(sample.node["name"], tuple(found), tuple(batch)))
