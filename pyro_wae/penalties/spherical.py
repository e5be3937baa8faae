"""Sliced Wasserstein distance on the sphere: transport on great circles."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_wae._core import checks
from pyro_wae._core.rows import working_precision
from pyro_wae.penalties.base import Penalty
from pyro_wae.penalties.context import PenaltyContext
from pyro_wae.penalties.sliced import match_quantiles, power

NORM_TOLERANCE, COARSE_TOLERANCE = 1e-3, 2.0**-7
"""What a code may be off the sphere, and the same of one in bfloat16, which is brought there to half of it at best."""


class SphericalSlicedWasserstein(Penalty):
    r"""The sliced Wasserstein distance on the unit sphere to the power p: the mean over great circles of W_p^p.

    For a random plane with orthonormal basis U, of shape (d, 2), drawn afresh at every step, codes z on the sphere
    go to the angle of U^T z. The value is

    .. math:: E_U W_p^p(\angle U^\top q, \angle U^\top p), \qquad
        W_p^p = \min_a \int_0^1 \lvert F^{-1}(s) - G^{-1}(s - a) \rvert^p\, ds

    with the length of an arc in **turns**, the convention of the source and of POT: the whole circle has
    length 1, two points are never farther apart than 1/2, and the value is (2 pi)^p times less than in radians.
    It is the power and not the root. The inner function is convex and piecewise linear in the shift a, so a bisection
    over its kinks, the multiples of 1 / lcm(n, m), is exact for every p >= 1 and any n and m. The gradient is that of
    the matching found. Time is O(projections (n + m) log(n + m) log(n m)).

    **Its value is positive even when Q_Z = P_Z**: for the uniform distribution and p = 2 by about 1/(12 n) + 1/(12 m)
    for large n and m, for every d; the largest value, that of two opposite points, is 1/4, half a turn squared. Of K
    particles each is compared with all the prior samples; why, see :class:`~pyro_wae.penalties.SlicedWasserstein`.

    Args:
        projections: Number of great circles, >= 1.
        p: Order, >= 1; any number.

    Raises:
        TypeError: If projections is not an integer, or p is not a number.
        ValueError: If one is below 1 or not finite. In a call, if d < 2, or if the
            norm of a code or of a prior sample differs from 1 by more than 1e-3. On an accelerator the norms are read
            back at the first call only; later a code off the sphere makes the value NaN, which a WAELoss reports.

    Source: Bonet, Berg, Courty, Septier, Drumetz, Pham, "Spherical Sliced-Wasserstein", 2023, arXiv:2206.08776; for
    the circle Delon, Salomon, Sobolevski, "Fast Transport Optimization for Monge Costs on the Circle", 2010,
    arXiv:0902.3527.

    Example:
        >>> import torch
        >>> from torch.nn.functional import normalize
        >>> codes = normalize(torch.ones(10, 2), dim=-1)
        >>> print(f"{SphericalSlicedWasserstein()(codes, -codes):.4f}")  # half a turn, squared
        0.2500
    """

    def __init__(self, projections: int = 50, *, p: float = 2) -> None:
        super().__init__()
        self.projections = checks.whole("SphericalSlicedWasserstein's projections", projections, write="projections=50")
        self.p = checks.number("SphericalSlicedWasserstein's p", p, least=1, write="SphericalSlicedWasserstein(p=2)")
        self._was_read_back = False

    def estimate(self, codes: Tensor, prior: Tensor, context: PenaltyContext) -> Tensor:
        d = codes.shape[-1]
        if d < 2:
            raise ValueError(
                f"SphericalSlicedWasserstein compares codes on great circles and needs d >= 2, found d = {d}. "
                "Write SlicedWasserstein() for codes on a line."
            )
        on_sphere = self._check_norms(codes, prior)
        frames = torch.linalg.qr(codes.new_empty(self.projections, d, 2).normal_()).Q
        value = transport_on_circle(turns(frames, codes), turns(frames, prior), self.p).mean()
        return value.where(on_sphere, math.nan)

    def _check_norms(self, codes: Tensor, prior: Tensor) -> Tensor:
        """Whether all norms are 1, as a scalar tensor; raises where reading it costs no synchronisation, and once."""
        norms = [rows.detach().norm(dim=-1) for rows in (codes, prior)]
        # NaN passes here: the loss names the site that it comes from.
        off = [(norm - 1).abs() > _tolerance(rows.detach()) for norm, rows in zip(norms, (codes, prior), strict=True)]
        on_sphere = ~(off[0].any() | off[1].any())
        if codes.device.type == "cpu" or not self._was_read_back:
            self._was_read_back = True
            for name, norm, is_off in zip(("codes", "prior samples"), norms, off, strict=True):
                if bool(is_off.any()):
                    worst = norm.flatten()[(norm - 1).abs().nan_to_num().argmax()].item()
                    remedy = (
                        "codes / codes.norm(dim=-1, keepdim=True)"
                        if name == "codes"
                        else "dist.ProjectedNormal(x.new_zeros(d)) as the prior, or divide its draws by their norm"
                    )
                    raise ValueError(
                        f"SphericalSlicedWasserstein takes codes and prior samples of norm 1, found {name} of norm "
                        f"{worst:.4g} (shape {tuple(norm.shape)} without the last dimension). Write {remedy}."
                    )
        return on_sphere


def turns(frames: Tensor, points: Tensor) -> Tensor:
    """Where points (..., n, d) fall on the great circles of frames (J, d, 2): (..., J, n), in turns, -1/2 to 1/2."""
    planar = torch.einsum("jdc,...nd->...jnc", frames, points)
    return torch.atan2(planar[..., 1], planar[..., 0]) / math.tau


def transport_on_circle(x: Tensor, y: Tensor, p: float) -> Tensor:
    """W_p^p on a circle of length 1 of points x (..., n) and y (..., m), given by their places in turns."""
    x, y = x.sort(-1).values, y.sort(-1).values
    n, m = x.shape[-1], y.shape[-1]
    shape = torch.broadcast_shapes(x.shape[:-1], y.shape[:-1])
    x, y = x.expand(*shape, n), y.expand(*shape, m)
    with torch.no_grad():
        # Neighbouring kinks differ by less than float32 resolves when n and m have no common divisor.
        at = (working_precision(x), working_precision(y), p)
        unit = math.lcm(n, m)
        # Beyond one turn a shift carries every point by more than half a turn.
        low = torch.full(shape, -unit, device=x.device)
        high = torch.full(shape, unit, device=x.device)
        for _ in range((2 * unit).bit_length()):
            middle = (low + high) // 2
            rises = _shifted_cost(*at, middle + 1) >= _shifted_cost(*at, middle)
            low, high = torch.where(rises, low, middle + 1), torch.where(rises, middle, high)
    return _shifted_cost(x, y, p, low)


def _shifted_cost(x: Tensor, y: Tensor, p: float, shift: Tensor) -> Tensor:
    """The cost of matching sorted x (..., n) with sorted y (..., m) moved by a shift (...)."""
    m = y.shape[-1]
    rows, columns, lengths = match_quantiles(x.shape[-1], m, shift)
    difference = x.gather(-1, rows) - y.gather(-1, columns % m) - columns // m
    return (power(difference, p) * lengths.to(x)).sum(-1)


def _tolerance(rows: Tensor) -> Tensor:
    """What each row may be off the sphere; rows that were cast up from bfloat16 are told by their digits."""
    is_coarse = (rows == rows.bfloat16()).all(-1)
    return torch.where(is_coarse, COARSE_TOLERANCE, NORM_TOLERANCE)
