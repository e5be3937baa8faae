"""Maximum mean discrepancy, the penalty of WAE-MMD."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pyro_wae._core.numerics import working_precision
from pyro_wae.kernels import Conditional, InverseMultiquadratic, Kernel
from pyro_wae.kernels.given import as_kernel
from pyro_wae.penalties.base import Penalty, PenaltyContext
from pyro_wae.penalties.blocks import PairTerm, holds_function, pair_total, row_total
from pyro_wae.penalties.joint import DefaultConditionKernels, join, label_columns
from pyro_wae.penalties.kernel_means import KernelMean, LastKernelMean
from pyro_wae.penalties.null import NullVariance, pair_variance
from pyro_wae.penalties.pairs import PairWeights, across, every, mean_within, within

__all__ = ["MMD"]

MOST_ROWS = 512
"""The largest number of codes whose means against the prior are taken at once: a mixture of Gaussians that stands for
seven inverse multiquadratic kernels has hundreds of terms for each."""


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
        condition_kernel: What compares the conditions y where the context has them, k_y in the product
            ``k(z, z') k_y(y, y')``: a kernel or a function of rows (n, c). It must be positive definite. Default, for
            labels: ``UnitMean(SameLabel())``, the mean over pairs of one label; for floats: a Gaussian of half the
            length that :class:`~pyro_wae.kernels.Gaussian` takes, over its mean.

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
    reads_condition = True

    def __init__(
        self,
        kernel: Kernel | Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        unbiased: bool = True,
        standardize: bool = False,
        closed_form: bool = True,
        condition_kernel: Kernel | Callable[[Tensor, Tensor], Tensor] | None = None,
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
        self.condition_kernel = None if condition_kernel is None else as_kernel(condition_kernel)
        self.null = NullVariance() if standardize else None
        self._last_mean = LastKernelMean()
        self.condition_defaults = DefaultConditionKernels()

    def estimate(self, codes: Tensor, prior: Tensor, context: PenaltyContext) -> Tensor:
        self.kernel.fit(prior)
        if context.condition is not None:
            return self._conditional(codes, prior, context, context.condition)
        known = self._known(context)
        value = self._from_draws(codes, prior, context) if known is None else self._from_means(codes, known, context)
        if self.null is None:
            return value
        square = self.null.of_means(known) if known is not None else None
        if square is None:
            square = self.null.of_draws(self.kernel, prior)
        return value / (square * pair_variance(codes.shape[1], None if known is not None else len(prior))).sqrt()

    def _conditional(self, codes: Tensor, prior: Tensor, context: PenaltyContext, condition: Tensor) -> Tensor:
        """The same of the rows [z, y], with the product of the two kernels."""
        condition_kernel = self.condition_kernel or self.condition_defaults.of(condition)
        kernel = Conditional(self.kernel, condition_kernel, condition.shape[1])
        columns = label_columns(condition)
        value = MMD(kernel, unbiased=self.unbiased).estimate(*join(codes, prior, context, columns))
        if self.null is None:
            return value
        # Given the conditions, each pair enters with its own factor k_y, and codes that match are independent of it.
        rows = columns.to(value)
        square = mean_within(condition_kernel.gram(rows, rows).square(), 1)
        return value / (square * self.null.of_draws(self.kernel, prior) * pair_variance(len(rows), len(prior))).sqrt()

    def _known(self, context: PenaltyContext) -> KernelMean | None:
        """What is known of the kernel against the prior, if it may be used."""
        if not self.closed_form or context.shared_data or context.prior is None:
            return None
        prior = context.prior()
        return None if prior is None else self._last_mean.of(self.kernel, prior)

    def _from_means(self, codes: Tensor, known: KernelMean, context: PenaltyContext) -> Tensor:
        # Once and not for each mean: their gradients nearly cancel, and have to meet before they are rounded.
        rows = codes.flatten(0, 1) if holds_function(self.kernel) else working_precision(codes.flatten(0, 1))
        weights = within(len(rows), len(codes), context.data_size) if self.unbiased else every(len(rows), len(rows))
        qq = pair_total(self.kernel, (rows,), (PairTerm(0, 0, weights),))
        return qq + known.norm() - 2 * row_total(known.at, rows, MOST_ROWS) / len(rows)

    def _from_draws(self, codes: Tensor, prior: Tensor, context: PenaltyContext) -> Tensor:
        rows = codes.flatten(0, 1)
        qq, pp, qp = self._weights(codes, prior, context)
        return pair_total(self.kernel, (rows, prior), (PairTerm(0, 0, qq), PairTerm(1, 1, pp), PairTerm(0, 1, -2 * qp)))

    def _weights(
        self, codes: Tensor, prior: Tensor, context: PenaltyContext
    ) -> tuple[PairWeights, PairWeights, PairWeights]:
        """Those of the means over pairs of codes, of prior draws, and of both."""
        (particles, n), m = codes.shape[:2], len(prior)
        if not self.unbiased:
            return every(particles * n, particles * n), every(m, m), every(particles * n, m)
        if not context.shared_data:
            return within(particles * n, particles, context.data_size), within(m, 1), every(particles * n, m)
        repeats, rest = divmod(m, n)
        if rest or not repeats:
            raise ValueError(
                f"With shared_data, row i of the prior draws has the datum of code i, so that they come in multiples "
                f"of the {n} data, found {m}. Draw the prior once or several times for each datum."
            )
        # A datum's own pairs enter all three means or none: at q_i = p_i for every i they must cancel.
        size = context.data_size if min(particles, repeats) > 1 else None
        return within(particles * n, particles, size), within(m, repeats, size), across(particles * n, m, n, size)
