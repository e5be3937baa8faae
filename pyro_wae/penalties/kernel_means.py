"""Means of kernels against priors in closed form, and the registry that finds them.

A radial kernel that is a mixture of Gaussians over their width, k = sum_a w_a exp(-g_a |x - y|^2), has every mean
against a Normal in closed form, one factor for each dimension. The Gaussian kernel is one such term; the inverse
multiquadratic, Laplace and Matern kernels are integrals over g, taken here by the trapezoidal rule in log g.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch import distributions as dist

from pyro_wae._core.numerics import working_precision
from pyro_wae.kernels import Gaussian, InverseMultiquadratic, Kernel, Laplace, Matern, MultiScale, Scaled, Sum

__all__ = ["KernelMean", "LastKernelMean", "NormalMixtureMean", "kernel_mean", "register_kernel_mean"]


class KernelMean(Protocol):
    """What is known of a kernel k against a prior P in closed form."""

    def at(self, x: Tensor) -> Tensor:
        """E k(x, p) for p ~ P: maps shape (n, d) to (n,)."""
        ...

    def norm(self) -> Tensor:
        """E k(p, p') for independent p, p' ~ P, a scalar."""
        ...

    def centred_square(self) -> Tensor | None:
        """E h(p, p')^2 of the centred kernel h(x, y) = k(x, y) - E k(x, p) - E k(p, y) + E k(p, p'), or None."""
        ...


_Component = tuple[Tensor, Tensor, Tensor]
Finder = Callable[[Any, Any], KernelMean | None]
F = TypeVar("F", bound=Finder)

STEP = 0.4
"""That of the trapezoidal rule."""

_REGISTRY: dict[tuple[type, type], Finder] = {}


def register_kernel_mean(kernel_type: type[Kernel], prior_type: type) -> Callable[[F], F]:
    """Registers a function that gives the :class:`KernelMean` of a kernel against a prior.

    It works as :func:`torch.distributions.kl.register_kl` does: the most specific pair of types is taken.

    Args:
        kernel_type: A kernel class; its subclasses are covered.
        prior_type: A distribution class; its subclasses are covered. For an ``Independent`` prior it is the class of
            what lies inside.

    Returns:
        A decorator for a function (kernel, prior) -> KernelMean or None. The prior is that of one code:
        ``batch_shape`` (), ``event_shape`` (d,).

    Raises:
        TypeError: If an argument is no class.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_wae.kernels import Laplace
        >>> @register_kernel_mean(Laplace, dist.Delta)
        ... def _laplace_delta(kernel, prior):
        ...     return None
    """
    for argument, value in (("kernel_type", kernel_type), ("prior_type", prior_type)):
        if not isinstance(value, type):
            raise TypeError(
                f"{argument} must be a class, found {value!r}. Write @register_kernel_mean(Gaussian, dist.Normal)."
            )

    def register(function: F) -> F:
        _REGISTRY[kernel_type, prior_type] = function
        return function

    return register


def kernel_mean(kernel: Kernel, prior: Any) -> KernelMean | None:
    """Finds what is known of a kernel against a prior; None if nothing is registered.

    Args:
        kernel: A kernel whose lengths are set.
        prior: The prior of one code, ``batch_shape`` () and ``event_shape`` (d,).
    """
    inner = prior
    while isinstance(inner, dist.Independent):
        inner = inner.base_dist
    best: tuple[int, Finder] | None = None
    for (kernel_type, prior_type), function in _REGISTRY.items():
        if isinstance(kernel, kernel_type) and isinstance(inner, prior_type):
            distance = type(kernel).__mro__.index(kernel_type) + type(inner).__mro__.index(prior_type)
            if best is None or distance < best[0]:
                best = distance, function
    return None if best is None else best[1](kernel, prior)


@dataclass(frozen=True)
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
        return _total_at(x, self.components())

    def norm(self) -> Tensor:
        total = self.probs.new_zeros(())
        for prob, loc, variance in zip(self.probs, self.locs, self.variances, strict=True):
            for other, other_loc, other_variance in zip(self.probs, self.locs, self.variances, strict=True):
                heights, rates = self._widen(variance + other_variance)
                total = total + prob * other * _sum_at((loc - other_loc).square()[None], heights, rates)[0]
        return total

    def components(self) -> list[_Component]:
        """Place, heights (a,) and rates (d, a) of the Gaussians in x that each Normal's means are."""
        found = []
        for prob, loc, variance in zip(self.probs, self.locs, self.variances, strict=True):
            heights, rates = self._widen(variance)
            found.append((loc, prob * heights, rates))
        return found

    def centred_square(self) -> Tensor | None:
        if len(self.probs) > 1:
            return None
        v, g, w = self.variances[0], self.rates, self.weights
        square = w[:, None] * w * _normaliser(2 * (g[:, None] + g), v)
        # E_p exp(-g |x - p|^2) is a Gaussian in x again, of the rate `narrowed`; its rate depends on the dimension.
        shrink = 1 + 2 * g[:, None] * v
        narrowed = g[:, None] / shrink
        height = w * shrink.log().sum(1).mul(-0.5).exp()
        crossed = height[:, None] * height
        for dim in range(len(v)):
            crossed = crossed * (1 + 2 * v[dim] * (narrowed[:, None, dim] + narrowed[:, dim])).rsqrt()
        return square.sum() - 2 * crossed.sum() + self.norm().square()

    def _widen(self, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Heights (a,) and rates (d, a) of E k(o + e) for e ~ N(0, diag variance), as a function of o^2."""
        shrink = 1 + 2 * self.rates[:, None] * variance
        return self.weights * shrink.log().sum(1).mul(-0.5).exp(), (self.rates[:, None] / shrink).mT


class _Fixed:
    """A mean whose prior and kernel stay as they are: what does not depend on codes is found once."""

    def __init__(self, mean: NormalMixtureMean) -> None:
        self._mean, self._components, self._norm = mean, mean.components(), mean.norm()

    def at(self, x: Tensor) -> Tensor:
        return _total_at(x, self._components)

    def norm(self) -> Tensor:
        return self._norm

    def centred_square(self) -> Tensor | None:
        return self._mean.centred_square()


class LastKernelMean:
    """Finds means as :func:`kernel_mean` does, and gives the last again while kernel and prior are the same.

    A step makes its prior anew, which mostly is the one of the step before. Whether it is can be told without waiting
    on a CPU alone, and only of the priors that this file knows.
    """

    def __init__(self) -> None:
        self._made_of: list[Tensor] = []
        self._kernel: Kernel | None = None
        self._numbers: list[Any] = []
        self._found: _Fixed | None = None

    def of(self, kernel: Kernel, prior: Any) -> KernelMean | None:
        """The mean of a kernel against a prior, or None; see :func:`kernel_mean`."""
        made_of = _tensors(kernel, prior)
        if made_of is None or torch.is_inference_mode_enabled():
            return kernel_mean(kernel, prior)
        numbers = _numbers(kernel)
        is_same = self._kernel is kernel and self._numbers == numbers
        if self._found is not None and is_same and _equal(made_of, self._made_of):
            return self._found
        found = kernel_mean(kernel, prior)
        if not isinstance(found, NormalMixtureMean):
            return found
        self._made_of, self._kernel, self._numbers = [part.clone() for part in made_of], kernel, numbers
        self._found = _Fixed(found)
        return self._found


def _tensors(kernel: Kernel, prior: Any) -> list[Tensor] | None:
    """All that decides what :func:`_normal_mixture_mean` gives; None if it cannot be told, or may have a gradient."""
    parts = [prior]
    if isinstance(prior, dist.MixtureSameFamily):
        parts = [prior.component_distribution, prior.mixture_distribution]
    tensors = list(kernel.buffers())
    for part in parts:
        inner = part.base_dist if isinstance(part, dist.Independent) else part
        if isinstance(inner, dist.Normal):
            tensors += [inner.loc, inner.scale]
        elif isinstance(inner, dist.Categorical):
            tensors.append(inner.probs)
        else:
            return None
    return None if any(part.requires_grad or part.device.type != "cpu" for part in tensors) else tensors


def _numbers(kernel: Kernel) -> list[Any]:
    """The plain numbers of a kernel and its parts: lengths that were given, factors."""
    return [
        value for part in kernel.modules() for value in vars(part).values() if isinstance(value, int | float | tuple)
    ]


def _equal(parts: list[Tensor], others: list[Tensor]) -> bool:
    return len(parts) == len(others) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(parts, others, strict=True)
    )


def _total_at(x: Tensor, components: list[_Component]) -> Tensor:
    x = working_precision(x)
    return functools.reduce(
        torch.add, (_sum_at((x - loc).square(), heights, rates) for loc, heights, rates in components)
    )


def _sum_at(squares: Tensor, heights: Tensor, rates: Tensor) -> Tensor:
    """Sums of Gaussians at squared offsets of shape (n, d)."""
    return (squares @ -rates).exp() @ heights


def _normaliser(rates: Tensor, variance: Tensor) -> Tensor:
    """Product over dimensions of (1 + 2 g v)^(-1/2), for rates of any shape; dimensions one at a time."""
    total = torch.zeros_like(rates)
    for value in variance:
        total = total - 0.5 * torch.log1p(2 * rates * value)
    return total.exp()


def _gaussian_terms(kernel: Kernel, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """Weights and rates of a kernel as a mixture of Gaussians, or None."""
    if isinstance(kernel, Sum):
        parts = [_gaussian_terms(part, like) for part in kernel.parts()]
        found = [part for part in parts if part is not None]
        return (
            (torch.cat([w for w, _ in found]), torch.cat([g for _, g in found])) if len(found) == len(parts) else None
        )
    if isinstance(kernel, Scaled):
        scaled = _gaussian_terms(kernel.kernel, like)
        return None if scaled is None else (kernel.factor * scaled[0], scaled[1])
    base, factors = (kernel.kernel, kernel.factors) if isinstance(kernel, MultiScale) else (kernel, (1.0,))
    if isinstance(base, Gaussian):
        found_rates = 1 / (2 * like.new_tensor(factors) * base.squared_length_like(like))
        return torch.ones_like(found_rates), found_rates
    integral = _integral(base)
    if integral is None:
        return None
    # The integrals of all lengths meet in one grid of rates.
    least, largest = integral.limits
    least, largest = least - math.log(max(factors)), largest - math.log(min(factors))
    rates = torch.arange(least, largest, STEP, dtype=like.dtype, device=like.device).exp()
    weights = STEP * integral.density(rates * like.new_tensor(factors)[:, None]).sum(0)
    return weights, integral.unit * rates / base.squared_length_like(like)


@dataclass(frozen=True)
class _Integral:
    """A kernel as the integral of ``density(t) exp(-unit t |x - y|^2 / s^2)`` over log t, for s^2 its squared length.

    To both sides the integrand falls off exponentially, and the trapezoidal rule converges as fast. A kernel of f times
    the squared length is the same integral of ``density(f t)``.

    Args:
        density: Maps t of any shape to weights.
        unit: Of the rates.
        limits: Logarithms of t between which the integral is taken.
    """

    density: Callable[[Tensor], Tensor]
    unit: float
    limits: tuple[float, float]


def _integral(kernel: Kernel) -> _Integral | None:
    if type(kernel) is InverseMultiquadratic:
        # C / (C + r^2) = integral of exp(-t) exp(-t r^2 / C) dt. Gauss-Laguerre nodes are exact near the prior but see
        # nothing of codes at 100 times its mean square: their error is 100 percent there.
        return _Integral(lambda t: t * (-t).exp(), 1.0, (-22.0, 4.2))
    if type(kernel) is Laplace or type(kernel) is Matern:
        # A Matern kernel is the mean of exp(-nu r^2 / (2 w s^2)) over w from a Gamma distribution of shape nu and rate 1;
        # t is 1 / w. The Laplace kernel is that of nu = 1/2. Small t are for codes far away: exp(-6) for 400 lengths.
        nu = kernel.nu if isinstance(kernel, Matern) else 0.5
        return _Integral(lambda t: t**-nu * (-1 / t).exp() / math.gamma(nu), nu / 2, (-6.0, 14.5 / nu))
    return None


def _normal_mixture_mean(kernel: Kernel, prior: Any) -> KernelMean | None:
    if isinstance(prior, dist.MixtureSameFamily):
        component = prior.component_distribution
        probs = prior.mixture_distribution.probs
    else:
        component, probs = prior, None
    normal = component.base_dist if isinstance(component, dist.Independent) else component
    if not isinstance(normal, dist.Normal):
        return None
    locs, scales = working_precision(normal.loc), working_precision(normal.scale)
    # A scalar, a batch of priors, or a mixture of each number by itself is no prior of one code.
    if locs.ndim != (1 if probs is None else 2) or (probs is not None and len(prior.event_shape) != 1):
        return None
    locs, scales = torch.atleast_2d(locs, scales)
    terms = _gaussian_terms(kernel, locs)
    if terms is None:
        return None
    weights = locs.new_ones(1) if probs is None else working_precision(probs)
    return NormalMixtureMean(*terms, weights, locs, scales.square())


for _kernel_type in (Gaussian, InverseMultiquadratic, Laplace, Matern, MultiScale, Sum, Scaled):
    for _prior_type in (dist.Normal, dist.MixtureSameFamily):
        register_kernel_mean(_kernel_type, _prior_type)(_normal_mixture_mean)
