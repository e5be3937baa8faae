"""Guards against a stochastic encoder whose variance collapses to 0, as in ``MMD() + LogVarianceL1(0.1)``.

A penalty on the aggregated posterior does not distinguish the spread within a datum's posterior from that between data.
A stochastic encoder may therefore lose its noise and become deterministic.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_wae._core import checks
from pyro_wae.penalties.base import Penalty
from pyro_wae.penalties.context import PenaltyContext, laid_out


class _VarianceGuard(Penalty):
    """A weight times the mean over data of sum_j f(sigma_j^2); subclasses define ``cost``."""

    needs_prior_draws = False

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        name = type(self).__name__
        self.weight = checks.number(f"{name}'s weight", weight, least=0, write=f"{name}(0.1)")

    def estimate(self, codes: Tensor, prior: Tensor, context: PenaltyContext) -> Tensor:
        name = type(self).__name__
        if context.encoder_variance is None:
            raise ValueError(
                f"{name} reads the variance of the encoder's distribution, which is known only inside WAELoss with a "
                f"stochastic guide, found none. Write WAELoss(MMD() + {self!r}), or outside of it "
                f"{name}()(codes, context=PenaltyContext(encoder_variance=lambda: variance))."
            )
        variance = laid_out("encoder_variance", context.encoder_variance(), codes.shape)
        usable = (variance > 0) & torch.isfinite(variance)
        # On an accelerator a look at the values would wait for it: there the NaN tells.
        if variance.device.type == "cpu" and not bool(usable.all()):
            raise ValueError(
                f"{name} takes the logarithm of the encoder's variance, found a variance of "
                f"{variance[~usable][0].item():g}. A deterministic encoder has none to guard: leave {name} out. If the "
                "variance underflowed, bound the guide's scale, as in dist.Normal(loc, 1e-3 + softplus(scale))."
            )
        return self.weight * self.cost(variance.where(usable, math.nan)).sum(-1).mean()

    def cost(self, variance: Tensor) -> Tensor:
        """The cost f of each variance, elementwise."""
        raise NotImplementedError


class LogVarianceL1(_VarianceGuard):
    r"""An L1 penalty on the encoder's log-variances, weight times :math:`E_x \sum_j \lvert \log \sigma_j^2(x) \rvert`.

    It is 0 where every variance is 1, and its gradient with respect to each log-variance has constant size: superfluous
    dimensions keep a variance of 1, pure noise, and the others do not. It needs no prior samples, and a guide with a
    variance.

    Args:
        weight: A number >= 0, in the penalty's units; the penalty weight of the loss multiplies it once more.

    Raises:
        TypeError: If the weight is not a number.
        ValueError: If the weight is negative or not finite; when called, if the encoder's variance is not known, or is
            not positive.

    Source: Rubenstein, Schoelkopf, Tolstikhin, "On the Latent Space of Wasserstein Auto-Encoders", 2018,
    arXiv:1802.03761.

    Example:
        >>> import torch
        >>> context = PenaltyContext(encoder_variance=lambda: torch.full((1, 10, 2), 0.5))
        >>> LogVarianceL1(0.1)(torch.randn(10, 2), context=context)
        tensor(0.1386)
    """

    def cost(self, variance: Tensor) -> Tensor:
        return variance.log().abs()


class UnitVarianceKL(_VarianceGuard):
    r"""The encoder's divergence from unit variance at its own mean, :math:`E_x KL(N(\mu, \sigma^2), N(\mu, 1))`.

    That is :math:`E_x \sum_j (\sigma_j^2 - \log \sigma_j^2 - 1) / 2`, times the weight; it does not act on the means.
    For a guide that is not Normal it is the same function of the variance. It needs no prior samples.

    Args:
        weight: A number >= 0, in the penalty's units; the penalty weight of the loss multiplies it once more.

    Raises:
        TypeError: If the weight is not a number.
        ValueError: If the weight is negative or not finite; when called, if the encoder's variance is not known, or is
            not positive.

    Source: Bahuleyan, Mou, Zhou, Vechtomova, "Stochastic Wasserstein Autoencoder for Probabilistic Sentence
    Generation", 2019, arXiv:1806.08462.

    Example:
        >>> import torch
        >>> context = PenaltyContext(encoder_variance=lambda: torch.full((1, 10, 2), 0.5))
        >>> UnitVarianceKL(0.1)(torch.randn(10, 2), context=context)
        tensor(0.0193)
    """

    def cost(self, variance: Tensor) -> Tensor:
        return (variance - variance.log() - 1) / 2
