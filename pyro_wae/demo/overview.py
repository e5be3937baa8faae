"""The picture of how a Wasserstein auto-encoder works, drawn of a trained one; ``python -m pyro_wae.demo`` makes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pyro_wae.plotting import BLUE, GREY, ORANGE, PALETTE, WIDTH, as_images, make_mosaic, show_mosaic, styled_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float]

SIDE = 4  # digits in a row
HEIGHT, PANEL, GAP = 5.0, 1.45, 0.82  # inches
INK = "#333333"


def overview(inputs: Tensor, outputs: Tensor, samples: Tensor, codes: Tensor, prior: Tensor, labels: Tensor) -> Figure:
    """Draws the parts of a Wasserstein auto-encoder, and what its loss compares.

    Codes and prior samples are shown in the plane that separates the classes best.

    Args:
        inputs: Digits, at least 16, of shape (n, 1, 28, 28).
        outputs: Their reconstructions, of the same shape.
        samples: Samples of the model, of the same shape.
        codes: Shape (m, d) with d >= 2.
        prior: Prior samples, of the same shape.
        labels: The class of each code, from 0 to 9, shape (m,).
    """
    points, draws, classes = (rows.cpu().numpy() for rows in (codes, prior, labels))
    plane = _plane(points, classes)
    points, draws = points @ plane, draws @ plane
    limit = 1.05 * float(np.quantile(np.abs(np.concatenate([points, draws])), 0.999))
    with styled_figure((WIDTH, HEIGHT)) as figure:
        figure.set_layout_engine("none")
        digits, middle, back = (_panel(figure, column, 0) for column in range(3))
        below, new = (_panel(figure, column, 1) for column in (1, 2))
        for axes, images in ((digits, inputs), (back, outputs), (new, samples)):
            rows = as_images(images[: SIDE * SIDE], "images")
            show_mosaic(axes, make_mosaic([rows[i : i + SIDE] for i in range(0, SIDE * SIDE, SIDE)])[0], "gray_r")
        _cloud(middle, points, np.array(PALETTE)[classes], limit)
        _cloud(below, draws, GREY, limit)

        for axes, title in ((digits, "data"), (middle, "latent codes"), (back, "reconstructions")):
            axes.set_title(title, fontsize=13, pad=6)
        for axes, title in ((below, "prior samples"), (new, "samples")):
            axes.set_title(title, fontsize=13, y=-0.22)
        for start, end, name in ((digits, middle, "encoder"), (middle, back, "decoder"), (below, new, "decoder")):
            _arrow(figure, start, (1, 0.5), end, (0, 0.5), INK, "-|>")
            _label(start, (1 + GAP / PANEL / 2, 0.58), name, INK)
        _arrow(figure, middle, (0.5, 0), below, (0.5, 1), ORANGE, "<|-|>")
        _label(middle, (0.58, -0.19), "penalty", ORANGE, ha="left", va="center", weight="bold")
        _arrow(figure, digits, (0.5, 1.19), back, (0.5, 1.19), BLUE, "<|-|>", bend="bar,fraction=-0.06")
        _label(middle, (0.5, 1.38), "cost", BLUE, weight="bold")
        cost, penalty = (
            "cost: reconstructions\nare close to the data",
            "penalty: the\naggregated posterior\nmatches the prior",
        )
        for height, text, colour in ((0.33, cost, BLUE), (0.15, penalty, ORANGE)):
            figure.text(0.015, height, text, color=colour, fontsize=13, va="center")
    return figure


def _plane(points: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The two orthogonal directions, as columns, along which the means of the classes scatter most."""
    means = np.stack([points[classes == label].mean(0) for label in np.unique(classes)])
    return np.linalg.svd(means - means.mean(0))[2][:2].T


def _panel(figure: Figure, column: int, row: int) -> Axes:
    bottom = (2.75, 0.42)[row]
    return figure.add_axes((column * (PANEL + GAP) / WIDTH, bottom / HEIGHT, PANEL / WIDTH, PANEL / HEIGHT))


def _cloud(axes: Axes, points: np.ndarray, colour: np.ndarray | str, limit: float) -> None:
    axes.scatter(points[:, 0], points[:, 1], s=4, c=colour, alpha=0.8, linewidths=0)
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[])
    axes.set_box_aspect(1)
    axes.spines[:].set_visible(False)


def _arrow(
    figure: Figure, start: Axes, at: Point, end: Axes, to: Point, colour: str, style: str, bend: str = "arc3"
) -> None:
    # Imported here, because the benchmarks take the quickstart's nets and no matplotlib.
    from matplotlib.patches import ConnectionPatch

    patch = ConnectionPatch(
        at, to, start.transAxes, end.transAxes, arrowstyle=style, color=colour, linewidth=2, mutation_scale=16,
        shrinkA=4, shrinkB=4, connectionstyle=bend,
    )  # fmt: skip
    figure.add_artist(patch)


def _label(axes: Axes, at: Point, text: str, colour: str, **options: Any) -> None:
    options = {"ha": "center", "va": "bottom", "fontsize": 13, **options}
    axes.text(*at, text, transform=axes.transAxes, color=colour, clip_on=False, **options)
