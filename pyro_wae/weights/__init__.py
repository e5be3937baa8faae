"""Penalty weights: the lambda of a Wasserstein auto-encoder as a number, a schedule, or a Lagrange multiplier."""

import warnings
from typing import Any

from pyro_wae.weights.base import Constant, LinearSchedule, Schedule, Weight, as_weight
from pyro_wae.weights.constraint import Constraint

__all__ = ["Constant", "Constraint", "LinearSchedule", "Schedule", "Weight", "as_weight"]


def __getattr__(name: str) -> Any:
    if name == "Linear":
        warnings.warn(
            "weights.Linear is now weights.LinearSchedule. Write LinearSchedule.", DeprecationWarning, stacklevel=2
        )
        return LinearSchedule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
