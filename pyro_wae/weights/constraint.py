"""The penalty weight as a Lagrange multiplier."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from pyro_wae.penalties.null import pair_variance
from pyro_wae.weights.base import SteppedWeight, check_weight
from pyro_wae.weights.features import RandomFeatures, trace_of_squared_covariance

__all__ = ["Constraint"]

FREQUENCIES = 256
FIRST_SHARE, LEAST_COST, LARGEST_RISE = 0.1, 1e-6, 300.0
WARM_UP, MEMORY = 200, 0.01
"""Steps before the first rise is judged, and the share of a step in the running mean of the discrepancy."""

NEAR = 1.5
"""The discrepancy, in slacks, up to which the constraint counts as met."""

RISE, NEEDED = 2.0, 0.8
"""A rise of the weight by this factor must lower the discrepancy to this share of it."""

CHECK_EVERY = 100
LEAST_TRACE_ROWS, TRACE_ROWS, TRACE_SHARE = 4, 256, 1 / 256
"""Prior draws of a step from which the null's variance is estimated, and the step's share in its running mean."""


class Constraint(SteppedWeight):
    """The weight that holds the codes so close to the prior that a given number of them cannot be told from it.

    It is the Lagrange multiplier of: minimise the cost subject to D(Q_Z, P_Z) <= slack. D is the squared maximum mean
    discrepancy of a fixed kernel, whatever the penalty is, and the slack is the standard deviation of its unbiased
    estimate between two sets of ``codes`` prior draws. While D is larger, log lambda rises; while it is smaller,
    log lambda falls. The kernel has long lengths and short ones, which detect gaps between codes.

    Where a larger weight no longer lowers D, the slack is out of reach of these nets, this penalty or this training,
    and a larger weight would only raise the cost. Each time that lambda has doubled, D must have fallen by a fifth;
    otherwise lambda returns to where it was, and rises no more. :attr:`outcome` says which of the two has happened.

    D is measured on the last ``pool`` steps, over pairs of codes of *different* steps. So it does not see what
    a layer such as BatchNorm lets the codes of one batch arrange among themselves, and is unbiased for the
    distribution that one code has over all batches. It looks at the codes of all sites that have a penalty, joined,
    and not at what they are conditional on. Sequences of different lengths count as filled up with zeros.

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
        smoothed: Its running mean over about a hundred steps, a scalar tensor.

    Raises:
        TypeError: If a weight is no number.
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
        for name, value, least, example in (("codes", codes, 2, 1000), ("pool", pool, 2, 32)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"Constraint takes {name}, a whole number >= {least}, found {value!r}. Write {name}={example}."
                )
        for name, weight in (("initial", initial), ("maximum", maximum)):
            if weight is not None:
                check_weight(f"Constraint's {name}", weight)
        if initial is not None and (initial == 0 or (maximum is not None and maximum < initial)):
            raise ValueError(
                f"Constraint takes 0 < initial <= maximum, found {initial} and {maximum}. Write initial=100.0."
            )
        if not 0 < rate < 1:
            raise ValueError(f"Constraint takes a rate between 0 and 1, found {rate}. Write rate=0.002.")
        self.codes = codes
        self.initial = initial
        self.maximum = maximum
        self.rate = rate
        self.pool = pool
        self._has_warned = False
        self.register_buffer("weight", torch.tensor(math.nan if initial is None else float(initial)))
        self.register_buffer("discrepancy", torch.tensor(math.nan))
        self.register_buffer("largest", torch.tensor(math.nan if maximum is None else float(maximum)))
        self.register_buffer("widths", torch.empty(0))
        self.register_buffer("frequencies", torch.empty(0))
        self.register_buffer("differences", torch.empty(0))
        self.register_buffer("trace", torch.zeros(()))
        self.register_buffer("smoothed", torch.tensor(math.nan))
        self.register_buffer("earlier", torch.tensor([math.nan, math.nan]))  # a weight, and the discrepancy then
        self.register_buffer("plateau", torch.tensor(False))

    @property
    def outcome(self) -> str:
        """What has happened up to the last step; reading it waits for the device.

        ``"matched"``: the discrepancy is within its slack or near it. ``"plateau"``: it is above, and a larger weight did
        not lower it. ``"maximum"``: it is above, and the weight is the largest allowed. ``"rising"``: it is above, and
        the weight still rises.
        """
        if bool(self.smoothed <= NEAR):
            return "matched"
        if bool(self.plateau):
            return "plateau"
        return "maximum" if bool(self.weight >= self.largest) else "rising"

    def forward(self, cost: Tensor | None = None) -> Tensor:
        if cost is None:
            return self.weight
        # A likelihood's cost may be negative.
        return torch.where(self.weight.isnan(), FIRST_SHARE * cost.abs().clamp(min=LEAST_COST), self.weight.to(cost))

    @torch.no_grad()
    def observe(self, cost: Tensor, codes: Tensor, prior: Tensor | None) -> None:
        assert prior is not None  # needs_prior_draws
        # A step may stand under autocast as a whole; phases of half precision would be off by more than the slack.
        with torch.autocast(codes.device.type, enabled=False):
            self._measure(cost, codes, prior)
        super().observe(cost, codes, prior)
        self._ascend()

    def _measure(self, cost: Tensor, codes: Tensor, prior: Tensor) -> None:
        if self.step == 0:
            self._begin(cost, prior)
        if self.frequencies.device != prior.device:
            self.to(prior.device)  # the state was loaded from elsewhere
        features = RandomFeatures(self.widths, self.frequencies)
        if codes.shape[2] > len(self.frequencies):
            # As if the shorter codes before had been filled up with zeros, like the masked end of a sequence.
            features = features.extend(codes.shape[2], seed=0)
            self.frequencies = features.frequencies
        of_prior = features.of(prior)
        self.differences[self.step % self.pool] = features.of(codes.flatten(0, 1)).mean(0) - of_prior.mean(0)
        if len(prior) >= LEAST_TRACE_ROWS:
            share = max(1 / (self.step + 1), TRACE_SHARE)
            self.trace = torch.lerp(self.trace, trace_of_squared_covariance(of_prior[:TRACE_ROWS]), share)

    def _begin(self, cost: Tensor, prior: Tensor) -> None:
        features = RandomFeatures.draw(prior, FREQUENCIES, seed=0)
        self.widths, self.frequencies = features.widths, features.frequencies
        self.differences = self.frequencies.new_zeros(self.pool, 2 * FREQUENCIES)
        self.weight = self.forward(cost).to(self.frequencies)
        self.largest = torch.where(self.largest.isnan(), LARGEST_RISE * self.weight, self.largest.to(self.weight))
        self.trace = self.trace.to(self.frequencies)
        self.earlier = torch.stack([self.weight, torch.full_like(self.weight, math.inf)])
        self.smoothed, self.plateau = self.smoothed.to(self.weight), self.plateau.to(self.weight.device)

    def _ascend(self) -> None:
        steps = min(self.step, self.pool)
        if steps < 2:
            return
        across = self.differences.sum(0).square().sum() - self.differences.square().sum()
        # Prior draws that coincide have no variance; the smallest positive number then makes a NaN impossible.
        tiny = torch.finfo(self.trace.dtype).tiny
        slack = (self.trace * pair_variance(self.codes, self.codes)).clamp(min=tiny).sqrt()
        self.discrepancy = across / (steps * (steps - 1)) / slack
        change = (self.rate * (self.discrepancy - 1).clamp(-1, 1)).exp()
        self.weight = torch.minimum(self.weight * change, self.largest)
        self._look_for_plateau()
        if self.step % CHECK_EVERY == 0 and not self._has_warned and bool((self.weight >= self.largest) & ~self.plateau):
            self._has_warned = True
            warnings.warn(
                f"Constraint: the weight has reached its maximum, {self.largest.item():.4g}, with the codes' "
                f"discrepancy still at {self.discrepancy.item():.2g} of what {self.codes} codes are allowed. A larger "
                "weight would only drown the cost. Take larger batches, more steps or a lower learning rate, or ask "
                f"for less: Constraint(codes={self.codes // 2}).",
                UserWarning,
                stacklevel=2,
            )

    def _look_for_plateau(self) -> None:
        """Judges each doubling of the weight; in tensors, because nothing here waits for the device."""
        share = max(1 / (self.step - 1), MEMORY)
        self.smoothed = torch.lerp(self.smoothed.nan_to_num(), self.discrepancy, share)
        if self.step <= WARM_UP:
            self.earlier = torch.stack([self.weight, self.smoothed])
            return
        weight, discrepancy = self.earlier
        has_risen = self.weight >= RISE * weight
        is_useless = has_risen & (self.smoothed > NEEDED * discrepancy) & (self.smoothed > NEAR)
        self.plateau = self.plateau | is_useless
        self.largest = torch.where(is_useless, weight, self.largest)
        self.weight = torch.minimum(self.weight, self.largest)
        now = torch.stack([self.weight, self.smoothed])
        self.earlier = torch.where(has_risen & ~is_useless, now, self.earlier)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self._buffers:
            value = state_dict.get(prefix + name)
            if value is not None:
                # Assigned and not copied: shape and precision are known only after the first step.
                setattr(self, name, value.detach().clone())
        super()._load_from_state_dict(state_dict, prefix, *args)
