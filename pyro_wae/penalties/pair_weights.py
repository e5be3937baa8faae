"""Weights of pairs of rows in a mean that leaves out the pairs that are not independent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PairWeights:
    """What each pair of rows counts in a sum. Row i has the datum i modulo n.

    Args:
        between: Weight of a pair of different data.
        same: Weight of a pair of one datum.
        own: Weight of a row with itself, where both rows come from one set.
        data: n, or None where no two rows share a datum.
    """

    between: float
    same: float
    own: float
    data: int | None

    def __rmul__(self, factor: float) -> PairWeights:
        return PairWeights(factor * self.between, factor * self.same, factor * self.own, self.data)

    def diagonals(
        self, shape: Sequence[int], *, symmetric: bool = False, corner: tuple[int, int] = (0, 0)
    ) -> Iterator[tuple[int, float]]:
        """The diagonals of a block of the matrix of pairs whose weight is not ``between``.

        Args:
            shape: The block's.
            symmetric: Whether rows and columns of the matrix are one set.
            corner: The row and the column of the matrix where the block begins.

        Yields:
            The offset of a diagonal, as :func:`torch.diagonal` takes it, and its weight over ``between``.
        """
        rows, columns = shape
        main = corner[0] - corner[1]
        if self.data is None:
            times = range(1) if symmetric and -rows < main < columns else range(0)
        else:
            times = range(-((rows - 1 + main) // self.data), (columns - 1 - main) // self.data + 1)
        for time in times:
            weight = self.own if symmetric and time == 0 else self.same
            if weight != self.between:
                yield main + time * (self.data or 0), weight / self.between

    def total(self, values: Tensor, *, symmetric: bool = False, corner: tuple[int, int] = (0, 0)) -> Tensor:
        """The weighted sum of a block, by default of the whole matrix; its values must all be finite.

        Args:
            values: Shape (rows, columns).
            symmetric: As in :meth:`diagonals`.
            corner: As in :meth:`diagonals`.

        Returns:
            A scalar.
        """
        total = values.sum()
        for offset, ratio in self.diagonals(values.shape, symmetric=symmetric, corner=corner):
            total = total + (ratio - 1) * values.diagonal(offset).sum()
        return self.between * total


def every(rows: int, columns: int) -> PairWeights:
    """The mean over all pairs."""
    weight = 1 / (rows * columns)
    return PairWeights(weight, weight, weight, None)


def within(rows: int, repeats: int, data_size: int | None = None) -> PairWeights:
    """The mean over pairs of rows of different data, E h(q, q').

    Args:
        rows: Number of rows, ``repeats`` draws of each of n data, one block after the other.
        repeats: Number of draws of each datum.
        data_size: Number N of data that the distribution averages over. Pairs of different draws of one datum then
            have the weight 1/N, which is their share.
    """
    n = rows // repeats
    between = 1 / (repeats**2 * n * (n - 1))
    if repeats == 1:
        return PairWeights(between, 0.0, 0.0, None)
    if data_size is None:
        return PairWeights(between, 0.0, 0.0, n)
    return PairWeights(between * (1 - 1 / data_size), 1 / (repeats * (repeats - 1) * n * data_size), 0.0, n)


def across(rows: int, columns: int, n: int, data_size: int | None = None) -> PairWeights:
    """The mean over pairs of a row of one set and a row of another with different data, n in both.

    Args:
        rows: Number of rows, a multiple of n.
        columns: The same of the other set.
        n: Number of data.
        data_size: As in :func:`within`.
    """
    pairs = rows * columns
    between, same = 1 / (pairs - pairs // n), n / pairs
    if data_size is None:
        return PairWeights(between, 0.0, 0.0, n)
    return PairWeights(between * (1 - 1 / data_size), same / data_size, 0.0, n)
