"""Maximum mean discrepancy, the penalty of WAE-MMD."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_wae.adapters import as_kernel
from pyro_wae.kernels import FunctionKernel, InverseMultiquadratic, Kernel
from pyro_wae.numerics import working_precision
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
        ValueError: When called, if the prior draws share their data with the codes and are no multiple of them.

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
        if not any(isinstance(part, FunctionKernel) for part in self.kernel.modules()):
            # Once and not for each mean: their gradients nearly cancel, and have to meet before they are rounded.
            codes, prior = working_precision(codes), working_precision(prior)
        particles, n, d = codes.shape
        rows = codes.reshape(-1, d)
        if not self.unbiased:
            return self._mean(rows, rows) + self._mean(prior, prior) - 2 * self._mean(rows, prior)
        if not context.shared_data:
            qq = self._mean_within(rows, particles, context.data_size)
            return qq + self._mean_within(prior, 1) - 2 * self._mean(rows, prior)
        repeats, rest = divmod(len(prior), n)
        if rest or not repeats:
            raise ValueError(
                f"With shared_data, row i of the prior draws has the datum of code i, so that they come in multiples "
                f"of the {n} data, found {len(prior)}. Draw the prior once or several times for each datum."
            )
        # A datum's own pairs enter all three means or none: at q_i = p_i for every i they must cancel.
        data_size = context.data_size if min(particles, repeats) > 1 else None
        qq, pp = self._mean_within(rows, particles, data_size), self._mean_within(prior, repeats, data_size)
        return qq + pp - 2 * self._mean_across(rows, prior, particles, repeats, data_size)

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

    def _mean_across(self, rows: Tensor, prior: Tensor, particles: int, repeats: int, data_size: int | None) -> Tensor:
        """Mean over pairs of a code and a prior draw of different data."""
        n = len(rows) // particles
        gram = self.kernel.gram(rows, prior)
        same = _same_datum(gram, particles, repeats)
        between = (gram.sum() - same.sum()) / (particles * repeats * n * (n - 1))
        return between if data_size is None else torch.lerp(between, same.mean(), 1 / data_size)


def _same_datum(gram: Tensor, row_repeats: int, column_repeats: int) -> Tensor:
    """The entries of pairs that share a datum, from a matrix of (row_repeats n, column_repeats n)."""
    blocks = gram.unflatten(0, (row_repeats, -1)).unflatten(2, (column_repeats, -1))
    return blocks.diagonal(dim1=1, dim2=3)
