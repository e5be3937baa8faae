"""The variance of the MMD estimate when Q_Z = P_Z."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_wae._core.fitted import FittedBuffers
from pyro_wae._core.rows import working_precision
from pyro_wae.kernels import Kernel
from pyro_wae.penalties import pair_sums
from pyro_wae.penalties.kernel_means import KernelMean
from pyro_wae.penalties.pair_sums import Block, blocks, zeros


def pair_variance(n: int, m: int | None, *, of_data: bool = False) -> float:
    """The variance of the unbiased estimate under the null, in units of E h(p, p')^2 of the centred kernel h.

    Every pair of rows contributes an uncorrelated term: 2/(n(n-1)) of codes, 2/(m(m-1)) of prior samples, 4/(nm) of
    both.

    Args:
        n: Number of data.
        m: Number of prior samples, or None where the prior's means are known.
        of_data: Whether the prior samples are m/n of each datum. No pair within a datum counts then.
    """
    codes = 2 / (n * (n - 1))
    if of_data:
        assert m is not None  # their means are not known
        return codes * (1 + n / m) ** 2
    return codes if m is None else codes + 2 / (m * (m - 1)) + 4 / (n * m)


def centred_square(gram: Tensor) -> Tensor:
    """Estimates E h(p, p')^2 of the centred kernel h without bias, from the kernel's values on m >= 4 prior samples.

    h(x, y) = k(x, y) - E k(x, p) - E k(p, y) + E k(p, p'). The matrix is centred to zero row sums without its diagonal,
    which is left out, and the squares are averaged with the weight 1 / (m (m - 3)): the mean is E h^2 exactly.

    Args:
        gram: Shape (m, m).

    Returns:
        A scalar >= 0.

    Raises:
        ValueError: If m < 4.

    Source: Szekely, Rizzo, "Partial Distance Correlation with Methods for Dissimilarities", Annals of Statistics 42,
    2014, doi:10.1214/14-AOS1255, proposition 1.
    """
    m = len(gram)
    _check_draws(m)
    diagonal = torch.eye(m, dtype=torch.bool, device=gram.device)
    rows = gram.masked_fill(diagonal, 0).sum(1) / (m - 2)
    centred = gram - rows[:, None] - rows + rows.sum() / (m - 1)
    return centred.masked_fill(diagonal, 0).square().sum() / (m * (m - 3))


def _centred_square_of(kernel: Kernel, prior: Tensor) -> Tensor:
    """The same from the draws themselves, by blocks where there are many."""
    m = len(prior)
    if m**2 <= pair_sums.MOST_PAIRS:
        return centred_square(kernel.gram(prior, prior))
    _check_draws(m)
    return _centred_squares(kernel, prior) / (m * (m - 3))


def _centred_squares(kernel: Kernel, rows: Tensor) -> Tensor:
    """Sums (k_ij - r_i - r_j + c)^2 over pairs i != j of m rows.

    r is the sum of a row without the diagonal, over m - 2, and c the sum of all r, over m - 1. It takes two passes over
    the pairs, because the square of a difference would lose its digits if it were taken apart.

    Args:
        kernel: Its lengths are set.
        rows: Shape (m, d), m > 2.

    Returns:
        A scalar in the working precision, without a graph.
    """
    m, offsets = len(rows), zeros(rows, len(rows))
    total, mean = zeros(rows), zeros(rows)
    with torch.no_grad():
        rows = kernel.widened(rows)
        for block in blocks(m, m, symmetric=True, device=rows.device):
            values = _gram(kernel, rows, block)
            offsets[block.rows] += values.sum(1) / (m - 2)
            if not block.is_own:
                offsets[block.columns] += values.sum(0) / (m - 2)
        mean += offsets.sum() / (m - 1)
        for block in blocks(m, m, symmetric=True, device=rows.device):
            values = _gram(kernel, rows, block) - offsets[block.rows, None] - offsets[block.columns] + mean
            if block.is_own:
                values.fill_diagonal_(0)
            total += block.times * values.square().sum()
    return total


def _gram(kernel: Kernel, rows: Tensor, block: Block) -> Tensor:
    """The values of a kernel on pairs of one set, with 0 on the diagonal."""
    left = rows[block.rows]
    if not block.is_own:
        return kernel.gram(left, rows[block.columns])
    return kernel.gram(left, left).clone().fill_diagonal_(0)


def _square_between_data(kernel: Kernel, first: Tensor, second: Tensor) -> Tensor:
    """The same where row i is of datum i and the data differ, as the mean of E h_ij^2 over pairs of data i != j.

    With p_i the prior of datum i, h_ij is centred by the means against p_i and p_j. They cancel in
    g_ij = k(a_i, a_j) + k(b_i, b_j) - k(a_i, b_j) - k(b_i, a_j) of two draws a and b of each datum, whose four terms
    are uncorrelated: E g_ij^2 = 4 E h_ij^2.

    Args:
        kernel: Its lengths are set.
        first: Shape (n, d), n >= 2, a prior sample of each datum.
        second: Another.
    """
    n, total = len(first), zeros(first)
    a, b = kernel.widened(first), kernel.widened(second)
    for block in blocks(n, n, symmetric=True, device=first.device):
        pairs = [kernel.gram(x[block.rows], y[block.columns]) for x, y in ((a, a), (b, b), (a, b), (b, a))]
        values = pairs[0] + pairs[1] - pairs[2] - pairs[3]
        total += block.times * (values.clone().fill_diagonal_(0) if block.is_own else values).square().sum()
    return total / (4 * n * (n - 1))


def _check_draws(m: int) -> None:
    if m < 4:
        raise ValueError(
            f"standardize=True estimates a variance from at least 4 prior samples, found {m}. Use a "
            "larger batch, or write WAELoss(MMD(standardize=True), prior_draws=4)."
        )


class NullVariance(FittedBuffers):
    """Keeps E h(p, p')^2: known at once where the prior is, else averaged over the first prior samples.

    It does not follow a prior that learns: the penalty's unit stays what it was. Draws that are not finite are left
    out.
    """

    enough_draws = 8192
    """Draws after which the average is kept as it is; its relative error is then about a percent."""

    square: Tensor
    counts = ("draws",)

    def __init__(self) -> None:
        super().__init__()
        self.register_fitted("square", torch.zeros(()))
        self.draws = 0

    def of_means(self, known: KernelMean) -> Tensor | None:
        """From closed forms, or None where they do not give it."""
        if self.draws == 0:
            square = known.centred_square()
            if square is None:
                return None
            self.set_fitted("square", square)
            self.draws = self.enough_draws
        return self.square if self.draws >= self.enough_draws else None

    def of_draws(self, kernel: Kernel, prior: Tensor, n: int | None = None) -> Tensor:
        """From prior samples, these and the earlier ones; an evaluation adds none to those of the training.

        Args:
            kernel: Its lengths are set.
            prior: Shape (m, d).
            n: The number of data, if prior samples come one block of data after the other and the data differ.

        Raises:
            ValueError: If the data differ, and there are not two prior samples of each.
        """
        if n is not None and len(prior) < 2 * n:
            raise ValueError(
                "standardize=True takes its unit from two prior samples of each datum where masks, or a prior that "
                f"depends on the data, make the data differ; found {len(prior)} of {n} data. Write "
                "WAELoss(MMD(standardize=True), prior_draws=2), or MMD()."
            )
        if self.draws < self.enough_draws and (self.draws == 0 or torch.is_grad_enabled()):
            with torch.no_grad():
                rows = working_precision(prior)
                if n is None:
                    square = _centred_square_of(kernel, rows)
                else:
                    square = _square_between_data(kernel, rows[:n], rows[n : 2 * n])
            self._average(square, len(prior))
        # Draws that coincide have no variance; the smallest positive number then makes a NaN impossible.
        return self.square.clamp(min=torch.finfo(self.square.dtype).tiny)

    def _average(self, square: Tensor, draws: int) -> None:
        # On an accelerator a look at the value would wait for it, after the first one: there a bad one changes nothing.
        if (self.draws == 0 or square.device.type == "cpu") and not bool(square.isfinite()):
            return
        kept = self.square.to(square) if self.draws else torch.zeros_like(square)
        self.draws += draws
        mean = kept + (square - kept) * (draws / self.draws)
        self.set_fitted("square", torch.where(square.isfinite(), mean, kept))

    def get_extra_state(self) -> dict[str, int]:
        """The number of draws, for ``state_dict``."""
        return {"draws": self.draws}

    def set_extra_state(self, state: Any) -> None:
        """Restores what :meth:`get_extra_state` gave."""
        self.draws = state["draws"]
