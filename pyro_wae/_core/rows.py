"""Rows of numbers: their precision and distances, and a sample site's values as rows; nothing here knows Pyro.

A code is a row. Of a site it has to be known which of its dimensions are data and particles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Casts half precision, and less, up to float32; leaves float32 and float64 as they are."""
    return x.float() if x.dtype.is_floating_point and x.dtype.itemsize < 4 else x


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
        squares = _not_negative(norms[:, None] + norms - 2 * (x @ x.mT))
        return squares.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 0)
    centre = (x.detach().mean(0) + y.detach().mean(0)) / 2
    x, y = x - centre, y - centre
    return _not_negative(x.square().sum(1)[:, None] + y.square().sum(1) - 2 * (x @ y.mT))


def _not_negative(squares: Tensor) -> Tensor:
    """0 in place of what rounding has made negative; `clamp` would take its second derivative, too."""
    return squares - squares.detach().clamp(max=0)


@dataclass(frozen=True)
class Site:
    """A sample site of one run of the model.

    Args:
        name: The name that the user gave it.
        distribution: The model's distribution of it: the prior of a latent, P_G(. | z) of an observed site.
        value: Its value, shape ``distribution.shape()``.
        shape: The batch shape that the site's plates give, 1 where a dimension belongs to no plate.
        data_dim: The data plate's dimension, counted from the right of ``shape`` (negative).
        particle_dim: The same for vectorised particles, or None without them.
        mask: Boolean, broadcasts to ``value``; False where the site is masked. None without a mask.
        scale: The user's ``poutine.scale``: a number, or a tensor that broadcasts to the batch shape.
        subsample_scale: N/B of the subsampled plates inside a datum, by which its part stands for the whole.
    """

    name: str
    distribution: Any
    value: Tensor
    shape: tuple[int, ...]
    data_dim: int
    particle_dim: int | None = None
    mask: Tensor | None = None
    scale: float | Tensor = 1.0
    subsample_scale: float = 1.0

    @property
    def data(self) -> int:
        """The number of data."""
        return self.shape[self.data_dim]

    @property
    def event_dim(self) -> int:
        """Number of event dimensions of the value."""
        return self.distribution.event_dim

    @property
    def value_dim(self) -> int:
        """The dimension of the data in the value, counted from its right (negative)."""
        return self.data_dim - self.event_dim

    def value_rows(self) -> Tensor:
        """The rows of its value, shape ``(K, n, *inner, *event)``."""
        return self.rows(self.value, self.distribution.event_dim)

    @property
    def kept(self) -> Tensor | None:
        """Whether any part of a datum is unmasked, shape (K, n). None without a mask."""
        if self.mask is None:
            return None
        rows = self.rows(self.mask.expand(self.value.shape), self.event_dim)
        return rows.flatten(2).any(2) if rows.ndim > 2 else rows

    def rows(self, x: Tensor, event_dim: int) -> Tensor:
        """Moves particles and data to the front.

        Args:
            x: A tensor whose last ``event_dim`` dimensions are the event and whose others broadcast to ``shape``.
            event_dim: Number of event dimensions.

        Returns:
            Shape (K, n, *inner, *event): K particles, n data, then the other batch dimensions, then the event.

        Raises:
            ValueError: If a batch dimension of x belongs to no plate.
        """
        batch, event = x.shape[: x.ndim - event_dim], x.shape[x.ndim - event_dim :]
        for dim in range(-len(batch), 0):
            planned = self.shape[dim] if -dim <= len(self.shape) else 1
            if batch[dim] not in (1, planned):
                own = -dim if dim > self.data_dim else self.data_dim - dim  # dimensions that are not the data's
                raise ValueError(
                    f"At site '{self.name}', batch dimension {dim} has size {batch[dim]} where its plates give "
                    f"{planned}. Write .to_event({own}) if it belongs to the value of one datum, or put the site "
                    f"under pyro.plate(..., {batch[dim]}, dim={dim})."
                )
        if batch != self.shape:
            x = x.reshape(batch[max(0, len(batch) - len(self.shape)) :] + event).expand(self.shape + event)
        data = self.data_dim - event_dim
        if self.particle_dim is None:
            return (x if x.ndim == -data else x.movedim(data, 0)).unsqueeze(0)
        return x.movedim((self.particle_dim - event_dim, data), (0, 1))

    def unrows(self, rows: Tensor, event_shape: tuple[int, ...]) -> Tensor:
        """Undoes :meth:`rows` and the flattening of what belongs to a datum.

        Args:
            rows: Shape (K, n, size).
            event_shape: The site's event shape.

        Returns:
            Shape ``shape + event_shape``.
        """
        moved = (self.particle_dim, self.data_dim)
        inner = [size for dim, size in zip(range(-len(self.shape), 0), self.shape, strict=True) if dim not in moved]
        x = rows.reshape((*rows.shape[:2], *inner, *event_shape))
        data = self.data_dim - len(event_shape)
        if self.particle_dim is None:
            return x.squeeze(0).movedim(0, data)
        return x.movedim((0, 1), (self.particle_dim - len(event_shape), data))


def side_by_side(
    rows: Mapping[str, Tensor], kept: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, slice], Tensor | None]:
    """Sets the rows of several sites side by side.

    Half precision is cast up to float32: under autocast one site may have it, and the next may not. Of float32 and
    float64, all become float64.

    Args:
        rows: For each site a tensor (K, n, ...).
        kept: For the sites that have a mask, a boolean tensor of the same shape.

    Returns:
        Codes (K, n, d), the columns of each site, and the mask (K, n, d) or None.

    Raises:
        ValueError: If the sites are on different devices.
    """
    flat: list[Tensor] = []
    columns: dict[str, slice] = {}
    masks: list[Tensor] = []
    start = 0
    for site, value in rows.items():
        value = at_least_float32(value)
        value = value.flatten(2) if value.ndim > 2 else value.unsqueeze(2)
        if flat and value.device != flat[0].device:
            first = next(iter(rows))
            raise ValueError(
                f"Site '{site}' has values on {value.device}, site '{first}' on {flat[0].device}, and one code joins "
                f"all sites. Write pyro.sample('{site}', ...) with parameters on {flat[0].device}, in model and guide."
            )
        flat.append(value)
        columns[site] = slice(start, start + value.shape[2])
        start += value.shape[2]
        if kept:
            masks.append(kept[site].reshape(value.shape) if site in kept else value.new_ones(value.shape).bool())
    return joined(flat, 2), columns, joined(masks, 2) if kept else None
