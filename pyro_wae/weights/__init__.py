"""Penalty weights: the lambda of a Wasserstein auto-encoder as a number, as a plan, or as the answer to a question."""

from pyro_wae.weights.base import Constant, Linear, Schedule, Weight, as_weight
from pyro_wae.weights.constraint import Constraint

__all__ = ["Constant", "Constraint", "Linear", "Schedule", "Weight", "as_weight"]
