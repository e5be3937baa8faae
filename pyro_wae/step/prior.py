"""The prior of a model: draws of its latent sites, their log density, and its distribution where it has one."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.runtime import NonlocalExit
from torch import Tensor, nn

from pyro_wae._core.batch_norm import batch_norm_at_rest
from pyro_wae._core.distributions import innermost, is_a
from pyro_wae.step.program import Particle, ReplaySubsamples, Structure
from pyro_wae.step.records import Codes, Layout

__all__ = [
    "distribution_tensors",
    "draw_prior",
    "leaves",
    "prior_log_prob",
    "prior_of_one_code",
    "warn_of_lost_gradient",
]

Site = Mapping[str, Any]

MOST_COMPONENTS = 10
"""Components of a mixture up to which its distribution is given: what is done with it takes their pairs one by one,
and soon takes longer than drawing."""


def draw_prior(particle: Particle, structure: Structure) -> Tensor:
    """Draws the latent sites afresh from the model; the decoder does not run.

    A single latent at the root comes from its own distribution. Anything else runs the model again on the same data
    and leaves it right after the last latent; what runs before that leaves BatchNorm's statistics alone. The draws
    have a graph only if the prior has parameters to learn.

    Returns:
        Shape (K, n, d), laid out as :func:`pyro_wae.step.program.gather_codes` lays out the codes.

    Raises:
        ValueError: If the model does not reach a latent site when it runs again.
    """
    if structure.is_root:
        (name,) = structure.latents
        fn = particle.model.nodes[name]["fn"]
        sites: dict[str, Site] = {name: {"fn": fn, "value": fn.rsample() if fn.has_rsample else fn.sample()}}
    else:
        sites = _rerun_to_last_latent(particle, structure)
    rows = {name: structure.latents[name].rows(site["value"], site["fn"].event_dim) for name, site in sites.items()}
    return Codes.of_sites(rows, {}).values


def warn_of_lost_gradient(particle: Particle, structure: Structure, penalty: Tensor) -> None:
    """Warns if the prior has parameters to learn whose gradient neither its draws nor the penalty give."""
    for name in structure.latents:
        fn = particle.model.nodes[name]["fn"]
        if not torch.is_grad_enabled() or fn.has_rsample:
            continue
        parameters = {leaf for tensor in distribution_tensors(fn) for leaf in leaves(tensor)}
        # A penalty may know the prior by its density or its means, which have a gradient where draws have none.
        if parameters and not parameters <= leaves(penalty).keys():
            warnings.warn(
                f"The prior at site '{name}' ({type(fn).__name__}) has parameters to learn but cannot be "
                "reparameterised: prior draws give them no gradient. Take a prior with rsample, or detach them.",
                UserWarning,
                stacklevel=2,
            )


def prior_log_prob(z: Tensor, particles: Sequence[Particle], structure: Structure, codes: Codes) -> Tensor:
    """The log density of codes under the model's prior, given this step's data.

    Args:
        z: Shape (J, n, d), laid out as the codes.
        particles: The runs of this step; with several, the j-th (n, d) goes to the run of its turn.
        structure: What the sites are.
        codes: The codes of the runs, for their layout.

    Returns:
        Shape (J, n).

    Raises:
        ValueError: If a site's prior has no log_prob.
    """
    size = len(codes.values) // len(particles)
    totals = []
    for chunk, particle in zip(z.split(size), itertools.cycle(particles), strict=False):
        values = {}
        for name, columns in codes.columns.items():
            event_shape = particle.model.nodes[name]["fn"].event_shape
            values[name] = structure.latents[name].unrows(chunk[..., columns], event_shape)
        sites = particle.model.nodes if structure.is_root else _rerun_to_last_latent(particle, structure, values)
        total = z.new_zeros(chunk.shape[:2])
        for name, value in values.items():
            total = total + _log_prob_rows(name, sites[name]["fn"], value, structure.latents[name])
        totals.append(total)
    return torch.cat(totals)


def prior_of_one_code(particle: Particle, name: str, layout: Layout) -> Any | None:
    """A root site's prior for the first datum, flattened as a code is.

    Returns:
        A distribution with ``batch_shape`` () and ``event_shape`` (d,), or None where the family is not known to draw
        each number by itself, or is no mixture of up to :data:`MOST_COMPONENTS` such families.
    """
    outer = particle.model.nodes[name]["fn"].event_dim
    fn = _same_family(innermost(particle.model.nodes[name]["fn"]))
    if not is_a(type(fn), dist.MixtureSameFamily):
        return _elementwise(fn, lambda value: layout.rows(value, outer)[0, 0].flatten())
    probs = fn.mixture_distribution.probs
    if outer != fn.event_dim or layout.rows(probs, 1)[0, 0].numel() != probs.shape[-1]:
        return None
    count = probs.shape[-1]
    if count > MOST_COMPONENTS:
        return None
    component = _elementwise(
        innermost(fn.component_distribution),
        lambda value: layout.rows(value, 1 + outer)[0, 0].reshape(count, -1),
    )
    if component is None:
        return None
    return dist.MixtureSameFamily(dist.Categorical(layout.rows(probs, 1)[0, 0].flatten()), component)


class _StopAfter(ReplaySubsamples):
    """Records the named sites, with given values or fresh ones, and leaves the program when all have been seen."""

    def __init__(self, trace: Any, names: set[str], values: Mapping[str, Tensor] | None) -> None:
        super().__init__(trace)
        self.names = names
        self.values = values or {}
        self.sites: dict[str, Site] = {}

    def _pyro_sample(self, msg: Any) -> None:
        super()._pyro_sample(msg)
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] not in self.names:
            return
        self.sites[msg["name"]] = msg.copy()
        if len(self.sites) == len(self.names):
            # A continuation runs after every other handler has seen the site.
            msg["continuation"] = _leave


def _leave(msg: Any) -> None:
    raise NonlocalExit(msg)


def _rerun_to_last_latent(
    particle: Particle, structure: Structure, values: Mapping[str, Tensor] | None = None
) -> dict[str, Site]:
    stop = _StopAfter(particle.model, set(structure.latents), values)
    try:
        with batch_norm_at_rest(), stop:
            particle.rerun()
    except NonlocalExit:
        pass
    missing = [name for name in structure.latents if name not in stop.sites]
    if missing:
        raise ValueError(
            f"When the model ran again for prior draws it did not sample site '{missing[0]}'. A WAE needs a model "
            "that samples the same sites in every run."
        )
    return {name: stop.sites[name] for name in structure.latents}


def _log_prob_rows(name: str, fn: Any, value: Tensor, layout: Layout) -> Tensor:
    try:
        rows = layout.rows(fn.log_prob(value), 0)
    except NotImplementedError as error:
        raise ValueError(
            f"The prior at site '{name}' ({type(fn).__name__}) has no log_prob. Take a penalty that needs draws alone, "
            "such as MMD() or SlicedWasserstein()."
        ) from error
    return rows.flatten(2).sum(2) if rows.ndim > 2 else rows


def _same_family(fn: Any) -> Any:
    """Pyro's own mixtures of Normals as a ``MixtureSameFamily``; anything else as it is."""
    if not is_a(type(fn), dist.MixtureOfDiagNormals, dist.MixtureOfDiagNormalsSharedCovariance):
        return fn
    shared = isinstance(fn, dist.MixtureOfDiagNormalsSharedCovariance)
    scales = fn.coord_scale.unsqueeze(-2).expand_as(fn.locs) if shared else fn.coord_scale
    components = dist.Normal(fn.locs, scales, validate_args=False).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(logits=fn.component_logits), components, validate_args=False)


def _elementwise(fn: Any, take: Callable[[Tensor], Tensor]) -> Any | None:
    """The same family with its parameters cut out by `take`, if it draws each number by itself."""
    if not is_a(type(fn), dist.Normal, dist.Laplace, dist.Uniform, dist.StudentT):
        return None
    parameters = {name: take(getattr(fn, name).expand(fn.batch_shape)) for name in fn.arg_constraints}
    return type(fn)(**parameters, validate_args=False).to_event(1)


def distribution_tensors(value: Any, depth: int = 5) -> Iterator[Tensor]:
    """The tensors of a distribution, those of its modules included."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from value.parameters()
    if depth and isinstance(value, list | tuple):
        for item in value:
            yield from distribution_tensors(item, depth - 1)
    if depth and isinstance(value, torch.distributions.Distribution | torch.distributions.Transform):
        for name, item in vars(value).items():
            # A transform keeps its last draw, which is no parameter.
            if not name.startswith("_cache"):
                yield from distribution_tensors(item, depth - 1)


def leaves(value: Tensor) -> dict[Tensor, None]:
    """The parameters that a tensor depends on, in the order of a walk through its graph."""
    if value.grad_fn is None:
        return {value: None} if value.requires_grad else {}
    found: dict[Tensor, None] = {}
    seen: set[Any] = {value.grad_fn}
    nodes = [value.grad_fn]
    while nodes:
        node: Any = nodes.pop()
        if hasattr(node, "variable"):
            found[node.variable] = None
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                nodes.append(parent)
    return found
