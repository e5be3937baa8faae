"""The prior of a model: draws of its latent sites, their log density, and its distribution where it has one."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.ops.gaussian import Gaussian
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import NonlocalExit
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_wae._core.batch_norm import batch_norm_at_rest
from pyro_wae._core.distributions import component, innermost, own_methods
from pyro_wae._core.private import InverseTransform
from pyro_wae._core.random_state import random_state, restored_random_state, same_generators
from pyro_wae._core.rows import Site, joined, side_by_side
from pyro_wae.penalties.mmd import MOST_COMPONENTS
from pyro_wae.step import refusals
from pyro_wae.step.program import Run, Sample, is_imputed, is_random, mask_of


def draw_prior(run: Run, times: int) -> Tensor | None:
    """Draws the latent sites afresh from the model; the decoder does not run.

    A single latent at the root comes from its own distribution. Anything else runs the model again on the same data
    and leaves it right after the last latent; what runs before that leaves BatchNorm's statistics alone. The draws
    have a graph only if the prior has learnable parameters.

    Returns:
        Shape (times * K, n, d), one after the other, laid out as the codes of the run; None if ``times`` is 0.

    Raises:
        ValueError: If a prior cannot be drawn, or the model does not reach a latent site when it runs again.
    """
    draws = []
    for _ in range(times):
        if run.is_root:
            (site,) = run.latents.values()
            try:
                drawn = {site.name: (site.distribution(), site.distribution.event_dim)}
            except (NotImplementedError, TypeError) as error:
                _check_drawn(site.name, site.distribution, error)
                raise
        else:
            nodes = _rerun_to_last_latent(run)
            _check_masks(run, nodes)
            drawn = {name: (node["value"], node["fn"].event_dim) for name, node in nodes.items()}
        rows = {name: _rows_of_draws(run.latents[name], *value) for name, value in drawn.items()}
        draws.append(side_by_side(rows, {})[0])
    return joined(draws) if draws else None


def drawn_beside_codes(run: Run) -> dict[str, Any]:
    """The distributions of the sites that the model alone draws on the way to its last latent site."""
    nodes = run.model.nodes
    names = list(nodes)
    before = names[: max(names.index(name) for name in run.latents)]
    own = [name for name in before if is_random(nodes[name]) and name not in run.guide.nodes]
    return {name: nodes[name]["fn"] for name in own if name not in run.latents and not is_imputed(name, nodes)}


def _rows_of_draws(site: Site, value: Tensor, event_dim: int) -> Tensor:
    """Prior samples as rows, those of whole numbers (of a Categorical) in the dtype of the codes."""
    rows = site.rows(value, event_dim)
    return rows if rows.is_floating_point() or rows.is_complex() else rows.to(site.value.dtype)


def prior_log_prob(z: Tensor, runs: Sequence[Run], columns: Mapping[str, slice], particles: int) -> Tensor:
    """The log density of codes under the model's prior, given the data of the runs.

    Args:
        z: Shape (J, n, d), laid out as the codes.
        runs: One or several runs on the same n data; the j-th ``particles`` rows go to the run of their turn.
        columns: The columns of each latent site.
        particles: Number of vectorised particles in a run.

    Returns:
        Shape (J, n).

    Raises:
        ValueError: If a site's prior has no log_prob.
    """
    totals = []
    for chunk, run in zip(z.split(particles), itertools.cycle(runs), strict=False):
        values = {
            name: run.latents[name].unrows(chunk[..., here], run.latents[name].distribution.event_shape)
            for name, here in columns.items()
        }
        nodes = run.model.nodes if run.is_root else _rerun_to_last_latent(run, values)
        total = z.new_zeros(chunk.shape[:2])
        for name, value in values.items():
            total = total + _log_prob_rows(run.latents[name], nodes[name]["fn"], value)
        totals.append(total)
    return torch.cat(totals)


def prior_of_one_code(run: Run) -> Any | None:
    """A root site's prior for the first datum, flattened as a code is.

    Returns:
        A distribution with ``batch_shape`` () and ``event_shape`` (d,), or None where the family is not known to draw
        each number by itself, or is no mixture of such families with as few components as have a closed form.
    """
    (site,) = run.latents.values()
    outer = site.distribution.event_dim
    fn = _same_family(innermost(site.distribution))
    if not isinstance(fn, dist.MixtureSameFamily):
        return _elementwise(fn, site, outer)
    if own_methods(fn.__class__) or own_methods(fn.mixture_distribution.__class__):
        return None
    probs = fn.mixture_distribution.probs
    count = probs.shape[-1]
    if outer != fn.event_dim or site.rows(probs, 1)[0, 0].numel() != count or count > MOST_COMPONENTS:
        return None
    component = _elementwise(innermost(fn.component_distribution), site, 1 + outer, count)
    if component is None:
        return None
    return dist.MixtureSameFamily(dist.Categorical(site.rows(probs, 1)[0, 0].flatten()), component)


def prior_varies(run: Run) -> bool:
    """Whether the prior of a datum's code may depend on the datum, as far as can be seen.

    A false alarm is harmless: the pairs that it leaves out of a penalty cost a little variance and no bias.
    """
    if not run.is_root:
        return True
    (site,) = run.latents.values()
    return _differs(site, site.distribution)


def depends_on_data(run: Run) -> str | None:
    """The first latent site whose prior differs between data with the same values of the other sites, or None.

    The values are looked at, which waits for an accelerator. It is not known, None, where the model has other random
    choices, or cannot run with one code for all data.
    """
    first = next(name for name, node in run.model.nodes.items() if is_random(node))
    if first not in run.latents or run.data < 2:
        return None
    nodes = {first: run.model.nodes[first]}
    if len(run.latents) > 1:
        alike = {
            name: site.value.detach().narrow(site.value_dim, 0, 1).expand_as(site.value)
            for name, site in run.latents.items()
        }
        with restored_random_state(), torch.no_grad():
            before = random_state()
            try:
                found = _rerun_to_last_latent(run, alike)
            except (ValueError, RuntimeError):
                found = {}
            if same_generators(before, random_state()):
                nodes |= found
    return next((name for name, node in nodes.items() if _differs(run.latents[name], node["fn"], look=True)), None)


def _differs(site: Site, distribution: Any, *, look: bool = False) -> bool:
    """Whether what the prior of a site is made of may differ between data; see :func:`_varies`."""
    batch = len(distribution.batch_shape)
    place = batch + site.data_dim  # of the data among the batch dimensions, from the left
    size = site.shape[site.data_dim]
    return place >= 0 and _varies(distribution, size, place, batch, distribution.event_dim, look=look)


def _varies(value: Any, n: int, place: int, batch: int, event_dim: int, depth: int = 8, *, look: bool = False) -> bool:
    """Whether what a distribution is made of may differ along the data.

    Args:
        value: A distribution or a part of one.
        n: Number of data.
        place: The dimension of the data in the distribution's batch shape, counted from the left.
        batch: Number of its batch dimensions.
        event_dim: Number of dimensions of a tensor to the right of the batch's.
        depth: How deep to look.
        look: Whether to look at the values of all tensors, and at no function but what a partial gives it.
    """
    if isinstance(value, Tensor):
        dim = value.ndim - (batch + event_dim) + place  # a tensor of fewer dimensions is broadcast from the right
        if not 0 <= dim < value.ndim or value.shape[dim] != n or not value.stride(dim):
            return False
        if not look and (
            value.requires_grad or value.device.type != "cpu"
        ):  # where looking would wait, or miss a graph
            return True
        return bool((value != value.narrow(dim, 0, 1)).any())
    if depth == 0:
        return isinstance(value, list | tuple | torch.distributions.Distribution | torch.distributions.Transform)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return any(_varies(item, n, place, batch, event_dim, depth - 1, look=look) for item in value)
    if look and isinstance(value, functools.partial):  # the net of a flow with its context
        parts = [*value.args, *value.keywords.values()]
        return any(_varies(part, n, place, batch, event_dim, depth - 1, look=look) for part in parts)
    if isinstance(value, ExpandedDistribution):
        # The dimensions that it adds on the left are not those of what it repeats.
        own = len(value.base_dist.batch_shape)
        place -= len(value.batch_shape) - own
        return place >= 0 and _varies(value.base_dist, n, place, own, event_dim, depth - 1, look=look)
    if isinstance(value, torch.distributions.Distribution):
        # Nor are those that a part lacks, such as the one mixture that a NormalMixture repeats.
        place -= max(batch - len(value.batch_shape), 0)
        if place < 0:
            return False
        inner, constraints = len(value.batch_shape), _constraints(value)
        is_library = type(value).__module__.startswith(("torch.", "pyro."))
        for name, part in vars(value).items():
            if look and name == "_mask":
                continue  # which data count is no parameter
            # Some families keep a parameter a second time, as it was before it was broadcast.
            known = constraints.get(name.removeprefix("_unbroadcasted_").removeprefix("_"))
            if known is None and isinstance(part, Tensor) and constraints and is_library and name != "temperature":
                continue  # made of the parameters, and of any shape
            # The constraint of a Delta's point does not know the number of its dimensions.
            is_point = name == "v" and isinstance(value, dist.Delta)
            own = len(value.event_shape) if known is None or is_point else known.event_dim
            # Nor do those of Pyro's mixtures of Normals.
            if isinstance(part, Tensor) and part.shape[:inner] == value.batch_shape and not is_point:
                own = part.ndim - inner if known is None else max(own, part.ndim - inner)
            if _varies(part, n, place, inner, own, depth - 1, look=look):
                return True
        return False
    if isinstance(value, torch.distributions.Transform):
        # A transform keeps its last draw, which is as long as the data and says nothing about them, and its inverse,
        # which is made of the same parts; the inverse keeps nothing else.
        left_out = ("_cache",) if isinstance(value, InverseTransform) else ("_cache", "_inv")
        parts = [(name, part) for name, part in vars(value).items() if not name.startswith(left_out)]
        return any(
            _varies(part, n, place, batch, event_dim + (name == "scale_tril"), depth - 1, look=look)
            for name, part in parts
        )
    if isinstance(value, Gaussian):  # what Pyro's Gaussian models of sequences are made of
        tensors = [part for part in vars(value).values() if isinstance(part, Tensor)]
        return any(_varies(part, n, place, batch, part.ndim - batch, depth - 1, look=look) for part in tensors)
    if type(value).__module__ == "types" or dataclasses.is_dataclass(value):  # a namespace of parameters
        return _varies(vars(value), n, place, batch, event_dim, depth - 1, look=look)
    return (
        not look
        and callable(value)
        and not isinstance(getattr(value, "__self__", value), nn.Module | type | weakref.ref)
    )


class ReplaySubsamples(Messenger):
    """Gives every plate, but one that is left out, the subsample that it had in a trace."""

    def __init__(self, trace: Any, *, leave_out: str | None = None) -> None:
        super().__init__()
        self.trace = trace
        self.leave_out = leave_out

    def _pyro_sample(self, msg: Any) -> None:
        is_free = msg["value"] is None and msg["name"] != self.leave_out
        if is_free and site_is_subsample(msg) and msg["name"] in self.trace:
            msg["value"] = self.trace.nodes[msg["name"]]["value"]


class _StopAfter(ReplaySubsamples):
    """Records the named sites, with given values or fresh ones, and leaves the program when all have been seen."""

    def __init__(self, trace: Any, names: set[str], values: Mapping[str, Tensor] | None) -> None:
        super().__init__(trace)
        self.names = names
        self.values = values or {}
        self.nodes: dict[str, Any] = {}
        self.drawing: Any = None  # the site that is being drawn

    def _pyro_sample(self, msg: Any) -> None:
        super()._pyro_sample(msg)
        self.drawing = msg
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        self.drawing = None
        if msg["name"] not in self.names:
            return
        self.nodes[msg["name"]] = msg.copy()
        if len(self.nodes) == len(self.names):
            # A continuation runs after every other handler has seen the site.
            msg["continuation"] = _leave


def _leave(msg: Any) -> None:
    raise NonlocalExit(msg)


def _constraints(distribution: Any) -> Mapping[str, Any]:
    """The constraint of each parameter, as far as a family names them."""
    try:
        return distribution.arg_constraints
    except NotImplementedError:
        return {}


def _rerun_to_last_latent(run: Run, values: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    stop = _StopAfter(run.model, set(run.latents), values)
    try:
        with batch_norm_at_rest(), stop:
            run.rerun()
    except NonlocalExit:
        pass
    except (NotImplementedError, TypeError) as error:
        if stop.drawing is not None:
            _check_drawn(stop.drawing["name"], stop.drawing["fn"], error)
        raise
    missing = [name for name in run.latents if name not in stop.nodes]
    if missing:
        raise ValueError(
            f"When the model ran again for prior samples it did not sample site '{missing[0]}'. A WAE needs a model "
            "that samples the same sites in every run."
        )
    return {name: stop.nodes[name] for name in run.latents}


def _check_drawn(name: str, fn: Any, error: Exception) -> None:
    """Raises ValueError if an error means that a distribution cannot be drawn, as torch's of whole numbers."""
    part = component(fn)
    while isinstance(part, torch.distributions.TransformedDistribution):
        part = component(part.base_dist)
    own = [value.dtype for value in vars(part).values() if isinstance(value, Tensor)]
    whole = [dtype for dtype in own if not dtype.is_floating_point]
    if whole and not own_methods(part.__class__):
        raise ValueError(refusals.prior_of_integers(name, fn, whole[0])) from error
    if isinstance(error, NotImplementedError):
        raise ValueError(refusals.not_drawn(name, fn)) from error


def _check_masks(run: Run, nodes: Mapping[str, Any]) -> None:
    """Raises ValueError if a mask is another one with the prior's draws: it depends on a latent."""
    for name, node in nodes.items():
        before, now = mask_of(Sample(run.model.nodes[name])), mask_of(Sample(node))
        if before is None and now is None:
            continue
        if before is None or now is None or not torch.equal(*torch.broadcast_tensors(before, now)):
            raise ValueError(
                f"The mask at latent site '{name}' depends on a latent: it is another one for prior samples than for "
                "codes, which are compared under one mask. Write poutine.mask(mask=...) with a mask that is computed "
                "from the data."
            )


def _log_prob_rows(site: Site, fn: Any, value: Tensor) -> Tensor:
    try:
        rows = site.rows(fn.log_prob(value), 0)
    except (NotImplementedError, KeyError) as error:  # KeyError: of Pyro's flows, for a value that they have not drawn
        raise ValueError(
            f"The prior at site '{site.name}' ({type(fn).__name__}) has no log_prob. Take a penalty that needs draws "
            "alone, such as MMD() or SlicedWasserstein()."
        ) from error
    return rows.flatten(2).sum(2) if rows.ndim > 2 else rows


def _same_family(fn: Any) -> Any:
    """Pyro's own mixtures of Normals as a ``MixtureSameFamily``; anything else as it is."""
    shared = isinstance(fn, dist.MixtureOfDiagNormalsSharedCovariance)
    if not (shared or isinstance(fn, dist.MixtureOfDiagNormals)) or own_methods(fn.__class__):
        return fn
    scales = fn.coord_scale.unsqueeze(-2).expand_as(fn.locs) if shared else fn.coord_scale
    components = dist.Normal(fn.locs, scales, validate_args=False).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(logits=fn.component_logits), components, validate_args=False)


def _elementwise(fn: Any, site: Site, event_dim: int, *batch: int) -> Any | None:
    """The family with the parameters of the first datum, shape (*batch, d), if it draws each number by itself."""
    known = {
        dist.Normal: ("loc", "scale"),
        dist.Laplace: ("loc", "scale"),
        dist.Uniform: ("low", "high"),
        dist.StudentT: ("df", "loc", "scale"),
    }
    family = next((family for family in known if isinstance(fn, family)), None)
    if family is None or own_methods(fn.__class__):
        return None
    parameters = {
        name: site.rows(getattr(fn, name).expand(fn.batch_shape), event_dim)[0, 0].reshape(*batch, -1)
        for name in known[family]
    }
    return family(**parameters, validate_args=False).to_event(1)
