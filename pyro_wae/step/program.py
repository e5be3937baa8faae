"""Runs model and guide, and reads from their traces what each site is to a WAE."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor, site_is_subsample
from pyro.util import check_if_enumerated, check_model_guide_match

from pyro_wae._core import checks
from pyro_wae._core.distributions import family
from pyro_wae._core.programs import add_note
from pyro_wae._core.sites import Site
from pyro_wae.step.plates import (
    Node,
    Sample,
    data_frame,
    data_size,
    find_data_plate,
    latent_site,
    observed_site,
    samples_of,
)

Program = Callable[..., Any]


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
        is_root: Whether the code is one site that no other random choice precedes.
    """

    model: Any
    guide: Any
    rerun: Callable[[], Any]
    plate: str
    latents: Mapping[str, Site]
    observed: Mapping[str, Site]
    factors: Sequence[Factor]
    data_size: int | None
    is_root: bool

    @property
    def data(self) -> int:
        """Number of data in this run."""
        return next(iter(self.latents.values())).data

    def latents_alone(self) -> Run:
        """The same with traces of the latent sites alone: the rest, the decoder's output before all, fills memory."""
        traces = []
        for trace in (self.model, self.guide):
            kept = poutine.Trace()
            kept.nodes.update((name, node) for name, node in trace.nodes.items() if name in self.latents)
            traces.append(kept)
        model, guide = traces
        return dataclasses.replace(self, model=model, guide=guide, observed={}, factors=())


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
    with ReplaySubsamples(subsample_of.model) if subsample_of else nullcontext():
        model_trace, guide_trace = trace_pair(model, guide, args, kwargs, max_plate_nesting)
    return read(model_trace, guide_trace, functools.partial(model, *args, **kwargs), data_plate)


def trace_pair(
    model: Program, guide: Program, args: Sequence[Any], kwargs: Mapping[str, Any], max_plate_nesting: float
) -> tuple[Any, Any]:
    """The traces of the model, replayed against the guide, and of the guide."""
    checks.program("model", model)
    checks.program("guide", guide)
    unwrapped = poutine.unwrap(guide)
    try:
        if isinstance(unwrapped, Messenger):
            guide(*args, **kwargs)
            model_trace, guide_trace = unwrapped.get_traces()
        else:
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    except Exception as error:
        add_note(error, args, kwargs)
        raise
    if is_validation_enabled():
        check_model_guide_match(model_trace, guide_trace, max_plate_nesting)
        check_if_enumerated(guide_trace)
    return model_trace, guide_trace


def read(model_trace: Any, guide_trace: Any, rerun: Callable[[], Any], data_plate: str | None) -> Run:
    """Reads from traces which sites are codes, which have costs, and which plate is the data; see :func:`run`."""
    samples, in_guide = samples_of(model_trace), samples_of(guide_trace)
    _check_guide(in_guide)
    for sample in samples.values():
        _check_point(sample)
    latents = dict(_latents(samples, in_guide))
    observed = dict(observed_samples(samples))
    if not latents:
        own = [[name for name, s in found.items() if not s.node["is_observed"]] for found in (samples, in_guide)]
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
    nodes = [sample.node for sample in latents.values()]
    plate = find_data_plate(nodes, [sample.node for sample in observed.values()], data_plate)
    size = data_size(data_frame(nodes[0], plate))
    sites = {name: latent_site(name, sample, in_guide[name], plate) for name, sample in latents.items()}
    return Run(
        model=model_trace,
        guide=guide_trace,
        rerun=rerun,
        plate=plate,
        latents=sites,
        observed={name: observed_site(name, sample, plate) for name, sample in observed.items()},
        factors=[*_factors(model_trace, -1.0), *_factors(guide_trace, 1.0)],
        data_size=size,
        is_root=len(sites) == 1 and next(name for name, s in samples.items() if not s.node["is_observed"]) in sites,
    )


class ReplaySubsamples(Messenger):
    """Gives every plate the subsample that it had in a trace."""

    def __init__(self, trace: Any) -> None:
        super().__init__()
        self.trace = trace

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["value"] is None and msg["name"] in self.trace:
            msg["value"] = self.trace.nodes[msg["name"]]["value"]


def is_random(node: Node) -> bool:
    """Whether a node of a trace is drawn, neither observed nor a subsample."""
    return node["type"] == "sample" and not node["is_observed"] and not site_is_subsample(node)


def is_code(name: str, trace: Any) -> bool:
    """Whether a site of a model's trace is a latent site whose value is a part of a code."""
    return is_random(trace.nodes[name]) and not _is_imputed(name, trace.nodes)


def observed_samples(samples: Mapping[str, Sample]) -> Iterator[tuple[str, Sample]]:
    """The sites of a model that may have a cost, by the names that the user gave them."""
    for name, sample in samples.items():
        if not sample.node["is_observed"] or site_is_factor(sample.node):
            continue
        is_computed = sample.node["infer"].get("_deterministic") or _is_reparametrised(name, samples)
        # What is masked as a whole is a value that was computed, as by a reparametrisation, or counts for nothing.
        if not is_computed and not sample.is_masked_out:
            yield _user_name(name, samples), sample


def _factors(trace: Any, sign: float) -> Iterator[Factor]:
    for node in trace.nodes.values():
        if node["type"] == "sample" and site_is_factor(node) and node["mask"] is not False:
            yield Factor(node, sign)


def _check_guide(samples: Mapping[str, Sample]) -> None:
    """Raises ValueError if the guide observes a site: a term of an ELBO that has no place here."""
    for name, sample in samples.items():
        node = sample.node
        if not node["is_observed"] or site_is_factor(node):
            continue
        if not node["infer"].get("_deterministic") and not sample.is_masked_out:
            raise ValueError(
                f"The guide observes site '{name}' ({family(node['fn'])}), whose density is a term of Pyro's ELBO and "
                "would be left out here: what it depends on would not be trained. Write in the guide "
                f"pyro.factor('{name}', -distribution.log_prob(value), has_rsample=True), which adds the negative log "
                "likelihood to the loss (with a plus sign, what Trace_ELBO adds), or sample the site without obs=."
            )


def _is_reparametrised(name: str, samples: Mapping[str, Sample]) -> bool:
    """Whether a reparametrisation has computed a site, which is then observed at the point of its own Delta."""
    # A user's own site may be given its own value, as a condition that is no random choice: nothing is drawn for it.
    return samples[name].is_own_point and any(
        other.startswith(f"{name}_") and not sample.node["is_observed"] for other, sample in samples.items()
    )


def _check_point(sample: Sample) -> None:
    """Raises ValueError if a site that was computed has a density, as some reparametrisations give it."""
    if not sample.is_own_point or sample.is_masked_out:
        return
    if bool((sample.innermost.log_density != 0).any()):  # waits for an accelerator, at such a site alone
        name = sample.node["name"]
        raise ValueError(
            f"Site '{name}' is observed at the point of its own Delta, whose log_density is a term of Pyro's ELBO "
            "and would be left out here. ConjugateReparam, NeuTraReparam, SplitReparam and StructuredReparam make "
            f"such a site: leave '{name}' out of the config of poutine.reparam, or write the density as a term of "
            f"the loss: pyro.factor('{name}_density', log_density)."
        )


def _latents(samples: Mapping[str, Sample], guide: Mapping[str, Sample]) -> Iterator[tuple[str, Sample]]:
    for name, sample in samples.items():
        if sample.node["is_observed"] or _is_imputed(name, samples):
            continue
        in_guide = name in guide
        if in_guide and not getattr(guide[name].fn, "has_rsample", False):
            _raise_not_reparameterised(name, guide[name].fn)
        if not in_guide and sample.node["infer"].get("enumerate"):
            raise ValueError(
                f"Latent site '{name}' of the model is to be enumerated, and WAELoss does not enumerate. Sum it out "
                "in the likelihood (dist.MixtureSameFamily), or sample it in the guide through a relaxation."
            )
        if in_guide and not sample.is_masked_out:
            yield name, sample


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


def _is_imputed(name: str, sites: Container[str]) -> bool:
    """Whether the site holds the part of an observed value that ``obs_mask`` left to be imputed."""
    stem = name.removesuffix("_unobserved")
    return stem != name and f"{stem}_observed" in sites and stem in sites


def _user_name(name: str, sites: Container[str]) -> str:
    """The name that the user gave an observed site, whose part that ``obs_mask`` leaves has another."""
    stem = name.removesuffix("_observed")
    return stem if stem != name and f"{stem}_unobserved" in sites else name
