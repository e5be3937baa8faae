"""Codes and prior draws side by side with what both are conditional on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_wae.penalties.context import PenaltyContext


def beside(codes: Tensor, condition: Tensor | None) -> Tensor:
    """Codes (K, n, d) with c more columns for a condition (n, c), for what depends on their number alone.

    Raises:
        ValueError: If the condition has another shape.
    """
    if condition is None:
        return codes
    if condition.ndim != 2 or (not condition.is_floating_point() and condition.shape[1] != 1):
        raise ValueError(
            f"A condition has shape (n, c), and (n, 1) if it holds labels, found {tuple(condition.shape)} of "
            f"{condition.dtype}. Write labels[:, None], or y.float().flatten(1) for what has a distance."
        )
    return torch.cat([codes, codes.new_zeros(*codes.shape[:-1], condition.shape[1])], dim=-1)


def join(
    codes: Tensor, prior: Tensor, context: PenaltyContext, columns: Tensor
) -> tuple[Tensor, Tensor, PenaltyContext]:
    """Sets a datum's condition beside each of its codes and of its prior draws.

    Args:
        codes: Shape (K, n, d).
        prior: Shape (J n, d): J draws of each datum, one block after the other.
        context: How they were drawn.
        columns: Shape (n, c), the condition as numbers.

    Returns:
        Shapes (K, n, d + c) and (J n, d + c), and a context for them: without a condition, with shared data.

    Raises:
        ValueError: If the condition has not a row for each datum, or the prior draws are no multiple of the data.
    """
    n, d = codes.shape[1:]
    repeats, rest = divmod(len(prior), n)
    if len(columns) != n or rest or not repeats:
        raise ValueError(
            f"A condition has a row for each datum, and prior draw i has the datum of code i: with {n} data found "
            f"{len(columns)} rows of the condition and {len(prior)} prior draws. Draw the prior once or several times "
            "for each datum."
        )
    columns = columns.detach().to(codes)
    joint = torch.cat([codes, columns.expand(len(codes), *columns.shape)], dim=2)
    draws = torch.cat([prior, columns.repeat(repeats, 1)], dim=1)
    # p(z, y) and p(z | y) differ by a factor that codes and prior draws of one datum share.
    log_prob = None if context.prior_log_prob is None else _of_codes(context.prior_log_prob, d)
    return joint, draws, dataclasses.replace(
        context, condition=None, shared_data=True, prior=None, prior_log_prob=log_prob, kept=None
    )  # fmt: skip


def scaled_columns(penalty: object, context: PenaltyContext) -> Tensor:
    """The condition in the units of a code, for a penalty that knows only rows of numbers.

    Raises:
        ValueError: If the condition is made of labels.
    """
    condition = context.condition
    assert condition is not None
    if not condition.is_floating_point():
        raise ValueError(
            f"{penalty!r} compares rows of numbers, and the condition holds labels ({condition.dtype}). Give it "
            "torch.nn.functional.one_hot(labels, classes).float() as the condition, or write MMD(), which compares "
            "labels by equality."
        )
    return condition if context.condition_scale is None else condition * context.condition_scale


def label_columns(condition: Tensor) -> Tensor:
    """The condition as numbers that are equal where it is: floats as they are, labels (n, 1) by their place."""
    if condition.is_floating_point():
        return condition
    # Large labels differ by less than a float32 can tell; the place in their order is below n.
    labels = condition[:, 0].contiguous().to(torch.int64)
    return torch.searchsorted(labels.sort().values, labels)[:, None]


def _of_codes(log_prob: Callable[[Tensor], Tensor], d: int) -> Callable[[Tensor], Tensor]:
    return lambda rows: log_prob(rows[..., :d])
