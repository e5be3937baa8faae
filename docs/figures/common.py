"""The style of the figures of these pages: their colours, their size, and how they are saved."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from pyro_wae.plotting import GREY, PALETTE, STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BLUE", "GREEN", "GREY", "INK", "ORANGE", "RED", "new_figure", "save"]

IMAGES = Path(__file__).parents[1] / "images"
LARGEST = 60_000  # bytes

# Data and P_X are blue, the prior and P_G orange, the mixture of all posteriors green, single posteriors red.
BLUE, ORANGE, GREEN = PALETTE[:3]
RED, INK = "#CC3311", "#222222"

# Beside text, somewhat smaller than the package's own figures.
SMALLER: dict[str, Any] = {
    "axes.titlepad": 6,
    "axes.titlesize": 15,
    "legend.fontsize": 13,
    "legend.frameon": False,
    "mathtext.fontset": "cm",
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
}


def new_figure(height: float, **options: Any) -> tuple[Figure, Any]:
    """Makes a figure of a page's width with its axes, as ``plt.subplots`` does."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({**STYLE, **SMALLER})
    return plt.subplots(figsize=(6.4, height), layout="constrained", **options)


def save(figure: Figure, name: str, *, colours: int = 64, dpi: int = 150) -> None:
    """Writes a figure to docs/images as a PNG with a palette, of at most 60 kB.

    Args:
        figure: The figure.
        name: Its name, without ending.
        colours: Colours of the palette; 0 keeps 256 greys.
        dpi: Pixels per inch.

    Raises:
        ValueError: If the file is larger.
    """
    memory = io.BytesIO()
    figure.savefig(memory, dpi=dpi, format="png")
    picture = Image.open(memory)
    picture = picture.convert("L") if colours == 0 else picture.convert("RGB").quantize(colours)
    path = IMAGES / f"{name}.png"
    picture.save(path, optimize=True)
    size = path.stat().st_size
    print(f"{path.name}: {size / 1000:.0f} kB, {picture.size[0]} x {picture.size[1]}")
    if size > LARGEST:
        raise ValueError(f"{path.name} has {size} bytes, more than {LARGEST}. Draw fewer points or colours.")
