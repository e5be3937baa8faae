"""Maximum mean discrepancy, the penalty of WAE-MMD."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_wae.adapters import as_kernel
from pyro_wae.kernels import InverseMultiquadratic, Kernel
from pyro_wae.penalties.base import Penalty, PenaltyContext

__all__ = ["MMD"]


class MMD(Penalty):
    """The squared maximum mean discrepancy, E k(q, q') + E k(p, p') - 2 E k(q, p).

    The estimate is **unbiased, and therefore sometimes negative**: it scatters around 0 when Q_Z = P_Z. That is
    right, and clamping it would pull codes to where they need not be. It leaves out the pairs that are not
    independent: a code with itself, and the codes of one datum's particles with each other. With more than one
    particle and a known data set size N, pairs of different particles of one datum come back with weight 1/N, which
    is their share in a Q_Z that averages over N data.

    Args:
        kernel: A :class:`~pyro_wae.kernels.Kernel`, a Pyro GP kernel (frozen) or a function k(x, y). Default: the
            authors' sum of inverse multiquadratic kernels at seven scales.
        unbiased: The U-statistic if True, the V-statistic (all pairs, never negative, biased up) if False.

    Raises:
        TypeError: If the kernel cannot be called.

    Source: Gretton, Borgwardt, Rasch, Schoelkopf, Smola, "A Kernel Two-Sample Test", JMLR 13, 2012, lemma 6;
    Tolstikhin, Bousquet, Gelly, Schoelkopf, "Wasserstein Auto-Encoders", 2018, arXiv:1711.01558, algorithm 2.

    Example:
        >>> import torch
        >>> from pyro_wae.kernels import Gaussian
        >>> codes = torch.zeros(10, 2, requires_grad=True)
        >>> value = MMD(Gaussian(bandwidth=1.0))(codes, torch.randn(20, 2))
        >>> value.backward()
    """

    kernel: Kernel

    def __init__(
        self, kernel: Kernel | Callable[[Tensor, Tensor], Tensor] | None = None, *, unbiased: bool = True
    ) -> None:
        super().__init__()
        self.kernel = InverseMultiquadratic.multiscale() if kernel is None else as_kernel(kernel)
        self.unbiased = unbiased

    def estimate(self, codes: Tensor, prior: Tensor, context: PenaltyContext) -> Tensor:
        self.kernel.fit(prior)
        particles, n, d = codes.shape
        rows = codes.reshape(-1, d)
        repeats = len(prior) // n if context.shared_data else 1
        if not self.unbiased:
            return self._mean(rows, rows) + self._mean(prior, prior) - 2 * self._mean(rows, prior)
        qq = self._mean_within(rows, particles, data_size=context.data_size)
        pp = self._mean_within(prior, repeats)
        qp = self._mean_across(rows, prior, particles, repeats) if context.shared_data else self._mean(rows, prior)
        return qq + pp - 2 * qp

    def _mean(self, x: Tensor, y: Tensor) -> Tensor:
        return self.kernel.gram(x, y).mean()

    def _mean_within(self, rows: Tensor, repeats: int, data_size: int | None = None) -> Tensor:
        """Mean over pairs of different data; rows are `repeats` draws of each datum, one block after the other."""
        n = len(rows) // repeats
        gram = self.kernel.gram(rows, rows)
        same = _same_datum(gram, repeats, repeats)
        between = (gram.sum() - same.sum()) / (repeats**2 * n * (n - 1))
        if data_size is None or repeats == 1:
            return between
        within = (same.sum() - gram.diagonal().sum()) / (repeats * (repeats - 1) * n)
        return torch.lerp(between, within, 1 / data_size)

    def _mean_across(self, rows: Tensor, prior: Tensor, particles: int, repeats: int) -> Tensor:
        n = len(rows) // particles
        gram = self.kernel.gram(rows, prior)
        same = _same_datum(gram, particles, repeats)
        return (gram.sum() - same.sum()) / (particles * repeats * n * (n - 1))


def _same_datum(gram: Tensor, row_repeats: int, column_repeats: int) -> Tensor:
    """The entries of pairs that share a datum, from a matrix of (row_repeats n, column_repeats n)."""
    blocks = gram.unflatten(0, (row_repeats, -1)).unflatten(2, (column_repeats, -1))
    return blocks.diagonal(dim1=1, dim2=3)
