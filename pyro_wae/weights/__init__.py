"""Penalty weights: the lambda of a Wasserstein auto-encoder as a number, a schedule, or a Lagrange multiplier."""

import warnings
from typing import Any

from pyro_wae.weights.base import Constant, LinearSchedule, Schedule, Weight, as_weight
from pyro_wae.weights.constraint import Constraint

__all__ = ["Constant", "Constraint", "Linear", "LinearSchedule", "Schedule", "Weight", "as_weight"]


def Linear(*args: Any, **kwargs: Any) -> LinearSchedule:
    """The former name of :class:`LinearSchedule`."""
    warnings.warn(
        "weights.Linear is now weights.LinearSchedule. Write LinearSchedule.", DeprecationWarning, stacklevel=2
    )
    return LinearSchedule(*args, **kwargs)
