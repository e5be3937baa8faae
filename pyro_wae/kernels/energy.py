"""The kernel of the energy distance."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_wae._core import checks
from pyro_wae.kernels.base import Kernel, Scratch
from pyro_wae.kernels.radial import inverse_root_into, root, scratch_like


class Energy(Kernel):
    r"""The negative distance, :math:`k(x, y) = -\lVert x - y \rVert^a`.

    It is positive definite only on differences of distributions, which is what a maximum mean
    discrepancy needs; the discrepancy is then the energy distance. It has no length to choose.

    Args:
        exponent: a, in (0, 2).

    Raises:
        ValueError: For an exponent outside (0, 2).

    Source: Szekely, Rizzo, "Energy statistics", 2013, doi:10.1016/j.jspi.2013.03.018.

    Example:
        >>> Energy()(torch.zeros(1, 2), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
        tensor([[-0.0000, -1.4142]])
    """

    is_definite = False

    def __init__(self, exponent: float = 1.0) -> None:
        super().__init__()
        self.exponent = checks.number("Energy's exponent", exponent, above=0, below=2, write="Energy(1.0)")

    @property
    def is_radial(self) -> bool:
        return True

    def profile(self, u: Tensor) -> Tensor:
        return -(root(u) ** self.exponent)

    def profile_and_slope(self, u: Tensor, scratch: Scratch | None = None) -> tuple[Tensor, Tensor]:
        values, slopes, roots, *_ = scratch or scratch_like(u)
        inverse_root_into(u, slopes)
        if self.exponent == 1:
            torch.mul(u, slopes.neg_(), out=values)
            return values, slopes.mul_(0.5)
        torch.pow(torch.mul(u, slopes, out=roots), self.exponent, out=values).neg_()
        return values, slopes.square_().mul_(values).mul_(self.exponent / 2)
