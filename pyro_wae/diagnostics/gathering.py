"""Runs model and guide on held-out data, and keeps what a report looks at."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_wae._core.batch_norm import batch_norm_at_rest, batch_norm_layers
from pyro_wae._core.private import BatchNorm
from pyro_wae._core.random_state import isolated_seed
from pyro_wae.costs import Cost
from pyro_wae.penalties import MMD
from pyro_wae.penalties.base import check_codes
from pyro_wae.step.observe import Observer
from pyro_wae.step.program import Program, Run
from pyro_wae.step.records import Step

CostOption = Cost | Mapping[str, Cost]


@dataclass(frozen=True, kw_only=True)
class CostSummary:
    """The cost of one observed site, or what a ``pyro.factor`` adds to the loss.

    Args:
        mean: Mean per datum that has the site unmasked; ``loss.terms`` divides by all data of the batch.
        standard_error: Standard error of the mean; None for a single datum.
    """

    mean: float
    standard_error: float | None


@dataclass(frozen=True, kw_only=True)
class BatchNormComparison:
    """Codes and costs with the BatchNorm layers in train mode, normalised by their batch, and in eval mode.

    Args:
        layers: Number of BatchNorm layers that keep running statistics.
        training: How many of them were in train mode when the report was made.
        code_shift: Root mean square of the difference between the two codes of a datum, in prior standard deviations.
        penalty_train: Mean over batches of the unbiased squared MMD, in train mode.
        penalty_eval: The same in eval mode, against the same prior samples.
        penalty_error: Standard error of the mean difference between the two; None with fewer than three batches.
        cost_train: Mean cost per datum, all sites and factors together, in train mode.
        cost_eval: The same in eval mode.
        batch_sizes: Smallest and largest number of data in a batch; single data are left out of the comparison.
    """

    layers: int
    training: int
    code_shift: float
    penalty_train: float
    penalty_eval: float
    penalty_error: float | None
    cost_train: float
    cost_eval: float
    batch_sizes: tuple[int, int]


@dataclass(frozen=True)
class Gathered:
    """What was seen of model and guide.

    Args:
        codes: Shape (n, d), masked elements 0.
        prior: Prior samples of the same layout and masks.
        second: As many more.
        columns: The columns of each latent site.
        positions: The place of each row in the data, shape (n,).
        noise: Variance that the guide's noise gives each coordinate, shape (d,).
        paired: Whether a code and the prior sample in its row may depend on the same datum.
        costs: By observed site or ``pyro.factor``.
        batch_norm: None without such layers, or without a batch of at least 2 data.
        first: The first batch's arguments, and its run.
    """

    codes: Tensor
    prior: Tensor
    second: Tensor
    columns: Mapping[str, slice]
    positions: Tensor
    noise: Tensor
    paired: bool
    costs: Mapping[str, CostSummary]
    batch_norm: BatchNormComparison | None
    first: tuple[tuple[Any, ...], Run]


def gather(
    model: Program,
    guide: Program,
    batches: Iterable[tuple[Any, ...]],
    kwargs: Mapping[str, Any],
    *,
    cost: CostOption,
    max_codes: int,
    data_plate: str | None,
    seed: int,
) -> Gathered:
    """Runs batch after batch until there are ``max_codes`` codes.

    Raises:
        ValueError: If there is no batch, model and guide do not fit a WAE, batches give codes of different sizes, or
            prior samples have another dtype or device than the codes.
    """
    observer = Observer(model, guide, cost=cost, data_plate=data_plate, prior_draws=2)
    seen: list[Step] = []
    in_train: list[Step] = []
    in_eval: list[Step] = []
    noise: list[Tensor] = []
    count = 0
    layers: list[BatchNorm] = []
    first: tuple[tuple[Any, ...], Run] | None = None
    for index, args in enumerate(batches):
        tensors = (x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        device = next((x.device for x in tensors), torch.device("cpu"))
        with isolated_seed(seed + 2 * index, device):
            with batch_norm_layers() as ran:
                step = _observe(observer, args, kwargs, None)
            with torch.no_grad(), batch_norm_at_rest():
                again = Observer(model, guide, data_plate=data_plate).observe(args, kwargs, subsample_of=step.first)
        layers += [layer for layer in ran if layer not in layers]
        first = first or (args, step.first)
        with torch.no_grad():
            noise.append((step.rows()[0] - again.rows()[0])[0].square() / 2)
        if layers and len(noise[-1]) >= 2:  # a single datum has no variance, and no penalty
            for training, found in ((True, in_train), (False, in_eval)):
                # One seed for both modes, or the guide's noise would be a difference between them.
                with _mode(layers, training), isolated_seed(seed + 2 * index + 1, device):
                    found.append(_observe(observer, args, kwargs, step.first))
        seen.append(step)
        count += len(noise[-1])
        if count >= max_codes:
            break
    if first is None:
        raise ValueError("There is no batch of data to report on. Write report(model, guide, x) or batches=loader.")
    widths = {step.codes.shape[2] for step in seen}
    if len(widths) > 1:
        raise ValueError(
            f"Batches give codes of different sizes, {sorted(widths)}, which have no joint distribution. Pad sequences "
            "to one length under poutine.mask, or report on one batch."
        )
    rows = [step.rows() for step in seen]
    codes = torch.cat([values[0] for values, _ in rows])
    draws = [draws.unflatten(0, (2, -1)) for _, draws in rows if draws is not None]
    if len(codes) < 2:
        raise ValueError(f"A report needs at least 2 data that are not masked, found {len(codes)}.")
    prior, second = (torch.cat(rows) for rows in zip(*draws, strict=True))
    check_codes(codes, prior)
    chosen = torch.arange(len(codes), device=codes.device)
    if len(codes) > max_codes:  # data may be sorted, by class for instance
        order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(seed), device="cpu")
        chosen = order[:max_codes].sort().values.to(codes.device)
    return Gathered(
        codes=codes[chosen],
        prior=prior[chosen],
        second=second[chosen],
        columns=seen[0].columns,
        positions=_positions(seen)[chosen],
        noise=torch.cat(noise)[chosen].mean(0),
        paired=any(step.prior_varies or step.kept is not None for step in seen),
        costs={name: _summary(costs) for name, costs in _costs(seen).items()},
        batch_norm=_compare_modes(layers, in_train, in_eval) if in_train else None,
        first=first,
    )


def _observe(observer: Observer, args: tuple[Any, ...], kwargs: Mapping[str, Any], subsample_of: Run | None) -> Step:
    with torch.no_grad(), batch_norm_at_rest():
        step = observer.observe(args, kwargs, subsample_of=subsample_of)
    for name, columns in step.columns.items():
        if not step.rows()[0][..., columns].isfinite().all():
            raise ValueError(
                f"The codes of latent site '{name}' are not all finite. If the data hold NaN, write in the guide: "
                "x = x.nan_to_num(). If an output of the guide overflows, bound it."
            )
    return step


def _costs(steps: Sequence[Step]) -> dict[str, Tensor]:
    """The costs of each site's data that are not masked, shape (number of them,), of the steps that have the site."""
    found: dict[str, list[Tensor]] = {}
    for step in steps:
        for name, (costs,) in step.costs.items():
            site = step.first.observed.get(name)
            kept = step.seen if site is None else site.kept  # None is a pyro.factor
            found.setdefault(name, []).append(costs if kept is None else costs[kept[0]])
    return {name: torch.cat(costs).double() for name, costs in found.items()}


def _positions(steps: Sequence[Step]) -> Tensor:
    """The place of each unmasked datum among all data of the batches."""
    found, start = [], 0
    for step in steps:
        found.append(step.left(torch.arange(start, start + step.data, device=step.codes.device), 0))
        start += step.data
    return torch.cat(found)


def _summary(costs: Tensor) -> CostSummary:
    error = costs.std().item() / math.sqrt(len(costs)) if len(costs) > 1 else None
    return CostSummary(mean=costs.mean().item(), standard_error=error)


@contextmanager
def _mode(layers: Sequence[BatchNorm], training: bool) -> Iterator[None]:
    before = [layer.training for layer in layers]
    try:
        for layer in layers:
            layer.train(training)
        yield
    finally:
        for layer, was_training in zip(layers, before, strict=True):
            layer.train(was_training)


def _compare_modes(
    layers: Sequence[BatchNorm], in_train: Sequence[Step], in_eval: Sequence[Step]
) -> BatchNormComparison:
    mmd, penalties, squares, spreads = MMD(), [], [], []
    with torch.no_grad():
        for trained, evaluated in zip(in_train, in_eval, strict=True):
            codes, draws = trained.rows()
            others, _ = evaluated.rows()
            penalties.append(torch.stack([mmd(codes, draws), mmd(others, draws)]).double())
            squares.append((codes - others)[0].square())
            spreads.append(draws)
    spread = torch.cat([draws for draws in spreads if draws is not None]).std(0)
    shift = torch.cat(squares) / spread.where(spread > 0, 1.0).square()
    values = torch.stack(penalties)
    gap = values[:, 1] - values[:, 0]
    means = values.mean(0).tolist()
    costs = [sum(own.mean().item() for own in _costs(steps).values()) for steps in (in_train, in_eval)]
    sizes = [step.data for step in in_train]
    return BatchNormComparison(
        layers=len(layers),
        training=sum(layer.training for layer in layers),
        code_shift=shift.mean().sqrt().item(),
        penalty_train=means[0],
        penalty_eval=means[1],
        penalty_error=(gap.std() / math.sqrt(len(gap))).item() if len(gap) >= 3 else None,
        cost_train=costs[0],
        cost_eval=costs[1],
        batch_sizes=(min(sizes), max(sizes)),
    )
