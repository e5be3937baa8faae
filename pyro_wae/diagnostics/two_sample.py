"""Kernel two-sample tests of codes against the prior, with p-values from permutations."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_wae._core.checks import flag, number, whole
from pyro_wae._core.rows import at_least_float32, working_precision
from pyro_wae.diagnostics.hypothesis_test import HypothesisTest, as_rows, new_generator, prior_rows
from pyro_wae.kernels import FunctionKernel, Gaussian, InverseMultiquadratic, Kernel, Laplace
from pyro_wae.kernels.function import as_kernel

LENGTHS = 10
"""Lengths of each kind of kernel in the aggregated test."""

SPREAD_ROWS = 1000
"""Rows whose distances choose the lengths; more would change no quantile by much."""

BLOCK_NUMBERS = 250_000
"""Numbers in one block of a kernel matrix: 2 MB in float64, which stay near the processor."""

TIE = 1e-6
"""Difference, in standard deviations under the null, below which two statistics are a tie: far above rounding."""


@dataclass(frozen=True, kw_only=True)
class TwoSampleTest(HypothesisTest):
    """The result of :func:`two_sample_test`; ``str(result)`` is a line of text.

    Args:
        p_value: The probability, if codes are samples of the prior, of a statistic at least as large as the observed
            one.
        level: Level at which the test was to reject.
        statistic: The unbiased estimate of the squared maximum mean discrepancy; it may be negative.
        standardized: The statistic in standard deviations under the null: those over all permutations, where its mean
            is 0.
        n: Number of codes.
        m: Number of prior samples.
        permutations: Number of random permutations.
        kernel: The kernel of the statistic; of an aggregated test, the one with the largest standardised statistic.
        aggregate: Whether that kernel was chosen among several. Only the p-value is corrected for the choice, and not
            the standardised statistic.
    """

    statistic: float
    standardized: float
    n: int
    m: int
    permutations: int
    kernel: str
    aggregate: bool

    def __str__(self) -> str:
        best = "best of several kernels, " if self.aggregate else ""
        return self._sentence(
            f"MMD^2 = {self.statistic:.3g} ({self.standardized:.3g} standard deviations under the null; "
            f"n = {self.n}, m = {self.m}; {best}{self.kernel})"
        )


def two_sample_test(
    codes: Tensor,
    prior: Tensor | Any,
    *,
    kernel: Kernel | Callable[[Tensor, Tensor], Tensor] | None = None,
    aggregate: bool = True,
    permutations: int = 299,
    level: float = 0.05,
    prior_draws: int = 1,
    seed: int = 0,
) -> TwoSampleTest:
    """Tests whether codes are samples of the prior, by the maximum mean discrepancy and its permutations.

    If they are, codes and prior samples are exchangeable: the statistic is one of ``permutations + 1`` values that are
    equally likely to be the largest, and its rank among them is a p-value that is **exact at every n, d and kernel**,
    with no asymptotics: at most a share ``level`` of tests rejects. Where no two values tie, the p-value is uniform on
    1/(permutations + 1), ..., 1.

    By default no bandwidth has to be chosen. Gaussian and Laplace kernels, each at ten lengths between half the 5 and
    twice the 95 percent quantile of the pooled rows' distances, are computed, each statistic is divided by its
    own deviation over all permutations (known in closed form), and the test's statistic is the largest. The
    permutations take the same maximum, and the p-value accounts for the choice among twenty.

    The rows must be independent draws: one code of each datum. Codes of training data show
    whether training reached its goal, codes of held-out data whether the encoder generalises.

    Args:
        codes: Shape (n, d).
        prior: Prior samples of shape (m, d), or the distribution of one code (anything with ``sample(shape)``), which
            is then drawn from.
        kernel: One kernel to test with, as :class:`~pyro_wae.penalties.MMD` takes it, symmetric in its arguments. A
            length that is still unset is taken from other samples of the prior than the tested ones, or, where the
            prior is a tensor, from the pooled rows; the kernel itself is left as it was.
        aggregate: Whether several kernels are aggregated where none is given. False takes ``InverseMultiquadratic()``.
        permutations: Number B of random permutations. With (B + 1) level a whole number the size is exactly the level.
        level: The probability of rejecting codes that are samples of the prior.
        prior_draws: Draws for each code where the prior is a distribution; more give the test more power.
        seed: Seed of permutations and draws. The global random state is neither used nor changed.

    Returns:
        The result. Time (n + m)^2 B for each kernel, memory (n + m) B: with 1000 codes and as many
        draws 1.5 seconds on one core for all twenty kernels.

    Raises:
        TypeError: If codes are not a tensor, the prior is neither tensor nor distribution, or a kernel cannot be
            called.
        ValueError: If shape, dtype, device or a value of codes and prior does not fit, a kernel returns NaN, or rows or
            permutations are too few to reject at the level at all.

    Source: Gretton, Borgwardt, Rasch, Schoelkopf, Smola, "A Kernel Two-Sample Test", JMLR 13, 2012 (statistic);
    Hemerik, Goeman, "Exact testing with random permutations", TEST 27, 2018, arXiv:1411.7565 (p-value);
    Schrab, Kim, Albert, Laurent, Guedj, Gretton, "MMD Aggregated Two-Sample Test", JMLR 24, 2023, arXiv:2110.15073, and
    Biggs, Schrab, Gretton, "MMD-FUSE", NeurIPS 2023, arXiv:2306.08777 (several kernels).

    Example:
        >>> import torch
        >>> codes = 1.3 * torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
        >>> prior = torch.distributions.Normal(torch.zeros(4), 1.0)
        >>> two_sample_test(codes, prior).rejected
        True
    """
    level = number("level", level, above=0, below=1, write="level=0.05")
    permutations = whole("permutations", permutations, write="permutations=299")
    aggregate = flag("aggregate", aggregate)
    rows = as_rows(codes, "codes")
    generator, draw_seed = new_generator(seed)
    draws = prior_rows(rows, prior, prior_draws=prior_draws, seed=draw_seed)
    _check_resolution(len(rows), len(draws), permutations, level)
    pooled = at_least_float32(torch.cat([rows, draws]))
    members = _memberships(len(rows), len(draws), permutations, generator)
    tested: list[Kernel]
    if kernel is None and aggregate:
        lengths = _lengths(pooled, generator)
        tested = [kind(length) for kind in (Gaussian, Laplace) for length in lengths]
    else:
        tested = [as_kernel(InverseMultiquadratic() if kernel is None else copy.deepcopy(kernel))]
        # A length from the tested prior samples alone would tell which rows they are, and the rows could no longer
        # change places.
        others = pooled if isinstance(prior, Tensor) else prior_rows(rows, prior, prior_draws=1, seed=draw_seed + 1)
        tested[0].fit(others)
    found = [_permuted_mmd(one, pooled, members, len(rows)) for one in tested]
    standardized = torch.stack([statistics / deviation for statistics, deviation in found])
    largest = standardized.amax(0)
    best = int(standardized[:, 0].argmax())
    return TwoSampleTest(
        statistic=found[best][0][0].item(),
        p_value=(largest >= largest[0] - TIE).double().mean().item(),
        standardized=standardized[best, 0].item(),
        level=level,
        n=len(rows),
        m=len(draws),
        permutations=permutations,
        kernel=repr(tested[best]),
        aggregate=len(tested) > 1,
    )


def _check_resolution(n: int, m: int, permutations: int, level: float) -> None:
    """Raises unless some p-value can be as low as the level."""
    if 1 / (permutations + 1) > level:
        raise ValueError(
            f"permutations={permutations} can give no p-value below {1 / (permutations + 1):.2g} and so never reject "
            f"at level={level:g}. Write permutations={math.ceil(1 / level) - 1} or more."
        )
    # Sets of equal size can also change places as a whole, which leaves the statistic as it is.
    least = (2 if n == m else 1) / math.comb(n + m, n)
    if least > level:
        raise ValueError(
            f"{n} codes and {m} prior samples can give no p-value below {least:.2g} and so never reject at "
            f"level={level:g}. Give more codes or draws."
        )


def _memberships(n: int, m: int, permutations: int, generator: torch.Generator) -> Tensor:
    """Which rows count as codes: shape (n + m, permutations + 1), in the first column as they are."""
    members = torch.zeros(n + m, permutations + 1, device="cpu")
    members[:n, 0] = 1
    order = torch.rand(permutations, n + m, generator=generator, dtype=torch.float64, device="cpu").argsort(1)
    members[:, 1:].scatter_(0, order[:, :n].T, 1.0)
    return members


def _lengths(pooled: Tensor, generator: torch.Generator) -> list[float]:
    """Lengths that cover the distances between pooled rows, whichever of them are codes."""
    # Rows chosen without a look at which of them are codes: all may still change places.
    chosen = torch.randperm(len(pooled), generator=generator, device="cpu")[:SPREAD_ROWS].to(pooled.device)
    rows = working_precision(pooled[chosen])
    distances = torch.nn.functional.pdist(rows)
    distances = distances[distances > 0]
    if len(distances) == 0:
        return [1.0]
    low, high = distances.quantile(distances.new_tensor([0.05, 0.95])).tolist()
    lengths = [low / 2 * (4 * high / low) ** (step / (LENGTHS - 1)) for step in range(LENGTHS)]
    return [float(f"{length:.3g}") for length in lengths]


def _permuted_mmd(kernel: Kernel, pooled: Tensor, members: Tensor, n: int) -> tuple[Tensor, float]:
    """The unbiased MMD for each choice of n pooled rows as codes, and its deviation over all choices.

    Args:
        kernel: A kernel whose length is set.
        pooled: Shape (N, d).
        members: Shape (N, B), 1 where a row counts as a code.
        n: The number of ones in each column.

    Returns:
        Shape (B,), and a number > 0; infinity where the kernel is the same for all pairs of rows.
    """
    # A function of the user's gets codes in their own precision, as in a penalty.
    if not any(isinstance(part, FunctionKernel) for part in kernel.modules()):
        pooled = working_precision(pooled)
    total_rows, m = len(pooled), len(pooled) - n
    ones = working_precision(members.to(pooled.device))
    within, rowsums, squares = ones.new_zeros(ones.shape[1]), ones.new_zeros(total_rows), ones.new_zeros(())
    height = max(1, BLOCK_NUMBERS // total_rows)
    with torch.no_grad(), torch.autocast(pooled.device.type, enabled=False):
        for start in range(0, total_rows, height):
            stop = start + height
            # Each pair once: the kernel is symmetric, and a row's pair with itself is left out.
            gram = kernel.gram(pooled[start:stop], pooled[start:]).triu(1)
            within += (ones[start:stop] * (gram @ ones[start:])).sum(0)
            rowsums[start:stop] += gram.sum(1)
            rowsums[start:] += gram.sum(0)
            squares += gram.square().sum()
    if not torch.isfinite(squares):
        raise ValueError(
            f"The kernel {kernel!r} gave a NaN or an infinite value, or one too large to square. "
            "Look at kernel(codes, prior)."
        )
    total = rowsums.sum() / 2
    across = rowsums @ ones - 2 * within
    statistics = within / math.comb(n, 2) + (total - within - across) / math.comb(m, 2) - 2 * across / (n * m)
    return statistics, _deviation(squares.item(), rowsums, n)


def _deviation(squares: float, rowsums: Tensor, n: int) -> float:
    """The standard deviation of the unbiased MMD over all choices of n rows, exactly.

    The statistic stays the same when the kernel matrix A is centred to row sums 0 without its diagonal. It is then
    c = 1/(n(n-1)) + 1/(m(m-1)) + 2/(nm) times the sum of A over pairs i != j of chosen rows. Of the square of that sum,
    only terms of A_ij^2 remain after the row sums have been put to 0: with p_k the probability that k given rows are
    all chosen, its mean is (2 p_2 - 4 p_3 + 2 p_4) times the sum of all A_ij^2, and the mean of the sum itself is 0.

    Args:
        squares: The sum of squares of the kernel over pairs i < j.
        rowsums: Shape (N,): sums of the kernel over the pairs of a row.
        n: Number of chosen rows.
    """
    rows = len(rowsums)
    m = rows - n
    total = rowsums.sum().item()
    centred = 2 * squares - 2 * rowsums.square().sum().item() / (rows - 2) + total**2 / ((rows - 1) * (rows - 2))
    # What is left of equal numbers is rounding, which has to count as no difference.
    if centred <= 1e-13 * squares:
        return math.inf
    p2, p3, p4 = (math.prod((n - k) / (rows - k) for k in range(count)) for count in (2, 3, 4))
    factor = 1 / (n * (n - 1)) + 1 / (m * (m - 1)) + 2 / (n * m)
    return factor * math.sqrt(centred * (2 * p2 - 4 * p3 + 2 * p4))
