"""Maximum mean discrepancy, the penalty of WAE-MMD."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_wae.adapters import as_kernel
from pyro_wae.kernels import FunctionKernel, InverseMultiquadratic, Kernel
from pyro_wae.numerics import working_precision
from pyro_wae.penalties.base import Penalty, PenaltyContext
from pyro_wae.penalties.kernel_means import KernelMean, kernel_mean
from pyro_wae.penalties.null import NullVariance, pair_variance
from pyro_wae.penalties.pairs import mean_within, same_datum

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
        standardize: Whether the estimate is divided by its standard deviation when Q_Z = P_Z, so that it has mean 0
            and variance 1 there and a penalty weight carries over between sizes and kernels. The deviation is known in
            closed form or estimated from the first prior draws, then kept in ``state_dict``. It counts data, not
            particles.
        closed_form: Whether means of the kernel against the prior are taken from
            :func:`~pyro_wae.penalties.kernel_means.register_kernel_mean` where they are known, as for a Gaussian or
            inverse multiquadratic kernel and a Normal or a mixture of Normals. The prior then adds no noise.

    Raises:
        TypeError: If the kernel cannot be called.
        ValueError: If ``standardize`` is asked of the V-statistic.
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
        self,
        kernel: Kernel | Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        unbiased: bool = True,
        standardize: bool = False,
        closed_form: bool = True,
    ) -> None:
        super().__init__()
        if standardize and not unbiased:
            raise ValueError(
                "standardize=True divides an estimate whose mean is 0 when Q_Z = P_Z, and the V-statistic's is not. "
                "Write MMD(unbiased=True, standardize=True)."
            )
        self.kernel = InverseMultiquadratic.multiscale() if kernel is None else as_kernel(kernel)
        self.unbiased = unbiased
        self.standardize = standardize
        self.closed_form = closed_form
        self.null = NullVariance() if standardize else None

    def estimate(self, codes: Tensor, prior: Tensor, context: PenaltyContext) -> Tensor:
        self.kernel.fit(prior)
        if not any(isinstance(part, FunctionKernel) for part in self.kernel.modules()):
            # Once and not for each mean: their gradients nearly cancel, and have to meet before they are rounded.
            codes, prior = working_precision(codes), working_precision(prior)
        known = self._known(context)
        value = self._from_draws(codes, prior, context) if known is None else self._from_means(codes, known, context)
        if self.null is None:
            return value
        square = self.null.of_means(known) if known is not None else None
        if square is None:
            square = self.null.of_draws(self.kernel, prior)
        return value / (square * pair_variance(codes.shape[1], None if known is not None else len(prior))).sqrt()

    def _known(self, context: PenaltyContext) -> KernelMean | None:
        """What is known of the kernel against the prior, if it may be used."""
        if not self.closed_form or context.shared_data or context.prior is None:
            return None
        prior = context.prior()
        return None if prior is None else kernel_mean(self.kernel, prior)

    def _from_means(self, codes: Tensor, known: KernelMean, context: PenaltyContext) -> Tensor:
        rows = codes.flatten(0, 1)
        gram = self.kernel.gram(rows, rows)
        qq = mean_within(gram, len(codes), context.data_size) if self.unbiased else gram.mean()
        return qq + known.norm() - 2 * known.at(rows).mean()

    def _from_draws(self, codes: Tensor, prior: Tensor, context: PenaltyContext) -> Tensor:
        rows, n = codes.flatten(0, 1), codes.shape[1]
        if not self.unbiased:
            return self._mean(rows, rows) + self._mean(prior, prior) - 2 * self._mean(rows, prior)
        if not context.shared_data:
            qq = self._mean_within(rows, len(codes), context.data_size)
            return qq + self._mean_within(prior, 1) - 2 * self._mean(rows, prior)
        repeats, rest = divmod(len(prior), n)
        if rest or not repeats:
            raise ValueError(
                f"With shared_data, row i of the prior draws has the datum of code i, so that they come in multiples "
                f"of the {n} data, found {len(prior)}. Draw the prior once or several times for each datum."
            )
        # A datum's own pairs enter all three means or none: at q_i = p_i for every i they must cancel.
        data_size = context.data_size if min(len(codes), repeats) > 1 else None
        qq, pp = self._mean_within(rows, len(codes), data_size), self._mean_within(prior, repeats, data_size)
        return qq + pp - 2 * self._mean_across(rows, prior, n, data_size)

    def _mean(self, x: Tensor, y: Tensor) -> Tensor:
        return self.kernel.gram(x, y).mean()

    def _mean_within(self, rows: Tensor, repeats: int, data_size: int | None = None) -> Tensor:
        return mean_within(self.kernel.gram(rows, rows), repeats, data_size)

    def _mean_across(self, rows: Tensor, prior: Tensor, n: int, data_size: int | None) -> Tensor:
        """Mean over pairs of a code and a prior draw of different data."""
        gram = self.kernel.gram(rows, prior)
        same = same_datum(gram, len(rows) // n, len(prior) // n)
        between = (gram.sum() - same.sum()) / (gram.numel() - same.numel())
        return between if data_size is None else torch.lerp(between, same.mean(), 1 / data_size)
