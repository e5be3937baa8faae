"""The base class of kernels, and sums, products and multiples of kernels."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_wae._core import checks
from pyro_wae._core.repr import CallRepr
from pyro_wae._core.rows import at_least_float32, squared_distances, working_precision

Scratch = tuple[Tensor, ...]
"""Tensors to work in, where taking fresh memory from the system would cost more than the arithmetic."""

SCRATCH = 5
"""The number of them."""

FOLLOWS = {
    "gram": ("is_radial", "gaussian_terms"),
    "scaled_squares": ("is_radial", "gaussian_terms"),
    "profile": ("profile_and_slope", "profile_and_slope_at_scales", "gaussian_terms"),
}
"""Methods that define a kernel, and those that describe the same kernel: who overrides the first inherits no second."""


class Kernel(CallRepr, nn.Module):
    """A positive definite kernel; subclasses define :meth:`~Kernel.gram`, or :meth:`~Kernel.profile`.

    Example:
        >>> import torch
        >>> from pyro_wae.kernels import Gaussian
        >>> k = Gaussian(bandwidth=1.0) + 0.5 * Gaussian(bandwidth=2.0)
        >>> k(torch.zeros(3, 2), torch.zeros(4, 2)).shape
        torch.Size([3, 4])
    """

    __array_ufunc__ = None  # numpy's numbers then leave `number * kernel` to __rmul__

    is_definite = True
    """Whether it is positive definite, and not only conditionally so, for weights that sum to 0."""

    is_function = False
    """Whether it calls a plain function or module, which receives codes in their own precision."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Resets to the base class what describes a parent's kernel, where the subclass defines another."""
        super().__init_subclass__(**options)
        order = cls.__mro__
        for written, names in FOLLOWS.items():
            above = order[next(i for i, base in enumerate(order) if written in vars(base)) + 1 :]
            for name in names:
                owners = [base for base in order if name in vars(base)]
                if len(owners) > 1 and owners[0] in above:
                    setattr(cls, name, vars(owners[-1])[name])

    def __init__(self) -> None:
        super().__init__()
        self.compiles = False  # whether compile_profile has been called

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Computes the kernel on all pairs of rows.

        Args:
            x: Shape (n, d).
            y: Shape (m, d).

        Returns:
            Shape (n, m), in the precision of ``x`` (float32 at least).

        Raises:
            TypeError: If an argument is not a tensor.
            ValueError: If a shape is not (rows, d) with one d, a dtype is not floating, or a bandwidth has not been
                set.
        """
        for name, rows in (("x", x), ("y", y)):
            what = f"{type(self).__name__}'s {name}"
            checks.instance(what, rows, Tensor, "a tensor of shape (rows, d)", write=f"torch.as_tensor({name})")
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
        """The same as a call, unchecked and left in the working precision, for sums that nearly cancel.

        By default it is the :meth:`profile` of a radial kernel.
        """
        return self.profile(self.scaled_squares(x, y))

    # Kernels of the distance alone

    @property
    def is_radial(self) -> bool:
        """Whether it is :meth:`profile` of ``u = |x - y|^2 / squared_unit``, a function of the distance alone."""
        return False

    @property
    def is_smooth(self) -> bool:
        """Whether it is radial and twice differentiable in each argument, also where they coincide.

        By default it is where all kernels that it is made of are.
        """
        parts = [part for part in self.modules() if isinstance(part, Kernel) and part is not self]
        return self.is_radial and len(parts) > 0 and all(part.is_smooth for part in parts)

    def squared_unit(self, like: Tensor) -> Tensor:
        """The squared length in which a radial kernel measures, a scalar with the precision and device of ``like``."""
        return like.new_ones(())

    def scaled_squares(self, x: Tensor, y: Tensor) -> Tensor:
        """``|x - y|^2 / squared_unit`` for all pairs, in the working precision."""
        first = working_precision(x)
        squares = squared_distances(first, first if y is x else working_precision(y))
        return squares / self.squared_unit(squares)

    def profile(self, u: Tensor) -> Tensor:
        """A radial kernel as a function of ``u >= 0``, elementwise."""
        raise NotImplementedError

    def profile_and_slope(self, u: Tensor, scratch: Scratch | None = None) -> tuple[Tensor, Tensor]:
        """The profile and its derivative by u, which is 0 where it would be infinite: without a graph.

        The derivative is taken automatically where a subclass does not write it out, which saves time.

        Args:
            u: Any shape.
            scratch: Five tensors of that shape to work in; what is returned may lie in them.

        Returns:
            Two tensors of the shape of ``u``.
        """
        with torch.inference_mode(False), torch.enable_grad():
            u = u.detach().clone().requires_grad_()
            values = self.profile(u)
            (slopes,) = torch.autograd.grad(values.sum(), u)
        return values.detach(), slopes

    def gaussian_terms(self, like: Tensor, factors: Sequence[float] = (1.0,)) -> tuple[Tensor, Tensor] | None:
        """The kernel as a mixture of Gaussians, ``sum_a w_a exp(-g_a |x - y|^2)``, from which closed forms follow.

        Args:
            like: Of the precision and device that the result is to have.
            factors: Factors of the squared length, over which a kernel with a length is summed.

        Returns:
            The weights w and the rates g, both of shape (a,), or None where it is not known as one.
        """
        return None

    def compile_profile(self) -> None:
        """Compiles what a penalty of a large batch spends its time on, the profile and slope of a radial kernel.

        The first large batch then takes a while. It needs what :func:`torch.compile` needs, a C++ compiler on a CPU.

        Raises:
            TypeError: If the kernel is not radial.
        """
        if not self.is_radial:
            raise TypeError(
                f"Kernel.compile_profile takes a kernel of the distance alone, found {self!r}. Leave it as it is."
            )
        self.compiles = True

    # Lengths

    @property
    def is_set(self) -> bool:
        """Whether its own length, if it has one, was given or has been taken from prior samples."""
        return True

    def take_length(self, half_mean_square: Tensor) -> None:
        """Sets its own length from half the mean squared distance of independent prior samples, a scalar."""

    def unset(self) -> list[Kernel]:
        """Itself and the kernels that it is made of, as far as they have no length yet."""
        return [part for part in self.modules() if isinstance(part, Kernel) and not part.is_set]

    def fit(self, prior: Tensor) -> None:
        """Sets every length that is still unset, from samples of the prior.

        The squared length is half the mean squared distance of two independent draws, which for
        N(0, sigma^2 I) in d dimensions is d sigma^2; kernels state their own multiple of it. It is
        kept in ``state_dict``. Codes never enter: a length that followed them would let an encoder
        lower the penalty by moving the length.

        Args:
            prior: Shape (m, d) with m >= 2.

        Raises:
            TypeError: If the prior samples are not a dense tensor.
            ValueError: If they are fewer than 2, or have no finite, positive spread.
        """
        unset = self.unset()
        if not unset:
            return
        checks.tensor("prior", prior, write="kernel.fit(torch.as_tensor(prior).to_dense())")
        count = prior.shape[:1].numel()  # a number without dimensions is one sample
        if count < 2:
            raise ValueError(
                f"A kernel's bandwidth is computed from at least 2 prior samples, found {count}. Write it, as in "
                "Gaussian(bandwidth=1.0)."
            )
        half_mean_square = working_precision(prior.detach()).var(0).sum()
        if not (torch.isfinite(half_mean_square) and half_mean_square > 0):
            raise ValueError(
                f"The prior samples have a total variance of {half_mean_square.item():g}, from which no length "
                f"can be taken for {unset[0]!r}. Give the length, as in Gaussian(bandwidth=1.0)."
            )
        for part in unset:
            part.take_length(half_mean_square)

    @property
    def holds_function(self) -> bool:
        """Whether it, or a kernel that it is made of, :attr:`is_function`."""
        return any(isinstance(part, Kernel) and part.is_function for part in self.modules())

    def widened(self, rows: Tensor) -> Tensor:
        """Rows in the precision in which it takes them: the working one, or their own where it holds a function."""
        return rows if self.holds_function else working_precision(rows)

    @property
    def holds_only_definite(self) -> bool:
        """Whether it, and the kernels that it is made of, are positive definite."""
        return all(part.is_definite for part in self.modules() if isinstance(part, Kernel))

    def __add__(self, other: Kernel) -> Kernel:
        return Sum(self, other) if isinstance(other, Kernel) else NotImplemented

    def __mul__(self, other: Kernel | float) -> Kernel:
        if isinstance(other, Kernel):
            return Product(self, other)
        return Scaled(self, other) if checks.is_number(other) else NotImplemented

    __rmul__ = __mul__


class Composite(Kernel):
    """Several kernels as one; subclasses say how their values combine.

    Raises:
        TypeError: If one of them is not a kernel.
        ValueError: If there is none.
    """

    def __init__(self, *kernels: Kernel) -> None:
        super().__init__()
        name = type(self).__name__
        if not kernels:
            raise ValueError(
                f"{name} takes one of its kernels or more, found none. Write {name}(Gaussian(), Laplace())."
            )
        self.kernels = nn.ModuleList(
            checks.instance(
                f"Each of {name}'s kernels", kernel, Kernel, "a kernel", write=f"{name}(Gaussian(), Laplace())"
            )
            for kernel in kernels
        )

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
        values, slopes = scratch[:2] if scratch else (torch.empty_like(u), torch.empty_like(u))
        values.zero_()
        slopes.zero_()
        for value, slope in self.profiles_and_slopes(u):
            values += value
            slopes += slope
        return values, slopes

    def gaussian_terms(self, like: Tensor, factors: Sequence[float] = (1.0,)) -> tuple[Tensor, Tensor] | None:
        weights, rates = [], []
        for part in self.parts():
            terms = part.gaussian_terms(like, factors)
            if terms is None:
                return None
            weights.append(terms[0])
            rates.append(terms[1])
        return torch.cat(weights), torch.cat(rates)

    def __repr__(self) -> str:
        return f"({' + '.join(map(repr, self.kernels))})"


class Product(Composite):
    """k1 * k2 * ...; usually written with ``*``.

    Raises:
        ValueError: If a factor is an :class:`Energy` kernel, whose products are not kernels.
    """

    def __init__(self, *kernels: Kernel) -> None:
        super().__init__(*kernels)
        if not self.holds_only_definite:
            raise ValueError(
                "A product with Energy is not a kernel, because Energy is only conditionally positive definite. "
                "Write a sum, or Laplace() in its place."
            )

    def combine(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def profile_and_slope(self, u: Tensor, scratch: Scratch | None = None) -> tuple[Tensor, Tensor]:
        values, slopes = scratch[:2] if scratch else (torch.empty_like(u), torch.empty_like(u))
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

    Args:
        kernel: The kernel.
        factor: The number, > 0.

    Raises:
        TypeError: If one of them is of another kind.
        ValueError: If the number is not positive and finite.
    """

    def __init__(self, kernel: Kernel, factor: float) -> None:
        super().__init__()
        self.kernel = checks.instance("Scaled's kernel", kernel, Kernel, "a kernel", write="2.0 * Gaussian()")
        self.factor = checks.number("Scaled's factor", factor, above=0, write="factor=1.0")

    @property
    def is_radial(self) -> bool:
        return self.kernel.is_radial

    def squared_unit(self, like: Tensor) -> Tensor:
        return self.kernel.squared_unit(like)

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        return self.factor * self.kernel.gram(x, y)

    def profile(self, u: Tensor) -> Tensor:
        return self.factor * self.kernel.profile(u)

    def profile_and_slope(self, u: Tensor, scratch: Scratch | None = None) -> tuple[Tensor, Tensor]:
        values, slopes = self.kernel.profile_and_slope(u, scratch)
        return values.mul_(self.factor), slopes.mul_(self.factor)

    def gaussian_terms(self, like: Tensor, factors: Sequence[float] = (1.0,)) -> tuple[Tensor, Tensor] | None:
        terms = self.kernel.gaussian_terms(like, factors)
        return None if terms is None else (self.factor * terms[0], terms[1])

    def __repr__(self) -> str:
        return f"{self.factor} * {self.kernel!r}"
