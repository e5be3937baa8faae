"""What a trained model and guide give: codes, reconstructions, new data and the way between two data.

Every function takes model and guide as ``SVI`` does, and what they are called with. Results are dicts by site name,
as those of ``pyro.infer.Predictive``. Nothing has a graph, no log_prob is computed, and BatchNorm's statistics stay as
they are. Modules run in the mode they are in: call ``.eval()`` on them first, if that is what you want.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from pyro import poutine
from torch import Tensor

from pyro_wae._core import checks
from pyro_wae._core.batch_norm import batch_norm_at_rest
from pyro_wae._core.sites import Site
from pyro_wae.costs import generator_output, with_own_total
from pyro_wae.step.observe import Observer
from pyro_wae.step.plates import find_data_plate, layout
from pyro_wae.step.program import Program, ReplaySubsamples, Run, is_random, observed_nodes, run

__all__ = ["code_rows", "decode", "encode", "interpolate", "reconstruct", "sample"]

Path = Literal["linear", "spherical"]
Node = Mapping[str, Any]


def encode(
    model: Program, guide: Program, *args: Any, data_plate: str | None = None, **kwargs: Any
) -> dict[str, Tensor]:
    """Gives the codes of data, one draw of the guide for each datum.

    Args:
        model: The Pyro model; it says which of the guide's sites are codes.
        guide: Its guide, the encoder.
        args: Arguments of both.
        data_plate: Name of the plate that holds the data; found as :class:`~pyro_wae.WAELoss` finds it if not given.
        kwargs: Keyword arguments of both.

    Returns:
        The value of each latent site in the site's own shape, as :func:`decode` takes it.

    Raises:
        ValueError: If model and guide do not fit a WAE.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1).to_event(1))
        ...         pyro.sample("x", dist.Normal(2 * z, 1).to_event(1), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Delta(x / 2).to_event(1))
        >>> encode(model, guide, torch.tensor([[2.0, 4.0]]))
        {'z': tensor([[1., 2.]])}
    """
    encoded = _encoded(model, guide, args, kwargs, data_plate)
    return {name: site.value for name, site in encoded.latents.items()}


def code_rows(
    model: Program,
    guide: Program,
    *args: Any,
    site: str | None = None,
    prior_draws: int = 1,
    data_plate: str | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Gives codes and prior draws as the rows that a penalty compares.

    Masked data are left out, other masked elements are 0 in both. It is what two-sample tests and
    :func:`~pyro_wae.plotting.codes_and_prior` take.

    Args:
        model: The Pyro model.
        guide: Its guide.
        args: Arguments of both.
        site: The latent site; None sets all of them side by side, in the order of the model.
        prior_draws: Prior draws for each code.
        data_plate: Name of the plate that holds the data; found if not given.
        kwargs: Keyword arguments of both.

    Returns:
        Codes, shape (n, d), and prior draws, shape (n * prior_draws, d).

    Raises:
        ValueError: If there is no such site, ``prior_draws`` is below 1, or model and guide do not fit a WAE.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Delta(x).to_event(1))
        >>> codes, prior = code_rows(model, guide, torch.randn(10, 2), prior_draws=3)
        >>> codes.shape, prior.shape
        (torch.Size([10, 2]), torch.Size([30, 2]))
    """
    draws = checks.whole("prior_draws", prior_draws)
    with torch.no_grad(), batch_norm_at_rest():
        step = Observer(model, guide, data_plate=data_plate, prior_draws=draws).observe(args, kwargs)
    if site is not None:
        step = step.part([checks.choice("site", site, step.columns)])
    codes, prior = step.rows()
    assert prior is not None  # there are draws
    return codes[0], prior


def decode(
    model: Program,
    codes: Mapping[str, Tensor] | Tensor,
    *args: Any,
    return_sites: Sequence[str] | None = None,
    random: bool = False,
    data_plate: str | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Gives what the generator makes of codes.

    The model runs with its latent sites held at the codes. A latent site that is not given is drawn from its prior,
    given those before it: for ``z1`` then ``z2 | z1``, a ``z1`` alone gives variations on it.

    Args:
        model: The Pyro model.
        codes: A value for each latent site in the site's own shape, as :func:`encode` gives them, for any number of
            data; or the tensor alone, where the model has one latent site.
        args: Arguments of the model. Of data, the number is used, and whatever the generator sees of them. With more
            or fewer codes than data the model runs as often as it must, and takes the data from the first again.
        return_sites: Names of the sites to give; None takes the observed ones.
        random: Whether to draw from the observed site's distribution instead of taking its mean.
        data_plate: Name of the plate that holds the data; found if not given.
        kwargs: Keyword arguments of the model.

    Returns:
        For each observed site its output G(z), in the site's own shape with as many data as there are codes.

    Raises:
        ValueError: If a name is no latent site, the codes have different numbers of data, or an observed site has
            no mean.

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
    first = _run_model(model, args, kwargs)
    latents = [name for name, site in first.nodes.items() if is_random(site)]
    if isinstance(codes, Tensor):
        if len(latents) != 1:
            raise ValueError(f"The model has the latent sites {latents}: name them, as in codes={{'z': z}}.")
        codes = {latents[0]: codes}
    unknown = [name for name in codes if name not in latents]
    if unknown or not codes:
        found = f"names '{unknown[0]}', which is no latent site of the model" if unknown else "is empty"
        raise ValueError(
            f"codes {found}; these are {latents}. Write codes={{'{latents[0] if latents else 'z'}': ...}}."
        )
    plate = find_data_plate(
        [first.nodes[name] for name in codes], list(_outputs(first, return_sites).values()), data_plate
    )
    dims = {name: _data_dim(first.nodes[name], plate) for name in codes}
    counts = {name: _size(value, dims[name], name) for name, value in codes.items()}
    count = next(iter(counts.values()))
    if len(set(counts.values())) > 1 or count == 0:
        raise ValueError(f"Each site's codes must be of the same number of data, at least 1, found {counts}.")
    shape, dim, _ = layout(first.nodes[next(iter(codes))], plate)
    size = shape[dim]
    parts, joins = [], {}
    for start in range(0, count, size):
        index = torch.arange(start, start + size) % count
        chosen = {name: value.index_select(dims[name], index.to(value.device)) for name, value in codes.items()}
        trace = _run_model(poutine.condition(model, data=chosen), args, kwargs)
        sites = _outputs(trace, return_sites, leave_out=codes)
        parts.append({name: _output(name, site["fn"], random) for name, site in sites.items()})
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
    """Gives what the generator makes of the codes of data.

    Of a plate that takes a subsample, this is a subsample too: fix it in the model to know which data they are.

    Args:
        model: The Pyro model.
        guide: Its guide.
        args: Arguments of both.
        return_sites: Names of the sites to give; None takes the observed ones.
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
    encoded = _encoded(model, guide, args, kwargs, data_plate)
    names = list(encoded.observed) if return_sites is None else return_sites
    _check_names(names, encoded.observed)
    return {name: _reconstruction(encoded.observed[name], random) for name in names}


def sample(
    model: Program,
    *args: Any,
    num_samples: int | None = None,
    return_sites: Sequence[str] | None = None,
    random: bool = False,
    data_plate: str | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Gives new data: what the generator makes of draws of the prior.

    The model runs without its guide. One that is called with data, ``obs=x``, gives one new datum for each; what the
    data hold does not matter, unless prior or generator depend on them. A model that can run without data,
    ``obs=None``, may be run so: then ``return_sites`` says which of its sites are the data.

    Args:
        model: The Pyro model.
        args: Arguments of the model.
        num_samples: Number of new data; the model runs as often as it must. None gives as many as one run does.
        return_sites: Names of the sites to give; None takes the observed ones.
        random: Whether to draw from the site's distribution instead of taking its mean.
        data_plate: Name of the plate that holds the data; found if not given.
        kwargs: Keyword arguments of the model.

    Returns:
        For each observed site its output G(z), in the site's own shape with ``num_samples`` data.

    Raises:
        ValueError: If there is no such site, ``num_samples`` is below 1, or a site has no mean.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1).to_event(1))
        ...         pyro.sample("x", dist.Normal(2 * z, 1).to_event(1), obs=x)
        >>> sample(model, torch.zeros(10, 2), num_samples=25)["x"].shape
        torch.Size([25, 2])
    """
    if num_samples is not None:
        num_samples = checks.whole("num_samples", num_samples, write="num_samples=100")
    parts: list[dict[str, Tensor]] = []
    joins: dict[str, int] = {}
    while not parts or (num_samples is not None and _total(parts, joins) < num_samples):
        trace = _run_model(model, args, kwargs)
        sites = _outputs(trace, return_sites)
        parts.append({name: _output(name, site["fn"], random) for name, site in sites.items()})
        if num_samples is not None and not joins:
            inside = [
                site
                for site in trace.nodes.values()
                if is_random(site) and site["name"] not in sites and site["cond_indep_stack"]
            ]
            plate = find_data_plate(inside, list(sites.values()), data_plate)
            joins = {name: _data_dim(site, plate) for name, site in sites.items()}
    return parts[0] if num_samples is None else _join(parts, joins, num_samples)


def interpolate(
    model: Program,
    guide: Program,
    x_a: Any,
    x_b: Any,
    steps: int = 8,
    *,
    path: Path = "linear",
    return_sites: Sequence[str] | None = None,
    random: bool = False,
    data_plate: str | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    r"""Gives what lies between the codes of two batches of data, datum by datum.

    Along the ``"linear"`` path at t the code is ``(1 - t) a + t b``. Draws of a normal prior in many dimensions have
    nearly one norm, below which a straight line sinks half-way: the ``"spherical"`` path turns from the direction of a
    to that of b at an even pace, and its norm goes evenly from ``|a|`` to ``|b|``, at each site by itself. It stays on
    a sphere that holds both.

    Args:
        model: The Pyro model.
        guide: Its guide.
        x_a: Where to start: the data, or a tuple of all arguments of model and guide.
        x_b: Where to end, likewise, for as many data.
        steps: Number of outputs, the two ends included, >= 2.
        path: ``"linear"`` or ``"spherical"``.
        return_sites: Names of the sites to give; None takes the observed ones.
        random: Whether to draw from the observed site's distribution instead of taking its mean.
        data_plate: Name of the plate that holds the data; found if not given.
        kwargs: Keyword arguments of model and guide.

    Returns:
        For each observed site the outputs in the shape ``(steps, *shape of the site's data)``.

    Raises:
        ValueError: If ``steps`` is below 2, the path is unknown, the codes of the two batches differ in shape, or
            model and guide do not fit a WAE.

    Source: for the spherical path Shoemake, "Animating Rotation with Quaternion Curves", 1985,
    doi:10.1145/325165.325242; White, "Sampling Generative Networks", 2016, arXiv:1609.04468.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Delta(x).to_event(1))
        >>> interpolate(model, guide, torch.tensor([[0.0, 2.0]]), torch.tensor([[4.0, 2.0]]), 3)["x"]
        tensor([[[0., 2.]],
        <BLANKLINE>
                [[2., 2.]],
        <BLANKLINE>
                [[4., 2.]]])
    """
    steps = checks.whole("steps", steps, least=2, write="steps=8")
    checks.choice("path", path, _PATHS)
    args_a, args_b = (x if isinstance(x, tuple) else (x,) for x in (x_a, x_b))
    start = _encoded(model, guide, args_a, kwargs, data_plate)
    end = _encoded(model, guide, args_b, kwargs, data_plate)
    ends = {}
    for name, site in start.latents.items():
        a, b = site.value, end.latents[name].value
        if a.shape != b.shape:
            raise ValueError(
                f"x_a and x_b must give codes of one shape, but those of site '{name}' have {tuple(a.shape)} and "
                f"{tuple(b.shape)}. Take as many data in both."
            )
        ends[name] = a, b, site.value_dim
    outputs = []
    for step in range(steps):
        codes = {name: _PATHS[path](a, b, step / (steps - 1), dim) for name, (a, b, dim) in ends.items()}
        with ReplaySubsamples(start.model):
            trace = _run_model(poutine.condition(model, data=codes), args_a, kwargs)
        sites = _outputs(trace, return_sites, leave_out=codes)
        outputs.append({name: _output(name, site["fn"], random) for name, site in sites.items()})
    return {name: torch.stack([output[name] for output in outputs]) for name in outputs[0]}


def _encoded(
    model: Program, guide: Program, args: Sequence[Any], kwargs: Mapping[str, Any], data_plate: str | None
) -> Run:
    with torch.no_grad(), batch_norm_at_rest():
        return run(model, guide, args, kwargs, max_plate_nesting=math.inf, data_plate=data_plate)


def _run_model(model: Program, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    with torch.no_grad(), batch_norm_at_rest():
        return poutine.trace(model).get_trace(*args, **kwargs)


def _outputs(
    trace: Any, return_sites: Sequence[str] | None = None, *, leave_out: Mapping[str, Any] | None = None
) -> dict[str, Node]:
    """The sites that hold data, by the names the user gave them."""
    observed = {name: node for name, node in observed_nodes(trace) if name not in (leave_out or ())}
    if return_sites is not None:
        known = {name: site for name, site in trace.nodes.items() if is_random(site)} | observed
        _check_names(return_sites, known)
        return {name: known[name] for name in return_sites}
    if not observed:
        raise ValueError(
            "The model has no observed site, so that nothing says which of its sites are the data. Call it with data, "
            "or name them: return_sites=('x',)."
        )
    return observed


def _check_names(return_sites: Sequence[str], known: Mapping[str, Any]) -> None:
    unknown = [name for name in return_sites if name not in known]
    if unknown or not return_sites:
        found = f"names '{unknown[0]}', which is not among the sites {list(known)}" if unknown else "is empty"
        raise ValueError(f"return_sites {found}. Write return_sites=('{next(iter(known), 'x')}',).")


def _reconstruction(site: Site, random: bool) -> Tensor:
    output = _output(site.name, site.distribution, random)
    return output if random else with_own_total(site.distribution, output, site.value)


def _output(name: str, fn: Any, random: bool) -> Tensor:
    if random:
        with torch.no_grad():
            return fn()
    try:
        return generator_output(fn).detach().expand(fn.shape())
    except ValueError as error:
        raise ValueError(
            f"The distribution of site '{name}' ({type(fn).__name__}) has no finite mean to take as the generator's "
            "output. Write random=True for a draw instead."
        ) from error


def _data_dim(node: Node, plate: str) -> int:
    return layout(node, plate)[1] - node["fn"].event_dim


def _size(value: Tensor, dim: int, name: str) -> int:
    if value.ndim < -dim:
        raise ValueError(
            f"The codes of site '{name}' have shape {tuple(value.shape)}, without dimension {dim}, that of the data. "
            "Give them in the site's own shape, as encode(model, guide, ...) does."
        )
    return value.shape[dim]


def _total(parts: Sequence[Mapping[str, Tensor]], dims: Mapping[str, int]) -> int:
    name, dim = next(iter(dims.items()))
    return sum(part[name].shape[dim] for part in parts)


def _join(parts: Sequence[Mapping[str, Tensor]], dims: Mapping[str, int], count: int) -> dict[str, Tensor]:
    joined = {name: torch.cat([part[name] for part in parts], dim) for name, dim in dims.items()}
    return {name: value.narrow(dims[name], 0, count) for name, value in joined.items()}


def _straight(a: Tensor, b: Tensor, t: float, dim: int) -> Tensor:
    return (1 - t) * a + t * b


def _great_circle(a: Tensor, b: Tensor, t: float, dim: int) -> Tensor:
    shape = a.movedim(dim, 0).shape
    rows_a, rows_b = (x.movedim(dim, 0).flatten(1) if x.ndim > 1 else x[:, None] for x in (a, b))
    norm_a, norm_b = rows_a.norm(dim=1, keepdim=True), rows_b.norm(dim=1, keepdim=True)
    unit_a, unit_b = rows_a / norm_a, rows_b / norm_b
    # By the half chord, because the arc cosine loses half the digits of a small angle.
    angle = 2 * torch.atan2((unit_a - unit_b).norm(dim=1, keepdim=True), (unit_a + unit_b).norm(dim=1, keepdim=True))
    sine = angle.sin()
    turned = (((1 - t) * angle).sin() * unit_a + (t * angle).sin() * unit_b) / sine
    turned = turned * ((1 - t) * norm_a + t * norm_b)
    # Two codes on one line through 0, or one at 0, have no great circle between them.
    straight = _straight(rows_a, rows_b, t, 0)
    return torch.where(sine > 1e-6, turned, straight).reshape(shape).movedim(0, dim)


_PATHS: dict[str, Callable[[Tensor, Tensor, float, int], Tensor]] = {"linear": _straight, "spherical": _great_circle}
