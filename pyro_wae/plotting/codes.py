"""Codes against prior samples: clouds in the plane of largest discrepancy, and quantiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pyro_wae._core.checks import whole
from pyro_wae.plotting.style import BLUE, GREY, ORANGE, PALETTE, WIDTH, Rows, as_array, styled_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

AXIS_NAMES = ("largest discrepancy", "second largest")

MOST_CLASSES = 20
"""Classes that have distinguishable colours."""


def codes_and_prior(
    codes: Rows,
    prior: Rows,
    labels: Rows | None = None,
    *,
    plane: tuple[int, int] | None = None,
    title: str | None = None,
) -> Figure:
    r"""Draws codes beside prior samples, both projected to one plane, on the same axes limits.

    Codes of more than two dimensions are shown in the plane of largest discrepancy: that of the two orthogonal
    directions whose second moment about the prior's mean differs most between codes and prior, which are the
    eigenvectors of

    .. math:: \mathrm{Cov}_Q - \mathrm{Cov}_P + (\mu_Q - \mu_P)(\mu_Q - \mu_P)^T

    with the eigenvalues largest in size. Where the two clouds look alike there, mean and variance differ less
    along every other direction.

    Args:
        codes: Codes of data, shape ``(n, d)`` with ``d >= 2``.
        prior: Prior samples, shape ``(m, d)``. With ``m`` near ``n`` the clouds look equally dense.
        labels: Class of each code, shape ``(n,)``: up to 20 classes get colours and a legend.
        plane: Two coordinates to show instead, for example ``(0, 1)``.
        title: A line above both panels.

    Returns:
        A figure with two axes: codes, then prior samples.

    Raises:
        ValueError: If the shapes do not fit together, ``d`` is less than 2, a value is not finite, there are more than
            20 classes, or ``plane`` is not two different coordinates.
        TypeError: If an argument is of another kind.
        ImportError: If matplotlib is not installed.

    Example:
        >>> import torch
        >>> figure = codes_and_prior(torch.randn(500, 8), torch.randn(500, 8))
    """
    points, draws = _as_pair(codes, prior, least=2)
    classes = None if labels is None else _as_classes(labels, len(points))
    basis, names = _plane(points, draws, plane)
    points, draws = points @ basis, draws @ basis

    number = 0 if classes is None else len(np.unique(classes))
    height = 3.5 + (0.4 if title is not None else 0) + 0.4 * math.ceil(number / _legend_columns(number))
    with styled_figure((WIDTH, height), title) as figure:
        draw_clouds(figure, points, draws, names, classes=classes)
    return figure


def quantiles(codes: Rows, prior: Rows, *, names: Sequence[str] | None = None, title: str | None = None) -> Figure:
    """Draws the quantiles of each coordinate of the codes against those of the prior, a line each.

    Both are measured by the mean and standard deviation of the prior samples: if codes match the prior, all lines lie
    on the diagonal, up to sampling noise. A line above it is shifted up, a flatter one is too narrow, a bent one has
    another shape. The line with the largest discrepancy is drawn in colour.

    Args:
        codes: Codes of data, shape ``(n, d)``.
        prior: Prior samples, shape ``(m, d)``.
        names: A name for each coordinate, for the legend; by default "coordinate 0" and so on.
        title: A line above.

    Returns:
        A figure with one axes.

    Raises:
        ValueError: If the shapes do not fit together, or a value is not finite.
        TypeError: If an argument is of another kind.
        ImportError: If matplotlib is not installed.

    Example:
        >>> import torch
        >>> figure = quantiles(1.2 * torch.randn(500, 8), torch.randn(500, 8))
    """
    points, draws = _as_pair(codes, prior, least=1)
    if names is None:
        names = [f"coordinate {index}" for index in range(points.shape[1])]
    if isinstance(names, str) or not isinstance(names, Sequence) or len(names) != points.shape[1]:
        raise ValueError(
            f"names must be a list of one name for each of {points.shape[1]} coordinates, found {names!r}. "
            "Write names=None."
        )
    with styled_figure((WIDTH, 4.4 + (0.4 if title is not None else 0)), title) as figure:
        draw_quantiles(figure, points, draws, names)
    return figure


def draw_clouds(
    figure: Figure | SubFigure,
    points: np.ndarray,
    draws: np.ndarray,
    names: tuple[str, str],
    *,
    classes: np.ndarray | None = None,
    marked: np.ndarray | None = None,
) -> None:
    """Scatters codes and prior samples of shape (n, 2) side by side, on the same limits; marked draws in colour."""
    # The clouds' outermost points would shrink everything else.
    limit = 1.08 * np.quantile(np.abs(np.concatenate([points, draws]) - draws.mean(0)), 0.999) or 1.0
    # Fewer points can be larger and darker; at 2,000 a cloud still shows its density.
    size = float(np.clip(12_000 / max(len(points), len(draws)), 2, 30))
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    if classes is None:
        left.scatter(points[:, 0], points[:, 1], s=size, color=BLUE, alpha=0.5, linewidths=0)
    else:
        _scatter_classes(left, points, classes, size)
    marked = np.zeros(len(draws), dtype=bool) if marked is None else marked
    for chosen, colour, factor in ((draws[~marked], GREY, 1), (draws[marked], ORANGE, 2)):
        right.scatter(chosen[:, 0], chosen[:, 1], s=factor * size, color=colour, alpha=0.6, linewidths=0)
    left.set(title="codes", xlabel=names[0], ylabel=names[1])
    right.set(title="prior samples", xlabel=names[0])
    for axes in (left, right):
        axes.set_box_aspect(1)
        axes.set_xlim(draws[:, 0].mean() - limit, draws[:, 0].mean() + limit)
        axes.set_ylim(draws[:, 1].mean() - limit, draws[:, 1].mean() + limit)


def draw_quantiles(figure: Figure | SubFigure, points: np.ndarray, draws: np.ndarray, names: Sequence[str]) -> None:
    """Draws the quantiles of the columns of codes against those of prior samples."""
    spread = draws.std(0)
    spread = np.where(spread > 0, spread, 1.0)
    # Quantiles further out are those of a few points.
    tail = min(0.25, 5 / min(len(points), len(draws)))
    levels = np.linspace(tail, 1 - tail, 101)
    of_codes, of_prior = (np.quantile((rows - draws.mean(0)) / spread, levels, axis=0) for rows in (points, draws))
    largest = int(np.abs(of_codes - of_prior).max(0).argmax())
    low, high = min(of_codes.min(), of_prior.min()), max(of_codes.max(), of_prior.max())
    axes = figure.subplots()
    axes.plot([low, high], [low, high], color=GREY, linewidth=1.5, linestyle=(0, (4, 3)), zorder=0)
    for index in range(points.shape[1]):
        chosen = index == largest
        axes.plot(
            of_prior[:, index],
            of_codes[:, index],
            color=ORANGE if chosen else BLUE,
            linewidth=3 if chosen else 1.5,
            alpha=1 if chosen else 0.6,
            zorder=3 if chosen else 2,
            label=f"{names[index]}, largest discrepancy" if chosen else None,
        )
    axes.set(xlabel="quantile of the prior", ylabel="quantile of the codes")
    axes.legend(frameon=False, loc="upper left", handlelength=1.2)


def discrepant_directions(points: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Orthogonal directions as columns, that in which the second moments about the prior's mean differ most first."""
    shift = (points.mean(0) - draws.mean(0))[:, None]
    values, vectors = np.linalg.eigh(np.cov(points.T, ddof=0) - np.cov(draws.T, ddof=0) + shift @ shift.T)
    return vectors[:, np.argsort(-np.abs(values))]


def _plane(points: np.ndarray, draws: np.ndarray, plane: tuple[int, int] | None) -> tuple[np.ndarray, tuple[str, str]]:
    """The plane to show as the two columns of a (d, 2) matrix, with the names of its axes."""
    dim = points.shape[1]
    if plane is None and dim > 2:
        return discrepant_directions(points, draws)[:, :2], AXIS_NAMES
    chosen: Sequence[int] = (0, 1) if plane is None else plane
    if isinstance(chosen, Sequence):
        what, write = "Each of plane's coordinates", "plane=(0, 1)"
        chosen = [whole(what, place, least=0, most=dim - 1, write=write) for place in chosen]
    if not isinstance(chosen, Sequence) or len(chosen) != 2 or chosen[0] == chosen[1]:
        raise ValueError(
            f"plane must be two different coordinates from 0 to {dim - 1}, found {plane!r}. Write plane=(0, 1)."
        )
    first, second = chosen
    return np.eye(dim)[:, [first, second]], (f"coordinate {first}", f"coordinate {second}")


def _scatter_classes(axes: Axes, points: np.ndarray, classes: np.ndarray, size: float) -> None:
    """Scatters points in their classes' colours, with a legend below the whole figure."""
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    names, indices = np.unique(classes, return_inverse=True)
    colours = PALETTE[: len(names)] if len(names) <= len(PALETTE) else colormaps["tab20"](range(len(names)))
    # All classes in one call and in the data's order: else the last class would cover the others.
    axes.scatter(points[:, 0], points[:, 1], s=size, c=np.array(colours)[indices], alpha=0.8, linewidths=0)
    dots = [Line2D([], [], color=colour, marker="o", markersize=8, linestyle="none") for colour in colours]
    axes.figure.legend(
        dots,
        [str(name) for name in names],
        loc="outside lower center",
        ncols=min(_legend_columns(len(names)), len(names)),
        frameon=False,
        handletextpad=-0.3,
        columnspacing=0.6,
    )


def _legend_columns(number: int) -> int:
    """Entries in a line of the legend: ten of one digit fit into the figure, and seven of two."""
    return 10 if number <= 10 else 7


def _as_classes(labels: Rows, count: int) -> np.ndarray:
    """The class of each of so many codes."""
    write = "[str(label) for label in labels]"
    classes = as_array(labels, "labels", kinds="biufUS", what="numbers or strings", write=write)
    if classes.shape != (count,):
        raise ValueError(
            f"labels must have shape ({count},), one a code, found shape {classes.shape}. Write labels=y[:{count}]."
        )
    number = len(np.unique(classes))
    if number > MOST_CLASSES:
        raise ValueError(
            f"labels must be of at most {MOST_CLASSES} classes, which have distinguishable colours, found {number}. "
            "Write labels=None, or join classes."
        )
    return classes


def _as_pair(codes: Rows, prior: Rows, *, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and prior samples as rows of equal length, in float64."""
    pair = []
    for name, values in (("codes", codes), ("prior", prior)):
        array = as_array(values, name)
        if array.ndim != 2 or len(array) == 0 or array.shape[1] < least:
            raise ValueError(
                f"{name} must have shape (n, d) with n > 0 and d >= {least}, found shape {array.shape}. "
                f"Write {name}.flatten(1)."
            )
        if not np.isfinite(array).all():
            raise ValueError(
                f"{name} must be finite, found {(~np.isfinite(array)).sum()} values that are not. "
                f"Write {name}[{name}.isfinite().all(1)] to leave out their rows."
            )
        pair.append(array.astype(np.float64))
    points, draws = pair
    if points.shape[1] != draws.shape[1]:
        raise ValueError(
            f"prior must have the columns of codes, {points.shape[1]}, found shape {draws.shape}. Write "
            f"prior[:, :{points.shape[1]}], or draw the prior of the same sites."
        )
    return points, draws
