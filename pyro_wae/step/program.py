"""Runs model and guide, and reads from their traces what each site is to a WAE."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor, site_is_subsample
from pyro.util import check_if_enumerated, check_model_guide_match
from torch import Tensor

from pyro_wae._core.distributions import family, innermost, layers
from pyro_wae._core.programs import called_with, check_program
from pyro_wae._core.sites import Site
from pyro_wae.step.plates import data_frame, data_size, find_data_plate, layout, subsample_scales

Program = Callable[..., Any]
Node = Mapping[str, Any]


class Factor(NamedTuple):
    """A ``pyro.factor`` site: the node of its trace, and its sign in a loss."""

    node: Node
    sign: float


@dataclass(frozen=True)
class Run:
    """One run of the guide with the model replayed against it, as a WAE reads it.

    Args:
        model: The model's trace.
        guide: The guide's trace.
        rerun: Calls the model again as it was called, in the plate of vectorised particles if there is one.
        plate: Name of the data plate.
        latents: The sites that make up a code, in the order of the model.
        observed: The sites that may have a cost.
        factors: The ``pyro.factor`` sites of model and guide, which are terms of the loss.
        data_size: Number of data, where the data plate takes a part of them; else None.
    """

    model: Any
    guide: Any
    rerun: Callable[[], Any]
    plate: str
    latents: Mapping[str, Site]
    observed: Mapping[str, Site]
    factors: Sequence[Factor]
    data_size: int | None

    @property
    def data(self) -> int:
        """Number of data in this run."""
        return next(iter(self.latents.values())).data

    @functools.cached_property
    def is_root(self) -> bool:
        """Whether the code is one site that no other random choice precedes."""
        first = next(name for name, node in self.model.nodes.items() if is_random(node))
        return len(self.latents) == 1 and first in self.latents

    def latents_alone(self) -> Run:
        """The same with traces of the latent sites alone: the rest, the decoder's output before all, fills memory."""
        traces = []
        for trace in (self.model, self.guide):
            kept = poutine.Trace()
            kept.nodes.update((name, node) for name, node in trace.nodes.items() if name in self.latents)
            traces.append(kept)
        model, guide = traces
        return Run(model, guide, self.rerun, self.plate, self.latents, {}, (), self.data_size)


def run(
    model: Program,
    guide: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    max_plate_nesting: float,
    data_plate: str | None,
    subsample_of: Run | None = None,
) -> Run:
    """Runs the guide and replays the model against it; no log_prob is computed.

    Args:
        model: A Pyro model.
        guide: Its guide, a messenger guide included.
        args: Arguments of both.
        kwargs: Keyword arguments of both.
        max_plate_nesting: Bound on nested plates, for Pyro's check that model and guide match.
        data_plate: Name of the data plate, or None to find it.
        subsample_of: An earlier run of the same step, whose data this one takes too.

    Raises:
        ValueError: If a latent cannot be part of a code, there is no code or no observed site, or the data plate is
            ambiguous.
    """
    with ReplaySubsamples(subsample_of.model if subsample_of else None):
        model_trace, guide_trace = trace_pair(model, guide, args, kwargs, max_plate_nesting)
    return read(model_trace, guide_trace, functools.partial(model, *args, **kwargs), data_plate)


def trace_pair(
    model: Program, guide: Program, args: Sequence[Any], kwargs: Mapping[str, Any], max_plate_nesting: float
) -> tuple[Any, Any]:
    """The traces of the model, replayed against the guide, and of the guide."""
    check_program("model", model)
    check_program("guide", guide)
    unwrapped = poutine.unwrap(guide)
    with called_with(args, kwargs):
        if isinstance(unwrapped, Messenger):
            guide(*args, **kwargs)
            model_trace, guide_trace = unwrapped.get_traces()
        else:
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    if is_validation_enabled():
        check_model_guide_match(model_trace, guide_trace, max_plate_nesting)
        check_if_enumerated(guide_trace)
    return model_trace, guide_trace


def read(model_trace: Any, guide_trace: Any, rerun: Callable[[], Any], data_plate: str | None) -> Run:
    """Reads from traces which sites are codes, which have costs, and which plate is the data; see :func:`run`."""
    _check_guide(guide_trace)
    _check_points(model_trace)
    latents = dict(_latent_nodes(model_trace, guide_trace))
    observed = dict(observed_nodes(model_trace))
    if not latents:
        own = [[name for name, node in trace.nodes.items() if is_random(node)] for trace in (model_trace, guide_trace)]
        raise ValueError(
            f"Model and guide share no latent site, and so there are no codes: those of the model are {own[0]}, those "
            f"of the guide {own[1]}. Sample one under the same name in both, inside the data plate: "
            "z = pyro.sample('z', ...)."
        )
    if not observed:
        raise ValueError(
            "The model has no observed site, and so nothing is reconstructed. Write pyro.sample('x', ..., obs=x); "
            "pyro.factor and pyro.deterministic are not reconstructions."
        )
    plate = find_data_plate(list(latents.values()), list(observed.values()), data_plate)
    sites = {name: _latent(name, node, guide_trace.nodes[name], plate) for name, node in latents.items()}
    return Run(
        model=model_trace,
        guide=guide_trace,
        rerun=rerun,
        plate=plate,
        latents=sites,
        observed={name: _observed(name, node, plate) for name, node in observed.items()},
        factors=[*_factors(model_trace, -1.0), *_factors(guide_trace, 1.0)],
        data_size=data_size(data_frame(next(iter(latents.values())), plate)),
    )


class ReplaySubsamples(Messenger):
    """Gives every plate the subsample that it had in a trace."""

    def __init__(self, trace: Any | None) -> None:
        super().__init__()
        self.trace = trace

    def _pyro_sample(self, msg: Any) -> None:
        if self.trace is not None and site_is_subsample(msg) and msg["value"] is None and msg["name"] in self.trace:
            msg["value"] = self.trace.nodes[msg["name"]]["value"]


def is_random(node: Node) -> bool:
    """Whether a node of a trace is drawn, neither observed nor a subsample."""
    return node["type"] == "sample" and not node["is_observed"] and not site_is_subsample(node)


def is_code(name: str, model_trace: Any) -> bool:
    """Whether a site of a model's trace is a latent site whose value is a part of a code."""
    return is_random(model_trace.nodes[name]) and not _is_imputed(name, model_trace)


def observed_nodes(model_trace: Any) -> Iterator[tuple[str, Node]]:
    """The nodes of a model's trace that may have a cost, by the names that the user gave them."""
    for name, node in model_trace.nodes.items():
        if node["type"] != "sample" or not node["is_observed"] or site_is_factor(node):
            continue
        is_computed = node["infer"].get("_deterministic") or _is_reparametrised(name, model_trace)
        # What is masked as a whole is a value that was computed, as by a reparametrisation, or counts for nothing.
        if not is_computed and not _is_masked_out(node):
            yield _user_name(name, model_trace), node


def _factors(trace: Any, sign: float) -> Iterator[Factor]:
    for node in trace.nodes.values():
        if node["type"] == "sample" and site_is_factor(node) and node["mask"] is not False:
            yield Factor(node, sign)


def _check_guide(guide_trace: Any) -> None:
    """Raises ValueError if the guide observes a site: a term of an ELBO that has no place here."""
    for name, node in guide_trace.nodes.items():
        if node["type"] != "sample" or not node["is_observed"] or site_is_factor(node) or site_is_subsample(node):
            continue
        if not node["infer"].get("_deterministic") and not _is_masked_out(node):
            raise ValueError(
                f"The guide observes site '{name}' ({family(node['fn'])}), whose density is a term of Pyro's ELBO and "
                "would be left out here: what it depends on would not be trained. Write in the guide "
                f"pyro.factor('{name}', -distribution.log_prob(value), has_rsample=True), which adds the negative log "
                "likelihood to the loss (with a plus sign, what Trace_ELBO adds), or sample the site without obs=."
            )


def _is_reparametrised(name: str, model_trace: Any) -> bool:
    """Whether a reparametrisation has computed a site, which is then observed at the point of its own Delta."""
    # A user's own site may be given its own value, as a condition that is no random choice: nothing is drawn for it.
    return _is_own_point(model_trace.nodes[name]) and any(
        other.startswith(f"{name}_") and is_random(node) for other, node in model_trace.nodes.items()
    )


def _is_own_point(node: Node) -> bool:
    """Whether a site is observed at the point of its own Delta."""
    fn, value = innermost(node["fn"]), node["value"]
    if not node["is_observed"] or not isinstance(fn, dist.Delta) or fn.v.shape != value.shape:
        return False
    # A plate may have expanded the distribution, whose point is then a view. Values are not compared, which would wait.
    base, its_base = (tensor if tensor._base is None else tensor._base for tensor in (fn.v, value))
    return base is its_base and fn.v.stride() == value.stride() and fn.v.storage_offset() == value.storage_offset()


def _check_points(model_trace: Any) -> None:
    """Raises ValueError if a site that was computed has a density, as some reparametrisations give it."""
    for name, node in model_trace.nodes.items():
        if node["type"] != "sample" or not _is_own_point(node) or _is_masked_out(node):
            continue
        if bool((innermost(node["fn"]).log_density != 0).any()):  # waits for an accelerator, at such a site alone
            raise ValueError(
                f"Site '{name}' is observed at the point of its own Delta, whose log_density is a term of Pyro's ELBO "
                "and would be left out here. ConjugateReparam, NeuTraReparam, SplitReparam and StructuredReparam make "
                f"such a site: leave '{name}' out of the config of poutine.reparam, or write the density as a term of "
                f"the loss: pyro.factor('{name}_density', log_density)."
            )


def _is_masked_out(node: Node) -> bool:
    return any(mask is False for mask, _ in _masks(node))


def _latent(name: str, node: Node, guide_node: Node, plate: str) -> Site:
    shape, data_dim, particle_dim = layout(node, plate)
    value, fn = node["value"], node["fn"]
    batch = tuple(value.shape[: value.ndim - fn.event_dim])
    aligned = (1,) * (len(shape) - len(batch)) + batch[max(0, len(batch) - len(shape)) :]
    scale, _ = _scales(node, plate)
    if _scales(guide_node, plate)[0] is not scale and not _is_alike(scale, _scales(guide_node, plate)[0]):
        raise ValueError(
            f"Latent site '{name}' has a poutine.scale in the guide that it has not in the model. A penalty compares "
            "codes with prior draws at once and has one scale: write poutine.scale around both, or around the model."
        )
    site = Site(name, fn, value, shape, data_dim, particle_dim, mask_of(node, guide_node), scale)
    if aligned != shape and not any(size not in (1, planned) for size, planned in zip(aligned, shape, strict=True)):
        raise ValueError(
            f"Latent site '{name}' has batch shape {batch} in the guide and {shape} in the model: several data or "
            "particles would share one code. Write the guide's pyro.sample("
            f"'{name}', ...) inside the same plates as the model's."
        )
    if isinstance(site.scale, Tensor) and site.scale.numel() != 1:
        raise ValueError(
            f"Latent site '{name}' has a poutine.scale of shape {tuple(site.scale.shape)}, and a penalty compares "
            "all data at once: a latent site takes one number. Write poutine.scale(scale=0.5)."
        )
    return site


def _observed(name: str, node: Node, plate: str) -> Site:
    fn, value = node["fn"], node["value"]
    shape, data_dim, particle_dim = layout(node, plate)
    if not isinstance(value, Tensor) or value.is_complex() or value.layout is not torch.strided:
        found = f"a tensor ({value.dtype}, {value.layout})" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(
            f"The data of observed site '{name}' are {found}, and costs take dense tensors of real numbers. Write "
            f"pyro.sample('{name}', ..., obs=x.to_dense()), a batch at a time, or obs=torch.as_tensor(x)."
        )
    if value.ndim == fn.event_dim > 0 and value.shape[0] == shape[data_dim] > 1:
        raise ValueError(
            f"Observed site '{name}' has data of shape {tuple(value.shape)}, all of them one event: the whole batch "
            f"would be the datum of each of {shape[data_dim]} data. Write .to_event({fn.event_dim - 1}), which leaves "
            "the first dimension to the data plate."
        )
    if value.shape != fn.shape():
        try:
            value = value.expand(torch.broadcast_shapes(value.shape, fn.shape()))
        except RuntimeError as error:
            raise ValueError(
                f"Observed site '{name}' has data of shape {tuple(value.shape)}, and its distribution "
                f"({family(fn)}) is of shape {tuple(fn.shape())}. Give the decoder's output the shape of the data."
            ) from error
    return Site(name, fn, value, shape, data_dim, particle_dim, mask_of(node), *_scales(node, plate))


def _latent_nodes(model_trace: Any, guide_trace: Any) -> Iterator[tuple[str, Node]]:
    for name, node in model_trace.nodes.items():
        if not is_code(name, model_trace):
            continue
        in_guide = name in guide_trace.nodes
        fn = guide_trace.nodes[name]["fn"] if in_guide else node["fn"]
        if in_guide and not getattr(fn, "has_rsample", False):
            _raise_not_reparameterised(name, fn)
        if not in_guide and node["infer"].get("enumerate"):
            raise ValueError(
                f"Latent site '{name}' of the model is to be enumerated, and WAELoss does not enumerate. Sum it out "
                "in the likelihood (dist.MixtureSameFamily), or sample it in the guide through a relaxation."
            )
        if in_guide and not _is_masked_out(node):
            yield name, node


def _raise_not_reparameterised(name: str, fn: Any) -> None:
    if getattr(getattr(fn, "support", None), "is_discrete", False):
        relaxation = {
            "Bernoulli": "dist.RelaxedBernoulliStraightThrough(temperature, logits=...), or ",
            "Categorical": "dist.OneHotCategoricalStraightThrough or dist.RelaxedOneHotCategorical, or ",
        }.get(family(fn).removeprefix("OneHot"), "")  # counts have none
        raise ValueError(
            f"Latent site '{name}' is discrete in the guide ({family(fn)}): no gradient of the penalty reaches "
            f"the encoder, and WAELoss does not enumerate. Write {relaxation}a Delta on a continuous code, "
            "dist.Delta(loc)."
        )
    raise ValueError(
        f"Latent site '{name}' cannot be reparameterised in the guide ({family(fn)} has no rsample): no "
        "gradient of the penalty reaches the encoder. Write dist.Normal(loc, scale), or dist.Delta(loc) for a "
        "deterministic encoder."
    )


def _is_imputed(name: str, model_trace: Any) -> bool:
    """Whether the site holds the part of an observed value that ``obs_mask`` left to be imputed."""
    stem = name.removesuffix("_unobserved")
    return stem != name and f"{stem}_observed" in model_trace.nodes and stem in model_trace.nodes


def _user_name(name: str, model_trace: Any) -> str:
    """The name that the user gave an observed site, whose part that ``obs_mask`` leaves has another."""
    stem = name.removesuffix("_observed")
    return stem if stem != name and f"{stem}_unobserved" in model_trace.nodes else name


def _scales(node: Node, plate: str) -> tuple[float | Tensor, float]:
    """The user's scale of a node, and the N/B of subsampled plates inside a datum."""
    outer, inner = subsample_scales(node, plate)
    scale = node["scale"] / (outer * inner)
    if isinstance(scale, Tensor):
        return scale.reshape(()) if scale.numel() == 1 else scale, inner
    # N/B divided out again leaves a rounding error, which must not look like a scale of the user's.
    return 1.0 if abs(scale - 1) < 1e-9 else scale, inner


def _is_alike(scale: float | Tensor, guide_scale: float | Tensor) -> bool:
    """Whether the guide's scale is the model's, or none."""
    if isinstance(guide_scale, Tensor) or isinstance(scale, Tensor):
        # Looking at a value on an accelerator would wait for it.
        tensors = [value for value in (scale, guide_scale) if isinstance(value, Tensor)]
        return any(value.device.type != "cpu" for value in tensors) or bool(
            torch.all((torch.as_tensor(guide_scale) == 1) | (torch.as_tensor(guide_scale) == torch.as_tensor(scale)))
        )
    return guide_scale in (1.0, scale) or abs(guide_scale - scale) <= 1e-9 * abs(scale)


def mask_of(*nodes: Node) -> Tensor | None:
    """Where all masks of the nodes are true: a tensor that broadcasts to batch and event dimensions, or None."""
    total: Tensor | None = None
    for node in nodes:
        for mask, event_dim in _masks(node):
            mask = torch.as_tensor(mask, dtype=torch.bool, device=node["value"].device)
            mask = mask.reshape(mask.shape + (1,) * event_dim)
            _check_mask(node, mask, event_dim)
            total = mask if total is None else total & mask
    return total


def _check_mask(node: Node, mask: Tensor, event_dim: int) -> None:
    shape = torch.broadcast_shapes(node["value"].shape, node["fn"].shape())
    sizes = zip(reversed(mask.shape), reversed(shape), strict=False)
    if mask.ndim > len(shape) or any(size not in (1, given) for size, given in sizes):
        batch, found = tuple(shape[: len(shape) - event_dim]), tuple(mask.shape[: mask.ndim - event_dim])
        raise ValueError(
            f"The mask at site '{node['name']}' has shape {found}, which does not fit its batch shape {batch}. "
            "Write poutine.mask(mask=...) with one truth value for each datum of this batch."
        )


def _masks(node: Node) -> Iterator[tuple[Tensor | bool, int]]:
    """The masks of ``poutine.mask`` and ``fn.mask``, each with the number of value dimensions to its right."""
    found = [(node["mask"], node["fn"].event_dim)]
    found += [(fn._mask, fn.event_dim) for fn in layers(node["fn"]) if isinstance(fn, dist.MaskedDistribution)]
    yield from ((mask, event_dim) for mask, event_dim in found if mask is not None and mask is not True)
