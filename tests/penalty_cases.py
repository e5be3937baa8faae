"""Every penalty, with what is known of it."""

from __future__ import annotations

import copy

import pyro
import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from pyro_wae.kernels import Gaussian, RationalQuadratic
from pyro_wae.penalties import (
    MMD,
    CramerWold,
    EnergyDistance,
    JensenShannon,
    KernelStein,
    MaxSlicedWasserstein,
    Sinkhorn,
    SlicedWasserstein,
    SphericalSlicedWasserstein,
    as_penalty,
)

D = 8


def mean_gap(codes, prior):
    return (codes.mean(0) - prior.mean(0)).square().sum()


def standard_normal(z):
    return -z.square().sum(1) / 2


def zeroed():
    """A discriminator that starts by knowing nothing, and takes any precision."""
    discriminator = nn.Sequential(nn.Linear(D, 32), nn.Tanh(), nn.Linear(32, 1))
    nn.init.zeros_(discriminator[2].weight)
    nn.init.zeros_(discriminator[2].bias)
    return discriminator


class Case:
    """A penalty with what is known of it at Q_Z = P_Z, for n = m = 100 and d = 8.

    Args:
        make: Makes the penalty.
        bias: Its mean there, as documented; 0 where the estimate is unbiased.
        sphere: Whether codes lie on the unit sphere.
        reads_prior: Whether it reads prior draws.
        written: Whether its repr is Python.
        exact: Whether its gradient by the codes is the derivative of its value.
    """

    def __init__(self, make, bias=0.0, *, sphere=False, reads_prior=True, written=True, exact=True):
        self.make = make
        self.bias = bias
        self.sphere = sphere
        self.reads_prior = reads_prior
        self.written = written
        self.exact = exact
        self._fitted = None

    def rows(self, n, dtype=torch.float64, d=D):
        z = torch.randn(n, d, dtype=dtype)
        return normalize(z, dim=-1) if self.sphere else z

    def elsewhere(self, n, dtype=torch.float64, d=D):
        """Codes around a point off the prior's centre."""
        z = 0.5 * torch.randn(n, d, dtype=dtype) + 1
        return normalize(z, dim=-1) if self.sphere else z

    def fitted(self):
        """The penalty, its lengths and units taken from prior draws that no test looks at."""
        if self._fitted is None:
            pyro.set_rng_seed(123)
            self._fitted = self.make().double()
            # A standardised MMD keeps its unit after 8192 prior draws.
            for _ in range(9 if isinstance(self._fitted, MMD) and self._fitted.standardize else 1):
                if not list(self._fitted.parameters()):
                    self._fitted(self.rows(4), self.rows(1000))
            pyro.set_rng_seed(0)
        return copy.deepcopy(self._fitted)


CASES = {
    "MMD": Case(MMD),
    "MMD standardised": Case(lambda: MMD(Gaussian(), standardize=True)),
    "EnergyDistance": Case(EnergyDistance),
    "SlicedWasserstein": Case(lambda: SlicedWasserstein(100), 0.055),
    "MaxSlicedWasserstein": Case(MaxSlicedWasserstein, 0.25, exact=False),
    "SphericalSlicedWasserstein": Case(SphericalSlicedWasserstein, 1 / 600, sphere=True),
    "Sinkhorn": Case(Sinkhorn, 0.53, exact=False),
    "CramerWold": Case(CramerWold),
    "JensenShannon": Case(
        lambda: JensenShannon(zeroed(), optimizer=None, gradient_penalty=0.0), 0.0, written=False, exact=False
    ),
    "KernelStein": Case(
        lambda: KernelStein(RationalQuadratic(0.5, bandwidth=2.0), log_prob=standard_normal),
        reads_prior=False,
        written=False,
    ),
    "sum": Case(lambda: MMD() + 0.1 * SlicedWasserstein(100), 0.0055),
    "scaled": Case(lambda: 0.5 * CramerWold()),
    "function": Case(lambda: as_penalty(mean_gap), D * (1 / 100 + 1 / 100), written=False),
}
VARIANTS = {
    **{f"sliced, p = {p}": Case(lambda p=p: SlicedWasserstein(3, p=p)) for p in (1, 1.5, 2)},
    **{
        f"on the sphere, p = {p}": Case(lambda p=p: SphericalSlicedWasserstein(3, p=p), sphere=True)
        for p in (1, 1.5, 2)
    },
    "Cramer-Wold, all pairs": Case(lambda: CramerWold(0.3, unbiased=False)),
}
"""Options that have a derivative of their own."""

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
