"""Runs model and guide on a batch, and makes rows of what a loss needs: codes, prior samples, costs, conditions."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.util import check_if_enumerated, check_model_guide_match
from torch import Tensor, nn

from pyro_wae._core import checks
from pyro_wae._core.distributions import innermost
from pyro_wae._core.private import PARTICLE_PLATE
from pyro_wae._core.programs import add_note, trial_run
from pyro_wae._core.rows import Site, at_least_float32, side_by_side
from pyro_wae.costs import Cost, OutputCost
from pyro_wae.step import refusals
from pyro_wae.step.condition import read_condition
from pyro_wae.step.options import check_names
from pyro_wae.step.parts import join
from pyro_wae.step.prior import ReplaySubsamples, draw_prior, prior_varies
from pyro_wae.step.program import Program, Run, data_frame, is_random, layout, scales, subsample_scales
from pyro_wae.step.records import Step


class Observer:
    """Observes a model and its guide on batches of data.

    Args:
        model: The Pyro model.
        guide: Its guide.
        cost: A cost, one for each observed site, or None to take none.
        data_plate: Name of the data plate, or None to find it.
        prior_draws: Prior samples for each code.
        num_particles: Number of codes for each datum.
        vectorize_particles: Whether to run them at once in an outermost plate.
        max_plate_nesting: Bound on nested plates; where vectorised particles need it and it is infinite, it is guessed
            by one more run.
        condition: Name of what the model is conditional on, or None.
        once_observed: Sites that earlier steps have observed, or warned of, to which those of this one are added.

    Raises:
        TypeError: If model or guide cannot be called.

    Warns:
        UserWarning: If a dict of costs names a latent site that has not been observed yet.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        *,
        cost: Cost | Mapping[str, Cost] | None = None,
        data_plate: str | None = None,
        prior_draws: int = 0,
        num_particles: int = 1,
        vectorize_particles: bool = False,
        max_plate_nesting: float = math.inf,
        condition: str | None = None,
        once_observed: set[str] | None = None,
    ) -> None:
        self.model, self.guide = checks.program("model", model), checks.program("guide", guide)
        self.cost = cost
        self.data_plate = data_plate
        self.prior_draws = prior_draws
        self.num_particles = num_particles
        self.is_vectorized = vectorize_particles and num_particles > 1
        self.max_plate_nesting = max_plate_nesting
        self.condition = condition
        self.once_observed = set() if once_observed is None else once_observed

    def observe(self, args: Sequence[Any], kwargs: Mapping[str, Any], *, subsample_of: Run | None = None) -> Step:
        """Runs model and guide, once or for each particle, and reads the step from the runs.

        Args:
            args: Arguments of model and guide.
            kwargs: Keyword arguments of both.
            subsample_of: An earlier run, whose data this step takes too.

        Raises:
            ValueError: If model and guide do not fit a WAE.
        """
        run = self.run(args, kwargs, subsample_of)
        _check_codes(run, args, kwargs)
        first = self._read(run, args, kwargs, None)
        steps = [first]
        while not self.is_vectorized and len(steps) < self.num_particles:
            steps.append(self._read(self.run(args, kwargs, subsample_of or run), args, kwargs, first))
        return join(steps, 0) if len(steps) > 1 else first

    def run(self, args: Sequence[Any], kwargs: Mapping[str, Any], subsample_of: Run | None = None) -> Run:
        """Runs the guide and replays the model against it, with all particles if they are vectorised."""
        model, guide = self.model, self.guide
        if self.is_vectorized:
            if self.max_plate_nesting == math.inf:
                self.max_plate_nesting = self._plate_nesting(args, kwargs)
            # A plate as a handler, and not in a function of its own, in which a messenger guide would not be found.
            dim = -int(self.max_plate_nesting)
            model, guide = (pyro.plate(PARTICLE_PLATE, self.num_particles, dim=dim)(own) for own in (model, guide))
        with ReplaySubsamples(subsample_of.model) if subsample_of else nullcontext():
            traces = trace_pair(model, guide, args, kwargs, self.max_plate_nesting)
        found = Run(*traces, functools.partial(model, *args, **kwargs), self.data_plate)
        _check_subsample(found)
        return found

    def _plate_nesting(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
        # Pyro's own guess computes every log_prob and moves the random numbers of the first step.
        with trial_run():
            traces = trace_pair(self.model, self.guide, args, kwargs, math.inf)
        stacks = [
            node["cond_indep_stack"] for trace in traces for node in trace.nodes.values() if node["type"] == "sample"
        ]
        return 1 + max((-f.dim for stack in stacks for f in stack if f.dim is not None), default=0)

    def _read(self, found: Run, args: Sequence[Any], kwargs: Mapping[str, Any], first: Step | None) -> Step:
        """Reads one run; what is the same for all particles is taken from the first."""
        n = found.data
        if not found.observed:
            raise ValueError(refusals.nothing_observed())
        for site in (*found.latents.values(), *found.observed.values()):
            _check_data(found, site, n)
        codes, columns, kept = _codes(found)
        # Before anything is drawn: a family may then keep derived parameters, which look as if they varied.
        varies = prior_varies(found) if first is None else first.prior_varies
        try:
            draws = draw_prior(found, self.prior_draws)
        except Exception as error:
            add_note(error, args, kwargs)
            raise
        condition, is_masked = (first and (first.condition, first.condition_is_masked)) or (None, False)
        if self.condition is not None and first is None:
            condition, is_masked = read_condition(self.condition, found, (self.model, args, kwargs))
        sites = self._reconstructed(found.observed)
        if isinstance(self.cost, Mapping):
            check_names("cost", self._named_costs(found, sites), list(sites), "observed", "SquaredError()")
        for name in set(found.points) & set(sites):
            # Looking waits for an accelerator, at such a site alone.
            if isinstance(self._cost(name), OutputCost) and _has_density(sites[name]):
                raise ValueError(refusals.density_without_a_cost(name))
        costs = {name: cost.per_datum(site) for name, site in sites.items() if (cost := self._cost(name)) is not None}
        factors, once = _factor_costs(found)
        return Step(
            runs=[[found]],
            codes=codes,
            columns=columns,
            kept=kept,
            prior=draws,
            costs=costs | factors,
            factors=tuple(factors),
            once=once,
            seen=_seen(list(sites.values())),
            condition=condition,
            condition_name=self.condition,
            condition_is_masked=is_masked,
            data_size=found.data_size,
            prior_varies=varies,
            common_scale=_common_scale(found),
        )

    def _named_costs(self, found: Run, sites: Mapping[str, Site]) -> list[str]:
        """The sites that the costs name, without those that are observed in other batches alone, as missing labels."""
        assert isinstance(self.cost, Mapping)
        nodes = found.model.nodes
        latent = [name for name in self.cost if name in nodes and is_random(nodes[name])]
        for name in latent:
            if name not in self.once_observed:
                warnings.warn(
                    f"cost names '{name}', which is latent in this batch: it has a cost in a batch where it is "
                    "observed, as labels that are missing. If it is latent in all of them, leave it out of cost.",
                    UserWarning,
                    stacklevel=7,
                )
        self.once_observed.update(latent, sites)
        return [name for name in self.cost if name in sites or name not in {*self.once_observed, *found.left_out}]

    def _cost(self, name: str) -> Cost | None:
        return self.cost[name] if isinstance(self.cost, Mapping) else self.cost

    def _reconstructed(self, observed: Mapping[str, Site]) -> Mapping[str, Site]:
        """The sites that have a cost: a condition is given, and not to be reconstructed."""
        if self.condition is None or (isinstance(self.cost, Mapping) and self.condition in self.cost):
            return observed
        left = {name: site for name, site in observed.items() if name != self.condition}
        if not left:
            raise ValueError(
                f"The condition '{self.condition}' is the model's only observed site, and so nothing is "
                "reconstructed. Write pyro.sample('x', ..., obs=x) for the decoder's output."
            )
        return left


class Runner:
    """Runs a step as it is: all data of this process at once. A subclass is another way to run it."""

    def observe(self, observer: Observer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Step:
        """Observes model and guide on the data of a step."""
        return observer.observe(args, kwargs)

    def training(
        self, observer: Observer, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> AbstractContextManager[None]:
        """Wraps a step whose gradients are added to those of Pyro's parameters."""
        return nullcontext()

    def comparing(
        self, step: Step, modules: Callable[[], Iterable[tuple[str, nn.Module]]]
    ) -> AbstractContextManager[None]:
        """Wraps the comparison of codes with prior samples; penalties, costs and weights have been prepared for it."""
        return nullcontext()

    def agree(self, loss: Tensor) -> None:
        """Compares the loss, which has been added up, between those who compute it."""


def trace_pair(
    model: Program, guide: Program, args: Sequence[Any], kwargs: Mapping[str, Any], max_plate_nesting: float
) -> tuple[Any, Any]:
    """Runs the guide, and replays the model against it, for the traces of the model and the guide.

    No log_prob is computed. The bound on nested plates is for Pyro's check that model and guide match.

    Raises:
        ValueError: If the guide computes or observes a latent site of the model.
    """
    unwrapped, values = poutine.unwrap(guide), list[tuple[str, Any]]()
    try:
        if isinstance(unwrapped, Messenger):
            guide(*args, **kwargs)
            model_trace, guide_trace = unwrapped.get_traces()
        else:
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            drawn = guide_trace.copy()
            for name in guide_trace.observation_nodes:
                drawn.remove_node(name)  # for which replay would raise an error of its own
            values = [(name, node["value"]) for name, node in drawn.nodes.items() if node["type"] == "sample"]
            # How often each has been changed in place.
            before = [(name, z, z._version) for name, z in values if isinstance(z, Tensor) and not z.is_inference()]
            model_trace = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
            changed = [name for name, z, version in before if z._version != version]
            if changed:
                raise ValueError(refusals.changed_in_place(changed[0]))
    except Exception as error:
        for name, z in values:
            if isinstance(z, Tensor) and not z.isfinite().all():
                error.add_note(f"pyro_wae: The codes of latent site '{name}' are not finite: look at the guide.")
        add_note(error, args, kwargs, model, guide)
        raise
    for trace in (model_trace, guide_trace):
        unwrap_factors(trace)
    for name in guide_trace.observation_nodes:
        if name in model_trace and is_random(model_trace.nodes[name]):
            is_computed = guide_trace.nodes[name]["infer"].get("_deterministic")
            refusal = refusals.computed_by_guide if is_computed else refusals.observed_by_guide
            raise ValueError(refusal(name, model_trace.nodes[name]["fn"]))
    if is_validation_enabled():
        check_model_guide_match(model_trace, guide_trace, max_plate_nesting)
        check_if_enumerated(guide_trace)
    return model_trace, guide_trace


def unwrap_factors(trace: Any) -> None:
    """Makes a site of a ``Unit`` in a wrapper, such as ``.mask(mask)``, the ``pyro.factor`` that it stands for."""
    for name in trace.observation_nodes:
        node, fn = trace.nodes[name], trace.nodes[name]["fn"]
        if math.prod(fn.event_shape) == 0 and fn is not innermost(fn) and isinstance(innermost(fn), dist.Unit):
            if getattr(fn, "_mask", None) is False:
                node["mask"] = False
            node["fn"] = dist.Unit(fn.log_prob(node["value"]))


def _check_codes(found: Run, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError if a site has codes of integers, which have no gradient, or of complex numbers."""
    for name, site in found.latents.items():
        if not site.value.is_floating_point():
            error = ValueError(refusals.code_of_integers(name, site.value.dtype, site.distribution))
            add_note(error, args, kwargs)
            raise error


def _codes(found: Run) -> tuple[Tensor, dict[str, slice], Tensor | None]:
    """The codes of one run, a row for each particle and datum, the columns of each site, and the mask."""
    rows, kept = {}, {}
    for name, site in found.latents.items():
        rows[name] = site.value_rows()
        if site.mask is not None:
            shape = torch.broadcast_shapes(site.shape + site.distribution.event_shape, site.mask.shape)
            kept[name] = site.rows(site.mask.expand(shape), site.event_dim).expand(rows[name].shape)
    return side_by_side(rows, kept)


def _common_scale(found: Run) -> float | Tensor:
    """The scale around model and guide.

    It is what all latent sites and an observed one have, where no site is without a scale; else that of the data plate.
    """
    latent = [site.scale for site in found.latents.values()]
    plate = found.model.nodes.get(found.plate)
    outer = 1.0 if plate is None else scales(plate, found.plate)[0]
    # A factor for each datum is a weight of the user's.
    outer = 1.0 if isinstance(outer, Tensor) and outer.numel() != 1 else outer
    observed = [site.scale for site in found.observed.values()]
    observed = [scale for scale in observed if not isinstance(scale, Tensor) or scale.numel() == 1]
    tensors = [scale for scale in (*latent, *observed, outer) if isinstance(scale, Tensor)]
    if not tensors:
        is_shared = len(set(latent)) == 1 and latent[0] in observed and 1.0 not in observed
        return (latent[0] if is_shared else outer) or 1.0
    own = torch.stack([torch.as_tensor(scale, device=tensors[0].device).detach() for scale in (*latent, *observed)])
    alike, unscaled = (torch.isclose(own, scale, rtol=1e-5, atol=0.0) for scale in (own[0], torch.ones_like(own[0])))
    found_alike = alike[: len(latent)].all() & alike[len(latent) :].any()
    return torch.where(found_alike & ~unscaled.any() & (own[0] > 0), own[0], outer)


def _factor_costs(found: Run) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What each ``pyro.factor`` adds to a loss: of each datum, shape (K, n), or once for all data, a scalar."""
    rows: dict[str, Tensor] = {}
    once: dict[str, Tensor] = {}
    for node, sign in found.factors:
        name, fn = node["name"], node["fn"]
        while name in found.observed:  # a guide's factor may have the name of what the model observes
            name += "_factor"
        values = sign * fn.log_factor * (node["scale"] / subsample_scales(node, found.plate)[0])
        if node["mask"] is not None:
            values = values.where(torch.as_tensor(node["mask"], device=values.device), 0.0)
        if data_frame(node, found.plate) is not None:
            site = Site(name, fn, values, *layout(node, found.plate))
            _check_data(found, site, found.data)
            try:
                own = site.rows(at_least_float32(values), 0)
            except ValueError:
                raise ValueError(
                    f"pyro.factor '{name}' has shape {tuple(values.shape)} where its plates give {site.shape}. Write "
                    f"the sum of what belongs to one datum: pyro.factor('{name}', value.sum(-1))."
                ) from None
            own = own.flatten(2).sum(2) if own.ndim > 2 else own
            rows[name] = rows[name] + own if name in rows else own
        else:
            # A plate of particles repeats what is there once.
            frame = data_frame(node, PARTICLE_PLATE)
            particles = frame.size if frame is not None and values.ndim >= -frame.dim else 1
            once[name] = once.get(name, 0.0) + at_least_float32(values).sum() / particles
    return rows, once


def _has_density(site: Site) -> bool:
    """Whether a Delta has a log density."""
    return bool((innermost(site.distribution).log_density != 0).any())


def _check_subsample(found: Run) -> None:
    """Raises ValueError if the guide draws a subsample of its own, so that codes are not those of the model's data."""
    for name in found.latents:
        in_model = {frame.name for frame in found.model.nodes[name]["cond_indep_stack"]}
        for frame in found.guide.nodes[name]["cond_indep_stack"]:
            own = found.guide.nodes.get(frame.name)
            if frame.name in in_model or own is None or frame.full_size == frame.size:
                continue
            # Both may have been given the same one.
            if not any(_is_same_subsample(own, found.model.nodes[other]) for other in in_model & set(found.model)):
                raise ValueError(
                    f"The guide draws {frame.size} of {frame.full_size} in plate '{frame.name}' around latent site "
                    f"'{name}', and the model has no such plate there: its data are others. Give the plates one "
                    f"name: write pyro.plate('{found.plate}', {frame.full_size}, subsample_size={frame.size}) in "
                    "model and guide."
                )


def _is_same_subsample(own: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return torch.equal(*(torch.as_tensor(node["value"], device="cpu") for node in (own, other)))


def _check_data(found: Run, site: Site, n: int) -> None:
    """Raises ValueError if a site has another number of data than the n codes, as in a plate that has no size."""
    if site.shape[site.data_dim] != n:
        raise ValueError(
            f"Site '{site.name}' has {site.data} data in plate '{found.plate}', and the codes have {n}. Write "
            f"pyro.plate('{found.plate}', {n}), and outside of it what all data share; fill up what some data "
            f"lack to {n} rows, under poutine.mask(mask=...)."
        )


def _seen(sites: Sequence[Site]) -> Tensor | None:
    """Shape (K, n): which data have anything observed; None if all have."""
    known = [mask for site in sites if site.mask is not None and (mask := site.kept) is not None]
    return torch.stack(known).any(0) if len(known) == len(sites) else None
