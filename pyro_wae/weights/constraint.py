"""The penalty weight as a Lagrange multiplier."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from pyro_wae._core import checks
from pyro_wae._core.fitted import FittedBuffers
from pyro_wae.penalties.null_variance import pair_variance
from pyro_wae.weights.base import SteppedWeight

__all__ = ["Constraint", "RandomFeatures", "trace_of_squared_covariance"]

FREQUENCIES, FACTORS = 192, (0.2, 1.0, 5.0)
FIRST_SHARE, LEAST_COST, LARGEST_RISE = 0.1, 1e-6, 300.0
CHECK_EVERY = 100
LEAST_TRACE_ROWS, TRACE_ROWS, TRACE_SHARE = 4, 256, 1 / 256
"""Prior draws of a step from which the null's variance is estimated, and the step's share in its running mean."""


class Constraint(FittedBuffers, SteppedWeight):
    """The weight that holds the codes so close to the prior that a given number of them cannot be told from it.

    It is the Lagrange multiplier of: minimise the cost subject to D(Q_Z, P_Z) <= slack. D is the squared maximum mean
    discrepancy of a fixed kernel, whatever the penalty is, and the slack is the standard deviation of its unbiased
    estimate between two sets of ``codes`` prior draws. While D is larger, log lambda rises; while it is smaller,
    log lambda falls.

    D is measured on the last ``pool`` steps, over pairs of codes of *different* steps. What a layer such as BatchNorm
    lets the codes of one batch arrange among themselves has no influence on it, and it is unbiased for the
    distribution that one code has over all batches. It compares the codes of all sites that have a penalty, joined,
    without what they are conditional on. Sequences of different lengths count as filled up with zeros. A step whose
    cost, codes or prior draws are not finite is left out.

    Args:
        codes: How many codes a test against the prior would need to tell them apart; more is stricter. It should not
            exceed the number of data.
        initial: The first weight; None takes a tenth of the first step's cost, so that a penalty that is near 1 for
            codes far from the prior, as :class:`~pyro_wae.penalties.MMD` is, first lets the auto-encoder learn.
        maximum: The largest weight; None takes 300 times the first. A weight that stays there is reported by a
            warning, because the training as it is cannot reach the slack.
        rate: The largest change of log lambda in a step.
        pool: The number of steps that D is measured on, >= 2.

    Attributes:
        weight: lambda, a scalar tensor.
        discrepancy: The last D over its slack, a scalar tensor: near 1 where the constraint holds. NaN before the
            second step.

    Raises:
        TypeError: If an argument is no number, or ``codes`` or ``pool`` no whole number.
        ValueError: If an argument is out of range.

    Source: Rezende, Viola, "Taming VAEs", 2018, arXiv:1810.00597, for a multiplier that is learnt along with an
    auto-encoder.

    Example:
        >>> from pyro_wae import WAELoss
        >>> loss = WAELoss(penalty_weight=Constraint())
    """

    needs_prior_draws = True

    weight: Tensor
    discrepancy: Tensor
    widths: Tensor
    frequencies: Tensor
    differences: Tensor
    trace: Tensor
    largest: Tensor

    def __init__(
        self,
        codes: int = 1000,
        *,
        initial: float | None = None,
        maximum: float | None = None,
        rate: float = 0.002,
        pool: int = 32,
    ) -> None:
        super().__init__()
        self.codes = checks.whole("Constraint's codes", codes, least=2, write="codes=1000")
        self.pool = checks.whole("Constraint's pool", pool, least=2, write="pool=32")
        self.rate = checks.number("Constraint's rate", rate, above=0, below=1, write="rate=0.002")
        if initial is not None:
            initial = checks.number("Constraint's initial", initial, above=0, write="initial=100.0")
        if maximum is not None:
            maximum = checks.number("Constraint's maximum", maximum, above=0, write="maximum=3000.0")
        if initial is not None and maximum is not None and maximum < initial:
            raise ValueError(
                f"Constraint takes 0 < initial <= maximum, found {initial:g} and {maximum:g}. Write initial=100.0."
            )
        self.initial = initial
        self.maximum = maximum
        self._has_warned = False
        placed: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        for name, number in (("weight", initial), ("discrepancy", None), ("largest", maximum)):
            self.register_fitted(name, torch.tensor(math.nan if number is None else number, **placed))
        for name in ("widths", "frequencies", "differences"):
            self.register_fitted(name, torch.empty(0, **placed), any_shape=True)
        self.register_fitted("trace", torch.zeros((), **placed))

    def forward(self, cost: Tensor | None = None) -> Tensor:
        if cost is None:
            return self.weight
        weight = self.weight.to(cost)
        # A likelihood's cost may be negative.
        return torch.where(weight.isnan(), FIRST_SHARE * cost.abs().clamp(min=LEAST_COST), weight)

    @torch.no_grad()
    def observe(self, cost: Tensor, codes: Tensor, prior: Tensor | None) -> None:
        assert prior is not None  # needs_prior_draws
        if self.step == 0:
            if not all(bool(part.isfinite().all()) for part in (cost, codes, prior)):
                return
            self._begin(cost, prior)
        # A step may stand under autocast as a whole; phases of half precision would be off by more than the slack.
        with torch.autocast(codes.device.type, enabled=False):
            self._measure(cost, codes, prior)
        self.step += 1
        if self.step >= 2:
            self._ascend()

    def _begin(self, cost: Tensor, prior: Tensor) -> None:
        features = RandomFeatures.draw(prior, FREQUENCIES, seed=0)
        self.widths, self.frequencies = features.widths, features.frequencies
        self.differences = self.frequencies.new_zeros(self.pool, 2 * FREQUENCIES)
        self.weight = self.forward(cost).to(self.frequencies)
        self.largest = self.largest.to(self.weight)
        self.largest = torch.where(self.largest.isnan(), LARGEST_RISE * self.weight, self.largest)
        self.trace = self.trace.to(self.frequencies)

    def _measure(self, cost: Tensor, codes: Tensor, prior: Tensor) -> None:
        if self.frequencies.device != prior.device:
            self.to(prior.device)  # the state was loaded from elsewhere
        features = RandomFeatures(self.widths, self.frequencies)
        if codes.shape[2] > len(self.frequencies):
            # As if the shorter codes before had been filled up with zeros, like the masked end of a sequence.
            features = features.extend(codes.shape[2], seed=0)
            self.frequencies = features.frequencies
        of_prior = features.of(prior)
        difference = features.of(codes.flatten(0, 1)).mean(0) - of_prior.mean(0)
        # A row of zeros is an empty one. Reading whether a step is usable would wait for an accelerator.
        is_finite = cost.isfinite() & difference.isfinite().all()
        self.differences[self.step % self.pool] = difference.where(is_finite, 0.0)
        if len(prior) >= LEAST_TRACE_ROWS:
            share = max(1 / (self.step + 1), TRACE_SHARE)
            trace = torch.lerp(self.trace, trace_of_squared_covariance(of_prior[:TRACE_ROWS]), share)
            self.trace = trace.where(is_finite, self.trace)

    def _ascend(self) -> None:
        steps = self.differences.any(1).sum()
        across = self.differences.sum(0).square().sum() - self.differences.square().sum()
        # Prior draws that coincide have no variance; the smallest positive number then makes a NaN impossible.
        tiny = torch.finfo(self.trace.dtype).tiny
        slack = (self.trace * pair_variance(self.codes, self.codes)).clamp(min=tiny).sqrt()
        discrepancy = across / (steps * (steps - 1)).clamp(min=1) / slack
        self.discrepancy = discrepancy.where(steps >= 2, self.discrepancy.to(discrepancy))
        change = (self.rate * (self.discrepancy - 1).nan_to_num().clamp(-1, 1)).exp()
        self.weight = torch.minimum(self.weight * change, self.largest)
        if self.step % CHECK_EVERY == 0 and not self._has_warned and bool(self.weight >= self.largest):
            self._has_warned = True
            warnings.warn(
                f"Constraint: the weight has reached its maximum, {self.largest.item():.4g}, with the codes' "
                f"discrepancy still at {self.discrepancy.item():.2g} of what {self.codes} codes are allowed. A larger "
                "weight would only drown the cost. Take larger batches, more steps or a lower learning rate, or ask "
                f"for less: Constraint(codes={self.codes // 2}).",
                UserWarning,
                stacklevel=2,
            )


class RandomFeatures:
    """Features phi with ``phi(x) . phi(y)`` near the mean of three inverse multiquadratic kernels, and 1 for x = y.

    Batches are compared with them at the price of their means. The kernel C / (C + |x - y|^2) is a mixture of
    Gaussians, whose frequencies are Normal with a variance drawn from an exponential distribution. C is the mean
    squared distance of prior draws times 0.2, 1 and 5.

    Args:
        widths: Shape (F,): the standard deviation of each frequency's components.
        frequencies: Shape (d, F).

    Source: Rahimi, Recht, "Random Features for Large-Scale Kernel Machines", NeurIPS 2007.
    """

    def __init__(self, widths: Tensor, frequencies: Tensor) -> None:
        self.widths = widths
        self.frequencies = frequencies

    @classmethod
    def draw(cls, prior: Tensor, count: int, seed: int) -> RandomFeatures:
        """Draws the frequencies from a generator of their own.

        Args:
            prior: Prior draws, shape (m, d) with m >= 2, which give the length.
            count: The number F of frequencies; there are twice as many features.
            seed: Of the generator.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        placed: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        precision = torch.empty(count, **placed).exponential_(generator=generator)
        factors = torch.tensor(FACTORS, **placed).repeat(math.ceil(count / len(FACTORS)))[:count]
        # Draws that coincide have no spread; any length then tells codes that are elsewhere.
        mean_square = (2 * prior.float().var(0).sum()).clamp(min=torch.finfo(torch.float32).tiny)
        widths = (2 * precision / factors).sqrt().to(prior.device) / mean_square.sqrt()
        return cls(widths, widths.new_empty(0, count)).extend(prior.shape[1], seed)

    def extend(self, size: int, seed: int) -> RandomFeatures:
        """The same features for codes of more numbers; on codes that are filled up with zeros they agree.

        Args:
            size: The number d of numbers in a code, no smaller than now.
            seed: Of the generator of what is added.
        """
        generator = torch.Generator("cpu").manual_seed(seed + len(self.frequencies))
        added = torch.empty(size - len(self.frequencies), len(self.widths), dtype=torch.float32, device="cpu")
        added = added.normal_(generator=generator).to(self.widths)
        return RandomFeatures(self.widths, torch.cat([self.frequencies, added * self.widths]))

    def of(self, x: Tensor) -> Tensor:
        """Maps rows (n, d) to features (n, 2 F) in float32, where d may be smaller than that of the frequencies."""
        phases = x.float() @ self.frequencies[: x.shape[1]]
        return torch.cat([phases.cos(), phases.sin()], 1) / math.sqrt(self.frequencies.shape[1])


def trace_of_squared_covariance(features: Tensor) -> Tensor:
    """Estimates tr(C^2) of the features' covariance C without bias, from two halves of (n, F) independent rows.

    It is E h(p, p')^2 of the kernel that the features stand for, centred.
    """
    halves = features.tensor_split(2)
    first, second = (half - half.mean(0) for half in halves)
    # tr(A^T A B^T B) = |A B^T|^2, which is (n/2)^2 numbers in place of F^2.
    return (first @ second.T).square().sum() / ((len(first) - 1) * (len(second) - 1))
