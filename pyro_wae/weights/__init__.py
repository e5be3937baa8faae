"""Penalty weights: the lambda of a Wasserstein auto-encoder as a number, a schedule, or a Lagrange multiplier."""

from pyro_wae.weights.base import Constant, LinearSchedule, Schedule, Weight, as_weight
from pyro_wae.weights.constraint import Constraint

__all__ = ["Constant", "Constraint", "LinearSchedule", "Schedule", "Weight", "as_weight"]
