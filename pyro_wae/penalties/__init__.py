"""Penalties: estimates of D(Q_Z, P_Z) from codes and prior samples, usable with plain PyTorch."""

from pyro_wae.penalties.adversarial import JensenShannon
from pyro_wae.penalties.base import FunctionPenalty, Penalty, ScaledPenalty, SumPenalty, as_penalty
from pyro_wae.penalties.chain import Chain
from pyro_wae.penalties.context import PenaltyContext
from pyro_wae.penalties.cramer_wold import CramerWold
from pyro_wae.penalties.energy import EnergyDistance
from pyro_wae.penalties.guards import LogVarianceL1, UnitVarianceKL
from pyro_wae.penalties.kernel_means import KernelMean, kernel_mean, register_kernel_mean
from pyro_wae.penalties.mmd import MMD
from pyro_wae.penalties.posterior_kl import PosteriorKL
from pyro_wae.penalties.prior_likelihood import PriorLikelihood
from pyro_wae.penalties.sinkhorn import Sinkhorn
from pyro_wae.penalties.sliced import MaxSlicedWasserstein, SlicedWasserstein
from pyro_wae.penalties.spherical import SphericalSlicedWasserstein
from pyro_wae.penalties.stein import KernelStein

__all__ = [
    "MMD",
    "Chain",
    "CramerWold",
    "EnergyDistance",
    "FunctionPenalty",
    "JensenShannon",
    "KernelMean",
    "KernelStein",
    "LogVarianceL1",
    "MaxSlicedWasserstein",
    "Penalty",
    "PenaltyContext",
    "PosteriorKL",
    "PriorLikelihood",
    "ScaledPenalty",
    "Sinkhorn",
    "SlicedWasserstein",
    "SphericalSlicedWasserstein",
    "SumPenalty",
    "UnitVarianceKL",
    "as_penalty",
    "kernel_mean",
    "register_kernel_mean",
]
