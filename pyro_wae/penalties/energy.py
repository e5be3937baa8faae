"""The energy distance."""

from __future__ import annotations

from torch import Tensor

from pyro_wae._core import checks
from pyro_wae.kernels import Energy
from pyro_wae.penalties.base import Penalty
from pyro_wae.penalties.context import PenaltyContext
from pyro_wae.penalties.mmd import known_mean, squared_discrepancy


class EnergyDistance(Penalty):
    r"""The energy distance, :math:`2 E|q - p|^a - E|q - q'|^a - E|p - p'|^a`, which has no length to choose.

    It is the squared maximum mean discrepancy of the kernel :math:`-|x - y|^a`, and is 0 only if Q_Z = P_Z. Its unit is
    that of a code to the power a. The estimate is unbiased, and therefore sometimes negative; particles of one datum
    are treated as by :class:`~pyro_wae.penalties.MMD`. (``scipy.stats.energy_distance`` gives the square root of the
    biased one.)

    Args:
        exponent: a, in (0, 2). The nearer to 2, the more the distance depends on the means alone.
        unbiased: The U-statistic if True, the V-statistic (all pairs, never negative, biased up) if False.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: For an exponent outside (0, 2).

    Source: Szekely, Rizzo, "Energy statistics: A class of statistics based on distances", 2013,
    doi:10.1016/j.jspi.2013.03.018; Sejdinovic, Sriperumbudur, Gretton, Fukumizu, "Equivalence of distance-based and
    RKHS-based statistics in hypothesis testing", 2013, arXiv:1207.6076.

    Example:
        >>> import torch
        >>> EnergyDistance()(torch.zeros(2, 1), torch.tensor([[1.0], [3.0]]))
        tensor(2.)
    """

    def __init__(self, exponent: float = 1.0, *, unbiased: bool = True) -> None:
        super().__init__()
        self.kernel = Energy(exponent)
        self.exponent = self.kernel.exponent
        self.unbiased = checks.flag("EnergyDistance's unbiased", unbiased, write="EnergyDistance(unbiased=True)")

    def estimate(self, codes: Tensor, prior: Tensor, context: PenaltyContext) -> Tensor:
        known = known_mean(self.kernel, context, codes.shape[2])
        return squared_discrepancy(self.kernel, codes, prior, context, known, unbiased=self.unbiased)
