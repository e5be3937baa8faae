"""Costs c(x, G(z)): what a reconstruction costs, one number for each datum."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_wae._core import checks
from pyro_wae._core.distributions import (
    distribution_tensors,
    family,
    is_finite,
    mean_of,
    off_edges,
    own_variance,
    widened,
    with_own_total,
)
from pyro_wae._core.random_state import restored_random_state
from pyro_wae._core.repr import CallRepr
from pyro_wae._core.rows import Site, at_least_float32

__all__ = [
    "AbsoluteError",
    "Cost",
    "ExpectedSquaredError",
    "FunctionCost",
    "NegativeLogLikelihood",
    "Site",
    "SquaredError",
    "as_cost",
    "generator_output",
]

Decode = Callable[[Any], Tensor]


class Cost(CallRepr, nn.Module):
    """A cost; subclasses define :meth:`~Cost.forward`.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> SquaredError()(dist.Normal(torch.zeros(5, 3), 1.0).to_event(1), torch.ones(5, 3))
        tensor([3., 3., 3., 3., 3.])
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, distribution: Any, value: Tensor) -> Tensor:
        """Computes the cost of each element of the batch.

        Args:
            distribution: A Pyro distribution, P_G(. | z).
            value: The data, shape ``batch_shape + event_shape``.

        Returns:
            Shape ``batch_shape``: event dimensions summed, batch dimensions kept. The costs here take half precision
            up to float32 before they compute anything.
        """
        raise NotImplementedError(f"{type(self).__name__} is no cost yet. Define forward(self, distribution, value).")

    def per_datum(self, site: Site) -> Tensor:
        """Computes the cost of each datum, without masked elements, times the scale of ``poutine.scale``.

        Returns:
            Shape (K, n): event dimensions and inner plates summed.

        Raises:
            ValueError: If the distribution does not serve or the cost has the wrong shape; the message names the site.
        """
        value, mask = site.value, site.mask
        value = value.float() if value.dtype in (torch.bool, torch.uint8) else value
        try:
            if mask is not None:
                value = self.fill(site.distribution, value, mask)
            again = self._of_others_masked(site, value)  # first: a cost that draws then has the same random numbers
            costs = self(site.distribution, value)
        except ValueError as error:
            raise ValueError(f"At observed site '{site.name}': {error}") from error
        event_dim = site.distribution.event_dim
        expected = value.shape[: value.ndim - event_dim]
        _check_costs(self, site.name, costs, tuple(expected))
        if again is not None and not torch.allclose(again, costs.detach(), equal_nan=True):
            raise ValueError(
                f"At observed site '{site.name}': {type(self).__name__} counts masked elements. Define "
                "fill(self, distribution, value, mask), which returns data that cost nothing there: "
                "torch.where(mask, value, distribution.mean)."
            )
        kept = mask
        if mask is not None and event_dim:
            kept = mask.expand(value.shape).flatten(len(expected)).any(-1)
        rows = site.rows(_scaled(costs, site.scale * site.subsample_scale, kept), 0)
        return rows.flatten(2).sum(2) if rows.ndim > 2 else rows

    def fill(self, distribution: Any, value: Tensor, mask: Tensor) -> Tensor:
        """Replaces masked data by what costs nothing, if this cost knows what that is."""
        return value

    def _of_others_masked(self, site: Site, value: Tensor) -> Tensor | None:
        """The cost with other data under a mask of elements, which only a cost of one's own may count; else None."""
        mask = site.mask
        if mask is None or type(self).fill is not Cost.fill:
            return None
        if not any(size > 1 for size in mask.shape[mask.ndim - site.event_dim :]):
            return None  # whole data are left out of the costs
        with restored_random_state(), torch.no_grad():
            return self(site.distribution, NegativeLogLikelihood().fill(site.distribution, value, mask).to(value))


class OutputCost(Cost):
    """A cost of the data and the generator's output G(z); subclasses define :meth:`difference`.

    Args:
        decode: Maps the site's distribution to G(z); None takes :func:`generator_output`, its mean.
    """

    def __init__(self, *, decode: Decode | None = None) -> None:
        super().__init__()
        if decode is not None:
            what = "a function of the site's distribution, or None"
            checks.function(f"{type(self).__name__}'s decode", decode, what, write="decode=lambda fn: fn.mean")
        self.decode = decode

    def output(self, distribution: Any) -> Tensor:
        """G(z), shape ``batch_shape + event_shape``."""
        return mean_of(distribution) if self.decode is None else self.decode(distribution)

    def difference(self, value: Tensor, output: Tensor) -> Tensor:
        """The cost of each number of the value, elementwise."""
        raise NotImplementedError

    def forward(self, distribution: Any, value: Tensor) -> Tensor:
        value = _checked(distribution, value)
        output = self._output_for(distribution, value)
        return _sum_event(self.difference(value, output), distribution.event_dim)

    def fill(self, distribution: Any, value: Tensor, mask: Tensor) -> Tensor:
        # A masked element equals the output: it costs nothing and passes no gradient, NaN data included.
        return torch.where(mask, value, self._output_for(distribution, value).detach())

    def _output_for(self, distribution: Any, value: Tensor) -> Tensor:
        """G(z) in the shape of the data, and with their total where the family has a fixed one."""
        output = self.output(distribution)
        output = output if self.decode else with_own_total(distribution, output, value)
        output = _as_float(checks.tensor("The generator's output", output, write="decode=lambda fn: fn.mean"))
        try:
            return output if output.shape == value.shape else output.expand(value.shape)
        except RuntimeError as error:
            raise ValueError(
                f"the generator's output has shape {tuple(output.shape)}, the data {tuple(value.shape)}. "
                "Give the distribution or decode= the data's shape."
            ) from error


class SquaredError(OutputCost):
    r"""The sum of squares, :math:`c(x, g) = \lVert x - g \rVert^2`, the default.

    It is the plain sum. The authors' code multiplies by 0.05: a penalty weight of 10 there is 200 here.

    Args:
        decode: Maps the site's distribution to G(z); None takes its mean.
    """

    def difference(self, value: Tensor, output: Tensor) -> Tensor:
        return (value - output).square()


class AbsoluteError(OutputCost):
    r"""The sum of absolute differences, :math:`c(x, g) = \lVert x - g \rVert_1`.

    Args:
        decode: Maps the site's distribution to G(z); None takes its mean.
    """

    def difference(self, value: Tensor, output: Tensor) -> Tensor:
        return (value - output).abs()


class ExpectedSquaredError(SquaredError):
    r"""The expected squared error of a random decoder, :math:`E \lVert x - Y \rVert^2` for a sample Y of it.

    It is the squared error of the mean, plus the variance of Y.
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, distribution: Any, value: Tensor) -> Tensor:
        squares = super().forward(distribution, value)
        try:
            variance = _as_float(own_variance(distribution, value).expand(value.shape))
        except NotImplementedError as error:
            raise ValueError(
                f"{family(distribution)} has no variance. Write cost=SquaredError(decode=...) or "
                "cost=NegativeLogLikelihood()."
            ) from error
        if variance.device.type == "cpu":
            is_finite(distribution, variance, "variance")
        return squares + _sum_event(variance, distribution.event_dim)

    def fill(self, distribution: Any, value: Tensor, mask: Tensor) -> Tensor:
        if distribution.event_dim and mask.shape[-distribution.event_dim :].numel() > 1:
            raise ValueError(
                "ExpectedSquaredError cannot leave out a part of an event. Declare the masked dimensions as plates and "
                "not by .to_event(...), or take SquaredError()."
            )
        return super().fill(distribution, value, mask)


class NegativeLogLikelihood(Cost):
    r"""The cost of a random decoder, :math:`c(x, z) = -\log p_G(x \mid z)`, in nats."""

    def forward(self, distribution: Any, value: Tensor) -> Tensor:
        value = _checked(distribution, value)
        # Bernoulli takes no integers, and float32 would round what is beside float64. VonMises has tensors of both.
        dtypes = [part.dtype for part in distribution_tensors(distribution) if part.is_floating_point()]
        least = min(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32)
        value = value.to(torch.promote_types(torch.promote_types(value.dtype, least), torch.float32))
        with torch.autocast(value.device.type, enabled=False):
            try:
                return -widened(distribution).log_prob(value)
            except (NotImplementedError, KeyError) as error:  # KeyError: of Pyro's flows
                raise ValueError(f"{family(distribution)} has no log_prob. Write cost=SquaredError().") from error

    def fill(self, distribution: Any, value: Tensor, mask: Tensor) -> Tensor:
        # A masked value may be NaN or outside the support. A draw is inside, where the log density has a finite
        # gradient, unless it has been rounded to an edge. It keeps its dtype: 0.3 would be 0 among whole numbers.
        try:
            with restored_random_state(), torch.no_grad():
                draw = distribution()
        except (NotImplementedError, AssertionError):  # not drawn: a family, a chain without a length
            draw = value.nan_to_num(0.0, 0.0, 0.0)
        return torch.where(mask, value, off_edges(distribution, draw))


class FunctionCost(OutputCost):
    """A plain function f(x, g) of data and generator output, as a cost.

    Args:
        function: Called with x and g of shape (n, ...), the data dimension first and inner plates after it; returns
            shape (n,), one cost for each datum. A masked element reaches it with x equal to g. Half precision is cast
            up to float32 first.
        decode: Maps the site's distribution to G(z); None takes its mean.

    Raises:
        ValueError: When used, if the function returns another shape.

    Warns:
        UserWarning: If the function is a module with trainable parameters, such as a perceptual loss: they are trained
            as well, and can lower the cost by making the features constant. Call its ``requires_grad_(False)`` first.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *, decode: Decode | None = None) -> None:
        super().__init__(decode=decode)
        what = "a function f(x, g) of data and generator output"
        write = "FunctionCost(lambda x, g: (x - g).abs().flatten(1).sum(1))"
        self.function = checks.function("FunctionCost's function", function, what, write=write)
        if isinstance(function, nn.Module) and any(value.requires_grad for value in function.parameters()):
            warnings.warn(
                f"The cost {type(function).__name__} has parameters, which are trained along with the model to lower "
                "it. If they are to stay as they are, call its requires_grad_(False) first.",
                UserWarning,
                stacklevel=2,
            )

    def forward(self, distribution: Any, value: Tensor) -> Tensor:
        value = _checked(distribution, value)
        return self.function(value, self._output_for(distribution, value))

    def per_datum(self, site: Site) -> Tensor:
        value = _as_float(site.value)
        try:
            if site.mask is not None:
                value = self.fill(site.distribution, value, site.mask)
            output = self._output_for(site.distribution, value)
            if site.mask is not None:
                # A function such as a root may have an infinite slope where x equals g.
                output = torch.where(site.mask, output, output.detach())
        except ValueError as error:
            raise ValueError(f"At observed site '{site.name}': {error}") from error
        x, g = (site.rows(part, site.distribution.event_dim) for part in (value, output))
        particles, n = x.shape[:2]
        costs = self.function(x.flatten(0, 1), g.flatten(0, 1))
        _check_costs(self.function, site.name, costs, (particles * n,))
        costs = costs.unflatten(0, (particles, n))
        # Of a datum that is masked as a whole, f(g, g) may be any number.
        return _scaled(costs, self._scale(site) * site.subsample_scale, site.kept)

    @staticmethod
    def _scale(site: Site) -> float | Tensor:
        scale = site.scale
        if not isinstance(scale, Tensor):
            return scale
        outer = (site.data_dim, site.particle_dim)
        if any(size > 1 and dim not in outer for dim, size in enumerate(scale.shape, -scale.ndim)):
            raise ValueError(
                f"At observed site '{site.name}': a cost function gives one number for each datum, and "
                f"poutine.scale has shape {tuple(scale.shape)}. Scale whole data, or take SquaredError()."
            )
        shape = tuple(size if dim in outer else 1 for dim, size in enumerate(site.shape, -len(site.shape)))
        return replace(site, shape=shape).rows(scale, 0).flatten(1)


def generator_output(distribution: Any) -> Tensor:
    """G(z): the mean of the observed site's distribution.

    It passes through Independent, masked and expanded distributions, and is ``v`` for Delta.

    Returns:
        Shape ``batch_shape + event_shape``.

    Raises:
        ValueError: If the distribution has no mean, none that is finite, one outside its support, or is one of angles,
            which have no difference along a line. On an accelerator, values are not looked at.
    """
    _check_distribution(distribution)
    return mean_of(distribution)


def as_cost(cost: Cost | Callable[[Tensor, Tensor], Tensor]) -> Cost:
    """Makes a :class:`Cost` of a function f(x, g).

    Raises:
        TypeError: If it cannot be called.
    """
    if isinstance(cost, Cost):
        return cost
    if callable(cost) and not isinstance(cost, type):
        return FunctionCost(cost)
    raise TypeError(
        f"cost must be a pyro_wae.costs.Cost, a function f(x, g) or a dict of them by observed site, found {cost!r}. "
        "Write cost=SquaredError() or cost=lambda x, g: (x - g).abs().flatten(1).sum(1)."
    )


def as_costs(cost: Any) -> Cost | dict[str, Cost]:
    """The same of each observed site where they are a dict; the default is :class:`SquaredError`."""
    if cost is None:
        return SquaredError()
    return {site: as_cost(own) for site, own in cost.items()} if isinstance(cost, Mapping) else as_cost(cost)


def _as_float(value: Tensor) -> Tensor:
    """Truth values, bytes and half precision as float32; other numbers as they are."""
    return value.float() if value.dtype in (torch.bool, torch.uint8) else at_least_float32(value)


def _scaled(costs: Tensor, scale: float | Tensor, kept: Tensor | None) -> Tensor:
    """Costs times a scale, and 0 of what is masked, also where its scale is infinite."""
    costs = at_least_float32(costs)
    return costs * scale if kept is None else (costs.where(kept, 0.0) * scale).where(kept, 0.0)


def _check_costs(cost: Any, site: str, found: Any, expected: tuple[int, ...]) -> None:
    is_tensor = isinstance(found, Tensor)
    if not is_tensor or found.shape != expected or found.layout is not torch.strided or found.is_meta:
        kind = "" if not is_tensor or found.shape != expected else f" ({found.layout}, {found.device})"
        described = f"shape {tuple(found.shape)}{kind}" if is_tensor else type(found).__name__
        raise ValueError(
            f"At observed site '{site}', the cost {cost!r} returned {described} where shape {expected} is needed: one "
            "number for each datum. Sum over all other dimensions, for instance by .flatten(1).sum(1)."
        )
    if not found.is_floating_point():
        raise ValueError(
            f"At observed site '{site}', the cost {cost!r} returned {found.dtype}, through which no gradient reaches "
            "the decoder. Return floats: write (x - g).square().flatten(1).sum(1)."
        )


def _sum_event(costs: Tensor, event_dim: int) -> Tensor:
    return costs.flatten(-event_dim).sum(-1) if event_dim else costs


def _check_distribution(value: Any) -> None:
    kinds = (torch.distributions.Distribution, dist.Distribution)
    checks.instance("distribution", value, kinds, "a distribution", write="dist.Normal(g, 1).to_event(1)")


def _checked(distribution: Any, value: Any) -> Tensor:
    """The data, which a cost compares with a distribution, as numbers."""
    _check_distribution(distribution)
    value = checks.tensor("value", value, write="cost(dist.Normal(g, 1).to_event(1), x)")
    if value.ndim < distribution.event_dim:
        shapes = f"{tuple(value.shape)}, and an event of the distribution {tuple(distribution.event_shape)}"
        raise ValueError(f"value has shape {shapes}. Give value.reshape(len(value), *distribution.event_shape).")
    return _as_float(value)
