"""A report as text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence

from pyro_wae.diagnostics.alarms import Alarm
from pyro_wae.diagnostics.comparison import Moments
from pyro_wae.diagnostics.gathering import BatchNormComparison, CostSummary
from pyro_wae.diagnostics.hypothesis_test import HypothesisTest
from pyro_wae.diagnostics.site_comparison import Comparison

TABLE_ROWS = 10
"""Coordinates in a table; of more, those least like the prior."""

TEXT_WIDTH = 90


def report_lines(
    count: int,
    comparisons: Mapping[str, Comparison],
    costs: Mapping[str, CostSummary],
    batch_norm: BatchNormComparison | None,
    alarms: Sequence[Alarm],
) -> Iterator[str]:
    """The lines of ``str(report)``, from the number of codes and the report's fields."""
    yield f"{count} codes against as many prior draws, one code for each datum"
    for name, comparison in comparisons.items():
        yield ""
        yield from _comparison_lines(name, comparison)
    yield ""
    for name, cost in costs.items():
        error = "" if cost.standard_error is None else f" +- {cost.standard_error:.2g}"
        yield f"cost of {name}: {cost.mean:.5g}{error} per datum"
    if batch_norm is not None:
        yield from _batch_norm_lines(batch_norm)
    yield ""
    yield "alarms:" if alarms else "alarms: none"
    for alarm in alarms:
        text = f"[{alarm.kind}] {f'{alarm.site}: ' if alarm.site else ''}{alarm.message}"
        yield from textwrap.wrap(text, TEXT_WIDTH, initial_indent="  ", subsequent_indent="    ")


def _comparison_lines(name: str, found: Comparison) -> Iterator[str]:
    test, classifier, shape = found.two_sample, found.classifier, found.moments
    yield f"{name}: latent dimension {found.size}"
    yield f"  two-sample test       p = {test.p_value:.3g} ({_verdict(test)})"
    yield f"  {'':22s}MMD^2 of {test.standardized:+.2f} standard deviations under the null"
    yield f"  classifier            p = {classifier.p_value:.3g} ({_verdict(classifier)})"
    yield f"  {'':22s}right on {classifier.accuracy:.1%} ({classifier.low:.1%} to {classifier.high:.1%})"
    yield f"  {'':50s}{'codes':>9s}{'prior':>9s}"
    rows = [
        ("largest discrepancy on a line, in prior deviations", found.direction.distance, found.direction.distance_null),
        ("least variance on a line over the prior's", shape.narrowest, shape.narrowest_null),
        ("largest variance on a line over the prior's", shape.widest, shape.widest_null),
        ("largest over smallest eigenvalue of covariance", shape.eigenvalue_ratio, shape.prior_eigenvalue_ratio),
        ("prior draws with no code nearby", found.coverage.holes, 0.01),
        ("codes with no prior draw nearby", found.coverage.stray, 0.01),
    ]
    for label, value, null in rows:
        yield f"  {label:50s}{_number(value):>9s}{_number(null):>9s}"
    share = found.noise.share
    yield f"  {'share of noise in the variance':50s}{'none' if share == 0 else f'{share:.3g}':>9s}"
    yield f"  direction of largest discrepancy: {found.loadings()}"
    yield f"  {'coordinate':>12s}{'mean':>9s}{'spread':>9s}{'noise':>9s}"
    for index in _least_like(shape)[:TABLE_ROWS]:
        noise = found.noise.by_coordinate[index]
        yield f"  {found.coordinates[index]:>12s}{shape.mean[index]:>+9.2f}{shape.spread[index]:>9.2f}{noise:>9.2g}"
    if found.size > TABLE_ROWS:
        yield f"  {'...':>12s} and {found.size - TABLE_ROWS} more, closer to mean 0 and spread 1"


def _batch_norm_lines(modes: BatchNormComparison) -> Iterator[str]:
    low, high = modes.batch_sizes
    sizes = f"{low}" if low == high else f"{low} to {high}"
    error = "" if modes.penalty_error is None else f" (the difference +- {modes.penalty_error:.2g})"
    layers = f"{modes.layers} layer{'s' * (modes.layers > 1)}"
    yield f"BatchNorm: {layers}, {modes.training} in train mode, batches of {sizes}"
    yield f"  codes in train and eval mode differ by {modes.code_shift:.2g} prior standard deviations"
    yield f"  MMD^2 of a batch: {modes.penalty_train:+.3g} in train mode, {modes.penalty_eval:+.3g} in eval mode{error}"
    yield f"  cost: {modes.cost_train:.4g} in train mode, {modes.cost_eval:.4g} in eval mode"


def _least_like(shape: Moments) -> list[int]:
    """The coordinates, all in order if they fit a table, else those first that differ most from the prior."""
    indices = list(range(len(shape.mean)))
    if len(indices) <= TABLE_ROWS:
        return indices
    return sorted(indices, key=lambda i: -(shape.mean[i] ** 2 + (shape.spread[i] - 1) ** 2))


def _verdict(test: HypothesisTest) -> str:
    return f"{'distinguishable' if test.rejected else 'not distinguishable'} at level {test.level:g}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
