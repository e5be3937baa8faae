"""The picture of a report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from pyro_wae.diagnostics.comparison import Yardstick
from pyro_wae.diagnostics.pictures import Pictures
from pyro_wae.plotting import (
    WIDTH,
    as_images,
    draw_clouds,
    draw_quantiles,
    least_alike,
    make_mosaic,
    mosaic_size,
    show_mosaic,
    styled_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pyro_wae.diagnostics.report import Report

__all__ = ["draw_report"]

CLOUDS_HEIGHT, QUANTILES_HEIGHT = 4.2, 4.6
COLUMNS = 10


def draw_report(report: Report, *, cmap: str = "gray") -> Figure:
    """Draws the picture that :meth:`pyro_wae.diagnostics.Report.plot` describes."""
    shape = report.joint.moments
    yardstick = Yardstick(torch.tensor(shape.prior_mean).double(), torch.tensor(shape.prior_spread).double())
    codes, prior = (yardstick.measure(rows.double().cpu()).numpy() for rows in (report.codes, report.prior))
    mosaics = [
        (f"{name}: {title}" if len(report.pictures) > 1 else title, mosaic)
        for name, pictures in report.pictures.items()
        for title, mosaic in _mosaics(pictures)
    ]
    has_plane = codes.shape[1] > 1
    heights = [CLOUDS_HEIGHT] * has_plane + [QUANTILES_HEIGHT]
    heights += [mosaic_size(mosaic, title)[1] + 0.1 for title, mosaic in mosaics]
    with styled_figure((WIDTH, sum(heights))) as figure:
        parts = iter(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
        if has_plane:
            part = next(parts)
            basis, names = _plane(report, codes, prior)
            draw_clouds(part, codes @ basis, prior @ basis, names, marked=report.in_hole.cpu().numpy())
            part.suptitle("Where codes and prior differ most")
            part.supxlabel("orange: prior draws with no code nearby", fontsize=13)
        part = next(parts)
        draw_quantiles(part, codes, prior, report.joint.coordinates)
        part.suptitle("Quantiles, in prior standard deviations")
        for part, (title, mosaic) in zip(parts, mosaics, strict=True):
            show_mosaic(part.subplots(), mosaic, cmap)
            part.suptitle(title)
    return figure


def _plane(report: Report, codes: np.ndarray, prior: np.ndarray) -> tuple[np.ndarray, tuple[str, str]]:
    """The line on which codes and prior lie farthest apart, and the worst one at right angles to it."""
    first = np.asarray(report.joint.direction.weights, dtype=np.float64)
    first /= np.linalg.norm(first)
    across = np.eye(len(first)) - np.outer(first, first)
    second = least_alike(codes @ across, prior @ across)[:, 0]
    # Where nothing is left across the first, any line at right angles to it will do.
    second = across @ second
    if np.linalg.norm(second) < 1e-6:
        second = across[:, np.diag(across).argmax()]
    return np.stack([first, second / np.linalg.norm(second)], 1), ("worst direction", "second worst")


def _mosaics(pictures: Pictures) -> list[tuple[str, np.ndarray]]:
    pairs = torch.cat([pictures.inputs, pictures.outputs])
    return [
        ("New data, from prior draws", _rows(pictures.samples, COLUMNS)),
        ("Data, above what their codes give", _rows(pairs, len(pictures.inputs), group=2)),
        ("From one datum to another", _rows(pictures.paths, pictures.steps)),
    ]


def _rows(images: torch.Tensor, columns: int, *, group: int = 1) -> np.ndarray:
    array = as_images(images, "images")
    return make_mosaic([array[i : i + columns] for i in range(0, len(array), columns)], group=group)[0]
