"""The penalty weight as a Lagrange multiplier."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from pyro_wae._core import checks
from pyro_wae._core.fitted import FittedBuffers
from pyro_wae._core.rows import at_least_float32
from pyro_wae.penalties.null_variance import pair_variance
from pyro_wae.weights.base import SteppedWeight

FREQUENCIES = 256
FACTORS = (0.2, 1.0, 5.0)
"""Squared lengths of the inverse multiquadratic kernels, in the mean squared distance of prior samples."""

LENGTHS = (0.05, 0.15, 0.5)
"""Lengths of the Laplace kernels, in the root of half that distance."""

LEAST_SQUARE = 1e-4
"""Bounds the frequencies: phases of float32 have few digits beyond."""

WARM_UP, MEMORY = 200, 0.01
"""Steps before the first rise is judged, and the share of a step in the running means."""

STRIDE = 8
"""After the warm-up the weight moves on every so many-th step, by so much more."""

RISE, NEEDED, LEARNING, NEAR = 2.0, 0.8, 0.97, 1.5
"""A rise of the weight by the first factor must lower the discrepancy to the second share of it, unless the cost falls
to the third, because the nets still learn, or the discrepancy is below the fourth number of slacks."""

FIRST_SHARE, LEAST_COST, LARGEST_RISE = 0.1, 1e-6, 300.0
CHECK_EVERY = 100
LEAST_TRACE_ROWS, TRACE_ROWS, TRACE_SHARE = 4, 256, 1 / 256
"""Prior samples of a step from which the null's variance is estimated, and the step's share in its running mean."""


class Constraint(FittedBuffers, SteppedWeight):
    """A penalty weight found during training: it rises until the discrepancy is the sampling noise of ``codes`` codes.

    It is the Lagrange multiplier lambda of: minimise the cost subject to D(Q_Z, P_Z) <= slack. D is the squared maximum
    mean discrepancy of a fixed kernel, whatever the penalty is, and the slack is the standard deviation of its unbiased
    estimate between two sets of ``codes`` prior samples. While D is larger, log lambda rises; while it is smaller,
    log lambda falls. The kernel has long lengths and short ones, which detect gaps between codes.

    Where a larger weight no longer lowers D, these nets cannot reach the slack, and a larger weight would only raise
    the cost. Each time that lambda has doubled, D must have fallen by a fifth; a cost that has fallen by three percent
    also counts, because it shows that the nets still learn. Otherwise lambda returns to where it was, and rises no
    more. :attr:`outcome` says which case it is.

    D is measured on the last ``pool`` steps, over pairs of codes of *different* steps. Dependence between the codes
    of one batch, as BatchNorm causes it, has no influence, and D is unbiased for the distribution that a code has over
    all batches. It compares the joined codes of all sites that have a penalty, without their conditions. Shorter
    sequences are padded with zeros. A step whose cost, codes or prior samples are not finite is left out.

    Args:
        codes: Number n of codes whose sampling noise is the slack, one standard deviation of the estimate between two
            sets of n prior samples; more is stricter. It should not exceed the number of data.
        initial: The first weight; None takes a tenth of the first step's cost, ``maximum`` at most. With a penalty that
            is near 1 for codes far from the prior, as :class:`~pyro_wae.penalties.MMD` is, the auto-encoder then learns
            first.
        maximum: The largest weight; None takes 300 times the first. A weight that stays there is reported by a
            warning, because the training as it is cannot reach the slack.
        rate: The largest change of log lambda per step. After 200 steps it changes on every eighth, by up to eight
            times as much, and where a larger weight has not helped it returns to the last one that did.
        pool: The number of steps that D is measured on, >= 2.

    Attributes:
        weight: lambda, a scalar tensor.
        discrepancy: The last D over its slack, a scalar tensor: near 1 where the constraint holds. NaN before the
            second step.
        smoothed: Running means of the discrepancy and of the cost, shape (2,).

    Raises:
        TypeError: If an argument is not a number, or ``codes`` or ``pool`` is not an integer.
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
    smoothed: Tensor
    earlier: Tensor
    plateau: Tensor

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
        self._variance = pair_variance(self.codes, self.codes)
        self.pool = checks.whole("Constraint's pool", pool, least=2, write="pool=32")
        self.rate = checks.number("Constraint's rate", rate, above=0, below=1, write="rate=0.002")
        if initial is not None:
            initial = checks.number("Constraint's initial", initial, above=0, write="initial=100.0")
        if maximum is not None:
            maximum = checks.number("Constraint's maximum", maximum, above=0, write="maximum=3000.0")
        if initial is not None and maximum is not None and maximum < initial:
            raise ValueError(
                f"Constraint takes initial <= maximum, found {initial:g} and {maximum:g}. Write initial={maximum:g}."
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
        self.register_fitted("smoothed", torch.zeros(2, **placed))
        self.register_fitted("earlier", torch.zeros(3, **placed))  # weight, discrepancy and cost before the last rise
        self.register_fitted("plateau", torch.zeros((), **placed))

    @property
    def outcome(self) -> str:
        """What has happened up to the last step; reading it waits for the device.

        ``"matched"``: the discrepancy is within its slack or near it. ``"plateau"``: it is above, and a larger weight
        did not lower it. ``"maximum"``: it is above, and the weight is the largest allowed. ``"rising"``: it is above,
        and the weight still rises.
        """
        if self.step > 1 and bool(self.smoothed[0] <= NEAR):
            return "matched"
        if bool(self.plateau):
            return "plateau"
        return "maximum" if bool(self.weight >= self.largest) else "rising"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("smoothed", "earlier", "plateau"):  # which former states have not
            state_dict.setdefault(prefix + name, getattr(self, name))
        rows = len(state_dict.get(prefix + "differences", ()))
        if rows not in (0, self.pool):
            what = f"size mismatch for {prefix}differences: {rows} steps saved, and Constraint(pool={self.pool}) here."
            args[-1].append(f"{what} Write Constraint(pool={rows}).")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, cost: Tensor | None = None) -> Tensor:
        if cost is None:
            return self.weight
        weight = self.weight.to(cost)
        if self.step:
            return weight
        # A likelihood's cost may be negative. The largest weight is NaN where none was given.
        first = torch.fmin(FIRST_SHARE * cost.abs().clamp(min=LEAST_COST), self.largest.to(cost))
        return torch.where(weight.isnan(), first, weight)

    @torch.no_grad()
    def observe(self, cost: Tensor, codes: Tensor, prior: Tensor | None) -> None:
        assert prior is not None  # needs_prior_draws
        checks.no_transform("Constraint", "moves the weight", write="WAELoss(penalty_weight=100.0)")
        if self.step == 0:
            if not all(bool(part.isfinite().all()) for part in (cost, codes, prior)):
                return
            self._begin(cost, prior)
        stride = 1 if self.step < WARM_UP else STRIDE
        moves = self.step % stride == 0
        # A step may stand under autocast as a whole; phases of half precision would be off by more than the slack.
        with torch.autocast(codes.device.type, enabled=False):
            waves, is_finite = self._measure(cost, codes, prior)
            if moves and len(prior) >= LEAST_TRACE_ROWS:
                of_prior = waves[-len(prior) :][:TRACE_ROWS]
                share = max(1 / (self.step + 1), TRACE_SHARE * stride)
                trace = torch.lerp(self.trace, trace_of_squared_covariance(of_prior) / FREQUENCIES**2, share)
                self.trace = trace.where(is_finite, self.trace)
        self.step += 1
        if self.step >= 2:
            self._average(1, cost, MEMORY)
            if moves:
                self._ascend(stride)
            if self.step % CHECK_EVERY == 0:
                self._warn_at_maximum()

    def _begin(self, cost: Tensor, prior: Tensor) -> None:
        features = RandomFeatures.draw(prior, FREQUENCIES, seed=0)
        self.widths, self.frequencies = features.widths, features.frequencies
        self.differences = self.frequencies.new_zeros(self.pool, 2 * FREQUENCIES)
        self.weight = self.forward(cost).to(self.frequencies)
        self.largest = self.largest.to(self.weight)
        self.largest = torch.where(self.largest.isnan(), LARGEST_RISE * self.weight, self.largest)
        self.trace = self.trace.to(self.frequencies)
        self.smoothed, self.earlier = self.smoothed.to(self.weight), self.earlier.to(self.weight)
        self.plateau = self.plateau.to(self.weight)

    def _measure(self, cost: Tensor, codes: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        """Keeps the difference of the features' means; returns the waves, and whether the step is finite."""
        if self.frequencies.device != prior.device:
            self.to(prior.device)  # the state was loaded from elsewhere
        features = RandomFeatures(self.widths, self.frequencies)
        if codes.shape[2] > self.frequencies.shape[0]:
            # As if the shorter codes before had been filled up with zeros, like the masked end of a sequence.
            features = features.extend(codes.shape[2], seed=0)
            self.frequencies = features.frequencies
        rows, (n, m) = codes.flatten(0, 1), (codes.shape[0] * codes.shape[1], prior.shape[0])
        waves = features.waves(torch.cat([rows, prior]))
        signs = torch.cat([waves.new_full((n,), features.height / n), waves.new_full((m,), -features.height / m)])
        difference = signs @ waves
        # A row of zeros is an empty one. Reading whether a step is usable would wait for an accelerator.
        is_finite = (cost + difference.sum()).isfinite()
        self.differences[self.step % self.pool] = difference.where(is_finite, 0.0)
        return waves, is_finite

    def _ascend(self, stride: int) -> None:
        norms = self.differences.square().sum(1)
        steps = norms.count_nonzero()
        across = self.differences.sum(0).square().sum() - norms.sum()
        # Prior samples that coincide have no variance; the smallest positive number then makes a NaN impossible.
        tiny = torch.finfo(self.trace.dtype).tiny
        slack = (self.trace * self._variance).clamp(min=tiny).sqrt()
        discrepancy = across / (steps * (steps - 1)).clamp(min=1) / slack
        self.discrepancy = discrepancy.where(steps >= 2, self.discrepancy.to(discrepancy))
        change = (self.discrepancy - 1).nan_to_num().clamp(-1, 1).mul(self.rate * stride).exp()
        self.weight = torch.minimum(self.weight * change, self.largest)
        self._look_for_plateau(stride)

    def _average(self, index: int, value: Tensor, share: float) -> None:
        """Takes a value into a running mean, unless it is not finite."""
        mean = self.smoothed[index]
        mean.add_((value - mean).nan_to_num_(0, 0, 0), alpha=max(1 / (self.step - 1), share))

    def _warn_at_maximum(self) -> None:
        if self._has_warned or self.outcome != "maximum":
            return
        self._has_warned = True
        warnings.warn(
            f"Constraint: the weight has reached its maximum, {self.largest.item():.4g}, and the "
            f"discrepancy is still {self.discrepancy.item():.2g} times the slack of {self.codes} codes. A larger "
            "weight would only drown the cost. Take larger batches, more steps or a lower learning rate, or ask "
            f"for less: Constraint(codes={self.codes // 2}).",
            UserWarning,
            stacklevel=3,
        )

    def _look_for_plateau(self, stride: int) -> None:
        """Judges each doubling of the weight, in tensors: nothing here waits for the device."""
        self._average(0, self.discrepancy, MEMORY * stride)
        if self.step > WARM_UP:
            weight, discrepancy, cost_then = self.earlier
            has_risen = self.weight >= RISE * weight
            is_useless = has_risen & (self.smoothed[0] > (NEEDED * discrepancy).clamp(min=NEAR))
            # Of a cost that may be negative, a fall is measured in its size.
            is_useless &= self.smoothed[1] > cost_then - (1 - LEARNING) * cost_then.abs()
            self.plateau = torch.maximum(self.plateau, is_useless.to(self.plateau))
            self.largest = torch.where(is_useless, weight, self.largest)
            self.weight = torch.minimum(self.weight, self.largest)
            is_kept = ~has_risen | is_useless
            self.earlier = torch.where(is_kept, self.earlier, torch.cat([self.weight[None], self.smoothed]))
        else:
            self.earlier = torch.cat([self.weight[None], self.smoothed])


class RandomFeatures:
    """Features phi with ``phi(x) . phi(y)`` near the mean of six kernels, and 1 for x = y.

    Batches are compared with them at the price of their means. Three are inverse multiquadratic, C / (C + |x - y|^2)
    with C the mean squared distance of prior samples times 0.2, 1 and 5, and detect codes that lie elsewhere. Three are
    Laplace kernels, exp(-|x - y| / s) with s^2 half that distance times the squares of 0.05, 0.15 and 0.5, and detect
    gaps between codes. Each is a mixture of Gaussians over their rate g, so its frequencies are Normal with the random
    variance 2 g: g C is exponential, and 1 / (4 g s^2) has a Gamma distribution of shape 1/2.

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
            prior: Prior samples, shape (m, d) with m >= 2, which give the length.
            count: The number F of frequencies; there are twice as many features.
            seed: Of the generator.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        placed: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}

        def cycled(values: tuple[float, ...], size: int) -> Tensor:
            return torch.tensor(values, **placed).repeat(math.ceil(size / len(values)))[:size]

        fine, coarse = count // 2, count - count // 2
        rates = torch.empty(coarse, **placed).exponential_(generator=generator) / cycled(FACTORS, coarse)
        # The square of a standard Normal is twice such a Gamma variable, and s^2 is half of the unit.
        squares = torch.empty(fine, **placed).normal_(generator=generator).square().clamp(min=LEAST_SQUARE)
        rates = torch.cat([rates, 1 / (squares * cycled(LENGTHS, fine).square())])
        # Draws that coincide have no spread; any length then detects codes that are elsewhere.
        mean_square = (2 * at_least_float32(prior).var(0).sum()).float().clamp(min=torch.finfo(torch.float32).tiny)
        widths = (2 * rates).sqrt().to(prior.device) / mean_square.sqrt()
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

    @property
    def height(self) -> float:
        """The factor of cosines and sines that makes phi(x) . phi(x) 1."""
        return len(self.widths) ** -0.5

    def waves(self, x: Tensor) -> Tensor:
        """The features (n, 2 F) of rows (n, d) over their height, in float32; d may be less than the frequencies'."""
        waves = self.frequencies.new_empty(len(x), 2 * len(self.widths))
        cosines, phases = waves.chunk(2, 1)
        frequencies = self.frequencies[: x.shape[1]]
        if x.dtype == torch.float64:  # far from 0 the turns would be lost in float32
            phases.copy_((x @ frequencies.double()).remainder_(2 * math.pi))
        else:
            torch.mm(x.float(), frequencies, out=phases)
        torch.cos(phases, out=cosines)
        phases.sin_()
        return waves


def trace_of_squared_covariance(features: Tensor) -> Tensor:
    """Estimates tr(C^2) of the features' covariance C without bias, from two halves of (n, F) independent rows.

    It is E h(p, p')^2 of the kernel that the features stand for, centred.
    """
    halves = features.tensor_split(2)
    first, second = (half - half.mean(0) for half in halves)
    # tr(A^T A B^T B) = |A B^T|^2, which is (n/2)^2 numbers in place of F^2.
    return (first @ second.T).square().sum() / ((len(first) - 1) * (len(second) - 1))
