"""Kernels that have a length, given or taken from prior draws."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pyro_wae._core import checks
from pyro_wae._core.fitted import FittedBuffers
from pyro_wae._core.rows import squared_distances, working_precision
from pyro_wae.kernels.base import Kernel, OneKernel, Scratch


class RadialKernel(FittedBuffers, Kernel):
    """A kernel of the distance alone, ``f(|x - y|^2 / l^2)``; subclasses define :meth:`~RadialKernel.profile`.

    Args:
        length: The length l, or None to take it from the prior draws.
        name: What the subclass calls its length: the attribute that keeps it, and the word in messages.

    Raises:
        TypeError: If the length is no number.
        ValueError: If it is not positive and finite.
    """

    squared_length_factor = 1.0
    """The squared length that is taken from the prior, over half the mean squared distance of its draws."""

    squared_length: Tensor

    def __init__(self, length: float | None, *, name: str) -> None:
        super().__init__()
        if length is not None:
            length = checks.number(f"{type(self).__name__}'s {name}", length, above=0, write=f"{name}=1.0")
        self._length_name = name
        setattr(self, name, length)
        self._given = None if length is None else length**2
        if length is None:
            self.register_fitted("squared_length")

    @property
    def is_set(self) -> bool:
        return self._given is not None or self._is_fitted["squared_length"]

    def take_length(self, half_mean_square: Tensor) -> None:
        self.set_squared_length(half_mean_square * self.squared_length_factor)

    def set_squared_length(self, value: Tensor) -> None:
        """Keeps ``value``, a scalar, as the squared length."""
        self.set_fitted("squared_length", value)

    @property
    def is_radial(self) -> bool:
        return type(self).gram is RadialKernel.gram

    @property
    def is_smooth(self) -> bool:
        return True

    def squared_unit(self, like: Tensor) -> Tensor:
        """l^2 as a scalar with the precision and device of ``like``.

        Raises:
            ValueError: If the length has neither been given nor taken from prior draws.
        """
        if not self.is_set:
            raise ValueError(
                f"{self!r} has no length yet. Give one, as in {type(self).__name__}({self._length_name}=1.0), "
                "or take it from prior draws: kernel.fit(prior)."
            )
        return self.squared_length_like(like)

    def squared_length_like(self, x: Tensor) -> Tensor:
        """l^2 as a scalar with the precision and device of ``x``; the length must be set."""
        return self.squared_length.to(x) if self._given is None else x.new_tensor(self._given)

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
        squares = working_squares(x, y)
        return squares / self.squared_unit(squares)

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        return self.profile(self.scaled_squares(x, y))


class MultiScale(OneKernel):
    """The sum of one kernel at several lengths: the squared length times each factor.

    Args:
        kernel: A kernel with a length.
        factors: Positive factors of its squared length.

    Raises:
        TypeError: If the kernel has no length.
        ValueError: If there is no factor, or one is not positive.
    """

    kernel: RadialKernel

    def __init__(self, kernel: RadialKernel, factors: Sequence[float]) -> None:
        super().__init__()
        write = "MultiScale(Gaussian(), (0.5, 1.0, 2.0)), or add kernels: k1 + k2"
        self.kernel = checks.instance(
            "MultiScale's kernel", kernel, RadialKernel, "a kernel that has a length", write=write
        )
        is_sequence = (
            isinstance(factors, Iterable) and not isinstance(factors, bytes) and getattr(factors, "ndim", 1) > 0
        )
        factors = checks.accepted(
            "MultiScale's factors", factors, is_sequence, "a sequence of numbers", write="factors=(0.5, 1.0, 2.0)"
        )
        self.factors = tuple(
            checks.number("Each of MultiScale's factors", factor, above=0, write="factors=(0.5, 1.0, 2.0)")
            for factor in factors
        )
        if not self.factors:
            raise ValueError("MultiScale's factors must be one or more, found none. Write factors=(0.5, 1.0, 2.0).")

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        return self.profile(self.kernel.scaled_squares(x, y))

    def profile(self, u: Tensor) -> Tensor:
        total = self.kernel.profile(u / self.factors[0])
        for factor in self.factors[1:]:
            total = total + self.kernel.profile(u / factor)
        return total

    def profile_and_slope(self, u: Tensor, scratch: Scratch | None = None) -> tuple[Tensor, Tensor]:
        return self.kernel.profile_and_slope_at_scales(u, self.factors, scratch)

    def gaussian_terms(self, like: Tensor, factors: Sequence[float] = (1.0,)) -> tuple[Tensor, Tensor] | None:
        return self.kernel.gaussian_terms(like, [own * factor for factor in factors for own in self.factors])


def working_squares(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances in the working precision; a set against itself stays one."""
    first = working_precision(x)
    return squared_distances(first, first if y is x else working_precision(y))
