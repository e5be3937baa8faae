"""Means over pairs of codes that leave out the pairs that are not independent."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["mean_within", "same_datum"]


def mean_within(gram: Tensor, repeats: int, data_size: int | None = None) -> Tensor:
    """The mean of a function h over pairs of rows of different data, E h(q, q').

    Args:
        gram: Shape (repeats n, repeats n): h of every pair of rows, finite also where it is left out. The rows are
            ``repeats`` draws of each of n data, one block after the other.
        repeats: Number of draws of each datum.
        data_size: Number N of data that the distribution averages over. Pairs of different draws of one datum then
            come back with weight 1/N, which is their share.

    Returns:
        A scalar.
    """
    n = len(gram) // repeats
    same = same_datum(gram, repeats, repeats)
    between = (gram.sum() - same.sum()) / (repeats**2 * n * (n - 1))
    if data_size is None or repeats == 1:
        return between
    within = (same.sum() - gram.diagonal().sum()) / (repeats * (repeats - 1) * n)
    return torch.lerp(between, within, 1 / data_size)


def same_datum(gram: Tensor, row_repeats: int, column_repeats: int) -> Tensor:
    """The entries of pairs that share a datum, from a matrix of (row_repeats n, column_repeats n)."""
    blocks = gram.unflatten(0, (row_repeats, -1)).unflatten(2, (column_repeats, -1))
    return blocks.diagonal(dim1=1, dim2=3)
