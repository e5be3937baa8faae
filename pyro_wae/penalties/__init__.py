"""Penalties: estimates of D(Q_Z, P_Z) from codes and prior draws, usable with plain PyTorch."""

from pyro_wae.penalties.base import FunctionPenalty, Penalty, PenaltyContext, as_penalty
from pyro_wae.penalties.mmd import MMD

__all__ = ["MMD", "FunctionPenalty", "Penalty", "PenaltyContext", "as_penalty"]
