"""The one style of all figures, and what they take as numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pyro_wae._core.checks import text
from pyro_wae._core.rows import at_least_float32

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Tensor | np.ndarray

# Okabe & Ito's palette, in which no two colours look alike to the colour-blind, with a wine red and a violet more, for
# ten colours of ten classes. Grey is left for prior samples.
OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442")
PALETTE = (*OKABE_ITO, "#882255", "#5511BB", "#000000")
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


@contextmanager
def styled_figure(size: tuple[float, float], title: str | None = None) -> Iterator[Figure]:
    """A figure of a size in inches, with a line above it; inside, matplotlib draws in the style of all figures."""
    if title is not None:
        title = text("title", title, "a line of text, or None", write='title="Samples"')
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Figures need matplotlib: pip install "pyro-wae[tutorials]"') from error
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        if title is not None:
            figure.suptitle(title)


def as_array(
    values: Any, name: str, *, kinds: str = "biuf", what: str = "numbers", write: str = "torch.as_tensor(...)"
) -> np.ndarray:
    """Numbers as an array of numpy; ``kinds`` are numpy's letters for what is accepted."""
    try:
        if isinstance(values, Tensor):
            values = at_least_float32(values.detach().cpu()).numpy()
        array = np.asarray(values)
        if array.dtype.kind in "OT":  # as a table's column holds strings
            array = np.asarray(array.tolist())
    except (RuntimeError, TypeError, ValueError):  # a sparse or a meta tensor, lists of different lengths
        array = np.asarray(None)
    if array.dtype.kind not in kinds:
        raise TypeError(
            f"{name} must be a tensor or an array of {what}, found {type(values).__name__}. Write {name}={write}."
        )
    return array
