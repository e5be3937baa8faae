"""Sliced Wasserstein distances: transport on lines, where sorting solves it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pyro_wae._core import checks
from pyro_wae._core.fitted import FittedBuffers
from pyro_wae.penalties.base import Penalty
from pyro_wae.penalties.context import PenaltyContext

FIRST_STRIDE = 0.5
STRIDE_RATIO = 0.8


class SlicedWasserstein(Penalty):
    r"""The sliced Wasserstein distance to the power p: the mean over directions of W_p^p on a line.

    For a unit vector t, uniform on the sphere and drawn afresh at every step,

    .. math:: E_t W_p^p(t^\top q, t^\top p) = E_t \int_0^1 \lvert F^{-1}(s) - G^{-1}(s) \rvert^p\, ds

    with the quantile functions F^-1 of the projected codes and G^-1 of the projected prior samples. It is the power and
    not the root, whose gradient has a jump at 0. Numbers of codes and of prior samples may differ: the steps of the two
    quantile functions are merged, which is exact. Time is O(projections (n + m) log(n + m)), memory without the log.

    **Its value is positive even when Q_Z = P_Z**, because two finite samples of one law differ. At p = 2 that bias is
    of the order 1/n where the density on each line is bounded away from 0, log log(n) / n for Normals, n^(-1/2) for a
    bounded distribution with a gap, and the mean penalty is least for codes a little narrower than the prior. For N(0,
    I), d = 8 and n = m = 100 the value is 0.053 and that scale 0.97 (measured by benchmarks/finite_samples.py).

    A shift of the codes by v has the value ``|v|^2 / d`` at p = 2, where W_2^2 has ``|v|^2``. For a prior of unit
    variance its gradient is of the size of that of ``MMD(InverseMultiquadratic.multiscale())``, within a factor of two
    at d = 8 and d = 64, so the penalty weight of that can stay; for another variance divide the weight by it.

    Of K particles each is compared with all the prior samples, and the values are averaged. Pooling their rows would
    have a smaller bias where the codes of one datum are independent, but not where they are equal. An encoder could
    then lower the penalty, at the same Q_Z, by spreading every datum's codes over the prior, as a VAE does. The bias of
    the average is the same for both, and larger were the prior samples shared out among the particles.

    Args:
        projections: Number of directions, >= 1.
        p: Order, >= 1; any number.

    Raises:
        TypeError: If projections is not an integer, or p is not a number.
        ValueError: If one is below 1 or not finite.

    Source: Bonneel, Rabin, Peyre, Pfister, "Sliced and Radon Wasserstein Barycenters of Measures", 2015,
    doi:10.1007/s10851-014-0506-3; Kolouri, Pope, Martin, Rohde, "Sliced-Wasserstein Autoencoder", 2018,
    arXiv:1804.01947; for the bias Bobkov, Ledoux, "One-Dimensional Empirical Measures, Order Statistics, and
    Kantorovich Transport Distances", 2019, doi:10.1090/memo/1259.

    Example:
        >>> import torch
        >>> codes = torch.zeros(10, 2, requires_grad=True)
        >>> value = SlicedWasserstein(projections=100)(codes, torch.randn(25, 2))
        >>> value.backward()
        >>> codes.grad.shape
        torch.Size([10, 2])
    """

    def __init__(self, projections: int = 50, *, p: float = 2) -> None:
        super().__init__()
        self.projections = checks.whole("SlicedWasserstein's projections", projections, write="projections=50")
        self.p = checks.number("SlicedWasserstein's p", p, least=1, write="SlicedWasserstein(p=2)")

    def estimate(self, codes: Tensor, prior: Tensor, context: PenaltyContext) -> Tensor:
        directions = nn.functional.normalize(codes.new_empty(self.projections, codes.shape[-1]).normal_(), dim=-1)
        return transport_along(directions, codes, prior, self.p).mean()


class MaxSlicedWasserstein(FittedBuffers, Penalty):
    r"""The max-sliced Wasserstein distance to the power p: W_p^p on the line where it is largest.

    It is :math:`\max_t W_p^p(t^\top q, t^\top p)` over unit vectors t. The direction is sought by projected gradient
    ascent on detached codes, at every step from the direction of the last one, from the difference of the means and
    from random ones; the best that was met is taken. What is found is a lower bound of the maximum, for the function is
    not concave. The gradient of the codes is that along the direction found, held fixed; where two matchings tie there,
    the maximum has a kink, and it is one of several. The direction belongs to the codes of the moment and is no
    parameter: no optimiser trains it, and it stands in ``state_dict`` as a buffer. A step without gradients, such as
    ``svi.evaluate_loss``, searches and keeps nothing.

    The maximum picks up sampling noise: with n codes in d dimensions the value at Q_Z = P_Z is of the order d / n.
    Take it for few dimensions and large batches.
    A shift by v has the value ``|v|^2`` at p = 2, as W_2^2 itself. Of K particles each is compared with all the prior
    samples, along one direction that maximises their mean; why, see :class:`SlicedWasserstein`.

    Args:
        steps: Steps of the ascent, >= 1.
        p: Order, >= 1; any number.
        restarts: Random directions, >= 1, from which the ascent starts besides.

    Raises:
        TypeError: If steps or restarts is not an integer, or p is not a number.
        ValueError: If one is below 1 or not finite.

    Source: Deshpande, Hu, Sun, Pyrros, Siddiqui, Koyejo, Zhao, Forsyth, Schwing, "Max-Sliced Wasserstein Distance and
    its use for GANs", 2019, arXiv:1904.05877.

    Example:
        >>> import torch
        >>> prior = torch.randn(50, 3)
        >>> MaxSlicedWasserstein()(prior + torch.tensor([0.0, 2.0, 0.0]), prior).item() > 3.99
        True
    """

    direction: Tensor

    def __init__(self, steps: int = 10, *, p: float = 2, restarts: int = 4) -> None:
        super().__init__()
        self.steps = checks.whole("MaxSlicedWasserstein's steps", steps, write="steps=10")
        self.p = checks.number("MaxSlicedWasserstein's p", p, least=1, write="MaxSlicedWasserstein(p=2)")
        self.restarts = checks.whole("MaxSlicedWasserstein's restarts", restarts, write="restarts=4")
        self.register_fitted("direction", torch.empty(0), any_shape=True)

    def estimate(self, codes: Tensor, prior: Tensor, context: PenaltyContext) -> Tensor:
        checks.no_transform("MaxSlicedWasserstein", "looks for a direction", write="WAELoss(SlicedWasserstein())")
        direction = self.search(codes.detach(), prior.detach())
        if torch.is_grad_enabled():
            # A copy, because whoever writes into buffers (DDP does) must not touch what backward still needs. That of
            # a batch with NaN would spoil every later step.
            known = self.direction.shape == direction.shape
            last = self.direction.to(direction) if known else torch.zeros_like(direction)
            self.set_fitted("direction", direction.where(direction.isfinite().all(), last))
        return transport_along(direction[None], codes, prior, self.p).mean()

    @torch.inference_mode(False)  # the ascent needs slopes in an evaluation too
    def search(self, codes: Tensor, prior: Tensor) -> Tensor:
        """The direction, of shape (d,), with the largest value that the ascent meets; the state stays as it is."""
        codes, prior = codes.clone(), prior.clone()
        d = codes.shape[-1]
        starts = [codes.mean((0, 1))[None] - prior.mean(0), codes.new_empty(self.restarts, d).normal_()]
        if self.direction.shape == (d,):
            starts.insert(0, self.direction.to(codes)[None])
        directions = nn.functional.normalize(torch.cat(starts), dim=-1)
        met, values = [directions], []
        for step in range(self.steps):
            with torch.enable_grad():
                directions.requires_grad_()
                value = transport_along(directions, codes, prior, self.p).mean(0)
                (slope,) = torch.autograd.grad(value.sum(), directions)
            values.append(value.detach())
            directions = directions.detach()
            tangent = slope - (slope * directions).sum(-1, keepdim=True) * directions
            # Every exchange in the matching is a kink: a slope tells the direction and not how far to go.
            stride = FIRST_STRIDE * STRIDE_RATIO**step
            directions = nn.functional.normalize(directions + stride * nn.functional.normalize(tangent, dim=-1), dim=-1)
            met.append(directions)
        values.append(transport_along(directions, codes, prior, self.p).mean(0))
        return torch.cat(met).detach().index_select(0, torch.cat(values).argmax()[None])[0]


def transport_along(directions: Tensor, codes: Tensor, prior: Tensor, p: float) -> Tensor:
    """W_p^p of codes (K, n, d) and prior samples (m, d) along each direction (J, d); shape (K, J)."""
    # Moving both leaves every distance as it is, and spares the digits of codes far from 0.
    centre = (codes.detach().mean((0, 1)) + prior.detach().mean(0)) / 2
    x = ((codes - centre) @ directions.mT).mT  # (K, J, n)
    y = ((prior - centre) @ directions.mT).mT  # (J, m)
    x, y = x.sort(-1).values, y.sort(-1).values
    rows, columns, lengths = match_quantiles(
        x.shape[-1], y.shape[-1], torch.zeros((), dtype=torch.long, device=x.device)
    )
    return (power(x[..., rows] - y[..., columns], p) * lengths.to(x)).sum(-1)


def match_quantiles(n: int, m: int, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cuts (0, 1) where the quantile function of n sorted points, or that of m points moved to the right, steps.

    Args:
        n: Number of points x.
        m: Number of points y.
        shift: By how much the quantile function of y is moved, in units of 1 / lcm(n, m); whole numbers of any shape.

    Returns:
        The index into x, the index into y, which leaves 0 ... m - 1 where the shift takes it around, and the
        length of each piece; the shape of the shift and, last, the pieces. The lengths sum to 1.
    """
    unit = math.lcm(n, m)
    if unit <= n + m:
        starts = torch.arange(unit, device=shift.device)
        lengths = torch.ones_like(starts)
    else:
        steps_x = torch.arange(n, device=shift.device) * (unit // n)
        steps_y = (torch.arange(m, device=shift.device) * (unit // m) + shift[..., None]) % unit
        starts = torch.cat([steps_x.expand(*shift.shape, n), steps_y], -1).sort(-1).values
        lengths = starts.diff(dim=-1, append=torch.full_like(starts[..., :1], unit))
    rows = (starts // (unit // n)).expand(*shift.shape, -1)
    return rows, (starts - shift[..., None]) // (unit // m), lengths.double() / unit


def power(difference: Tensor, p: float) -> Tensor:
    """|difference|^p, with a gradient that is finite at 0."""
    return difference.square() if p == 2 else difference.abs().pow(p)
