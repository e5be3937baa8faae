"""Gathers for a penalty what is known of the codes and the prior beyond their draws."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
from torch import Tensor

from pyro_wae._core.distributions import innermost
from pyro_wae.penalties import PenaltyContext
from pyro_wae.step.prior import prior_log_prob, prior_of_one_code
from pyro_wae.step.program import Particle, Structure
from pyro_wae.step.records import Codes

__all__ = ["penalty_context"]


def penalty_context(particles: Sequence[Particle], structure: Structure, codes: Codes) -> PenaltyContext:
    """Gathers what is known of the codes at some or all latent sites.

    Args:
        particles: The runs of this step.
        structure: What their sites are.
        codes: The codes that the penalty receives, before masked data are left out.
    """
    sites = list(codes.columns)
    # Under a mask or for a part of the sites, the rows are not draws of the model's joint prior any more.
    is_whole = codes.kept is None and sites == list(structure.latents)
    prior, log_prob = None, None
    if is_whole:
        log_prob = functools.partial(prior_log_prob, particles=particles, structure=structure, codes=codes)
    if is_whole and not structure.prior_varies:
        prior = functools.partial(prior_of_one_code, particles[0], sites[0], structure.latents[sites[0]])
    return PenaltyContext(
        data_size=structure.data_size,
        shared_data=codes.kept is not None or structure.prior_varies,
        prior=prior,
        prior_log_prob=log_prob,
        encoder_variance=functools.partial(_encoder_variance, particles, structure, codes),
        sites=codes.columns,
        kept=codes.kept_rows,
    )


def _encoder_variance(particles: Sequence[Particle], structure: Structure, codes: Codes) -> Tensor:
    parts = []
    for particle in particles:
        rows = {}
        for name in codes.columns:
            site = particle.guide.nodes[name]
            variance = _variance(name, site["fn"]).expand(site["value"].shape)
            rows[name] = structure.latents[name].rows(variance, site["fn"].event_dim)
        parts.append(Codes.of_sites(rows, {}))
    variances = Codes.stack(parts).values
    if codes.kept is None:
        return variances
    # A masked number counts as one of unit variance, at which every guard is 0.
    return codes.left(variances, 1).where(codes.left(codes.kept, 1), 1.0)


def _variance(name: str, fn: Any) -> Tensor:
    inner = innermost(fn)
    if isinstance(inner, dist.Delta):
        raise ValueError(
            f"The guide is deterministic at site '{name}' (Delta), so that there is no variance to guard. Leave the "
            "guard out, or write dist.Normal(loc, scale) in the guide."
        )
    try:
        return fn.variance
    except NotImplementedError as error:
        raise ValueError(
            f"The guide's {type(inner).__name__} at site '{name}' has no variance in closed form, which the guard "
            "needs. Write dist.Normal(loc, scale) in the guide."
        ) from error
