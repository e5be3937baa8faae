"""Weighted sums of a kernel over pairs of rows, of two sets within and across, in memory that grows with the rows.

Few pairs are summed as a whole matrix, by automatic differentiation. Of many the matrix is never there: a block at a
time is made, small enough to stay in a processor's cache, summed, and turned into its part of the gradient while it is
still there. Backward then only multiplies.

All of it is in float64, as the sums of whole matrices are; see :func:`~pyro_wae._core.rows.working_precision`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from pyro_wae._core.private import is_transforming
from pyro_wae._core.rows import working_precision
from pyro_wae.kernels import Kernel
from pyro_wae.kernels.base import SCRATCH

MOST_PAIRS = 512**2
"""The largest number of pairs of rows whose matrix is made as a whole."""

MOST_RADIAL_PAIRS = 64**2
"""The same for a kernel of the distance alone, whose derivative by hand is the faster from here on."""

MOST_ROWS_AT_ONCE = 256
"""The largest number of rows whose matrix, that of one set, is made as a whole without automatic differentiation."""

BLOCK = {"cpu": (128, 2048)}
"""Rows and columns of a block by the type of device: small enough for a processor's cache."""

OTHER_BLOCK = (1024, 4096)
"""The same for all other devices: enough to keep them busy."""


class PairTerm:
    """A weighted sum over pairs of rows of one set or of two. Row i has the datum i modulo n.

    Args:
        between: Weight of a pair of different data.
        same: Weight of a pair of one datum.
        own: Weight of a row with itself, where both rows come from one set.
        data: n, or None where no two rows share a datum.
        left: Index of the set that is the rows of the matrix of pairs.
        right: Index of the set that is its columns.
    """

    def __init__(
        self, between: float, *, same: float = 0.0, own: float = 0.0, data: int | None = None, left: int, right: int
    ) -> None:
        self.between, self.same, self.own, self.data = between, same, own, data
        self.left, self.right = left, right
        # Of the pairs of one set the kernel's values need to be taken once only.
        self.is_symmetric = left == right

    def __rmul__(self, factor: float) -> PairTerm:
        between, same, own = (factor * weight for weight in (self.between, self.same, self.own))
        return PairTerm(between, same=same, own=own, data=self.data, left=self.left, right=self.right)

    def diagonals(self, shape: Sequence[int], corner: tuple[int, int] = (0, 0)) -> Iterator[tuple[int, float]]:
        """The diagonals of a block of the matrix of pairs whose weight is not ``between``.

        Args:
            shape: The block's.
            corner: The row and the column of the matrix where the block begins.

        Yields:
            The offset of a diagonal, as :func:`torch.diagonal` takes it, and its weight over ``between``.
        """
        rows, columns = shape
        main = corner[0] - corner[1]
        if self.data is None:
            times = range(1) if self.is_symmetric and -rows < main < columns else range(0)
        else:
            times = range(-((rows - 1 + main) // self.data), (columns - 1 - main) // self.data + 1)
        for time in times:
            weight = self.own if self.is_symmetric and time == 0 else self.same
            if weight != self.between:
                yield main + time * (self.data or 0), weight / self.between

    def total(self, values: Tensor, corner: tuple[int, int] = (0, 0)) -> Tensor:
        """The weighted sum of a block, by default of the whole matrix; its values must all be finite.

        Args:
            values: Shape (rows, columns).
            corner: As in :meth:`diagonals`.

        Returns:
            A scalar.
        """
        total = values.sum()
        for offset, ratio in self.diagonals(values.shape, corner):
            total = total + (ratio - 1) * values.diagonal(offset).sum()
        return self.between * total


def every(rows: int, columns: int, left: int = 0, right: int = 0) -> PairTerm:
    """The mean over all pairs of rows of two sets."""
    weight = 1 / (rows * columns)
    return PairTerm(weight, same=weight, own=weight, left=left, right=right)


def within(rows: int, repeats: int, data_size: int | None = None, of: int = 0) -> PairTerm:
    """The mean over pairs of rows of one set that have different data, E h(q, q').

    Args:
        rows: Number of rows, ``repeats`` draws of each of n data, one block after the other.
        repeats: Number of draws of each datum.
        data_size: Number N of data that the distribution averages over. Pairs of different draws of one datum then
            have the weight 1/N, which is their share.
        of: Index of the set.
    """
    n = rows // repeats
    between = 1 / (repeats**2 * n * (n - 1))
    if repeats == 1 or data_size is None:
        return PairTerm(between, data=None if repeats == 1 else n, left=of, right=of)
    same = 1 / (repeats * (repeats - 1) * n * data_size)
    return PairTerm(between * (1 - 1 / data_size), same=same, data=n, left=of, right=of)


def across(rows: int, columns: int, n: int, data_size: int | None = None) -> PairTerm:
    """The mean over pairs of a row of the first set and a row of the second with different data, n in both.

    Args:
        rows: Number of rows, a multiple of n.
        columns: The same of the other set.
        n: Number of data.
        data_size: As in :func:`within`.
    """
    pairs = rows * columns
    between, same = 1 / (pairs - pairs // n), n / pairs
    if data_size is None:
        return PairTerm(between, data=n, left=0, right=1)
    return PairTerm(between * (1 - 1 / data_size), same=same / data_size, data=n, left=0, right=1)


def pair_total(kernel: Kernel, sets: tuple[Tensor, ...], terms: tuple[PairTerm, ...]) -> Tensor:
    """Sums a kernel over pairs of rows of one or several sets.

    Second derivatives and the transforms of ``torch.func`` are those of the whole matrix, and take its memory.

    Args:
        kernel: Its lengths are set. One that holds a function is called with some rows at a time where there are many.
        sets: Each of shape (rows, d), a float.
        terms: What is summed.

    Returns:
        A scalar in the working precision, differentiable in the sets.
    """
    most = max([len(sets[term.left]) * len(sets[term.right]) for term in terms])
    is_radial = kernel.is_radial
    is_few = most <= (MOST_RADIAL_PAIRS if is_radial else MOST_PAIRS)
    if is_few or is_transforming() or (not is_radial and _learns(kernel, sets)):
        return _dense(kernel, sets, terms)
    if torch.is_grad_enabled() and any(rows.requires_grad for rows in sets):
        return cast(Tensor, _PairTotal.apply(kernel, is_radial, terms, *sets))
    return _blockwise(kernel, is_radial, sets, terms, (False,) * len(sets))[0]


class _PairTotal(torch.autograd.Function):
    """The sum, whose gradient is known as soon as its value is."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, is_radial: bool, terms: tuple[PairTerm, ...], *sets: Tensor) -> Tensor:
        total, gradients = _blockwise(kernel, is_radial, sets, terms, ctx.needs_input_grad[3:])
        ctx.kernel, ctx.terms = kernel, terms
        ctx.save_for_backward(*sets, *gradients)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.saved_tensors) // 2
        sets, gradients = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        if not torch.is_grad_enabled():
            return None, None, None, *(None if known is None else (gradient * known).to(known) for known in gradients)
        # Someone wrote create_graph=True, and what is kept has no graph.
        wanted = [rows for rows, known in zip(sets, gradients, strict=True) if known is not None]
        found = iter(torch.autograd.grad(_dense(ctx.kernel, sets, ctx.terms), wanted, gradient, create_graph=True))
        return None, None, None, *(None if known is None else next(found) for known in gradients)


def _dense(kernel: Kernel, sets: tuple[Tensor, ...], terms: tuple[PairTerm, ...]) -> Tensor:
    # Once and not for each term: their gradients nearly cancel, and have to meet before they are rounded.
    sets = tuple(kernel.widened(rows) for rows in sets)
    totals = (term.total(kernel.gram(sets[term.left], sets[term.right])) for term in terms)
    return functools.reduce(torch.add, totals)


def _blockwise(
    kernel: Kernel, is_radial: bool, sets: tuple[Tensor, ...], terms: tuple[PairTerm, ...], wanted: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """The sum, and its gradient by each set where that is wanted, in the set's precision and without a graph."""
    with torch.no_grad():
        if is_radial and len(sets) == len(terms) == 1 and len(sets[0]) <= MOST_ROWS_AT_ONCE:
            return _at_once(kernel, sets[0], terms[0], wanted[0])
        pairs = (_RadialPairs if is_radial else _AnyPairs)(kernel, sets, wanted)
        total = zeros(sets[0])
        for term in terms:
            sizes = len(sets[term.left]), len(sets[term.right])
            for block in blocks(*sizes, symmetric=term.is_symmetric, device=sets[0].device):
                total += pairs.add(term, block)
        return total, pairs.take_gradients()


def _at_once(kernel: Kernel, rows: Tensor, term: PairTerm, wanted: bool) -> tuple[Tensor, list[Tensor | None]]:
    """What _RadialPairs gives for pairs of few rows of one set, in as few operations as it takes."""
    x = working_precision(rows)
    x = x - x.mean(0)
    unit = kernel.squared_unit(x).sqrt()
    x = x.div_(unit)
    squares = torch.linalg.vecdot(x, x)
    u = torch.addmm(squares, x, x.mT, alpha=-2).add_(squares[:, None]).clamp_(min=0).fill_diagonal_(0)
    values, slopes = kernel.profile_and_slope(u)
    value = term.total(values)
    if not wanted:
        return value, [None]
    for offset, ratio in term.diagonals(u.shape):
        slopes.diagonal(offset).mul_(ratio)
    gradient = torch.addmm(x * slopes.sum(1, keepdim=True), slopes, x, alpha=-1)
    return value, [gradient.mul_(4 * term.between).div_(unit).to(rows.dtype)]


@dataclass(frozen=True, eq=False)
class Block:
    """A rectangle of the matrix of pairs, which counts ``times`` times, also for its mirror image."""

    rows: slice
    columns: slice
    times: int
    is_own: bool
    """Whether rows and columns are the same."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    @property
    def corner(self) -> tuple[int, int]:
        return self.rows.start, self.columns.start


def blocks(rows: int, columns: int, *, symmetric: bool, device: torch.device) -> Iterator[Block]:
    """The rectangles that a matrix of pairs is made of; of a symmetric one those on and right of its diagonal."""
    height, width = _block_shape(max(rows, columns), device)
    for top in range(0, rows, height):
        band, start = slice(top, min(top + height, rows)), 0
        if symmetric:
            yield Block(band, band, 1, True)
            start = band.stop
        for left in range(start, columns, width):
            yield Block(band, slice(left, min(left + width, columns)), 2 if symmetric else 1, False)


def _block_shape(rows: int, device: torch.device) -> tuple[int, int]:
    """Rows and columns of a block; of few rows one block is all pairs, because more would take longer to start."""
    return (rows, rows) if rows <= MOST_ROWS_AT_ONCE else BLOCK.get(device.type, OTHER_BLOCK)


class _RadialPairs:
    """Sums of a function of the distance, with its derivative written out.

    For u = |x - y|^2 of two rows the gradient by x is 2 f'(u) (x - y). With the matrix S of slopes that of all rows is
    2 (s X - S Y), s the row sums of S, and one product of matrices, S [Y, 1], gives both. It is summed over all blocks
    and terms before X comes in.
    """

    def __init__(self, kernel: Kernel, sets: tuple[Tensor, ...], wanted: tuple[bool, ...]) -> None:
        self.kernel, self.dtypes, self.d = kernel, [rows.dtype for rows in sets], sets[0].shape[1]
        # |x|^2 + |y|^2 - 2 x.y loses the digits by which |x| exceeds |x - y|, and distances stay when all rows move.
        centre = torch.stack([rows.mean(0, dtype=zeros(rows).dtype) for rows in sets]).mean(0)
        self.unit = kernel.squared_unit(centre).sqrt()
        self.columns = [self._columns(rows, centre) for rows in sets]
        self.products = [
            torch.zeros_like(columns[:-1]) if want else None for columns, want in zip(self.columns, wanted, strict=True)
        ]
        # Of the rows x, 1, h of a block's columns and x, h, 1 of its rows one product of matrices gives u.
        self.swapped = torch.arange(self.d + 2, device=centre.device)
        self.swapped[-2:] = self.swapped[-2:].flip(0)
        most = max(map(len, sets))
        height, width = _block_shape(most, centre.device)
        # A set of few rows is one block, also beside a larger set.
        small = max((len(rows) for rows in sets if len(rows) <= MOST_ROWS_AT_ONCE), default=0)
        size = max(min(height, most) * min(max(width, height), most), small**2)
        self.scratch = [centre.new_empty(size) for _ in range(1 + SCRATCH)]

    def add(self, term: PairTerm, block: Block) -> Tensor:
        """The sum over a block; its part of the gradients is added to them."""
        x, y = self.columns[term.left][:, block.rows], self.columns[term.right][:, block.columns]
        u, *scratch = (part[: block.shape[0] * block.shape[1]].view(block.shape) for part in self.scratch)
        u.addmm_(x.index_select(0, self.swapped).mT, y, beta=0, alpha=-2).clamp_(min=0)
        if block.is_own:
            u.fill_diagonal_(0)
        compiled = self.kernel.compiles
        values, slopes = _compiled()(self.kernel, u) if compiled else self.kernel.profile_and_slope(u, tuple(scratch))
        by_x, by_y = self.products[term.left], None if block.is_own else self.products[term.right]
        if by_x is not None or by_y is not None:
            for offset, ratio in term.diagonals(block.shape, block.corner):
                slopes.diagonal(offset).mul_(ratio)
        # Of a row with itself both ends move.
        weight = term.between * (2 if block.is_own else block.times)
        if by_x is not None:
            by_x[:, block.rows].addmm_(y[:-1], slopes.mT, alpha=weight)
        if by_y is not None:
            by_y[:, block.columns].addmm_(x[:-1], slopes, alpha=weight)
        return block.times * term.total(values, block.corner)

    def take_gradients(self) -> list[Tensor | None]:
        """The gradients by the sets; they are then used up."""
        self.scratch.clear()
        gradients: list[Tensor | None] = []
        for columns, product, dtype in zip(self.columns, self.products, self.dtypes, strict=True):
            if product is None:
                gradients.append(None)
                continue
            x, pull = columns[:-2], product[:-1]
            gradient = x.mul_(product[-1]).sub_(pull).mul_(2 / self.unit)
            gradients.append(gradient.mT.to(dtype).contiguous())
        self.columns.clear()
        return gradients

    def _columns(self, rows: Tensor, centre: Tensor) -> Tensor:
        """The columns x, 1, h with h = -|x|^2 / 2.

        A code is a column because products with the transpose of S are twice as slow the other way.
        """
        columns = centre.new_empty(self.d + 2, len(rows))
        x = columns[:-2]
        x.copy_(rows.mT).sub_(centre[:, None]).div_(self.unit)
        columns[-2] = 1
        torch.linalg.vecdot(x, x, dim=0, out=columns[-1]).mul_(-0.5)
        return columns


class _AnyPairs:
    """Sums of any kernel, differentiated automatically, a block at a time."""

    def __init__(self, kernel: Kernel, sets: tuple[Tensor, ...], wanted: tuple[bool, ...]) -> None:
        self.kernel, self.sets = kernel, sets
        self.gradients = [zeros(rows, *rows.shape) if want else None for rows, want in zip(sets, wanted, strict=True)]

    def add(self, term: PairTerm, block: Block) -> Tensor:
        """The sum over a block; its part of the gradients is added to them."""
        x = self._rows(term.left, block.rows)
        y = x if block.is_own else self._rows(term.right, block.columns)
        with torch.set_grad_enabled(x.requires_grad or y.requires_grad):
            total = block.times * term.total(self.kernel.gram(x, y), block.corner)
        if total.requires_grad:
            ends = [(term.left, block.rows, x)] + ([] if block.is_own else [(term.right, block.columns, y)])
            ends = [end for end in ends if end[2].requires_grad]
            found = torch.autograd.grad(total, [end[2] for end in ends], allow_unused=True)
            for (index, part, _), gradient in zip(ends, found, strict=True):
                sums = self.gradients[index]
                if gradient is not None and sums is not None:
                    sums[part] += gradient
        return total.detach()

    def take_gradients(self) -> list[Tensor | None]:
        """The gradients by the sets."""
        return [
            None if gradient is None else gradient.to(rows.dtype)
            for gradient, rows in zip(self.gradients, self.sets, strict=True)
        ]

    def _rows(self, index: int, part: slice) -> Tensor:
        rows = self.kernel.widened(self.sets[index][part].detach())
        return rows if self.gradients[index] is None else rows.requires_grad_()


@functools.cache
def _compiled() -> Callable[[Kernel, Tensor], tuple[Tensor, Tensor]]:
    return torch.compile(lambda kernel, u: kernel.profile_and_slope(u), dynamic=True)


def _learns(kernel: Kernel, sets: tuple[Tensor, ...]) -> bool:
    """Whether a function in the kernel has a gradient of its own, which only automatic differentiation can tell."""
    if not (torch.is_grad_enabled() and kernel.holds_function):
        return False
    row = sets[0][:1].detach()
    return kernel.gram(row, row.clone()).requires_grad


def zeros(like: Tensor, *shape: int) -> Tensor:
    """Zeros in the working precision."""
    return torch.zeros(shape, dtype=working_precision(like[:0]).dtype, device=like.device)
