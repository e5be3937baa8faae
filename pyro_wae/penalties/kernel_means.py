"""Means of kernels against priors in closed form, and the registry that finds them.

A radial kernel that is a mixture of Gaussians over their width, k = sum_a w_a exp(-g_a |x - y|^2), has every mean
against a Normal in closed form, one factor for each dimension. The Gaussian kernel is one such term; the inverse
multiquadratic is an integral over g, taken here by the trapezoidal rule in log g.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch import distributions as dist

from pyro_wae.kernels import Gaussian, InverseMultiquadratic, Kernel, MultiScale, Scaled, Sum
from pyro_wae.numerics import working_precision

__all__ = ["KernelMean", "NormalMixtureMean", "kernel_mean", "register_kernel_mean"]


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


Finder = Callable[[Any, Any], KernelMean | None]
F = TypeVar("F", bound=Finder)

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
        x = working_precision(x)
        total = x.new_zeros(len(x))
        for prob, loc, variance in zip(self.probs, self.locs, self.variances, strict=True):
            total = total + prob * self._expect((x - loc).square(), variance)
        return total

    def norm(self) -> Tensor:
        total = self.probs.new_zeros(())
        for prob, loc, variance in zip(self.probs, self.locs, self.variances, strict=True):
            for other, other_loc, other_variance in zip(self.probs, self.locs, self.variances, strict=True):
                squares = (loc - other_loc).square()[None]
                total = total + prob * other * self._expect(squares, variance + other_variance)[0]
        return total

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

    def _expect(self, squares: Tensor, variance: Tensor) -> Tensor:
        """E k(o + e) for e ~ N(0, diag variance), from squared offsets o^2 of shape (n, d)."""
        shrink = 1 + 2 * self.rates[:, None] * variance
        heights = self.weights * shrink.log().sum(1).mul(-0.5).exp()
        return (-squares @ (self.rates[:, None] / shrink).mT).exp() @ heights


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
    if isinstance(kernel, MultiScale):
        base = _gaussian_terms(kernel.kernel, like)
        if base is None:
            return None
        factors = like.new_tensor(kernel.factors)
        return base[0].repeat(len(factors)), (base[1] / factors[:, None]).flatten()
    if isinstance(kernel, Gaussian):
        return like.new_ones(1), 1 / (2 * kernel.squared_length_like(like)).reshape(1)
    if isinstance(kernel, InverseMultiquadratic):
        # C / (C + r^2) = integral of exp(-t) exp(-t r^2 / C) dt. With t = exp(y) the integrand dies off
        # exponentially to both sides, and the trapezoidal rule converges as fast. Gauss-Laguerre nodes are exact near
        # the prior but see nothing of codes at 100 times its mean square: their error is 100 percent there.
        y = torch.arange(-22.0, 4.2, 0.4, dtype=like.dtype, device=like.device)
        t = y.exp()
        return 0.4 * t * (-t).exp(), t / kernel.squared_length_like(like)
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


for _kernel_type in (Gaussian, InverseMultiquadratic, MultiScale, Sum, Scaled):
    for _prior_type in (dist.Normal, dist.MixtureSameFamily):
        register_kernel_mean(_kernel_type, _prior_type)(_normal_mixture_mean)
