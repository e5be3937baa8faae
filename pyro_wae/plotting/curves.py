"""Cost and penalty during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pyro_wae._core.checks import text
from pyro_wae.plotting.style import BLUE, GREY, ORANGE, WIDTH, styled_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def loss_curves(history: Mapping[str, Sequence[float]], *, unit: str = "epoch", title: str | None = None) -> Figure:
    """Draws cost and penalty during training, a panel each.

    The penalty's panel has a line at zero: an unbiased penalty ends scattered around it, on both sides.

    Args:
        history: ``"cost"`` and ``"penalty"``, equally long sequences of numbers, one for every ``unit``.
        unit: What the horizontal axis counts, from 1: ``"epoch"`` or ``"step"``.
        title: A line above both panels.

    Returns:
        A figure with two axes: cost, then penalty.

    Raises:
        ValueError: If one of the two is missing or empty, or their lengths differ.
        TypeError: If ``history`` is not a dict of sequences of numbers.
        ImportError: If matplotlib is not installed.

    Example:
        >>> figure = loss_curves({"cost": [60.0, 30.0, 25.0], "penalty": [0.5, 0.1, 0.02]})
    """
    write = 'Write history={"cost": [60.0, 25.0], "penalty": [0.5, 0.02]}.'
    if not isinstance(history, Mapping):
        raise TypeError(f"history must be a dict of sequences of numbers, found {type(history).__name__}. {write}")
    if not {"cost", "penalty"} <= history.keys():
        raise ValueError(f'history must hold "cost" and "penalty", found {list(history)}. {write}')
    try:
        curves = {key: np.asarray([float(value) for value in history[key]]) for key in ("cost", "penalty")}
    except (TypeError, ValueError) as error:
        raise TypeError(f"history must hold sequences of numbers ({error}). {write}") from error
    lengths = {key: len(curve) for key, curve in curves.items()}
    if lengths["cost"] != lengths["penalty"] or lengths["cost"] == 0:
        raise ValueError(
            f"history's cost and penalty must be equally long and not empty, found lengths {lengths['cost']} and "
            f"{lengths['penalty']}. {write}"
        )
    unit = text("unit", unit, "what the horizontal axis counts", write='unit="step"')
    counts = np.arange(1, lengths["cost"] + 1)
    with styled_figure((WIDTH, 3.6 if title is not None else 3.2), title) as figure:
        from matplotlib.ticker import MaxNLocator

        for axes, (key, curve), colour in zip(figure.subplots(1, 2), curves.items(), (BLUE, ORANGE), strict=True):
            axes.plot(counts, curve, color=colour, marker="o" if len(curve) == 1 else None)
            axes.set(title=key, xlabel=unit)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, steps=[1, 2, 5, 10]))
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.axhline(0, color=GREY, linewidth=1.5, linestyle=(0, (4, 3)), zorder=0)
    return figure
