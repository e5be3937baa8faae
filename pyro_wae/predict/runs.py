"""Runs for a prediction: no graph, BatchNorm's statistics left alone, and the sites that hold data."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_wae._core import checks
from pyro_wae._core.batch_norm import batch_norm_at_rest
from pyro_wae._core.distributions import family, mean_of
from pyro_wae._core.programs import add_note
from pyro_wae.step.observe import Observer, unwrap_factors
from pyro_wae.step.program import Program, Run, is_random, observed_samples, samples_of

Node = Mapping[str, Any]


def encoded_run(
    model: Program,
    guide: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    data_plate: str | None,
    *,
    subsample_of: Run | None = None,
) -> Run:
    """A run of the guide with the model replayed against it, on the subsample of an earlier run if one is given."""
    with torch.no_grad(), batch_norm_at_rest():
        return Observer(model, guide, data_plate=data_plate).run(args, kwargs, subsample_of)


def run_model(model: Program, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The trace of a run of the model by itself."""
    checks.program("model", model)
    with torch.no_grad(), batch_norm_at_rest():
        try:
            trace = poutine.trace(model).get_trace(*args, **kwargs)
        except Exception as error:
            add_note(error, args, kwargs, model)
            raise
        unwrap_factors(trace)
        return trace


def output_nodes(
    trace: Any, return_sites: Sequence[str] | None = None, *, codes: Collection[str] = ()
) -> dict[str, Node]:
    """The sites to return: those that hold data, by the names the user gave them, or those named.

    Args:
        trace: Of a run of the model.
        return_sites: The names, if given.
        codes: The latent sites that were fixed in this run, which are no data.
    """
    observed = observed_nodes(trace, codes)
    if return_sites is not None:
        random = {name: site for name, site in trace.nodes.items() if is_random(site) or name in codes}
        # What ``obs_mask`` has made of data and draws is computed, too.
        known = random | computed_nodes(trace) | observed
        check_return_sites(return_sites, known)
        for name in return_sites:
            _check_event(name, known[name])
        return {name: known[name] for name in return_sites}
    if not observed:
        raise ValueError(
            "The model has no observed site, and no other site is known to hold the data. Call it with data, "
            "or name them: return_sites=('x',)."
        )
    return observed


def observed_nodes(trace: Any, codes: Collection[str] = ()) -> dict[str, Node]:
    """The observed sites but the codes that were fixed, by the names the user gave them."""
    return {name: sample.node for name, sample in observed_samples(samples_of(trace)) if name not in codes}


def _check_event(name: str, node: Node) -> None:
    """Raises ValueError if a computed site in a plate is one event, as ``pyro.deterministic`` makes it by default."""
    value, frames = node["value"], [frame for frame in node["cond_indep_stack"] if frame.dim is not None]
    if frames and node["infer"].get("_deterministic") and node["fn"].event_dim == value.ndim:
        own = max(value.ndim - max(-frame.dim for frame in frames), 0)
        raise ValueError(
            f"The value of site '{name}' is one event for all data, and which of its dimensions are the data is not "
            f"known. Write pyro.deterministic('{name}', value, event_dim={own}) in the model."
        )


def computed_nodes(trace: Any) -> dict[str, Node]:
    """The sites of ``pyro.deterministic``."""
    sites = ((name, site) for name, site in trace.nodes.items() if site["type"] == "sample")
    return {name: site for name, site in sites if site["infer"].get("_deterministic")}


def check_return_sites(return_sites: Sequence[str], known: Mapping[str, Any], drawn: Collection[str] = ()) -> None:
    """Raises ValueError if a name is not among the known sites, or there is none, and TypeError for other things."""
    is_names = isinstance(return_sites, Sequence | Set) and not isinstance(return_sites, str | bytes)
    checks.accepted("return_sites", return_sites, is_names, "a tuple of names", write="return_sites=('x',)")
    unknown = [name for name in return_sites if name not in known]
    if unknown and unknown[0] in drawn:
        raise ValueError(
            f"return_sites names '{unknown[0]}', which is not observed in this call, and is not reconstructed. Write "
            f"decode(model, encode(model, guide, x), x, return_sites=('{unknown[0]}',)), with the same arguments."
        )
    if unknown or not return_sites:
        found = f"names '{unknown[0]}', which is not among the sites {list(known)}" if unknown else "is empty"
        raise ValueError(f"return_sites {found}. Write return_sites=('{next(iter(known), 'x')}',).")


def site_values(sites: Mapping[str, Node], latents: Collection[str], random: bool) -> dict[str, Tensor]:
    """Of latent sites the values that a run has used, of others the means; with ``random`` draws, of the same run."""
    checks.flag("random", random)
    return {
        name: site["value"]
        if name in latents or (random and is_random(site))
        else site_output(name, site["fn"], random)
        for name, site in sites.items()
    }


def site_output(name: str, fn: Any, random: bool) -> Tensor:
    """The mean of a site's distribution, or a draw.

    Raises:
        ValueError: If it has no mean to take for the generator's output.
    """
    if checks.flag("random", random):
        with torch.no_grad():
            return fn()
    try:
        return mean_of(fn, takes_angles=True).detach().expand(fn.shape())
    except ValueError as error:
        raise ValueError(
            f"The distribution of site '{name}' ({family(fn)}) has no mean to take as the generator's output: none "
            "that is finite, inside the support, and not of a mixture of angles. Write random=True for a draw instead."
        ) from error
