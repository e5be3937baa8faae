"""The figure of a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyro_wae.diagnostics.comparison import Comparison, Yardstick
from pyro_wae.diagnostics.example_images import Pictures
from pyro_wae.plotting.codes import AXIS_NAMES, discrepant_directions, draw_clouds, draw_quantiles
from pyro_wae.plotting.images import as_images, mosaic_of_rows, mosaic_size, show_mosaic
from pyro_wae.plotting.style import WIDTH, styled_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLOUDS_HEIGHT, QUANTILES_HEIGHT = 4.2, 4.6
COLUMNS = 10


def draw_report(
    joint: Comparison,
    rows: tuple[Tensor, Tensor],
    in_hole: Tensor,
    pictures: Mapping[str, Pictures],
    *,
    cmap: str,
) -> Figure:
    """Draws the figure of :meth:`pyro_wae.diagnostics.Report.plot`, from codes and prior samples as rows."""
    shape = joint.moments
    yardstick = Yardstick(
        *(torch.tensor(x, dtype=torch.float64, device="cpu") for x in (shape.prior_mean, shape.prior_spread))
    )
    codes, prior = (yardstick.measure(part.double().cpu()).numpy() for part in rows)
    mosaics = []
    for name, own in pictures.items():
        for title, images, columns, group in (
            ("Samples", own.samples, COLUMNS, 1),
            ("Data and their reconstructions", torch.cat([own.inputs, own.outputs]), len(own.inputs), 2),
            ("Latent interpolations", own.paths, own.steps, 1),
        ):
            mosaic, _ = mosaic_of_rows(as_images(images, "images"), columns, group=group)
            mosaics.append((f"{name}: {title}" if len(pictures) > 1 else title, mosaic))
    has_plane = codes.shape[1] > 1
    heights = [CLOUDS_HEIGHT] * has_plane + [QUANTILES_HEIGHT]
    heights += [mosaic_size(mosaic, title)[1] + 0.1 for title, mosaic in mosaics]
    with styled_figure((WIDTH, sum(heights))) as figure:
        parts = iter(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
        if has_plane:
            part = next(parts)
            basis, names = _plane(joint, codes, prior)
            draw_clouds(part, codes @ basis, prior @ basis, names, marked=in_hole.cpu().numpy())
            part.suptitle("Plane of largest discrepancy")
            part.supxlabel("orange: prior samples with no code nearby", fontsize=13)
        part = next(parts)
        draw_quantiles(part, codes, prior, joint.coordinates)
        part.suptitle("Quantiles, in prior standard deviations")
        for part, (title, mosaic) in zip(parts, mosaics, strict=True):
            show_mosaic(part.subplots(), mosaic, cmap)
            part.suptitle(title)
    return figure


def _plane(joint: Comparison, codes: np.ndarray, prior: np.ndarray) -> tuple[np.ndarray, tuple[str, str]]:
    """The direction of largest discrepancy, and that of the largest at right angles to it."""
    first = np.asarray(joint.direction.weights, dtype=np.float64)
    first = first / np.linalg.norm(first) if first.any() else np.eye(len(first))[0]  # no difference in any direction
    across = np.eye(len(first)) - np.outer(first, first)
    second = discrepant_directions(codes @ across, prior @ across)[:, 0]
    # Where nothing is left across the first, any line at right angles to it will do.
    second = across @ second
    if np.linalg.norm(second) < 1e-6:
        second = across[:, np.diag(across).argmax()]
    return np.stack([first, second / np.linalg.norm(second)], 1), AXIS_NAMES
