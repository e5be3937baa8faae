"""Distances and sums that keep their digits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Casts half precision up to float32; leaves float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def working_precision(x: Tensor) -> Tensor:
    """Casts to float64, or on a device without it (MPS) to float32.

    The three sums of a maximum mean discrepancy cancel almost wholly when it is small, and so do the
    terms of its gradient: in float32 the gradient of two nearly equal samples keeps one digit with
    a kernel that has a kink at 0, and four with a smooth one.
    """
    return x.float() if x.device.type == "mps" else x.double()


def joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Sets tensors one after the other; a single one, which is the rule, is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean distances between rows, by one matrix product; never an (n, m, d) tensor.

    Args:
        x: Shape (n, d).
        y: Shape (m, d). Where ``y is x`` the diagonal is exactly 0.

    Returns:
        Shape (n, m), never negative, differentiable in both arguments, in the precision of ``x``.
    """
    # |x|^2 + |y|^2 - 2 x.y loses the digits by which |x| exceeds |x - y|. Distances stay the same when
    # both sets move, so both are moved to the middle of their means first.
    if y is x:
        x = x - x.detach().mean(0)
        norms = x.square().sum(1)
        squares = (norms[:, None] + norms - 2 * (x @ x.mT)).clamp(min=0)
        return squares.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 0)
    centre = (x.detach().mean(0) + y.detach().mean(0)) / 2
    x, y = x - centre, y - centre
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * (x @ y.mT)).clamp(min=0)
