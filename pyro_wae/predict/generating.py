"""Decoded codes, reconstructions and samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_wae._core import checks
from pyro_wae._core.distributions import distribution_of, drawn, is_discrete, with_own_total
from pyro_wae._core.rows import Site
from pyro_wae.predict.dependence import latent_among
from pyro_wae.predict.runs import (
    Node,
    check_return_sites,
    computed_nodes,
    encoded_run,
    output_nodes,
    run_model,
    site_output,
    site_values,
)
from pyro_wae.predict.support import DrawsInSupport
from pyro_wae.step.prior import ReplaySubsamples
from pyro_wae.step.program import Program, find_data_plate, is_imputed, is_random, layout


def decode(
    model: Program,
    codes: Mapping[str, Tensor] | Tensor,
    *args: Any,
    return_sites: Sequence[str] | None = None,
    random: bool = False,
    data_plate: str | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Decodes codes: runs the model with its latent sites fixed to them.

    A latent site that is not given is drawn from its prior, given those before it: with the prior ``z1``, ``z2 | z1``,
    a ``z1`` alone returns variations on it. Nothing here has a gradient: to optimise a code, call the decoder itself.

    Args:
        model: The Pyro model.
        codes: A value for each latent site in the site's own shape, as :func:`encode` returns them, for any number
            of data; or the tensor alone, where the model has one latent site.
        args: Arguments of the model. Data determine the number of codes in a run, and a conditional generator reads
            them. With more codes than data the model runs repeatedly, and starts again from the first datum.
        return_sites: Names of the sites to return, as in :func:`sample`.
        random: Whether to draw from the observed site's distribution instead of taking its mean.
        data_plate: Name of the plate that holds the data; found if not given.
        kwargs: Keyword arguments of the model.

    Returns:
        For each observed site its output G(z), in the site's own shape with as many data as there are codes.

    Raises:
        ValueError: If a name is not a latent site, the codes have different numbers of data, or an observed site has no
            mean.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1).to_event(1))
        ...         pyro.sample("x", dist.Normal(2 * z, 1).to_event(1), obs=x)
        >>> decode(model, {"z": torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])}, torch.zeros(2, 2))
        {'x': tensor([[2., 0.],
                [0., 2.],
                [2., 2.]])}
    """
    first = run_model(model, args, kwargs)
    nodes = first.nodes
    latents = [name for name in nodes if is_random(nodes[name]) and not is_imputed(name, nodes)]
    if isinstance(codes, Tensor):
        if len(latents) != 1:
            raise ValueError(f"The model has the latent sites {latents}: name them, as in codes={{'z': z}}.")
        codes = {latents[0]: codes}
    what, write = "a tensor, or a dict of them by latent site", "codes={'z': z}"
    checks.instance("codes", codes, Mapping, what, write=write)
    unknown = [name for name in codes if name not in latents]
    if unknown or not codes:
        found = f"names '{unknown[0]}', which is no latent site of the model" if unknown else "is empty"
        raise ValueError(
            f"codes {found}; these are {latents}. Write codes={{'{latents[0] if latents else 'z'}': ...}}."
        )
    plate = find_data_plate(
        [first.nodes[name] for name in codes], list(output_nodes(first, return_sites).values()), data_plate
    )
    dims = {name: _data_dim(first.nodes[name], plate) for name in codes}
    counts = {name: _size(value, first.nodes[name], dims[name]) for name, value in codes.items()}
    count = next(iter(counts.values()))
    if len(set(counts.values())) > 1 or count == 0:
        raise ValueError(
            f"Each site's codes must be of the same number of data, at least 1, found {counts}. "
            "Give a row for each datum."
        )
    shape, dim, _ = layout(first.nodes[next(iter(codes))], plate)
    size = shape[dim]
    read = set(codes)
    parts: list[dict[str, Tensor]] = []
    joins: dict[str, int] = {}
    for start in range(0, count, size):
        chosen = {
            name: value.index_select(dims[name], torch.arange(start, start + size, device=value.device) % count)
            for name, value in codes.items()
        }
        # As in `sample`: other data, but no other parts of a datum.
        fixed = poutine.condition(model, data=chosen)
        with ReplaySubsamples(first, leave_out=plate):
            trace = run_model(fixed, args, kwargs)
        sites = output_nodes(trace, return_sites, codes=codes)
        if not parts and not checks.flag("random", random):
            read |= latent_among(sites, trace, fixed, args, kwargs, codes)
        parts.append(site_values(sites, read, random))
        joins = {name: _data_dim(site, plate) for name, site in sites.items()}
    return _join(parts, joins, count)


def reconstruct(
    model: Program,
    guide: Program,
    *args: Any,
    return_sites: Sequence[str] | None = None,
    random: bool = False,
    data_plate: str | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Reconstructs data: encodes them, and decodes their codes.

    Where the data plate takes a subsample, only that subsample is reconstructed: pass its indices to the model.

    Args:
        model: The Pyro model.
        guide: Its guide.
        args: Arguments of both.
        return_sites: Names of the sites to return; None returns the observed ones. ``pyro.deterministic`` and latent
            sites may be named: their values are those that the others come from.
        random: Whether to draw from the observed site's distribution instead of taking its mean.
        data_plate: Name of the plate that holds the data; found if not given.
        kwargs: Keyword arguments of both.

    Returns:
        For each observed site its output G(z), in the shape of the site's data.

    Raises:
        ValueError: If model and guide do not fit a WAE, or an observed site has no mean.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0, 1))
        ...         pyro.sample("x", dist.Normal(torch.stack([z, z], -1), 1).to_event(1), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Delta(x.mean(1)))
        >>> reconstruct(model, guide, torch.tensor([[1.0, 3.0]]))
        {'x': tensor([[2., 2.]])}
    """
    encoded = encoded_run(model, guide, args, kwargs, data_plate)
    names = list(output_nodes(encoded.model)) if return_sites is None else return_sites
    # What ``obs_mask`` has made of data and draws is computed, too.
    computed = {name: node["value"] for name, node in computed_nodes(encoded.model).items()}
    known = {**{name: site.value for name, site in encoded.latents.items()}, **computed}
    # Drawn in a run of the model, and no output of the codes.
    drawn = [name for name, node in encoded.model.nodes.items() if is_random(node) and name not in known]
    check_return_sites(names, {**encoded.observed, **known}, drawn)
    return {
        name: _reconstruction(encoded.observed[name], random) if name in encoded.observed else known[name]
        for name in names
    }


def sample(
    model: Program,
    *args: Any,
    num_samples: int | None = None,
    prior: Any = None,
    return_sites: Sequence[str] | None = None,
    random: bool = False,
    data_plate: str | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Samples the model: decodes prior samples.

    The model runs without its guide. Called with data, ``obs=x``, it returns as many samples as there are data; their
    values have no effect, unless prior or generator are conditional on them. A model that can run without data,
    ``obs=None``, may be called so: ``return_sites`` then names the sites that hold the data.

    Args:
        model: The Pyro model.
        args: Arguments of the model.
        num_samples: Number of samples; the model runs as often as needed. None returns those of one run.
        prior: Replaces the model's own prior: one fitted by :func:`pyro_wae.priors.fit`, a
            distribution of one code, or a module whose call returns one, such as a flow of zuko. A draw is a row of
            :func:`code_rows`: all latent sites, joined in the order of the model; or those that are not discrete, if
            they have the size of a draw. The model draws the others. Draws outside the support of a site are decoded,
            with a warning.
        return_sites: Names of the sites to return; None returns the observed ones. ``pyro.deterministic`` and latent
            sites may be named: their values are those that the others come from. An unobserved site is latent if an
            observed site follows it or a later site depends on its value; otherwise it holds data, and its mean is
            returned. A site with ``obs_mask`` is observed; ``x_unobserved`` is the name of its imputed values.
        random: Whether to draw from the site's distribution instead of taking its mean.
        data_plate: Name of the plate that holds the data; found if not given.
        kwargs: Keyword arguments of the model.

    Returns:
        For each observed site its output G(z), in the site's own shape with ``num_samples`` data.

    Raises:
        ValueError: If there is no such site, ``num_samples`` is below 1, a site has no mean, or draws of ``prior``
            have another size than the codes.
        TypeError: If ``prior`` is neither a distribution nor a module whose call returns one.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1).to_event(1))
        ...         pyro.sample("x", dist.Normal(2 * z, 1).to_event(1), obs=x)
        >>> sample(model, torch.zeros(10, 2), num_samples=25)["x"].shape
        torch.Size([25, 2])
        >>> sample(model, torch.zeros(10, 2), num_samples=2, prior=dist.Delta(torch.tensor([1.0, 3.0]), event_dim=1))
        {'x': tensor([[2., 6.],
                [2., 6.]])}
    """
    if num_samples is not None:
        num_samples = checks.whole("num_samples", num_samples, write="num_samples=100")
    if data_plate is not None:
        checks.text("data_plate", data_plate, "a plate's name", write="data_plate='data'")
    trace = run_model(model, args, kwargs)
    sites = output_nodes(trace, return_sites)
    known_by_draw = checks.flag("random", random) and prior is None
    latents = set() if known_by_draw else latent_among(sites, trace, model, args, kwargs)
    if prior is not None:
        outputs = {name: site for name, site in sites.items() if name not in latents}
        codes = _codes_of(prior, trace, outputs, num_samples, data_plate)
        options: dict[str, Any] = {"return_sites": return_sites, "random": random, "data_plate": data_plate}
        with DrawsInSupport(codes):
            return decode(model, codes, *args, **options, **kwargs)
    parts = [site_values(sites, latents, random)]
    if num_samples is None:
        return parts[0]
    nodes = trace.nodes.items()
    inside = [site for name, site in nodes if is_random(site) and name not in sites and site["cond_indep_stack"]]
    plate = find_data_plate(inside, list(sites.values()), data_plate)
    joins = {name: _data_dim(site, plate) for name, site in sites.items()}
    while _total(parts, joins) < num_samples:
        # A run may take other data, but not other parts of a datum, which could not be joined.
        with ReplaySubsamples(trace, leave_out=plate):
            again = run_model(model, args, kwargs)
        parts.append(site_values(output_nodes(again, return_sites), latents, random))
    return _join(parts, joins, num_samples)


@torch.no_grad()
def _codes_of(
    prior: Any, trace: Any, outputs: Mapping[str, Node], count: int | None, data_plate: str | None
) -> dict[str, Tensor]:
    """Draws of a prior of whole codes, as the values of a model's latent sites."""
    latents = {
        name: node
        for name, node in trace.nodes.items()
        if is_random(node) and not is_imputed(name, trace.nodes) and name not in outputs
    }
    # One of the model alone may be drawn once for all data; a code is not.
    latents = {name: node for name, node in latents.items() if node["cond_indep_stack"]} or latents
    plate = find_data_plate(list(latents.values()), list(outputs.values()), data_plate)
    sites = {name: Site(name, node["fn"], node["value"], *layout(node, plate)) for name, node in latents.items()}
    if count is None:
        shape, dim, _ = layout(next(iter({**outputs, **latents}.values())), plate)
        count = shape[dim]
    write = "sample(model, x, prior=priors.fit(model, guide, x, prior=MixturePrior(100, {d})))"
    draws = drawn(distribution_of(prior, write=write.format(d="d")), count).reshape(count, -1)
    sizes = {name: site.value_rows()[0, 0].numel() for name, site in sites.items()}
    d, total = draws.shape[1], sum(sizes.values())
    # The guide samples no indicator of a mixture, which the model draws.
    chosen = [site for site in sites.values() if d == total or not is_discrete(site.distribution)]
    parts = [sizes[site.name] for site in chosen]
    if sum(parts) != d:
        raise ValueError(
            f"prior draws codes of size {d}, and those of the model's latent sites {sizes} have size {total} together. "
            f"Write {write.format(d=total)}."
        )
    rows = zip(chosen, draws.split(parts, 1), strict=True)
    return {site.name: site.unrows(part[None], site.distribution.event_shape).to(site.value) for site, part in rows}


def _reconstruction(site: Site, random: bool) -> Tensor:
    output = site_output(site.name, site.distribution, random)
    return output if random else with_own_total(site.distribution, output, site.value)


def _data_dim(node: Node, plate: str) -> int:
    return layout(node, plate)[1] - node["fn"].event_dim


def _size(value: Tensor, node: Node, dim: int) -> int:
    """The number of data of a site's codes, along dimension `dim`; all other dimensions are the site's own."""
    name = node["name"]
    checks.tensor(f"codes of site '{name}'", value, write=f"codes={{'{name}': z}}")
    shape = list(node["value"].shape)
    if value.ndim == len(shape):
        shape[dim] = value.shape[dim]
    if list(value.shape) != shape:
        raise ValueError(
            f"The codes of site '{name}' have shape {tuple(value.shape)}, and the site has "
            f"{tuple(node['value'].shape)} with the data along dimension {dim}. Give them in the site's own shape, as "
            "encode(model, guide, ...) does."
        )
    return value.shape[dim]


def _total(parts: Sequence[Mapping[str, Tensor]], dims: Mapping[str, int]) -> int:
    name, dim = next(iter(dims.items()))
    return sum(part[name].shape[dim] for part in parts)


def _join(parts: Sequence[Mapping[str, Tensor]], dims: Mapping[str, int], count: int) -> dict[str, Tensor]:
    joined = {name: torch.cat([part[name] for part in parts], dim) for name, dim in dims.items()}
    return {name: value.narrow(dims[name], 0, count) for name, value in joined.items()}
