"""The Sinkhorn divergence: optimal transport smoothed by an entropy, through geomloss."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_wae._core import checks
from pyro_wae._core.fitted import FittedBuffers
from pyro_wae._core.private import is_transforming
from pyro_wae._core.rows import working_precision
from pyro_wae.penalties.base import Penalty
from pyro_wae.penalties.context import PenaltyContext, share_out

BLUR_FRACTION = 0.5
DIAMETER_MULTIPLE = 4.0
ROUNDING = 1e-6


class Sinkhorn(FittedBuffers, Penalty):
    r"""The Sinkhorn divergence in the scale of W_p^p, with squared distances for p = 2.

    It is made of three terms,

    .. math:: S(q, p) = \mathrm{OT}(q, p) - \tfrac12 \mathrm{OT}(q, q) - \tfrac12 \mathrm{OT}(p, p), \qquad
        \mathrm{OT}(q, p) = \min_\Gamma\, E_\Gamma |z - z'|^p + p\, b^p\, \mathrm{KL}(\Gamma, q \otimes p),

    with couplings :math:`\Gamma` of q and p, and the blur b.

    It goes to :math:`W_p^p = \min E|z - z'|^p` as blur goes to 0 (geomloss itself returns half of that for p = 2), and
    for large blur to the squared distance of the means for p = 2, to half the energy distance for p = 1. It needs
    geomloss: ``pip install "pyro-wae[sinkhorn]"``.

    The blur decides what the penalty resolves in a finite batch. At a small one every code is coupled with one sample
    alone, and in more than a few dimensions that is mostly noise: with n = m = 100 and a blur of 0.1 times the spread
    (the root mean squared distance of independent prior samples), the cosine between the gradient and that of W_2^2
    between the populations is 0.49 for d = 8 and 0.14 for d = 64, and the mean penalty is least for codes of 0.71 and
    0.32 times the right scale. With the default, half the spread, the cosines are 0.83 and 0.54, the scales 0.88 and
    0.58 (measured by benchmarks/finite_samples.py). So it **pulls codes inwards**, and more in higher dimension: take
    large batches, or :class:`~pyro_wae.penalties.MMD`, which has no such bias. Its value is never negative up to
    convergence, and positive when Q_Z = P_Z.

    Each of K particles is compared with a K-th of the prior samples, or with all where K does not divide their
    number, and the values are averaged; why not pooled, see :class:`~pyro_wae.penalties.SlicedWasserstein`.
    It has no second derivative, because geomloss holds the dual potentials fixed in its gradient.
    Memory holds several (n, m), (n, n) and (m, m) matrices for each particle: some thousand rows are the limit. Time
    is that of about 2 + log(4 spreads / blur) / log(1 / scaling) passes over each.

    Args:
        p: 2 for squared distances, 1 for distances.
        blur: The length below which the coupling is smoothed, in the units of a code. Default: half the root mean
            squared distance of independent prior samples (sqrt(d / 2) sigma for N(0, sigma^2 I)), taken once, detached,
            and kept in ``state_dict``.
        scaling: Ratio of one blur to the next as it is lowered to its value, in (0, 1). Near 1 is slow and exact.
        debias: Whether to subtract the two self-terms. Without them the penalty is least for codes in too few places.

    Raises:
        ImportError: If geomloss is not installed.
        ValueError: If p is not 1 or 2, blur is not positive, or scaling lies outside (0, 1). In a call, if the prior
            samples have no finite, positive spread to take the blur from.
        RuntimeError: If its gradient is to be differentiated again, by ``create_graph=True``.
        TypeError: If p, blur or scaling is not a number, or debias neither True nor False.

    Source: Genevay, Peyre, Cuturi, "Learning Generative Models with Sinkhorn Divergences", 2018, arXiv:1706.00292;
    Feydy, Sejourne, Vialard, Amari, Trouve, Peyre, "Interpolating between Optimal Transport and MMD using Sinkhorn
    Divergences", 2019, arXiv:1810.08278; Patrini et al., "Sinkhorn AutoEncoders", 2019, arXiv:1810.01118.

    Example:
        >>> import torch
        >>> prior = torch.randn(50, 3)
        >>> round(Sinkhorn()(prior + torch.tensor([0.0, 2.0, 0.0]), prior).item(), 2)
        4.0
    """

    spread: Tensor

    def __init__(self, p: float = 2, *, blur: float | None = None, scaling: float = 0.5, debias: bool = True) -> None:
        super().__init__()
        _import_samples_loss()
        write = "Sinkhorn(p=2)"
        self.p = checks.choice("Sinkhorn's p", checks.number("Sinkhorn's p", p, write=write), (1.0, 2.0), write=write)
        if blur is not None:
            blur = checks.number("Sinkhorn's blur", blur, above=0, write="Sinkhorn(blur=1.0)")
        self.blur = blur
        self.scaling = checks.number("Sinkhorn's scaling", scaling, above=0, below=1, write="Sinkhorn(scaling=0.5)")
        self.debias = checks.flag("Sinkhorn's debias", debias, write="Sinkhorn(debias=True)")
        # geomloss takes numbers, and reading one from a device at every step would wait for it.
        self._spread = math.nan
        self.register_fitted("spread")

    def fit(self, prior: Tensor) -> None:
        """Takes the spread from prior samples (m, d), once: the blur's unit, and where its descent begins.

        Raises:
            ValueError: If it is not finite, or it is 0 and no blur was given.
        """
        if self.is_fitted("spread"):
            return
        spread = (2 * working_precision(prior.detach()).var(0).sum()).sqrt()
        number = spread.item()
        if not math.isfinite(number) or (number == 0 and self.blur is None):
            raise ValueError(
                f"The prior samples have a spread (root mean squared distance) of {number:g}, from which {self!r} can "
                "take no blur. Look at the model's prior, or give the blur, as in Sinkhorn(blur=1.0)."
            )
        self.set_fitted("spread", spread)
        self._spread = number

    def after_loading(self) -> None:
        if self.is_fitted("spread"):
            self._spread = self.spread.item()

    def estimate(self, codes: Tensor, prior: Tensor, context: PenaltyContext) -> Tensor:
        self.fit(prior)
        draws = share_out(prior, codes, context)
        blur = BLUR_FRACTION * self._spread if self.blur is None else self.blur
        # geomloss lowers the blur from the diameter by the scaling, in steps that numpy.arange counts, and then takes
        # the blur itself. The value is too small if the steps before have not come near it. Here the last of them is
        # the blur, and a bit more: rounding could leave out a step at the end of the range.
        descent = math.log(max(DIAMETER_MULTIPLE * self._spread / blur, 1.0)) / -math.log(self.scaling)
        loss = _import_samples_loss()(
            "sinkhorn",
            p=self.p,
            blur=blur,
            diameter=blur * self.scaling ** -math.ceil(descent - ROUNDING) * (1 + ROUNDING),
            scaling=self.scaling,
            debias=self.debias,
            backend="tensorized",
        )
        # The shift between the means is transport in closed form for squared distances, with or without entropy.
        # Taken out it costs no digits and no iterations, however far the codes are from the prior.
        centres = (codes.mean(1, keepdim=True), draws.mean(1, keepdim=True))
        if self.p == 2:
            shifted = (centres[0] - centres[1]).square().sum((1, 2))
        else:
            centres = (centres[1].detach(),) * 2
            shifted = codes.new_zeros(())
        # geomloss leaves gradients switched on behind it, in a no_grad block too (0.3.1, sinkhorn_loop).
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            # Given weights, geomloss makes none on the CPU to copy to the device, which would wait for it.
            weights = [rows.new_full(rows.shape[:2], 1 / rows.shape[1]) for rows in (codes, draws)]
            moved = (codes - centres[0], draws - centres[1])
            for rows in moved:
                if rows.requires_grad and not is_transforming():  # whose gradients may always be differentiated
                    rows.register_hook(_refuse_second_derivative)
            smoothed = loss(weights[0], moved[0], weights[1], moved[1])
        # Its cost is |z - z'|^p / p.
        return (shifted + self.p * smoothed).mean()


def _refuse_second_derivative(_: Tensor) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "Sinkhorn has no second derivative: geomloss holds the dual potentials fixed in its gradient. Leave out "
            "create_graph=True, or take a penalty that has one, such as MMD()."
        )


def _import_samples_loss() -> Any:
    try:
        from geomloss import SamplesLoss
    except ImportError as error:
        raise ImportError(
            'Sinkhorn needs geomloss, which is not installed. Run: pip install "pyro-wae[sinkhorn]"'
        ) from error
    return SamplesLoss
