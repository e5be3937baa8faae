"""Codes compared with the prior, for a model and its guide: one call on held-out data."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_wae._core.checks import accepted, number, text, whole
from pyro_wae.costs import Cost, as_costs
from pyro_wae.diagnostics.alarms import Alarm, find_alarms
from pyro_wae.diagnostics.comparison import Comparison, Moments, compare_site
from pyro_wae.diagnostics.example_images import Pictures, check_shape, collect_pictures
from pyro_wae.diagnostics.gathering import BatchNormComparison, CostSummary, gather
from pyro_wae.diagnostics.hypothesis_test import HypothesisTest, new_generator
from pyro_wae.diagnostics.report_figure import draw_report
from pyro_wae.step.program import Program

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TABLE_ROWS, TEXT_WIDTH = 10, 90
"""Coordinates in a table, of more those least like the prior; and letters in a line."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of :func:`report`; ``str(report)`` is a table, ``report.plot()`` a figure.

    Args:
        comparisons: One for each latent site, and with several one more, ``"joint"``, for all joined.
        costs: The cost of each observed site and of each ``pyro.factor`` in the data plate, the mean
            per datum that has it unmasked.
        batch_norm: The codes in the two modes of BatchNorm layers; None without such layers, or without a batch of at
            least 2 data.
        alarms: Problems that were found; empty if there are none.
        codes: Codes of all sites joined, shape (n, d).
        prior: Prior samples, shape (n, d).
        in_hole: Which prior samples have no code nearby, shape (n,).
        columns: The columns of each latent site.
        pictures: Samples, reconstructions and interpolations of observed sites that hold images.
    """

    comparisons: Mapping[str, Comparison]
    costs: Mapping[str, CostSummary]
    batch_norm: BatchNormComparison | None
    alarms: tuple[Alarm, ...]
    codes: Tensor = field(repr=False, compare=False)
    prior: Tensor = field(repr=False, compare=False)
    in_hole: Tensor = field(repr=False, compare=False)
    columns: Mapping[str, slice] = field(repr=False)
    pictures: Mapping[str, Pictures] = field(repr=False, compare=False)

    @property
    def joint(self) -> Comparison:
        """The comparison of all sites together; of the only site, if there is one."""
        return list(self.comparisons.values())[-1]

    def to_dict(self) -> dict[str, Any]:
        """All that was found, without tensors and pictures, as numbers, strings, lists and dicts that JSON takes."""
        comparisons = {name: _as_json(found) for name, found in self.comparisons.items()}
        for name, found in self.comparisons.items():
            del comparisons[name]["site"], comparisons[name]["coordinates"]
            comparisons[name] |= {"two_sample": found.two_sample.to_dict(), "classifier": found.classifier.to_dict()}
        others = {part: _as_json(getattr(self, part)) for part in ("costs", "batch_norm", "alarms")}
        return {"codes": len(self.codes), "comparisons": comparisons, **others}

    def plot(self, *, cmap: str = "gray") -> Figure:
        """Draws codes and prior samples, and images where an observed site holds such.

        From the top: codes and prior samples in the plane of largest discrepancy; the quantiles of each coordinate of
        the codes against those of the prior; then for each site that holds images samples, reconstructions and latent
        interpolations.

        Args:
            cmap: Matplotlib's colour map for images of one channel. ``"gray_r"`` shows ink on paper.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        return draw_report(self.joint, (self.codes, self.prior), self.in_hole, self.pictures, cmap=cmap)

    def __str__(self) -> str:
        lines = [f"{len(self.codes)} codes against as many prior samples, one code for each datum"]
        for name, comparison in self.comparisons.items():
            lines += ["", *_comparison_lines(name, comparison)]
        lines.append("")
        for name, cost in self.costs.items():
            error = "" if cost.standard_error is None else f" +- {cost.standard_error:.2g}"
            lines.append(f"cost of {name}: {cost.mean:.5g}{error} per datum")
        if self.batch_norm is not None:
            lines += _batch_norm_lines(self.batch_norm)
        lines += ["", "alarms:" if self.alarms else "alarms: none"]
        for alarm in self.alarms:
            text = f"[{alarm.kind}] {f'{alarm.site}: ' if alarm.site else ''}{alarm.message}"
            lines += textwrap.wrap(text, TEXT_WIDTH, initial_indent="  ", subsequent_indent="    ")
        return "\n".join(lines)


def report(
    model: Program,
    guide: Program,
    *args: Any,
    batches: Iterable[Any] | None = None,
    cost: Cost | Callable[[Tensor, Tensor], Tensor] | Mapping[str, Any] | None = None,
    max_codes: int = 2000,
    test_codes: int = 500,
    permutations: int = 199,
    level: float = 0.05,
    data_plate: str | None = None,
    shape: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> Report:
    """Tests whether codes match the prior, and shows where they do not.

    Pass held-out data, and call ``.eval()`` on modules first: they run in the mode they are in. Parameters, BatchNorm's
    running statistics and the random state do not change. Every figure of the codes stands beside that of a second set
    of prior samples, which shows the sampling noise.

    One code of each datum is used, because the particles of one datum are not independent. Coordinates are in units of
    the mean and the standard deviation of prior samples that are not tested. Masked data are left out.

    Args:
        model: The Pyro model.
        guide: Its guide.
        args: What both are called with, for one batch of data.
        batches: An iterable in their place, such as a ``DataLoader``. An item that is a tuple or a list holds all
            arguments; anything else is the only one. It is read until there are ``max_codes`` codes. With
            BatchNorm, take the batch size of the training.
        cost: A cost, a function f(x, g), or a dict of them, as in :class:`~pyro_wae.WAELoss`. Default: squared error.
        max_codes: Maximum number of codes to compare, drawn at random if there are more, >= 2.
        test_codes: Maximum number of codes in a kernel two-sample test, whose time grows with its square, >= 2.
        permutations: Permutations of that test.
        level: Level of each test.
        data_plate: Name of the plate that holds the data; found if not given.
        shape: Shape of an image, ``(h, w)`` or ``(channels, h, w)``, for one observed site or a dict by site. A
            site whose data have such a shape themselves is taken for images without it.
        seed: Seed of the guide's draws, prior samples, permutations and classifier.
        kwargs: Keyword arguments of model and guide.

    Returns:
        A :class:`Report`: print it, or look at its fields, :meth:`~Report.to_dict` and :meth:`~Report.plot`.

    Raises:
        ValueError: If an argument is out of range, there are too few data for the tests, or model and guide do not
            fit a WAE.
        TypeError: If data are given twice.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Delta(x + 1).to_event(1))
        >>> found = report(model, guide, torch.randn(200, 2, generator=torch.Generator().manual_seed(1)))
        >>> found.joint.two_sample.rejected, "mismatch" in {alarm.kind for alarm in found.alarms}
        (True, True)
    """
    max_codes = whole("max_codes", max_codes, least=2, write="max_codes=2000")
    test_codes = whole("test_codes", test_codes, least=2, write="test_codes=500")
    permutations = whole("permutations", permutations, write="permutations=199")
    if data_plate is not None:
        data_plate = text("data_plate", data_plate, "the name of a plate", write="data_plate='data'")
    level = number("level", level, above=0, below=1, write="level=0.05")
    check_shape(shape)
    if batches is not None and args:
        raise TypeError("Data are given twice. Write report(model, guide, x) or report(model, guide, batches=loader).")
    if batches is not None:
        is_right = isinstance(batches, Iterable) and not isinstance(batches, Tensor | Mapping | str | bytes)
        accepted("batches", batches, is_right, "an iterable of batches", write="batches=DataLoader(data, 100)")
    items = [args] if batches is None else batches
    _, own_seed = new_generator(seed)
    _, own_seed = new_generator(own_seed)  # the tests take the stream of the first
    gathered = gather(
        model,
        guide,
        (tuple(item) if isinstance(item, tuple | list) else (item,) for item in items),
        kwargs,
        cost=as_costs(cost),
        max_codes=max_codes,
        data_plate=data_plate,
        seed=own_seed,
    )
    parts = dict(gathered.columns)
    if len(parts) > 1:
        parts["joint" if "joint" not in parts else "all sites"] = slice(None)
    comparisons = {}
    in_hole = gathered.prior.new_zeros(len(gathered.prior)).bool()
    with torch.autocast(gathered.codes.device.type, enabled=False):  # codes are float32, and so are their products
        for name, columns in parts.items():
            comparisons[name], in_hole = compare_site(
                name, gathered, columns, test_codes=test_codes, permutations=permutations, level=level, seed=seed
            )
    return Report(
        comparisons=comparisons,
        costs=gathered.costs,
        batch_norm=gathered.batch_norm,
        alarms=tuple(find_alarms(comparisons, gathered.batch_norm, codes=len(gathered.codes))),
        codes=gathered.codes,
        prior=gathered.prior,
        in_hole=in_hole,
        columns=gathered.columns,
        pictures=collect_pictures(model, guide, gathered, kwargs, shape=shape, data_plate=data_plate, seed=own_seed),
    )


def _as_json(value: Any) -> Any:
    """Records as dicts and tuples as lists, as JSON reads them back."""
    return json.loads(json.dumps(value, default=dataclasses.asdict))


def _comparison_lines(name: str, found: Comparison) -> Iterator[str]:
    test, classifier, shape = found.two_sample, found.classifier, found.moments
    yield f"{name}: latent dimension {found.size}"
    yield f"  two-sample test       p = {test.p_value:.3g} ({_verdict(test)})"
    yield f"  {'':22s}MMD^2 of {test.standardized:+.2f} standard deviations under the null"
    yield f"  classifier            p = {classifier.p_value:.3g} ({_verdict(classifier)})"
    yield f"  {'':22s}accuracy {classifier.accuracy:.1%} ({classifier.low:.1%} to {classifier.high:.1%})"
    yield f"  {'':50s}{'codes':>9s}{'prior':>9s}"
    rows = [
        ("W_2 along the direction of largest discrepancy", found.direction.distance, found.direction.distance_null),
        ("smallest variance along a direction / prior's", shape.narrowest, shape.narrowest_null),
        ("largest variance along a direction / prior's", shape.widest, shape.widest_null),
        ("largest over smallest eigenvalue of covariance", shape.eigenvalue_ratio, shape.prior_eigenvalue_ratio),
        ("prior samples with no code nearby", found.coverage.holes, 0.01),
        ("codes with no prior sample nearby", found.coverage.stray, 0.01),
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
