"""Kernels k(x, y) on codes, as modules without trainable parameters.

A length that is left as ``None`` is taken from the prior draws when a penalty first sees them; see
:meth:`Kernel.fit`. Kernels add and multiply: ``Gaussian() + 0.5 * Laplace()``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_wae._repr import CallRepr
from pyro_wae.numerics import at_least_float32, squared_distances, working_precision

__all__ = [
    "Conditional",
    "Energy",
    "FunctionKernel",
    "Gaussian",
    "InverseMultiquadratic",
    "Kernel",
    "Laplace",
    "Matern",
    "MultiScale",
    "Product",
    "RadialKernel",
    "RationalQuadratic",
    "SameLabel",
    "Scaled",
    "Sum",
    "UnitMean",
]

AUTHORS_FACTORS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)

MOST_FITTED_PAIRS = 512**2
"""The largest number of pairs that :class:`UnitMean` takes its mean from at a time."""

Scratch = tuple[Tensor, Tensor, Tensor]
"""Tensors to work in, where taking fresh memory from the system would cost more than the arithmetic."""


class Kernel(CallRepr, nn.Module):
    """A positive definite kernel; subclasses define :meth:`~Kernel.gram`.

    Example:
        >>> import torch
        >>> from pyro_wae.kernels import Gaussian
        >>> k = Gaussian(bandwidth=1.0) + 0.5 * Gaussian(bandwidth=2.0)
        >>> k(torch.zeros(3, 2), torch.zeros(4, 2)).shape
        torch.Size([3, 4])
    """

    def __init__(self) -> None:
        super().__init__()
        self._compiles = False

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Gives the kernel's values on all pairs of rows.

        Args:
            x: Shape (n, d).
            y: Shape (m, d).

        Returns:
            Shape (n, m), in the precision of ``x`` (float32 at least).

        Raises:
            ValueError: If a shape is not (rows, d) with one d, a dtype is no float, or a length has not been set.
        """
        if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
            raise ValueError(
                f"{type(self).__name__}(x, y) takes x of shape (n, d) and y of shape (m, d); "
                f"found {tuple(x.shape)} and {tuple(y.shape)}. Write x.flatten(1) to make rows of codes."
            )
        if not (x.is_floating_point() and y.is_floating_point()):
            raise ValueError(
                f"{type(self).__name__}(x, y) takes floats, found {x.dtype} and {y.dtype}. Write x.float()."
            )
        with torch.autocast(x.device.type, enabled=False):
            return self.gram(x, y).to(at_least_float32(x).dtype)

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        """The same as a call, unchecked and left in the working precision, for sums that nearly cancel."""
        raise NotImplementedError

    @property
    def is_radial(self) -> bool:
        """Whether it is :meth:`profile` of ``u = |x - y|^2 / squared_unit``, a function of the distance alone."""
        return False

    def squared_unit(self, like: Tensor) -> Tensor:
        """The squared length in which a radial kernel measures, a scalar with the precision and device of ``like``."""
        return like.new_ones(())

    def profile(self, u: Tensor) -> Tensor:
        """A radial kernel as a function of ``u >= 0``, elementwise."""
        raise NotImplementedError

    def profile_and_slope(self, u: Tensor, scratch: Scratch | None = None) -> tuple[Tensor, Tensor]:
        """The profile and its derivative by u, which is 0 where it would be infinite: without a graph.

        The derivative is taken automatically where a subclass does not write it out, which saves time.

        Args:
            u: Any shape.
            scratch: Three tensors of that shape to work in; what is returned may lie in them.

        Returns:
            Two tensors of the shape of ``u``.
        """
        with torch.inference_mode(False), torch.enable_grad():
            u = u.detach().clone().requires_grad_()
            values = self.profile(u)
            (slopes,) = torch.autograd.grad(values.sum(), u)
        return values.detach(), slopes

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles what a penalty of a large batch spends its time on, the profile and slope of a radial kernel.

        The first large batch then takes a while. It needs what :func:`torch.compile` needs, a C++ compiler on a CPU.

        Args:
            *args: Not taken; :class:`torch.nn.Module` has them.
            **kwargs: Not taken either.

        Raises:
            TypeError: If there are arguments, or the kernel is not radial.
        """
        if args or kwargs:
            raise TypeError("Kernel.compile takes no arguments. Write kernel.compile().")
        if not self.is_radial:
            raise TypeError(f"Kernel.compile takes a kernel of the distance alone, found {self!r}. Leave it as it is.")
        self._compiles = True

    @property
    def compiles(self) -> bool:
        """Whether :meth:`compile` has been called."""
        return self._compiles

    def fit(self, prior: Tensor) -> None:
        """Sets every length that is still unset, from draws of the prior.

        The squared length is half the mean squared distance of two independent draws, which for
        N(0, sigma^2 I) in d dimensions is d sigma^2; kernels state their own multiple of it. It is
        kept in ``state_dict``. Codes never enter: a length that followed them would let an encoder
        lower the penalty by moving the length.

        Args:
            prior: Shape (m, d) with m >= 2.

        Raises:
            ValueError: If the draws have no finite, positive spread.
        """
        unset = [part for part in self.modules() if isinstance(part, RadialKernel) and not part.is_set]
        if not unset:
            return
        if len(prior) < 2:
            raise ValueError(f"A kernel's length needs at least 2 prior draws, found {len(prior)}.")
        half_mean_square = working_precision(prior.detach()).var(0).sum()
        if not (torch.isfinite(half_mean_square) and half_mean_square > 0):
            raise ValueError(
                f"The prior draws have a total variance of {half_mean_square.item():g}, from which no length "
                f"can be taken for {unset[0]!r}. Give the length, as in Gaussian(bandwidth=1.0)."
            )
        for part in unset:
            part.set_squared_length(half_mean_square * part.squared_length_factor)

    def __add__(self, other: Kernel) -> Kernel:
        return Sum(self, other) if isinstance(other, Kernel) else NotImplemented

    def __mul__(self, other: Kernel | float) -> Kernel:
        if isinstance(other, Kernel):
            return Product(self, other)
        return Scaled(self, other) if isinstance(other, int | float) else NotImplemented

    __rmul__ = __mul__


class RadialKernel(Kernel):
    """A kernel of the distance alone, ``f(|x - y|^2 / l^2)``; subclasses define :meth:`~RadialKernel.profile`.

    Args:
        length: The length l, or None to take it from the prior draws.
        name: What the subclass calls its length, for messages.
        squared: Whether ``length`` is l^2 already.
    """

    squared_length_factor = 1.0
    """The squared length that is taken from the prior, over half the mean squared distance of its draws."""

    squared_length: Tensor

    def __init__(self, length: float | None, *, name: str, squared: bool = False) -> None:
        super().__init__()
        if length is not None:
            _check_positive(type(self).__name__, name, length)
        self._length_name = name
        self._given = None if length is None else float(length if squared else length**2)
        self._is_fitted = False
        if length is None:
            self.register_buffer("squared_length", torch.tensor(math.nan))

    @property
    def is_set(self) -> bool:
        """Whether the length was given or has been taken from prior draws."""
        return self._given is not None or self._is_fitted

    def set_squared_length(self, value: Tensor) -> None:
        """Keeps ``value``, a scalar, as the squared length."""
        with torch.inference_mode(False):  # or a length that is first needed there could never be trained with
            self.squared_length = value.detach().clone()
        self._is_fitted = True

    @property
    def is_radial(self) -> bool:
        return type(self).gram is RadialKernel.gram

    def squared_unit(self, like: Tensor) -> Tensor:
        self._check_set()
        return self.squared_length_like(like)

    def profile(self, u: Tensor) -> Tensor:
        """The kernel as a function of ``u = |x - y|^2 / l^2``, elementwise."""
        raise NotImplementedError

    def profile_and_slope_at_scales(
        self, u: Tensor, factors: Sequence[float], scratch: Scratch | None = None
    ) -> tuple[Tensor, Tensor]:
        """The sum over factors c of the profile at ``u / c``, and its derivative, as ``profile_and_slope``."""
        values, slopes = torch.zeros_like(u), torch.zeros_like(u)
        for factor in factors:
            value, slope = self.profile_and_slope(u / factor)
            values += value
            slopes.add_(slope, alpha=1 / factor)
        return values, slopes

    def scaled_squares(self, x: Tensor, y: Tensor) -> Tensor:
        """``|x - y|^2 / l^2`` for all pairs, in the working precision.

        Raises:
            ValueError: If the length has neither been given nor taken from prior draws.
        """
        self._check_set()
        x, y = (working_precision(x),) * 2 if y is x else (working_precision(x), working_precision(y))
        squares = squared_distances(x, y)
        return squares / self.squared_length_like(squares)

    def _check_set(self) -> None:
        if not self.is_set:
            raise ValueError(
                f"{self!r} has no length yet. Give one, as in {type(self).__name__}({self._length_name}=1.0), "
                "or take it from prior draws: kernel.fit(prior)."
            )

    def squared_length_like(self, x: Tensor) -> Tensor:
        """l^2 as a scalar with the precision and device of ``x``; the length must be set."""
        return self.squared_length.to(x) if self._given is None else x.new_tensor(self._given)

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        return self.profile(self.scaled_squares(x, y))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        value = state_dict.get(prefix + "squared_length")
        if self._given is None and value is not None:
            # Assigned and not copied, so that a float64 length is not rounded to an unset float32 one.
            self.squared_length = value.detach().clone().to(self.squared_length.device)
            self._is_fitted = not bool(value.isnan())
        super()._load_from_state_dict(state_dict, prefix, *args)


class Gaussian(RadialKernel):
    """The Gaussian kernel, ``k(x, y) = exp(-|x - y|^2 / (2 s^2))``.

    Args:
        bandwidth: s, in the units of a code; None takes s^2 = half the mean squared distance of
            prior draws (d sigma^2 for N(0, sigma^2 I)).
    """

    def __init__(self, bandwidth: float | None = None) -> None:
        super().__init__(bandwidth, name="bandwidth")
        self.bandwidth = bandwidth

    def profile(self, u: Tensor) -> Tensor:
        return torch.exp(-u / 2)

    def profile_and_slope(self, u: Tensor, scratch: Scratch | None = None) -> tuple[Tensor, Tensor]:
        values, slopes, _ = scratch or _scratch_like(u)
        torch.exp(torch.mul(u, -0.5, out=values), out=values)
        return values, torch.mul(values, -0.5, out=slopes)


class InverseMultiquadratic(RadialKernel):
    """The inverse multiquadratic kernel, ``k(x, y) = C / (C + |x - y|^2)``.

    Its tails are heavy, so that codes far from the prior still feel a gradient.

    Args:
        scale: C, in squared units of a code; None takes the mean squared distance of prior draws
            (2 d sigma^2 for N(0, sigma^2 I), the choice of the source).

    Source: Tolstikhin, Bousquet, Gelly, Schoelkopf, "Wasserstein Auto-Encoders", 2018, arXiv:1711.01558, section 4.
    """

    squared_length_factor = 2.0

    def __init__(self, scale: float | None = None) -> None:
        super().__init__(scale, name="scale", squared=True)
        self.scale = scale

    def profile(self, u: Tensor) -> Tensor:
        return (1 + u).reciprocal()

    def profile_and_slope(self, u: Tensor, scratch: Scratch | None = None) -> tuple[Tensor, Tensor]:
        return self.profile_and_slope_at_scales(u, (1.0,), scratch)

    def profile_and_slope_at_scales(
        self, u: Tensor, factors: Sequence[float], scratch: Scratch | None = None
    ) -> tuple[Tensor, Tensor]:
        values, slopes, terms = scratch or _scratch_like(u)
        zero = u.new_zeros(())
        for index, factor in enumerate(factors):
            torch.add(u, factor, out=terms).reciprocal_()
            torch.add(values if index else zero, terms, alpha=factor, out=values)
            torch.addcmul(slopes if index else zero, terms, terms, value=-factor, out=slopes)
        return values, slopes

    @classmethod
    def multiscale(cls, scale: float | None = None, factors: Sequence[float] = AUTHORS_FACTORS) -> MultiScale:
        """The sum of seven kernels with C times 0.1 to 10 that the authors' code uses."""
        return MultiScale(cls(scale), factors)


class Laplace(RadialKernel):
    """The Laplace kernel, ``k(x, y) = exp(-|x - y| / s)``, with the Euclidean distance.

    Args:
        bandwidth: s, in the units of a code; None as in :class:`Gaussian`.
    """

    def __init__(self, bandwidth: float | None = None) -> None:
        super().__init__(bandwidth, name="bandwidth")
        self.bandwidth = bandwidth

    def profile(self, u: Tensor) -> Tensor:
        return torch.exp(-_root(u))

    def profile_and_slope(self, u: Tensor, scratch: Scratch | None = None) -> tuple[Tensor, Tensor]:
        values, slopes, roots = scratch or _scratch_like(u)
        _root_into(u, roots)
        torch.exp(torch.neg(roots, out=values), out=values)
        torch.div(values, roots, out=slopes).mul_(-0.5)
        return values, _without_infinite(slopes, u)


class Matern(RadialKernel):
    """The Matern kernel of half-integer order, with ``t = sqrt(2 nu) |x - y| / s``.

    nu = 1/2: ``exp(-t)``; nu = 3/2: ``(1 + t) exp(-t)``; nu = 5/2: ``(1 + t + t^2 / 3) exp(-t)``.

    Args:
        nu: 0.5, 1.5 or 2.5.
        bandwidth: s, in the units of a code; None as in :class:`Gaussian`.

    Raises:
        ValueError: For another nu.

    Source: Rasmussen, Williams, "Gaussian Processes for Machine Learning", 2006, equation 4.17.
    """

    def __init__(self, nu: float, bandwidth: float | None = None) -> None:
        if nu not in (0.5, 1.5, 2.5):
            raise ValueError(f"Matern takes nu of 0.5, 1.5 or 2.5, found {nu!r}. Write Matern(1.5).")
        super().__init__(bandwidth, name="bandwidth")
        self.nu = nu
        self.bandwidth = bandwidth

    def profile(self, u: Tensor) -> Tensor:
        t = _root(2 * self.nu * u)
        if self.nu == 0.5:
            return torch.exp(-t)
        return (1 + t) * torch.exp(-t) if self.nu == 1.5 else (1 + t + t.square() / 3) * torch.exp(-t)

    def profile_and_slope(self, u: Tensor, scratch: Scratch | None = None) -> tuple[Tensor, Tensor]:
        values, slopes, t = scratch or _scratch_like(u)
        _root_into(u, t).mul_(math.sqrt(2 * self.nu))
        torch.exp(torch.neg(t, out=values), out=values)
        if self.nu == 0.5:
            torch.div(values, t, out=slopes).mul_(-0.5)
            return values, _without_infinite(slopes, u)
        # With e = exp(-t): d/du = nu / t d/dt, and d/dt is -t e for nu = 3/2 and -t (1 + t) e / 3 for nu = 5/2.
        if self.nu == 1.5:
            torch.mul(values, -1.5, out=slopes)
            return values.addcmul_(values, t), slopes
        torch.addcmul(values, values, t, out=slopes)
        values.mul_(t.square_().div_(3)).add_(slopes)
        return values, slopes.mul_(-5 / 6)


class RationalQuadratic(RadialKernel):
    """The rational quadratic kernel, ``k(x, y) = (1 + |x - y|^2 / (2 alpha s^2))^-alpha``.

    Args:
        alpha: The weight of the tails, > 0; alpha to infinity gives :class:`Gaussian`.
        bandwidth: s, in the units of a code; None as in :class:`Gaussian`.

    Raises:
        ValueError: If alpha is not positive.
    """

    def __init__(self, alpha: float, bandwidth: float | None = None) -> None:
        _check_positive("RationalQuadratic", "alpha", alpha)
        super().__init__(bandwidth, name="bandwidth")
        self.alpha = alpha
        self.bandwidth = bandwidth

    def profile(self, u: Tensor) -> Tensor:
        return (1 + u / (2 * self.alpha)) ** -self.alpha

    def profile_and_slope(self, u: Tensor, scratch: Scratch | None = None) -> tuple[Tensor, Tensor]:
        values, slopes, base = scratch or _scratch_like(u)
        torch.div(u, 2 * self.alpha, out=base).add_(1)
        torch.pow(base, -self.alpha, out=values)
        return values, torch.div(values, base, out=slopes).mul_(-0.5)


class Energy(Kernel):
    """The negative distance, ``k(x, y) = -|x - y|^exponent``.

    It is positive definite only on differences of distributions, which is what a maximum mean
    discrepancy needs; the discrepancy is then the energy distance. It has no length to choose.

    Args:
        exponent: In (0, 2).

    Raises:
        ValueError: For an exponent outside (0, 2).

    Source: Szekely, Rizzo, "Energy statistics", 2013, doi:10.1016/j.jspi.2013.03.018.
    """

    def __init__(self, exponent: float = 1.0) -> None:
        super().__init__()
        if not 0 < exponent < 2:
            raise ValueError(f"Energy takes an exponent in (0, 2), found {exponent!r}. Write Energy(1.0).")
        self.exponent = exponent

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = (working_precision(x),) * 2 if y is x else (working_precision(x), working_precision(y))
        return self.profile(squared_distances(x, y))

    @property
    def is_radial(self) -> bool:
        return True

    def profile(self, u: Tensor) -> Tensor:
        return -(_root(u) ** self.exponent)

    def profile_and_slope(self, u: Tensor, scratch: Scratch | None = None) -> tuple[Tensor, Tensor]:
        values, slopes, roots = scratch or _scratch_like(u)
        _root_into(u, roots)
        if self.exponent == 1:
            torch.neg(roots, out=values)
            torch.reciprocal(roots, out=slopes).mul_(-0.5)
        else:
            torch.pow(roots, self.exponent, out=values).neg_()
            torch.div(values, roots, out=slopes).div_(roots).mul_(self.exponent / 2)
        return values, _without_infinite(slopes, u)


class MultiScale(Kernel):
    """The sum of one kernel at several lengths: the squared length times each factor.

    Args:
        kernel: A kernel with a length.
        factors: Positive factors of its squared length.

    Raises:
        TypeError: If the kernel has no length.
        ValueError: If there is no factor, or one is not positive.
    """

    def __init__(self, kernel: RadialKernel, factors: Sequence[float]) -> None:
        super().__init__()
        if not isinstance(kernel, RadialKernel):
            raise TypeError(
                f"MultiScale takes a kernel that has a length, found {kernel!r}. "
                "Write MultiScale(Gaussian(), (0.5, 1.0, 2.0)), or add kernels: k1 + k2."
            )
        if len(factors) == 0:
            raise ValueError("MultiScale takes at least one factor. Write factors=(0.5, 1.0, 2.0).")
        for factor in factors:
            _check_positive("MultiScale", "factors", factor)
        self.kernel = kernel
        self.factors = tuple(float(factor) for factor in factors)

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        return self.profile(self.kernel.scaled_squares(x, y))

    @property
    def is_radial(self) -> bool:
        return self.kernel.is_radial

    def squared_unit(self, like: Tensor) -> Tensor:
        return self.kernel.squared_unit(like)

    def profile(self, u: Tensor) -> Tensor:
        total = self.kernel.profile(u / self.factors[0])
        for factor in self.factors[1:]:
            total = total + self.kernel.profile(u / factor)
        return total

    def profile_and_slope(self, u: Tensor, scratch: Scratch | None = None) -> tuple[Tensor, Tensor]:
        return self.kernel.profile_and_slope_at_scales(u, self.factors, scratch)


class Composite(Kernel):
    """Several kernels as one; subclasses say how their values combine."""

    def __init__(self, *kernels: Kernel) -> None:
        super().__init__()
        self.kernels = nn.ModuleList(kernels)

    def parts(self) -> list[Kernel]:
        """The kernels that are combined."""
        return [kernel for kernel in self.kernels if isinstance(kernel, Kernel)]

    def combine(self, a: Tensor, b: Tensor) -> Tensor:
        """Combines the values of two kernels."""
        raise NotImplementedError

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        return functools.reduce(self.combine, (kernel.gram(x, y) for kernel in self.parts()))

    @property
    def is_radial(self) -> bool:
        return all(kernel.is_radial for kernel in self.parts())

    def profile(self, u: Tensor) -> Tensor:
        return functools.reduce(self.combine, (part.profile(u / part.squared_unit(u)) for part in self.parts()))

    def profiles_and_slopes(self, u: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The profile and slope by u of each part, one after the other."""
        for part in self.parts():
            unit = part.squared_unit(u)
            values, slopes = part.profile_and_slope(u / unit)
            yield values, slopes / unit


class Sum(Composite):
    """k1 + k2 + ...; usually written with ``+``."""

    def combine(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def profile_and_slope(self, u: Tensor, scratch: Scratch | None = None) -> tuple[Tensor, Tensor]:
        values, slopes, _ = scratch or _scratch_like(u)
        values.zero_()
        slopes.zero_()
        for value, slope in self.profiles_and_slopes(u):
            values += value
            slopes += slope
        return values, slopes

    def __repr__(self) -> str:
        return f"({' + '.join(map(repr, self.kernels))})"


class Product(Composite):
    """k1 * k2 * ...; usually written with ``*``.

    Raises:
        ValueError: If a factor is an :class:`Energy` kernel, whose products are not kernels.
    """

    def __init__(self, *kernels: Kernel) -> None:
        super().__init__(*kernels)
        if any(isinstance(part, Energy) for part in self.modules()):
            raise ValueError(
                "A product with Energy is not a kernel, because Energy is only conditionally positive definite. "
                "Write a sum, or Laplace() in its place."
            )

    def combine(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def profile_and_slope(self, u: Tensor, scratch: Scratch | None = None) -> tuple[Tensor, Tensor]:
        values, slopes, _ = scratch or _scratch_like(u)
        values.fill_(1)
        slopes.zero_()
        for value, slope in self.profiles_and_slopes(u):
            slopes.mul_(value).addcmul_(values, slope)
            values *= value
        return values, slopes

    def __repr__(self) -> str:
        return " * ".join(map(repr, self.kernels))


class Scaled(Kernel):
    """A kernel times a positive number; usually written ``2.0 * k``.

    Raises:
        ValueError: If the number is not positive.
    """

    def __init__(self, kernel: Kernel, factor: float) -> None:
        super().__init__()
        _check_positive("A kernel's multiple", "factor", factor)
        self.kernel = kernel
        self.factor = factor

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        return self.factor * self.kernel.gram(x, y)

    @property
    def is_radial(self) -> bool:
        return self.kernel.is_radial

    def squared_unit(self, like: Tensor) -> Tensor:
        return self.kernel.squared_unit(like)

    def profile(self, u: Tensor) -> Tensor:
        return self.factor * self.kernel.profile(u)

    def profile_and_slope(self, u: Tensor, scratch: Scratch | None = None) -> tuple[Tensor, Tensor]:
        values, slopes = self.kernel.profile_and_slope(u, scratch)
        return values.mul_(self.factor), slopes.mul_(self.factor)

    def __repr__(self) -> str:
        return f"{self.factor} * {self.kernel!r}"


class FunctionKernel(Kernel):
    """A plain function k(x, y) of tensors (n, d) and (m, d) with values of shape (n, m), as a kernel.

    Args:
        function: Called with codes in their own precision (float32 at least).

    Raises:
        ValueError: When called, if the function's value is not a tensor of shape (n, m).
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        values = self.function(at_least_float32(x), at_least_float32(y))
        if not isinstance(values, Tensor) or values.shape != (len(x), len(y)):
            found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"The kernel {self.function!r} takes tensors of shape ({len(x)}, d) and ({len(y)}, d) and must "
                f"return shape ({len(x)}, {len(y)}), found {found}. Return one value for each pair of rows."
            )
        return working_precision(values)


class SameLabel(Kernel):
    """1 where two rows are equal and 0 elsewhere: the kernel of labels, which have no distance.

    Example:
        >>> import torch
        >>> SameLabel()(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [1.0], [2.0]]))
        tensor([[0., 0., 0.],
                [1., 1., 0.]])
    """

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        same = torch.ones(len(x), len(y), dtype=torch.bool, device=x.device)
        for column in range(x.shape[1]):
            same = same & (x[:, None, column] == y[:, column])
        return same.to(working_precision(x).dtype)


class UnitMean(Kernel):
    """A kernel over its mean, so that a product with it keeps the other's size: ``(k(x, y) / E k + a) / (1 + a)``.

    Args:
        kernel: Any kernel with a positive mean.
        constant: a >= 0, the share of a constant kernel beside k.

    Raises:
        ValueError: If the constant is negative or not finite; in :meth:`fit`, if the mean is not positive.

    Example:
        >>> import torch
        >>> kernel = UnitMean(SameLabel())
        >>> kernel.fit(torch.tensor([[0.0], [0.0], [1.0], [1.0]]))
        >>> kernel(torch.zeros(1, 1), torch.tensor([[0.0], [1.0]]))
        tensor([[2., 0.]])
    """

    mean: Tensor

    def __init__(self, kernel: Kernel, constant: float = 0.0) -> None:
        super().__init__()
        if not (math.isfinite(constant) and constant >= 0):
            raise ValueError(f"UnitMean takes a finite constant >= 0, found {constant!r}. Write constant=1.0.")
        self.kernel = kernel
        self.constant = constant
        self._is_fitted = False
        self.register_buffer("mean", torch.tensor(math.nan))

    def fit(self, prior: Tensor) -> None:
        """Takes the lengths, and the mean over all pairs of rows, from the first rows that it sees."""
        self.kernel.fit(prior)
        if self._is_fitted:
            return
        with torch.no_grad():
            # Some rows at a time: the first batch may be a large one, whose pairs MMD never holds at once either.
            parts = prior.split(max(1, MOST_FITTED_PAIRS // len(prior)))
            mean = torch.stack([self.kernel.gram(part, prior).sum() for part in parts]).sum() / len(prior) ** 2
        if not (torch.isfinite(mean) and mean > 0):
            raise ValueError(
                f"{self!r} divides by the mean of its kernel, found {mean.item():g}. Use a kernel that is positive, "
                "such as SameLabel() or Gaussian()."
            )
        with torch.inference_mode(False):
            self.mean = mean.detach().clone()
        self._is_fitted = True

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        if not self._is_fitted:
            raise ValueError(f"{self!r} has no mean yet. Take it from the rows to be compared: kernel.fit(rows).")
        values = self.kernel.gram(x, y)
        return (values / self.mean.to(values) + self.constant) / (1 + self.constant)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        value = state_dict.get(prefix + "mean")
        if value is not None:
            # Assigned and not copied, as in RadialKernel.
            self.mean = value.detach().clone().to(self.mean.device)
            self._is_fitted = not bool(value.isnan())
        super()._load_from_state_dict(state_dict, prefix, *args)


class Conditional(Kernel):
    """``k((z, y), (z', y')) = k_z(z, z') k_y(y, y')``, for codes z beside what they are conditional on, y.

    Both sides must have the same y: an :class:`Energy` kernel on the codes then serves too, which in a plain
    :class:`Product` it does not.

    Args:
        kernel: On the codes.
        condition_kernel: On the conditions; positive definite.
        size: How many of the last columns are the condition.

    Raises:
        ValueError: If the condition's kernel holds an :class:`Energy` kernel; in :meth:`fit`, if the conditions give it
            no length.
    """

    def __init__(self, kernel: Kernel, condition_kernel: Kernel, size: int) -> None:
        super().__init__()
        if any(isinstance(part, Energy) for part in condition_kernel.modules()):
            raise ValueError(
                f"A condition's kernel must be positive definite, and {condition_kernel!r} is only conditionally so. "
                "Write Laplace() in its place."
            )
        self.kernel = kernel
        self.condition_kernel = condition_kernel
        self.size = size

    def fit(self, prior: Tensor) -> None:
        z, y = self._split(prior)
        self.kernel.fit(z)
        try:
            self.condition_kernel.fit(y)
        except ValueError as error:
            raise ValueError(
                f"The first conditions, of shape {tuple(y.shape)}, give {self.condition_kernel!r} no length: {error} "
                "Shuffle the data, or give the kernel, as in MMD(condition_kernel=Gaussian(bandwidth=1.0))."
            ) from error

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        first = self._split(x)
        second = first if y is x else self._split(y)
        return self.kernel.gram(first[0], second[0]) * self.condition_kernel.gram(first[1], second[1])

    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return rows[:, : -self.size], rows[:, -self.size :]


def _root(u: Tensor) -> Tensor:
    # The square root has an infinite slope at 0, and 0 times infinity on the diagonal would be NaN:
    # below the smallest normal number the clamp passes no gradient.
    return u.clamp(min=torch.finfo(u.dtype).tiny).sqrt()


def _root_into(u: Tensor, out: Tensor) -> Tensor:
    return torch.clamp(u, min=torch.finfo(u.dtype).tiny, out=out).sqrt_()


def _without_infinite(slopes: Tensor, u: Tensor) -> Tensor:
    return slopes.masked_fill_(u <= torch.finfo(u.dtype).tiny, 0)


def _scratch_like(u: Tensor) -> Scratch:
    return torch.empty_like(u), torch.empty_like(u), torch.empty_like(u)


def _check_positive(owner: str, argument: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{owner} takes a number as {argument}, found {type(value).__name__}. Write {argument}=1.0.")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{owner} takes a finite {argument} > 0, found {value!r}. Write {argument}=1.0.")
