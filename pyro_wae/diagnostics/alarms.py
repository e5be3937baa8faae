"""The alarms of a report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pyro_wae.diagnostics.comparison import Comparison
from pyro_wae.diagnostics.gathering import BatchNormComparison

NARROW = 0.25
"""Variance along a line, as a share of what prior samples show among themselves, below which codes are too narrow."""

CROWDED = 0.05
"""Share of prior samples without a near code, or the reverse, above which it is an alarm; 0.01 are expected."""

COLLAPSED_NOISE = 1e-3
"""Share of the encoder's noise in the variance of codes below which it is as good as deterministic."""

ALL_NOISE = 0.95
"""The same share above which codes hardly depend on the data."""

MODE_SHIFT = 0.1
"""Change between BatchNorm's modes, in prior standard deviations or as a share of the cost, that is an alarm."""


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """A problem that a report found.

    Args:
        kind: ``"mismatch"``, ``"narrow"``, ``"wide"``, ``"hole"``, ``"stray"``, ``"outliers"``, ``"noise"``,
            ``"uninformative"`` or ``"batch_norm"``.
        site: The latent site, ``"joint"`` for all of them together, or None where no site is concerned.
        message: What was found, in a sentence.
    """

    kind: str
    site: str | None
    message: str


def find_alarms(
    comparisons: Mapping[str, Comparison], batch_norm: BatchNormComparison | None, *, codes: int
) -> Iterator[Alarm]:
    """The alarms of each comparison of so many codes, and then those of BatchNorm."""
    for name, found in comparisons.items():
        for kind, message in _alarms_of(found, codes):
            yield Alarm(kind=kind, site=name, message=message)
    if batch_norm is not None:
        for message in _batch_norm_alarms(batch_norm):
            yield Alarm(kind="batch_norm", site=None, message=message)


def _alarms_of(found: Comparison, codes: int) -> Iterator[tuple[str, str]]:
    rejecting = ["the two-sample test"] * found.two_sample.rejected + ["the classifier"] * found.classifier.rejected
    if rejecting:
        yield (
            "mismatch",
            f"{' and '.join(rejecting)} can distinguish codes from prior samples; the direction of largest "
            f"discrepancy is {found.loadings()}, with {found.direction.distance:.2g} prior standard deviations "
            f"({found.direction.distance_null:.2g} of sampling noise)",
        )
    shape = found.moments
    if shape.narrowest is not None and shape.narrowest_null is not None and shape.widest is not None:
        if shape.narrowest < NARROW * shape.narrowest_null:
            yield "narrow", f"along some line the codes have {shape.narrowest:.2g} of the prior's variance"
        if shape.widest_null is not None and shape.widest > shape.widest_null / NARROW:
            yield "wide", f"along some line the codes have {shape.widest:.2g} times the prior's variance"
    allowed = max(CROWDED, 0.01 + 4 * math.sqrt(0.02 / codes))
    if found.coverage.holes > allowed:
        yield "hole", f"{found.coverage.holes:.1%} of prior samples have no code nearby, where 1% are expected"
    if found.coverage.stray > allowed:
        yield "stray", f"{found.coverage.stray:.1%} of codes have no prior sample nearby, where 1% are expected"
    if found.coverage.outliers:
        yield "outliers", f"codes far from every prior sample, of data number {_some(found.coverage.outliers)}"
    if 0 < found.noise.share < COLLAPSED_NOISE:
        yield "noise", f"the encoder's noise has collapsed to {found.noise.share:.2g} of the codes' variance"
    if found.noise.share > ALL_NOISE:
        yield "uninformative", f"{found.noise.share:.0%} of the codes' variance is the encoder's noise, not the data's"


def _batch_norm_alarms(modes: BatchNormComparison) -> Iterator[str]:
    if modes.training:
        yield (
            f"{modes.training} of {modes.layers} BatchNorm layers are in train mode, where codes depend on their "
            "batch: call .eval() on the modules"
        )
    if modes.code_shift > MODE_SHIFT:
        yield (
            f"codes in train and in eval mode differ by {modes.code_shift:.2g} prior standard deviations: codes "
            "that match the prior in train mode may not match it in eval mode"
        )
    if modes.penalty_error is not None and modes.penalty_eval - modes.penalty_train > 3 * modes.penalty_error:
        yield (
            f"the penalty of a batch is {modes.penalty_train:+.2g} in train mode and {modes.penalty_eval:+.2g} in eval "
            "mode: BatchNorm makes the codes of one batch match the prior better than independent codes would"
        )
    if abs(modes.cost_eval - modes.cost_train) > MODE_SHIFT * abs(modes.cost_train):
        yield f"the cost is {modes.cost_train:.4g} in train mode and {modes.cost_eval:.4g} in eval mode"


def _some(values: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, values[:5]))
    return shown + (f" and {len(values) - 5} more" if len(values) > 5 else "")
