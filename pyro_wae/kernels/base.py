"""What a kernel is, and the kernels that are made of others or of a function."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_wae._core.numerics import at_least_float32, squared_distances, working_precision
from pyro_wae._core.repr import CallRepr

__all__ = [
    "Composite",
    "FunctionKernel",
    "Kernel",
    "Product",
    "RadialKernel",
    "Scaled",
    "Scratch",
    "Sum",
    "check_positive",
    "scratch_like",
]

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

    is_definite = True
    """Whether it is positive definite, and not only conditionally so, for weights that sum to 0."""

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
            check_positive(type(self).__name__, name, length)
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
        values, slopes, _ = scratch or scratch_like(u)
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
        if any(isinstance(part, Kernel) and not part.is_definite for part in self.modules()):
            raise ValueError(
                "A product with Energy is not a kernel, because Energy is only conditionally positive definite. "
                "Write a sum, or Laplace() in its place."
            )

    def combine(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def profile_and_slope(self, u: Tensor, scratch: Scratch | None = None) -> tuple[Tensor, Tensor]:
        values, slopes, _ = scratch or scratch_like(u)
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
        check_positive("A kernel's multiple", "factor", factor)
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


def scratch_like(u: Tensor) -> Scratch:
    """Fresh tensors to work in."""
    return torch.empty_like(u), torch.empty_like(u), torch.empty_like(u)


def check_positive(owner: str, argument: str, value: float) -> None:
    """Raises TypeError or ValueError unless the value is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{owner} takes a number as {argument}, found {type(value).__name__}. Write {argument}=1.0.")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{owner} takes a finite {argument} > 0, found {value!r}. Write {argument}=1.0.")
