"""Latent codes of data, and interpolations between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pyro import poutine
from torch import Tensor

from pyro_wae._core import checks
from pyro_wae._core.batch_norm import batch_norm_at_rest
from pyro_wae._core.random_state import restored_random_state
from pyro_wae.predict.dependence import latent_among
from pyro_wae.predict.runs import encoded_run, output_nodes, run_model, site_values
from pyro_wae.step.observe import Observer
from pyro_wae.step.prior import ReplaySubsamples
from pyro_wae.step.program import Program

Path = Literal["linear", "spherical"]


def encode(
    model: Program, guide: Program, *args: Any, data_plate: str | None = None, **kwargs: Any
) -> dict[str, Tensor]:
    """Encodes data: the guide draws one latent code for each datum.

    Args:
        model: The Pyro model; its latent sites are the code.
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
    encoded = encoded_run(model, guide, args, kwargs, data_plate)
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
    """Returns codes and prior samples as rows, the form that a penalty compares.

    Two-sample tests and :func:`~pyro_wae.plotting.codes_and_prior` take these rows. Masked data are left out; other
    masked elements are 0 in both.

    Args:
        model: The Pyro model.
        guide: Its guide.
        args: Arguments of both.
        site: The latent site; None joins all of them, in the order of the model.
        prior_draws: Number of prior samples for each code.
        data_plate: Name of the plate that holds the data; found if not given.
        kwargs: Keyword arguments of both.

    Returns:
        Codes, shape (n, d), and prior samples, shape (n * prior_draws, d).

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
    r"""Decodes points on a path between the codes of two batches of data, datum by datum.

    On the ``"linear"`` path the code at t is ``(1 - t) a + t b``. Samples of a Normal prior in many dimensions have
    nearly the same norm, and a straight line between two of them passes through smaller norms. On the ``"spherical"``
    path the direction rotates from a to b at a constant rate, and the norm changes linearly from ``|a|`` to ``|b|``, at
    each site separately.

    Args:
        model: The Pyro model.
        guide: Its guide.
        x_a: The data at the start, or a tuple of all arguments of model and guide. All points are decoded with these.
        x_b: The data at the end, likewise; as many as at the start. What the decoder is conditional on must be that of
            the start.
        steps: Number of points on the path, both ends included, >= 2.
        path: ``"linear"`` or ``"spherical"``.
        return_sites: Names of the sites to return; None returns the observed ones. Latent sites, the codes on the
            path, may be named.
        random: Whether to draw from the observed site's distribution instead of taking its mean.
        data_plate: Name of the plate that holds the data; found if not given.
        kwargs: Keyword arguments of model and guide.

    Returns:
        For each observed site the decoded points, of shape ``(steps, *shape of the site's data)``.

    Raises:
        ValueError: If ``steps`` is below 2, the path is unknown, the codes of the two batches differ in shape, the
            decoder is conditional on arguments that differ between the ends, or model and guide do not fit a WAE.

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
    start = encoded_run(model, guide, args_a, kwargs, data_plate)
    subsample_of = None if start.data_size is None else start
    end = encoded_run(model, guide, args_b, kwargs, data_plate, subsample_of=subsample_of)
    ends = {}
    for name, site in start.latents.items():
        a, b = site.value, end.latents[name].value
        if a.shape != b.shape:
            raise ValueError(
                f"x_a and x_b must give codes of one shape, but those of site '{name}' have {tuple(a.shape)} and "
                f"{tuple(b.shape)}. Take as many data in both."
            )
        ends[name] = a, b, site.value_dim

    def decoded(t: float, args: tuple[Any, ...]) -> dict[str, Tensor]:
        codes = {name: _PATHS[path](a, b, t, dim) for name, (a, b, dim) in ends.items()}
        fixed = poutine.condition(model, data=codes)
        with ReplaySubsamples(start.model):
            trace = run_model(fixed, args, kwargs)
        sites = output_nodes(trace, return_sites, codes=codes)
        return site_values(sites, {*codes, *latent_among(sites, trace, fixed, args, kwargs, codes)}, random)

    if len(args_b) > 1:
        _check_alike(lambda args: decoded(1.0, args), args_a, args_b)
    outputs = [decoded(step / (steps - 1), args_a) for step in range(steps)]
    return {name: torch.stack([output[name] for output in outputs]) for name in outputs[0]}


def _check_alike(decoded: Callable[[Any], dict[str, Tensor]], args_a: tuple[Any, ...], args_b: tuple[Any, ...]) -> None:
    """Raises ValueError if a code is decoded otherwise with the arguments of the end than with those of the start."""
    found = []
    for args in (args_a, args_b):
        with restored_random_state():
            found.append(decoded(args))
    for name, value in found[0].items():
        other = found[1][name]
        if value.shape != other.shape or not torch.allclose(value, other, equal_nan=True):
            raise ValueError(
                f"The output at site '{name}' differs between the arguments of x_a and of x_b, on which the decoder is "
                "conditional, and one path has one condition. Give both ends the same: x_a=(x, y), x_b=(other, y)."
            )


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
