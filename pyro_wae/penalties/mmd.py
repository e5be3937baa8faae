"""Maximum mean discrepancy, the penalty of WAE-MMD."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_wae._core import checks
from pyro_wae.kernels import Conditional, Kernel, Laplace
from pyro_wae.kernels.conditional import DefaultConditionKernels
from pyro_wae.kernels.function import as_kernel
from pyro_wae.penalties.base import Penalty
from pyro_wae.penalties.context import PenaltyContext, join
from pyro_wae.penalties.kernel_means import KernelMean, kernel_mean, known_prior, row_total
from pyro_wae.penalties.null_variance import NullVariance, pair_variance
from pyro_wae.penalties.pair_sums import PairTerm, across, every, pair_total, within

MOST_ROWS = 512
"""The largest number of codes whose means against the prior are taken at once: a mixture of Gaussians that stands for
kernels of several lengths has a hundred terms for each."""

MOST_COMPONENTS = 32
"""Of a mixture whose means are taken in closed form."""


class MMD(Penalty):
    r"""The squared maximum mean discrepancy, :math:`E\,k(q, q') + E\,k(p, p') - 2\,E\,k(q, p)`.

    q are codes and p prior samples. The estimate is **unbiased, and therefore sometimes negative**: it scatters around
    0 when Q_Z = P_Z. Do not clamp it, which would make it biased. Pairs that are not independent are left out: a code
    with itself, and the codes of one datum's particles with each other. With several particles and a known data set
    size N, pairs of particles of one datum have the weight 1/N, their share in a Q_Z that averages over N data.

    Args:
        kernel: A :class:`~pyro_wae.kernels.Kernel`, a Pyro GP kernel (frozen) or a function k(x, y). Default:
            :meth:`Laplace.multiscale() <pyro_wae.kernels.Laplace.multiscale>`, whose short lengths detect gaps between
            codes; the source takes :meth:`~pyro_wae.kernels.InverseMultiquadratic.multiscale`.
        unbiased: The U-statistic if True, the V-statistic (all pairs, never negative, biased up) if False.
        standardize: Whether the estimate is divided by its standard deviation under the null Q_Z = P_Z, where it then
            has mean 0 and variance 1. A penalty weight then carries over between kernels. The standard deviation falls
            as 1/n: the same weight holds the codes of a larger batch closer to the prior. It has a closed form, or is
            estimated from the first prior samples and kept in ``state_dict``. It is that of one code for each datum:
            with several particles the variance is at most 1. Where masks or the prior make the data differ, it takes
            two prior samples of each datum: ``WAELoss(MMD(standardize=True), prior_draws=2)``.
        closed_form: Whether means of the kernel against the prior are taken from
            :func:`~pyro_wae.penalties.register_kernel_mean` where they are known, as for a Gaussian, inverse
            multiquadratic, Laplace or Matern kernel and a Normal with independent coordinates, or a mixture of at most
            32 of these. The prior then adds no noise. For more components, whose closed form takes longer than draws,
            draws are used.
        condition_kernel: Compares the conditions y where there are any, k_y in the product
            ``k(z, z') k_y(y, y')``: a kernel or a function of rows (n, c). It must be positive definite. Default, for
            labels: ``UnitMean(SameLabel())``, the mean over pairs of one label; for floats: a Gaussian of half the
            length that :class:`~pyro_wae.kernels.Gaussian` takes, over its mean.

    Raises:
        TypeError: If a kernel cannot be called, or an option is neither True nor False.
        ValueError: If ``standardize`` is True for the V-statistic; when called, if the prior samples share their data
            with the codes and are no multiple of them, or one of each where ``standardize`` takes two.

    Source: Gretton, Borgwardt, Rasch, Schoelkopf, Smola, "A Kernel Two-Sample Test", JMLR 13, 2012, lemma 6;
    Tolstikhin, Bousquet, Gelly, Schoelkopf, "Wasserstein Auto-Encoders", 2018, arXiv:1711.01558, algorithm 2.

    Example:
        >>> import torch
        >>> from pyro_wae.kernels import Gaussian
        >>> codes = torch.tensor([[0.0], [2.0]], requires_grad=True)
        >>> value = MMD(Gaussian(bandwidth=1.0))(codes, torch.tensor([[0.0], [2.0]]))
        >>> print(f"{value:.4f}")  # exp(-2) - 1: unbiased, and negative here
        -0.8647
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
        self.unbiased = checks.flag("MMD's unbiased", unbiased, write="MMD(unbiased=True)")
        self.standardize = checks.flag("MMD's standardize", standardize, write="MMD(standardize=True)")
        self.closed_form = checks.flag("MMD's closed_form", closed_form, write="MMD(closed_form=True)")
        if standardize and not unbiased:
            raise ValueError(
                "standardize=True divides an estimate whose mean is 0 when Q_Z = P_Z, and the V-statistic's is not. "
                "Write MMD(unbiased=True, standardize=True)."
            )
        self.kernel = Laplace.multiscale() if kernel is None else as_kernel(kernel)
        self.condition_kernel = None
        if condition_kernel is not None:
            self.condition_kernel = as_kernel(condition_kernel, name="condition_kernel")
        self.null = NullVariance() if standardize else None
        self.condition_defaults = DefaultConditionKernels()

    def fit(self, prior: Tensor) -> None:
        self.kernel.fit(prior)

    def estimate(self, codes: Tensor, prior: Tensor, context: PenaltyContext) -> Tensor:
        self.kernel.fit(prior)
        if context.condition is not None:
            return self._conditional(codes, prior, context, context.condition)
        known = known_mean(self.kernel, context, codes.shape[2]) if self.closed_form else None
        value = squared_discrepancy(self.kernel, codes, prior, context, known, unbiased=self.unbiased)
        if self.null is None:
            return value
        n = codes.shape[1]
        square = None if known is None else self.null.of_means(known)
        if square is None:
            square = self.null.of_draws(self.kernel, prior, n if context.shared_data else None)
        m = None if known is not None else len(prior)
        return value / (square * pair_variance(n, m, of_data=context.shared_data)).sqrt()

    def _conditional(self, codes: Tensor, prior: Tensor, context: PenaltyContext, condition: Tensor) -> Tensor:
        """The same of the rows [z, y], with the product of the two kernels."""
        # Looking at the labels on an accelerator would wait for it.
        is_read = condition.device.type == "cpu" and not condition.is_floating_point()
        if is_read and self.condition_kernel is None and len(condition.unique()) == len(condition) > 1:
            raise ValueError(
                f"The condition has {len(condition)} labels, and each occurs once: no two codes can be compared. Take "
                "larger batches with fewer labels, or give numbers that have a distance: y.float()."
            )
        condition_kernel = self.condition_kernel or self.condition_defaults.of(condition)
        kernel = Conditional(self.kernel, condition_kernel, condition.shape[1])
        columns = _by_place(condition) if self.condition_kernel is None else _as_numbers(condition, codes.dtype)
        joint, draws, joint_context = join(codes, prior, context, columns)
        kernel.fit(draws[: len(columns)])  # one row for each datum, whose conditions do not repeat
        value = squared_discrepancy(kernel, joint, draws, joint_context, unbiased=self.unbiased)
        if self.null is None:
            return value
        n, m = len(columns), len(prior)
        if context.shared_data:
            return value / (self.null.of_draws(kernel, draws, n) * pair_variance(n, m, of_data=True)).sqrt()
        # Given the conditions, each pair enters with its own factor k_y, and codes that match are independent of it.
        rows = columns.to(value)
        square = within(n, 1).total(condition_kernel.gram(rows, rows).square())
        return value / (square * self.null.of_draws(self.kernel, prior) * pair_variance(n, m, of_data=True)).sqrt()


def known_mean(kernel: Kernel, context: PenaltyContext, d: int) -> KernelMean | None:
    """The kernel's means against the context's prior, where both are known and rows, of d numbers, are independent."""
    prior = None if context.shared_data else known_prior(context, d)
    components = getattr(getattr(prior, "mixture_distribution", None), "probs", None)
    if prior is None or (components is not None and components.shape[-1] > MOST_COMPONENTS):
        return None
    return kernel_mean(kernel, prior)


def squared_discrepancy(
    kernel: Kernel,
    codes: Tensor,
    prior: Tensor,
    context: PenaltyContext,
    known: KernelMean | None = None,
    *,
    unbiased: bool = True,
) -> Tensor:
    """Estimates the squared maximum mean discrepancy.

    Args:
        kernel: Its lengths are set.
        codes: Shape (K, n, d).
        prior: Shape (m, d).
        context: How they were drawn.
        known: The kernel's means against the prior, taken in place of the draws, or None.
        unbiased: As in :class:`MMD`.

    Raises:
        ValueError: If the prior samples share their data with the codes and are no multiple of them.
    """
    rows = codes.flatten(0, 1)
    if known is None:
        return pair_total(kernel, (rows, prior), _terms(codes, prior, context, unbiased))
    # Cast once and not for each mean: their gradients nearly cancel, and have to meet before they are rounded.
    rows = kernel.widened(rows)
    term = within(len(rows), len(codes), context.data_size) if unbiased else every(len(rows), len(rows))
    pairs = pair_total(kernel, (rows,), (term,))
    return pairs + known.norm() - 2 * row_total(known.at, rows, MOST_ROWS) / len(rows)


def _terms(
    codes: Tensor, prior: Tensor, context: PenaltyContext, unbiased: bool
) -> tuple[PairTerm, PairTerm, PairTerm]:
    """The means over pairs of codes and of prior samples, and less twice that over pairs of both."""
    (particles, n), m = codes.shape[:2], len(prior)
    rows = particles * n
    if not unbiased:
        return every(rows, rows), every(m, m, 1, 1), -2 * every(rows, m, 0, 1)
    if not context.shared_data:
        return within(rows, particles, context.data_size), within(m, 1, of=1), -2 * every(rows, m, 0, 1)
    repeats, rest = divmod(m, n)
    if rest or not repeats:
        raise ValueError(
            f"With shared_data, row i of the prior samples has the datum of code i, and they come in multiples "
            f"of the {n} data, found {m}. Draw the prior once or several times for each datum."
        )
    # A datum's own pairs enter all three means or none: at q_i = p_i for every i they must cancel.
    size = context.data_size if min(particles, repeats) > 1 else None
    return within(rows, particles, size), within(m, repeats, size, of=1), -2 * across(rows, m, n, size)


def _by_place(condition: Tensor) -> Tensor:
    """The condition as numbers that are equal where it is: floats as they are, labels (n, 1) by their place."""
    if condition.is_floating_point():
        return condition
    # Large labels differ by less than a float32 can tell; the place in their order is below n.
    labels = condition[:, 0].contiguous().to(torch.int64)
    return torch.searchsorted(labels.sort().values, labels)[:, None]


def _as_numbers(condition: Tensor, dtype: torch.dtype) -> Tensor:
    """The condition as a kernel of the user's own takes it.

    Raises:
        ValueError: If labels differ by less than the dtype can tell. On an accelerator, values are not looked at.
    """
    is_read = condition.device.type == "cpu" and not condition.is_floating_point()
    if is_read and not torch.equal(condition.to(dtype).to(condition.dtype), condition):
        raise ValueError(
            f"The labels of the condition, up to {condition.abs().max().item()}, are not exact in {dtype}, in which a "
            "condition_kernel receives them. Number them: y.unique(return_inverse=True)[1]."
        )
    return condition
