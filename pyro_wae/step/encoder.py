"""The encoder's distribution of each datum's code: its variances, and its divergence from the prior."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_wae._core.distributions import innermost, own_methods
from pyro_wae._core.rows import Site, at_least_float32, side_by_side
from pyro_wae.step.program import Run, is_random, layers, subsample_scales


def variances(run: Run, names: Iterable[str]) -> Tensor:
    """The variance that the guide gives each number of a code, shape (K, n, d).

    Raises:
        ValueError: If the guide is deterministic at a site, or a variance is not known.
    """
    rows = {}
    for name in names:
        site, node = run.latents[name], run.guide.nodes[name]
        variance = _variance(run, site, node["fn"]).expand(node["value"].shape)
        rows[name] = site.rows(variance, node["fn"].event_dim)
    return side_by_side(rows, {})[0]


def divergence(run: Run, names: Iterable[str]) -> Tensor:
    """KL(q(z | x), p(z)) of each datum, the sum over latent sites of that given the sites before.

    In closed form where torch knows one, otherwise log q(z | x) - log p(z) at the code, whose mean it is.

    Args:
        run: A run of guide and model.
        names: The latent sites.

    Returns:
        Shape (K, n). A masked element counts 0.

    Raises:
        ValueError: If the guide is deterministic at a site, or a density is not known.
    """
    # Where guide and model draw sites in other orders, what one is conditional on is drawn later in the other.
    in_order = [name for name in run.guide.nodes if name in run.latents] == list(run.latents)
    return torch.stack([_of_site(run, name, in_closed_form=in_order) for name in names]).sum(0)


def _of_site(run: Run, name: str, *, in_closed_form: bool) -> Tensor:
    site, encoder = run.latents[name], run.guide.nodes[name]["fn"]
    if isinstance(innermost(encoder), dist.Delta):
        raise ValueError(
            f"{_as_a_point(run, name)}: a Delta has no density to compare with the prior's. Leave PosteriorKL out, or "
            "write dist.Normal(loc, scale) in the guide, or AutoNormalMessenger(model)."
        )
    if len({_has_mask(fn) for fn in (encoder, site.distribution)}) > 1:
        raise ValueError(
            f"At site '{name}' one distribution of guide and model has a mask of its own, under which its density "
            "is left out, and the other has none. Write .mask(mask) in both, or poutine.mask(mask=mask) around both."
        )
    values = _between(name, encoder, site.distribution, site.value, in_closed_form=in_closed_form)
    if site.mask is not None:
        kept = site.mask.expand(site.value.shape)
        values = values.where(kept.flatten(kept.ndim - site.event_dim).any(-1) if site.event_dim else kept, 0.0)
    rows = site.rows(at_least_float32(values) * subsample_scales(run.model.nodes[name], run.plate)[1], 0)
    return rows.flatten(2).sum(2) if rows.ndim > 2 else rows


def _has_mask(fn: Any) -> bool:
    return any(isinstance(layer, dist.MaskedDistribution) for layer in layers(fn))


def _between(name: str, encoder: Any, prior: Any, code: Tensor, *, in_closed_form: bool) -> Tensor:
    if in_closed_form and not any(own_methods(part.__class__) for fn in (encoder, prior) for part in layers(fn)):
        try:
            return kl_divergence(encoder, prior)
        except NotImplementedError:
            pass
    try:
        return encoder.log_prob(code) - prior.log_prob(code)
    except (NotImplementedError, KeyError) as error:  # KeyError: of Pyro's flows, for a value that they have not drawn
        raise ValueError(
            f"PosteriorKL needs the densities of guide and prior at site '{name}', and {type(encoder).__name__} or "
            f"{type(prior).__name__} has no log_prob. Take MMD() alone, which needs draws."
        ) from error


def _variance(run: Run, site: Site, guide: Any) -> Tensor:
    inner = innermost(guide)
    if isinstance(inner, dist.Delta):
        raise ValueError(
            f"{_as_a_point(run, site.name)}: a Delta has no variance to guard. Leave the guard out, or write "
            "dist.Normal(loc, scale) in the guide."
        )
    try:
        return guide.variance
    except NotImplementedError as error:
        raise ValueError(
            f"The guide's {type(inner).__name__} at site '{site.name}' has no variance in closed form, which the guard "
            "needs. Write dist.Normal(loc, scale) in the guide."
        ) from error


def _as_a_point(run: Run, name: str) -> str:
    """Of a Delta in the guide: that the guide is deterministic, or what its point is computed from."""
    nodes = run.guide.nodes.items()
    noise = [f"'{other}'" for other, node in nodes if is_random(node) and node["infer"].get("is_auxiliary")]
    if noise:
        return f"The guide computes the code of site '{name}' (Delta) from {', '.join(noise)}, as in AutoNormal"
    return f"The guide is deterministic at site '{name}' (Delta)"
