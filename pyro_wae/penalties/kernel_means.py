"""Means of kernels against priors in closed form, and the registry that finds them.

A radial kernel that is a mixture of Gaussians over their width, k = sum_a w_a exp(-g_a |x - y|^2), has every mean
against a Normal in closed form, one factor for each dimension; see :meth:`~pyro_wae.kernels.Kernel.gaussian_terms`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch import distributions as dist

from pyro_wae._core import checks
from pyro_wae._core.distributions import own_methods
from pyro_wae._core.private import is_transforming
from pyro_wae._core.rows import working_precision
from pyro_wae.kernels import Gaussian, InverseMultiquadratic, Kernel, Laplace, Matern, MultiScale, Scaled, Sum
from pyro_wae.penalties.context import PenaltyContext


class KernelMean(Protocol):
    """The means of a kernel k under a prior P, in closed form."""

    def at(self, x: Tensor) -> Tensor:
        """E k(x, p) for p ~ P: maps shape (n, d) to (n,)."""
        ...

    def norm(self) -> Tensor:
        """E k(p, p') for independent p, p' ~ P, a scalar."""
        ...

    def centred_square(self) -> Tensor | None:
        """E h(p, p')^2 of the centred kernel h(x, y) = k(x, y) - E k(x, p) - E k(p, y) + E k(p, p'), or None."""
        ...


Finder = Callable[[Any, Any], KernelMean | None]
F = TypeVar("F", bound=Finder)

_REGISTRY: dict[tuple[type, type], Finder] = {}


def register_kernel_mean(kernel_type: type[Kernel], prior_type: type) -> Callable[[F], F]:
    """Registers a function that returns the :class:`KernelMean` of a kernel under a prior.

    It works as :func:`torch.distributions.kl.register_kl` does: the most specific pair of types is taken.

    Args:
        kernel_type: A kernel class; its subclasses are covered.
        prior_type: A distribution class; its subclasses are covered. For an ``Independent`` prior it is the class of
            what lies inside.

    Returns:
        A decorator for a function (kernel, prior) -> KernelMean or None. The prior is that of one code:
        ``batch_shape`` (), ``event_shape`` (d,).

    Raises:
        TypeError: If an argument is not a class.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_wae.kernels import Laplace
        >>> @register_kernel_mean(Laplace, dist.Delta)
        ... def _laplace_delta(kernel, prior):
        ...     return None
    """
    for argument, value in (("kernel_type", kernel_type), ("prior_type", prior_type)):
        checks.instance(argument, value, type, "a class", write="@register_kernel_mean(Gaussian, dist.Normal)")

    def register(function: F) -> F:
        _REGISTRY[kernel_type, prior_type] = function
        return function

    return register


def kernel_mean(kernel: Kernel, prior: Any) -> KernelMean | None:
    """Looks up the :class:`KernelMean` of a kernel under a prior; None if nothing is registered.

    Args:
        kernel: A kernel whose lengths are set.
        prior: The prior of one code, ``batch_shape`` () and ``event_shape`` (d,).
    """
    inner = prior
    while isinstance(inner, dist.Independent) and not own_methods(inner.__class__):
        inner = inner.base_dist
    best: tuple[int, Finder] | None = None
    for (kernel_type, prior_type), function in _REGISTRY.items():
        is_of_type = isinstance(inner, prior_type) and own_methods(inner.__class__) <= own_methods(prior_type)
        if isinstance(kernel, kernel_type) and is_of_type:
            distance = type(kernel).__mro__.index(kernel_type) + type(inner).__mro__.index(prior_type)
            if best is None or distance < best[0]:
                best = distance, function
    return None if best is None else best[1](kernel, prior)


def known_prior(context: PenaltyContext, d: int) -> Any | None:
    """The context's prior where it is that of one code of d numbers; None where it is not one distribution.

    Raises:
        ValueError: If it is that of a code of another size.
    """
    prior = None if context.prior is None else context.prior()
    event, batch = tuple(getattr(prior, "event_shape", (d,))), tuple(getattr(prior, "batch_shape", ()))
    if len(event) == 1 and event != (d,):  # a term by term difference would broadcast
        raise ValueError(
            f"PenaltyContext's prior must be that of one code, and the codes have {d} numbers, found "
            f"{type(prior).__name__} with event_shape {event}. Write "
            f"PenaltyContext(prior=lambda: dist.Normal(torch.zeros({d}), 1.0).to_event(1))."
        )
    return prior if math.prod(batch + event) == d else None


@dataclass(frozen=True, eq=False)
class NormalMixtureMean:
    """Closed-form means of sum_a w_a exp(-g_a |x - y|^2) against a mixture of Normals with diagonal scales.

    Args:
        weights: w, shape (a,).
        rates: g, shape (a,).
        probs: The mixture's weights, shape (c,).
        locs: Shape (c, d).
        variances: Shape (c, d).
    """

    weights: Tensor
    rates: Tensor
    probs: Tensor
    locs: Tensor
    variances: Tensor

    def at(self, x: Tensor) -> Tensor:
        x = x.to(self.locs.dtype)
        values = []
        for index, (loc, variance) in enumerate(zip(self.locs, self.variances, strict=True)):
            heights, rates = self._widen(variance)
            heights = heights if len(self.probs) == 1 else self.probs[index] * heights
            values.append(((x - loc).square() @ -rates.mT).exp() @ heights)
        return functools.reduce(torch.add, values)

    def norm(self) -> Tensor:
        if len(self.probs) == 1:
            return self._widen(2 * self.variances[0])[0].sum()
        rows = []
        # A row of the pairs of components at a time: all pairs at once would take c times its memory.
        for prob, loc, variance in zip(self.probs, self.locs, self.variances, strict=True):
            heights, rates = self._widen(variance + self.variances)
            exponents = (rates @ (loc - self.locs).square()[..., None])[..., 0]
            rows.append(prob * (self.probs[:, None] * heights * (-exponents).exp()).sum())
        return functools.reduce(torch.add, rows)

    def centred_square(self) -> Tensor | None:
        if len(self.probs) > 1:
            return None
        v, g, w = self.variances[0], self.rates, self.weights
        # E_p exp(-g |x - p|^2) is a Gaussian in x again, of the rate `narrowed`, which depends on the dimension.
        height, narrowed = self._widen(v)
        squared, crossed = w[:, None] * w, height[:, None] * height
        for dim, variance in enumerate(v):  # one at a time: pairs of terms are many
            squared = squared * (1 + 4 * (g[:, None] + g) * variance).rsqrt()
            crossed = crossed * (1 + 2 * variance * (narrowed[:, None, dim] + narrowed[:, dim])).rsqrt()
        return squared.sum() - 2 * crossed.sum() + self.norm().square()

    def _widen(self, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Heights (..., a) and rates (..., a, d) of E k(o + e) for e ~ N(0, diag variance (..., d)), by o^2."""
        rates = self.rates[:, None]
        spread = 1 + 2 * rates * variance[..., None, :]
        return self.weights * spread.log().sum(-1).mul(-0.5).exp(), rates / spread


def row_total(function: Callable[[Tensor], Tensor], rows: Tensor, most_rows: int) -> Tensor:
    """Sums a function of single rows, some at a time, with the gradient taken on the way.

    Args:
        function: Maps rows (k, d) to (k,). Where it has a gradient of its own, and under a transform of
            ``torch.func``, all rows are taken at once.
        rows: Shape (n, d).
        most_rows: How many are taken at a time.

    Returns:
        A scalar.
    """
    if len(rows) <= most_rows or is_transforming():
        return function(rows).sum()
    if not torch.is_grad_enabled():
        return functools.reduce(torch.add, (function(part).sum() for part in rows.split(most_rows)))
    if not rows.requires_grad or function(rows[:1].detach()).requires_grad:
        return function(rows).sum()
    return cast(Tensor, _RowTotal.apply(function, rows, most_rows))


class _RowTotal(torch.autograd.Function):
    """The sum, whose gradient is known as soon as its value is."""

    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], rows: Tensor, most_rows: int) -> Tensor:
        totals, gradients = [], []
        for part in rows.detach().split(most_rows):
            with torch.enable_grad():
                part = part.requires_grad_()
                value = function(part).sum()
            gradients += torch.autograd.grad(value, part)
            totals.append(value.detach())
        ctx.function = function
        ctx.save_for_backward(rows, torch.cat(gradients))
        return functools.reduce(torch.add, totals)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        rows, known = ctx.saved_tensors
        if torch.is_grad_enabled():  # someone wrote create_graph=True, and what is kept has no graph
            (known,) = torch.autograd.grad(ctx.function(rows).sum(), rows, create_graph=True)
        return None, gradient * known, None


def _normal_mixture_mean(kernel: Kernel, prior: Any) -> KernelMean | None:
    if isinstance(prior, dist.MixtureSameFamily):
        component = prior.component_distribution
        probs = prior.mixture_distribution.probs
    else:
        component, probs = prior, None
    normal: Any = component
    if isinstance(component, dist.Independent) and not own_methods(component.__class__):
        normal = normal.base_dist
    if not isinstance(normal, dist.Normal) or own_methods(normal.__class__):
        return None
    locs, scales = working_precision(normal.loc), working_precision(normal.scale)
    # A scalar, a batch of priors, or a mixture of each number by itself is no prior of one code.
    if locs.ndim != (1 if probs is None else 2) or (probs is not None and len(prior.event_shape) != 1):
        return None
    terms = kernel.gaussian_terms(locs)
    if terms is None:
        return None
    if probs is None:
        return NormalMixtureMean(*terms, locs.new_ones(1), locs[None], scales.square()[None])
    return NormalMixtureMean(*terms, working_precision(probs), locs, scales.square())


for _kernel_type in (Gaussian, InverseMultiquadratic, Laplace, Matern, MultiScale, Sum, Scaled):
    for _prior_type in (dist.Normal, dist.MixtureSameFamily):
        register_kernel_mean(_kernel_type, _prior_type)(_normal_mixture_mean)
