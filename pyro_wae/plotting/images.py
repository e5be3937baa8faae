"""Images side by side: samples and reconstructions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from pyro_wae._core.checks import accepted, whole
from pyro_wae.plotting.style import WIDTH, Rows, as_array, styled_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABEL_WIDTH = 1.4


def image_grid(images: Rows, *, columns: int | None = None, title: str | None = None, cmap: str = "gray") -> Figure:
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
        TypeError: If an argument is of another kind.
        ImportError: If matplotlib is not installed.

    Example:
        >>> import torch
        >>> figure = image_grid(torch.rand(12, 1, 28, 28), columns=4)
    """
    pictures = as_images(images, "images")
    mosaic, _ = mosaic_of_rows(pictures, _as_columns(columns, math.ceil(math.sqrt(len(pictures)))))
    with styled_figure(mosaic_size(mosaic, title), title) as figure:
        show_mosaic(figure.add_subplot(), mosaic, cmap)
    return figure


def reconstructions(
    inputs: Rows, outputs: Rows, *, columns: int | None = None, title: str | None = None, cmap: str = "gray"
) -> Figure:
    """Draws data and their reconstructions, each datum above its own.

    Args:
        inputs: Images in any form that :func:`image_grid` takes.
        outputs: Their reconstructions, of the same shape.
        columns: Pairs in a row; by default ten, or all where there are fewer.
        title: A line above the grid.
        cmap: Matplotlib's colour map for images of one channel.

    Returns:
        A figure with one axes, whose rows are labelled "data" and "reconstruction" in turn.

    Raises:
        ValueError: If the two differ in shape, do not have the shape of images or are empty, or ``columns`` is not
            positive.
        TypeError: If an argument is of another kind.
        ImportError: If matplotlib is not installed.

    Example:
        >>> import torch
        >>> figure = reconstructions(torch.rand(20, 1, 28, 28), torch.rand(20, 1, 28, 28))
    """
    above, below = as_images(inputs, "inputs"), as_images(outputs, "outputs")
    if above.shape != below.shape:
        raise ValueError(
            f"outputs must have the shape of inputs, {tuple(np.shape(inputs))}, found {tuple(np.shape(outputs))}. "
            f"Write torch.as_tensor(outputs).reshape({tuple(np.shape(inputs))})."
        )
    columns = _as_columns(columns, min(10, len(above)))
    rows = []
    for start in range(0, len(above), columns):
        rows += [above[start : start + columns], below[start : start + columns]]
    mosaic, centres = make_mosaic(rows, group=2)
    with styled_figure(mosaic_size(mosaic, title, margin=LABEL_WIDTH), title) as figure:
        # The usual layout leaves no room for labels at the first drawing of an image of fixed proportions.
        figure.set_layout_engine("compressed")
        axes = figure.add_subplot()
        show_mosaic(axes, mosaic, cmap)
        axes.set_yticks(centres, ["data", "reconstruction"] * (len(rows) // 2))
        axes.tick_params(left=False, pad=2)
    return figure


def as_images(images: Rows, name: str) -> np.ndarray:
    """Images of shape (n, h, w) or (n, h, w, 3), floats in [0, 1]."""
    array = as_array(images, name)
    channels = {3: 1, 4: array.shape[1] if array.ndim == 4 else 0}.get(array.ndim)
    if channels not in (1, 3) or array.size == 0:
        raise ValueError(
            f"{name} must have shape (n, h, w), (n, 1, h, w) or (n, 3, h, w) and not be empty, found shape "
            f"{array.shape}. Write {name}.reshape(-1, 1, height, width)."
        )
    if array.ndim == 4:
        array = array[:, 0] if channels == 1 else np.moveaxis(array, 1, -1)
    scaled = array / 255 if array.dtype == np.uint8 else array.astype(np.float64)
    return np.clip(scaled, 0, 1)


def make_mosaic(rows: list[np.ndarray], *, group: int = 1) -> tuple[np.ndarray, list[float]]:
    """One picture of all rows, NaN between the images, with the height of each row's centre.

    Rows stand close together within a ``group`` and further apart between groups.
    """
    _, height, width, *colour = rows[0].shape
    gap, columns = max(1, round(0.07 * height)), len(rows[0])
    between = 0 if group == 1 else 3 * gap
    tops = [index * (height + gap) + index // group * between for index in range(len(rows))]
    mosaic = np.full((tops[-1] + height, columns * (width + gap) - gap, *colour), np.nan)
    for top, row in zip(tops, rows, strict=True):
        for column, image in enumerate(row):
            left = column * (width + gap)
            mosaic[top : top + height, left : left + width] = image
    return mosaic, [top + (height - 1) / 2 for top in tops]


def mosaic_of_rows(images: np.ndarray, columns: int, *, group: int = 1) -> tuple[np.ndarray, list[float]]:
    """The mosaic of images in rows of so many columns; see :func:`make_mosaic`."""
    return make_mosaic([images[start : start + columns] for start in range(0, len(images), columns)], group=group)


def mosaic_size(mosaic: np.ndarray, title: str | None, *, margin: float = 0.0) -> tuple[float, float]:
    """Width and height in inches of a figure that shows a mosaic, with a margin at its left."""
    height, width = mosaic.shape[:2]
    return WIDTH, (WIDTH - margin) * height / width + (0.4 if title is not None else 0.1)


def show_mosaic(axes: Axes, mosaic: np.ndarray, cmap: str) -> None:
    """Shows a mosaic without a frame."""
    from matplotlib import colormaps
    from matplotlib.colors import Colormap

    is_map = isinstance(cmap, Colormap) or (isinstance(cmap, str) and cmap in colormaps)
    accepted("cmap", cmap, is_map, "the name of one of matplotlib's colour maps", write='cmap="gray"')
    # Grey pixels that are NaN stay unpainted; in colour, where that does not hold, the gaps are made white.
    colour = mosaic.ndim == 3
    axes.imshow(np.where(np.isnan(mosaic), 1, mosaic) if colour else mosaic, cmap=cmap, vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _as_columns(columns: int | None, default: int) -> int:
    return default if columns is None else whole("columns", columns, write=f"columns={default}")
