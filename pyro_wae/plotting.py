"""Pictures of what a Wasserstein auto-encoder learnt, in one style.

Every function takes tensors or arrays and returns a ``matplotlib.figure.Figure`` that belongs to no window
and no pyplot state: save it with ``figure.savefig(path)``, or let a notebook show it. Matplotlib is imported
when the first picture is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["codes_and_prior", "image_grid", "loss_curves", "quantiles", "reconstructions"]

# Okabe & Ito's palette, in which no two colours look alike to the colour-blind, without its black, and with a
# wine red and a grey more, so that ten classes have ten colours.
PALETTE = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#D55E00",
    "#56B4E9",
    "#F0E442",
    "#882255",
    "#999999",
    "#000000",
)
BLUE, ORANGE, GREY = PALETTE[0], PALETTE[4], "#8C8C8C"

# A picture six inches wide is shown at about 360 pixels on a phone: 15 points come out there at 12 pixels.
# White is set, not left transparent, because black text on a dark page would vanish.
STYLE: dict[Any, Any] = {
    "axes.edgecolor": "#555555",
    "axes.labelsize": 15,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 16,
    "axes.titlepad": 10,
    "figure.dpi": 150,
    "figure.edgecolor": "white",
    "figure.facecolor": "white",
    "figure.titlesize": 16,
    "font.family": "sans-serif",
    "font.size": 14,
    "lines.linewidth": 2.5,
    "xtick.labelsize": 13,
    "ytick.labelsize": 13,
}
WIDTH = 6.0
LABEL_WIDTH = 0.75


def image_grid(
    images: Tensor | np.ndarray, *, columns: int | None = None, title: str | None = None, cmap: str = "gray"
) -> Figure:
    """Draws images side by side in rows, in their order.

    Args:
        images: Values in [0, 1] (values outside are clipped) or uint8, of shape ``(n, h, w)``,
            ``(n, 1, h, w)`` or, in colour, ``(n, 3, h, w)``.
        columns: Images in a row; by default as many as make the grid about square.
        title: A line above the grid.
        cmap: Matplotlib's colour map for images of one channel. ``"gray_r"`` shows ink on paper.

    Returns:
        A figure with one axes, which holds the whole grid as one picture.

    Raises:
        ValueError: If ``images`` is of another shape or is empty, or ``columns`` is not positive.
        ImportError: If matplotlib is not installed.

    Example:
        >>> figure = image_grid(torch.rand(12, 1, 28, 28), columns=4)
    """
    pictures = as_images(images, "images")
    columns = _as_columns(columns, math.ceil(math.sqrt(len(pictures))))
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    mosaic, _ = make_mosaic(rows)
    with styled_figure(mosaic_size(mosaic, title)) as figure:
        axes = figure.add_subplot()
        show_mosaic(axes, mosaic, cmap)
        if title is not None:
            figure.suptitle(title)
    return figure


def reconstructions(
    inputs: Tensor | np.ndarray,
    outputs: Tensor | np.ndarray,
    *,
    columns: int | None = None,
    title: str | None = None,
    cmap: str = "gray",
) -> Figure:
    """Draws each input above the output that the auto-encoder makes of it.

    Args:
        inputs: Images in any form that :func:`image_grid` takes.
        outputs: Their reconstructions, of the same shape.
        columns: Pairs in a row; by default ten, or all where there are fewer.
        title: A line above the grid.
        cmap: Matplotlib's colour map for images of one channel.

    Returns:
        A figure with one axes, whose rows are labelled "input" and "output" in turn.

    Raises:
        ValueError: If the two differ in shape, are of a shape that is no image's or are empty, or ``columns``
            is not positive.
        ImportError: If matplotlib is not installed.

    Example:
        >>> figure = reconstructions(torch.rand(20, 1, 28, 28), torch.rand(20, 1, 28, 28))
    """
    above, below = as_images(inputs, "inputs"), as_images(outputs, "outputs")
    if above.shape != below.shape:
        raise ValueError(
            f"outputs must have the shape of inputs, {tuple(inputs.shape)}, but has {tuple(outputs.shape)}"
        )
    columns = _as_columns(columns, min(10, len(above)))
    rows = []
    for start in range(0, len(above), columns):
        rows += [above[start : start + columns], below[start : start + columns]]
    mosaic, centres = make_mosaic(rows, group=2)
    with styled_figure(mosaic_size(mosaic, title, margin=LABEL_WIDTH)) as figure:
        axes = figure.add_subplot()
        show_mosaic(axes, mosaic, cmap)
        axes.set_yticks(centres, ["input", "output"] * (len(rows) // 2))
        axes.tick_params(left=False, pad=2)
        if title is not None:
            figure.suptitle(title)
    return figure


def codes_and_prior(
    codes: Tensor | np.ndarray,
    prior: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | None = None,
    *,
    plane: tuple[int, int] | None = None,
    title: str | None = None,
) -> Figure:
    r"""Draws codes beside prior draws, both projected to one plane, on the same axes limits.

    Codes of more than two dimensions are shown where they fit *worst*: in the plane of the two orthogonal
    directions whose second moment about the prior's mean differs most between codes and prior, which are the
    eigenvectors of

    .. math:: \mathrm{Cov}_Q - \mathrm{Cov}_P + (\mu_Q - \mu_P)(\mu_Q - \mu_P)^T

    with the eigenvalues largest in size. Where the two clouds look alike there, mean and variance differ less
    along every other direction.

    Args:
        codes: Codes of data, shape ``(n, d)`` with ``d >= 2``.
        prior: Prior draws, shape ``(m, d)``. Take ``m`` near ``n``, so that the clouds look equally dense.
        labels: Class of each code, shape ``(n,)``: classes get colours and a legend.
        plane: Two coordinates to show instead, for example ``(0, 1)``.
        title: A line above both panels.

    Returns:
        A figure with two axes: codes, then prior draws.

    Raises:
        ValueError: If the shapes do not fit together, ``d`` is less than 2, a value is not finite, or
            ``plane`` is not two different coordinates.
        ImportError: If matplotlib is not installed.

    Example:
        >>> figure = codes_and_prior(torch.randn(500, 8), torch.randn(500, 8))
    """
    points, draws = _as_rows(codes, "codes"), _as_rows(prior, "prior")
    _check_columns(points, draws)
    classes = None if labels is None else _as_array(labels)
    if classes is not None and classes.shape != (len(points),):
        raise ValueError(f"labels must have shape ({len(points)},), one a code, but has {classes.shape}")
    basis, names = _plane(points, draws, plane)
    points, draws = points @ basis, draws @ basis

    height = 3.5 + (0.4 if title else 0) + (0.4 if classes is not None else 0)
    with styled_figure((WIDTH, height)) as figure:
        draw_clouds(figure, points, draws, names, classes=classes)
        if title is not None:
            figure.suptitle(title)
    return figure


def quantiles(
    codes: Tensor | np.ndarray,
    prior: Tensor | np.ndarray,
    *,
    names: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Draws the quantiles of each coordinate of the codes against those of the prior, a line each.

    Both are measured by the mean and standard deviation of the prior draws, so that all lines lie on the diagonal, but
    for chance, if codes match the prior. A line above it is shifted up, a flatter one is too narrow, a bent one has
    another shape. The line that strays most is drawn in colour.

    Args:
        codes: Codes of data, shape ``(n, d)``.
        prior: Prior draws, shape ``(m, d)``.
        names: A name for each coordinate, for the legend; by default "coordinate 0" and so on.
        title: A line above.

    Returns:
        A figure with one axes.

    Raises:
        ValueError: If the shapes do not fit together, or a value is not finite.
        ImportError: If matplotlib is not installed.

    Example:
        >>> figure = quantiles(1.2 * torch.randn(500, 8), torch.randn(500, 8))
    """
    points, draws = _as_rows(codes, "codes", least=1), _as_rows(prior, "prior", least=1)
    _check_columns(points, draws)
    if names is not None and len(names) != points.shape[1]:
        raise ValueError(f"names must have one entry for each of {points.shape[1]} coordinates, but has {len(names)}")
    with styled_figure((WIDTH, 4.4 + (0.4 if title else 0))) as figure:
        draw_quantiles(figure, points, draws, names or [f"coordinate {index}" for index in range(points.shape[1])])
        if title is not None:
            figure.suptitle(title)
    return figure


def loss_curves(history: Mapping[str, Sequence[float]], *, unit: str = "epoch", title: str | None = None) -> Figure:
    """Draws how cost and penalty fell while training, on a panel each.

    The penalty's panel has a line at zero: an unbiased penalty ends scattered around it, on both sides.

    Args:
        history: ``"cost"`` and ``"penalty"``, equally long sequences of numbers, one for every ``unit``.
        unit: What the horizontal axis counts, from 1: ``"epoch"`` or ``"step"``.
        title: A line above both panels.

    Returns:
        A figure with two axes: cost, then penalty.

    Raises:
        ValueError: If one of the two is missing or empty, or their lengths differ.
        ImportError: If matplotlib is not installed.

    Example:
        >>> figure = loss_curves({"cost": [60.0, 30.0, 25.0], "penalty": [0.5, 0.1, 0.02]})
    """
    missing = [key for key in ("cost", "penalty") if key not in history]
    if missing:
        raise ValueError(f'history must hold "cost" and "penalty", but holds {sorted(history)}')
    curves = {key: np.asarray([float(value) for value in history[key]]) for key in ("cost", "penalty")}
    lengths = {key: len(curve) for key, curve in curves.items()}
    if lengths["cost"] != lengths["penalty"] or lengths["cost"] == 0:
        raise ValueError(
            f"history's cost and penalty must be equally long and not empty, but are of lengths "
            f"{lengths['cost']} and {lengths['penalty']}"
        )
    counts = np.arange(1, lengths["cost"] + 1)
    with styled_figure((WIDTH, 3.6 if title else 3.2)) as figure:
        from matplotlib.ticker import MaxNLocator

        for axes, (key, curve), colour in zip(figure.subplots(1, 2), curves.items(), (BLUE, ORANGE), strict=True):
            axes.plot(counts, curve, color=colour, marker="o" if len(curve) == 1 else None)
            axes.set(title=key, xlabel=unit)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, steps=[1, 2, 5, 10]))
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.axhline(0, color=GREY, linewidth=1.5, linestyle=(0, (4, 3)), zorder=0)
        if title is not None:
            figure.suptitle(title)
    return figure


@contextmanager
def styled_figure(size: tuple[float, float]) -> Iterator[Figure]:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Pictures need matplotlib: pip install "pyro-wae[tutorials]"') from error
    with matplotlib.rc_context(STYLE):
        yield Figure(figsize=size, layout="constrained")


def _as_array(values: Tensor | np.ndarray) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return np.asarray(values)


def as_images(images: Tensor | np.ndarray, name: str) -> np.ndarray:
    """Images of shape (n, h, w) or (n, h, w, 3), floats in [0, 1]."""
    array = _as_array(images)
    channels = {3: 1, 4: array.shape[1] if array.ndim == 4 else 0}.get(array.ndim)
    if channels not in (1, 3) or array.size == 0:
        raise ValueError(
            f"{name} must have shape (n, h, w), (n, 1, h, w) or (n, 3, h, w) and not be empty, "
            f"but has shape {array.shape}"
        )
    if array.ndim == 4:
        array = array[:, 0] if channels == 1 else np.moveaxis(array, 1, -1)
    scaled = array / 255 if array.dtype == np.uint8 else array.astype(np.float64)
    return np.clip(scaled, 0, 1)


def _as_columns(columns: int | None, default: int) -> int:
    if columns is not None and columns < 1:
        raise ValueError(f"columns must be at least 1, but is {columns}")
    return default if columns is None else columns


def _as_rows(values: Tensor | np.ndarray, name: str, *, least: int = 2) -> np.ndarray:
    array = _as_array(values)
    if array.ndim != 2 or len(array) == 0 or array.shape[1] < least:
        raise ValueError(f"{name} must have shape (n, d) with n > 0 and d >= {least}, but has {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, but {(~np.isfinite(array)).sum()} of its values are not")
    return array.astype(np.float64)


def _check_columns(points: np.ndarray, draws: np.ndarray) -> None:
    if points.shape[1] != draws.shape[1]:
        raise ValueError(f"prior must have the columns of codes, {points.shape[1]}, but has shape {tuple(draws.shape)}")


def draw_clouds(
    figure: Figure | SubFigure,
    points: np.ndarray,
    draws: np.ndarray,
    names: tuple[str, str],
    *,
    classes: np.ndarray | None = None,
    marked: np.ndarray | None = None,
) -> None:
    """Scatters codes and prior draws of shape (n, 2) side by side, on the same limits; marked draws in colour."""
    # The clouds' outermost points would shrink everything else.
    limit = 1.08 * np.quantile(np.abs(np.concatenate([points, draws]) - draws.mean(0)), 0.999)
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
    right.set(title="prior draws", xlabel=names[0])
    for axes in (left, right):
        axes.set_box_aspect(1)
        axes.set_xlim(draws[:, 0].mean() - limit, draws[:, 0].mean() + limit)
        axes.set_ylim(draws[:, 1].mean() - limit, draws[:, 1].mean() + limit)


def draw_quantiles(figure: Figure | SubFigure, points: np.ndarray, draws: np.ndarray, names: Sequence[str]) -> None:
    """Draws the quantiles of the columns of codes against those of prior draws."""
    spread = draws.std(0)
    spread = np.where(spread > 0, spread, 1.0)
    # Quantiles further out are those of a few points.
    tail = min(0.25, 5 / min(len(points), len(draws)))
    levels = np.linspace(tail, 1 - tail, 101)
    of_codes, of_prior = (np.quantile((rows - draws.mean(0)) / spread, levels, axis=0) for rows in (points, draws))
    worst = int(np.abs(of_codes - of_prior).max(0).argmax())
    low, high = min(of_codes.min(), of_prior.min()), max(of_codes.max(), of_prior.max())
    axes = figure.subplots()
    axes.plot([low, high], [low, high], color=GREY, linewidth=1.5, linestyle=(0, (4, 3)), zorder=0)
    for index in range(points.shape[1]):
        chosen = index == worst
        axes.plot(
            of_prior[:, index],
            of_codes[:, index],
            color=ORANGE if chosen else BLUE,
            linewidth=3 if chosen else 1.5,
            alpha=1 if chosen else 0.6,
            zorder=3 if chosen else 2,
            label=f"{names[index]}, strays most" if chosen else None,
        )
    axes.set(xlabel="quantile of the prior", ylabel="quantile of the codes")
    axes.legend(frameon=False, loc="upper left", handlelength=1.2)


def make_mosaic(rows: list[np.ndarray], *, group: int = 1) -> tuple[np.ndarray, list[float]]:
    """One picture of all rows, NaN between the images, with the height of each row's centre.

    Rows stand close together within a ``group`` and further apart between groups.
    """
    _, height, width, *colour = rows[0].shape
    gap = max(1, round(0.07 * height))
    columns = len(rows[0])
    tops, top = [], 0
    for index in range(len(rows)):
        tops.append(top)
        top += height + (gap if group == 1 or index % group < group - 1 else 4 * gap)
    mosaic = np.full((tops[-1] + height, columns * (width + gap) - gap, *colour), np.nan)
    for top, row in zip(tops, rows, strict=True):
        for column, image in enumerate(row):
            left = column * (width + gap)
            mosaic[top : top + height, left : left + width] = image
    return mosaic, [top + (height - 1) / 2 for top in tops]


def mosaic_size(mosaic: np.ndarray, title: str | None, *, margin: float = 0.0) -> tuple[float, float]:
    height, width = mosaic.shape[:2]
    return WIDTH, (WIDTH - margin) * height / width + (0.4 if title else 0.1)


def show_mosaic(axes: Axes, mosaic: np.ndarray, cmap: str) -> None:
    # Grey pixels that are NaN stay unpainted; in colour, where that does not hold, the gaps are made white.
    colour = mosaic.ndim == 3
    axes.imshow(np.where(np.isnan(mosaic), 1, mosaic) if colour else mosaic, cmap=cmap, vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def least_alike(points: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Orthogonal directions as columns, that in which the second moments about the prior's mean differ most first."""
    shift = (points.mean(0) - draws.mean(0))[:, None]
    values, vectors = np.linalg.eigh(np.cov(points.T, ddof=0) - np.cov(draws.T, ddof=0) + shift @ shift.T)
    return vectors[:, np.argsort(-np.abs(values))]


def _plane(points: np.ndarray, draws: np.ndarray, plane: tuple[int, int] | None) -> tuple[np.ndarray, tuple[str, str]]:
    """The plane to show as the two columns of a (d, 2) matrix, with the names of its axes."""
    dim = points.shape[1]
    if plane is None and dim > 2:
        return least_alike(points, draws)[:, :2], ("worst direction", "second worst")
    first, second = (0, 1) if plane is None else plane
    if first == second or not all(0 <= index < dim for index in (first, second)):
        raise ValueError(f"plane must be two different coordinates from 0 to {dim - 1}, but is {plane}")
    return np.eye(dim)[:, [first, second]], (f"coordinate {first}", f"coordinate {second}")


def _scatter_classes(axes: Axes, points: np.ndarray, classes: np.ndarray, size: float) -> None:
    """Scatters points in their classes' colours, with a legend below the whole figure."""
    from matplotlib.lines import Line2D

    names, indices = np.unique(classes, return_inverse=True)
    colours = [PALETTE[index % len(PALETTE)] for index in range(len(names))]
    # All classes in one call and in the data's order, so that the last class does not cover the others.
    axes.scatter(points[:, 0], points[:, 1], s=size, c=np.array(colours)[indices], alpha=0.8, linewidths=0)
    dots = [Line2D([], [], color=colour, marker="o", markersize=8, linestyle="none") for colour in colours]
    axes.figure.legend(
        dots,
        [str(name) for name in names],
        loc="outside lower center",
        ncols=min(10, len(names)),
        frameon=False,
        handletextpad=-0.3,
        columnspacing=0.6,
    )
