"""Kernels that compare what codes are conditional on."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from pyro_wae._core import checks
from pyro_wae._core.fitted import FittedBuffers
from pyro_wae._core.rows import working_precision
from pyro_wae.kernels.base import Kernel
from pyro_wae.kernels.radial import Gaussian, MultiScale

MOST_FITTED_PAIRS = 512**2
"""The largest number of pairs that :class:`UnitMean` takes its mean from at a time."""

FLOAT_FACTOR = 0.25
"""The squared length of the default kernel on floats, over half the mean squared distance of two conditions: of several
half images the closest tell most, and a longer one hardly measures more than the marginal."""


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
        values = same.to(working_precision(x).dtype)
        # NaN is equal to nothing: without this it would count as a label of its own.
        return values + 0.0 * (x.sum(1)[:, None] + y.sum(1)) if x.is_floating_point() else values


class UnitMean(FittedBuffers, Kernel):
    """A kernel divided by its mean, :math:`(k(x, y) / E k + a) / (1 + a)`; a product with it keeps the other's scale.

    Args:
        kernel: Any kernel with a positive mean.
        constant: a >= 0, the share of a constant kernel beside k.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If the constant is negative or not finite; in :meth:`fit`, if the mean is not positive.

    Example:
        >>> import torch
        >>> kernel = UnitMean(SameLabel())
        >>> kernel.fit(torch.tensor([[0.0], [0.0], [1.0], [1.0]]))
        >>> kernel(torch.zeros(1, 1), torch.tensor([[0.0], [1.0]]))
        tensor([[3., 0.]])
    """

    mean: Tensor

    def __init__(self, kernel: Kernel, constant: float = 0.0) -> None:
        super().__init__()
        self.kernel = checks.instance("UnitMean's kernel", kernel, Kernel, "a kernel", write="UnitMean(SameLabel())")
        self.constant = checks.number("UnitMean's constant", constant, least=0, write="constant=1.0")
        self.register_fitted("mean")

    def fit(self, prior: Tensor) -> None:
        """Takes the lengths, and the mean over pairs of two rows, from the first rows that it receives.

        If the kernel is 0 between any two rows, as between labels that all differ, the mean is that over all pairs, a
        row's pair with itself included.
        """
        self.kernel.fit(prior)
        if self.is_fitted("mean"):
            return
        n, between, own = len(prior), [], []
        with torch.no_grad():
            # Some rows at a time: the first batch may be a large one, whose pairs MMD never holds at once either.
            size = max(1, MOST_FITTED_PAIRS // n)
            for start in range(0, n, size):
                values = self.kernel.gram(prior[start : start + size], prior).clone()
                own.append(values.diagonal(start).sum())
                values.diagonal(start).zero_()
                between.append(values.sum())
            total = torch.stack(between).sum()
            mean = total / (n * (n - 1)) if total > 0 else (total + torch.stack(own).sum()) / n**2
        if not (torch.isfinite(mean) and mean > 0):
            raise ValueError(
                f"{self!r} divides by the mean of its kernel, found {mean.item():g}. Use a kernel that is positive, "
                "such as SameLabel() or Gaussian()."
            )
        self.set_fitted("mean", mean)

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.is_fitted("mean"):
            raise ValueError(f"{self!r} has no mean yet. Take it from the rows to be compared: kernel.fit(rows).")
        values = self.kernel.gram(x, y)
        return (values / self.mean.to(values) + self.constant) / (1 + self.constant)


class Conditional(Kernel):
    r"""The product :math:`k_z(z, z')\, k_y(y, y')`, for codes z beside what they are conditional on, y.

    Codes and prior samples must have the same conditions y. The kernel on the codes may then be an :class:`Energy`
    kernel, which a plain :class:`Product` does not accept.

    Args:
        kernel: On the codes.
        condition_kernel: On the conditions; positive definite.
        size: How many of the last columns are the condition, >= 1.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If the condition's kernel holds an :class:`Energy` kernel; in :meth:`~pyro_wae.kernels.Kernel.fit`,
            if the conditions give it no length.
    """

    def __init__(self, kernel: Kernel, condition_kernel: Kernel, size: int) -> None:
        super().__init__()
        write = "Conditional(Gaussian(), SameLabel(), 1)"
        self.kernel = checks.instance("Conditional's kernel", kernel, Kernel, "a kernel", write=write)
        self.condition_kernel = checks.instance(
            "Conditional's condition_kernel", condition_kernel, Kernel, "a kernel", write=write
        )
        self.size = checks.whole("Conditional's size", size, write=write)
        if not condition_kernel.holds_only_definite:
            raise ValueError(
                f"A condition's kernel must be positive definite, and {condition_kernel!r} is only conditionally so. "
                "Write Laplace() in its place."
            )

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


class DefaultConditionKernels(FittedBuffers, nn.ModuleDict):
    """The kernels that compare conditions unless one is given, made when they are first needed.

    Each is divided by its mean, which leaves a penalty weight what it is without a condition: labels then give the mean
    over pairs of one label, whatever the number of labels.
    """

    def of(self, condition: Tensor) -> Kernel:
        """The kernel for a condition of this kind."""
        return self._made("floats" if condition.is_floating_point() else "labels")

    def _made(self, kind: str) -> UnitMean:
        if kind not in self:
            self[kind] = UnitMean(SameLabel() if kind == "labels" else MultiScale(Gaussian(), (FLOAT_FACTOR,)))
        return cast(UnitMean, self[kind])

    def before_loading(self, saved: dict[str, Any]) -> None:
        for kind in {key.split(".")[0] for key in saved} & {"floats", "labels"}:
            self._made(kind)
