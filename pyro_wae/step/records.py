"""Codes: latent values as rows, one for each datum. Plain tensors with their layout; nothing of Pyro."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_wae._core.numerics import at_least_float32, joined

__all__ = ["Codes", "Layout"]


@dataclass(frozen=True)
class Layout:
    """Which batch dimensions of a site are the data and the particles; all others belong to a datum.

    Args:
        site: The site's name, for messages.
        shape: The batch shape that the site's plates give, 1 where a dimension belongs to no plate.
        data_dim: The data plate's dimension, counted from the right of ``shape`` (negative).
        particle_dim: The same for vectorised particles, or None without them.
    """

    site: str
    shape: tuple[int, ...]
    data_dim: int
    particle_dim: int | None = None

    @property
    def data(self) -> int:
        """The number of data."""
        return self.shape[self.data_dim]

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
                raise ValueError(
                    f"At site '{self.site}', batch dimension {dim} has size {batch[dim]} where its plates give "
                    f"{planned}. Write .to_event({-dim}) if it belongs to the value of one datum, or put the site "
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


@dataclass(frozen=True)
class Codes:
    """The codes of K particles of n data at one or several sites.

    Args:
        values: Shape (K, n, d).
        columns: The columns of each site.
        kept: Shape (K, n, d), False where an element is masked; None where nothing is.
    """

    values: Tensor
    columns: Mapping[str, slice]
    kept: Tensor | None = None

    @classmethod
    def of_sites(cls, rows: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> Codes:
        """Sets sites side by side.

        Half precision is cast up to float32: under autocast one site may have it, and the next may not.

        Args:
            rows: For each site a tensor (K, n, ...) as :meth:`Layout.rows` gives it.
            kept: For the sites that have a mask, a boolean tensor of the same shape.

        Raises:
            ValueError: If the sites have different dtypes or devices.
        """
        rows = {site: at_least_float32(value) for site, value in rows.items()}
        first = next(iter(rows))
        for site, value in rows.items():
            if value.dtype != rows[first].dtype or value.device != rows[first].device:
                raise ValueError(
                    f"Site '{site}' has values of {value.dtype} on {value.device}, site '{first}' of "
                    f"{rows[first].dtype} on {rows[first].device}. One code joins all sites: give them one dtype and "
                    "device, or compare the sites apart with WAELoss({'" + site + "': MMD(), ...})."
                )
        flat = {site: value.flatten(2) if value.ndim > 2 else value.unsqueeze(2) for site, value in rows.items()}
        columns, start = {}, 0
        for site, value in flat.items():
            columns[site] = slice(start, start + value.shape[2])
            start += value.shape[2]
        masks = None
        if kept:
            masks = torch.cat(
                [kept[s].reshape(v.shape) if s in kept else v.new_ones(v.shape).bool() for s, v in flat.items()], dim=2
            )
        return cls(joined(list(flat.values()), 2), columns, masks)

    @classmethod
    def stack(cls, parts: Sequence[Codes]) -> Codes:
        """Sets the particles of several runs one after the other.

        Raises:
            ValueError: If the runs disagree in the number of data or the size of a code.
        """
        if len(parts) == 1:
            return parts[0]
        shapes = [tuple(part.values.shape[1:]) for part in parts]
        if len(set(shapes)) > 1:
            raise ValueError(
                f"Runs of one step gave codes of different shapes (data, size): {shapes}. "
                "The model and guide must have one structure within a step."
            )
        masks = [part.kept for part in parts if part.kept is not None]
        values = torch.cat([part.values for part in parts])
        return cls(values, parts[0].columns, torch.cat(masks) if len(masks) == len(parts) else None)

    def site(self, *names: str) -> Codes:
        """The codes of one site alone, or of several in the order they have here."""
        columns, start = {}, 0
        for site, here in self.columns.items():
            if site in names:
                columns[site] = slice(start, start + here.stop - here.start)
                start = columns[site].stop
        kept = None if self.kept is None else self.cut(self.kept, names)
        return Codes(self.cut(self.values, names), columns, kept)

    def cut(self, rows: Tensor, names: Collection[str]) -> Tensor:
        """The columns of some sites, from a tensor (..., d) that is laid out as these codes."""
        return joined([rows[..., columns] for site, columns in self.columns.items() if site in names], -1)

    def masked(self, draws: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Leaves out masked data and sets other masked elements to 0, alike in codes and prior draws.

        Args:
            draws: Prior draws of the same layout, shape (J, n, d), or None.

        Returns:
            The codes, shape (K, n', d), and the draws, shape (J n', d), with n' data left.
        """
        codes, kept = self.values, self.kept_rows()
        if kept is not None:
            codes = self.left(codes, 1).where(kept, 0.0)
            if draws is not None:
                repeats = math.ceil(len(draws) / len(kept))
                draws = self.left(draws, 1).where(kept.repeat(repeats, 1, 1)[: len(draws)], 0.0)
        return codes, None if draws is None else draws.flatten(0, 1)

    def kept_rows(self) -> Tensor | None:
        """Which numbers are unmasked, shape (K, n', d), of the n' data that :meth:`masked` leaves; None if all are."""
        return None if self.kept is None else self.left(self.kept, 1)

    def left(self, rows: Tensor, dim: int) -> Tensor:
        """The data that a mask leaves, of a tensor that has all of them along a dimension, 0 or 1."""
        data = self._data_left
        if data is None:
            return rows
        return rows[data] if dim == 0 else rows[:, data]

    @functools.cached_property
    def _data_left(self) -> Tensor | None:
        """Shape (n,): False for data whose whole code is masked; None if there are none."""
        if self.kept is None:
            return None
        whole = self.kept.any(2).any(0)
        return None if bool(whole.all()) else whole
