"""What the notebooks share: a quick run, one look of pictures, and the loop that trains.

Model, guide and loss stand in each notebook itself.
"""

import io
import math
import os
from typing import Any, TypeVar

import matplotlib
import torch
from cycler import cycler
from IPython.display import Image, display
from matplotlib.figure import Figure
from pyro.infer import SVI
from torch import Tensor

from pyro_wae.plotting import PALETTE, STYLE, WIDTH

__all__ = ["PALETTE", "SMOKE", "WIDTH", "panels", "pick", "show", "train"]

T = TypeVar("T")

SMOKE = os.environ.get("PYRO_WAE_SMOKE", "0") not in ("", "0")
"""Whether the notebook only shows that it runs: ``PYRO_WAE_SMOKE=1``."""

DPI = 120
COLOURS, GREYS = 96, 16

matplotlib.rcParams.update(STYLE)
matplotlib.rcParams.update({"axes.prop_cycle": cycler(color=PALETTE), "legend.frameon": False})


def pick(full: T, smoke: T) -> T:
    """Gives the first value in a full run, and the second in a quick one: ``steps = pick(2000, 3)``."""
    return smoke if SMOKE else full


def panels(
    rows: int = 1, columns: int = 1, *, height: float, width: float = WIDTH, **kwargs: Any
) -> tuple[Figure, Any]:
    """Makes an empty figure and its axes, as ``matplotlib.pyplot.subplots`` does; ``show`` puts it on the page.

    Six inches, the width by default, are what the letters are sized for.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **kwargs)


def show(figure: Figure, alt: str) -> None:
    """Shows a figure in the notebook, as a small PNG with a text for those who cannot see it."""
    from PIL import Image as Pixels

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    pixels = Pixels.open(buffer).convert("RGB")
    red, green, blue = pixels.split()
    # A palette makes the file a third as large, and the eye sees no difference in plots and digits.
    colours = GREYS if red == green == blue else COLOURS
    pixels = pixels.quantize(colours, dither=Pixels.Dither.NONE)
    small = io.BytesIO()
    pixels.save(small, format="png", optimize=True)
    display(Image(small.getvalue(), alt=alt))


def train(
    svi: SVI, loss: Any, *data: Tensor, steps: int, batch_size: int = 128, lines: int = 5
) -> dict[str, list[float]]:
    """Trains on random batches of data, and prints how it goes.

    Args:
        svi: What takes the steps. A learning rate is lowered by the optimiser itself, as by ``ClippedAdam``.
        loss: The loss that ``svi`` has; of a ``WAELoss`` the terms are kept.
        data: What model and guide are called with, tensors of one length.
        steps: Number of steps.
        batch_size: Number of data in each.
        lines: Number of lines that are printed.

    Returns:
        A number for each step of ``"loss"``, per datum, and of ``"cost"``, ``"penalty"`` and ``"weight"`` where the
        loss has terms.
    """
    history: dict[str, list[float]] = {"loss": []}
    size = len(data[0])
    order = torch.randperm(size)
    printed = {math.ceil(steps * line / lines) for line in range(1, lines + 1)}
    for step in range(1, steps + 1):
        if len(order) < batch_size:
            order = torch.randperm(size)
        batch, order = order[:batch_size], order[batch_size:]
        value = svi.step(*(part[batch] for part in data))
        terms = getattr(loss, "terms", None)
        # Pyro's own losses are sums over a batch.
        found = {"loss": value / len(batch)} if terms is None else {"loss": value, **terms.as_dict()}
        for name, number in found.items():
            history.setdefault(name, []).append(number)
        if step in printed:
            # A mean over the last steps, for a single batch tells little.
            recent = {name: sum(numbers[-50:]) / len(numbers[-50:]) for name, numbers in history.items()}
            shown = ["loss"] if terms is None else ["cost", "penalty", "weight"]
            print(f"step {step:>5}: " + ", ".join(f"{name} {recent[name]:.4g}" for name in shown))
    return history
