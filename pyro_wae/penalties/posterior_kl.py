"""The VAE's term as a penalty, to stand beside one on all codes: ``MMD() + 0.1 * PosteriorKL()`` (InfoVAE)."""

from __future__ import annotations

from torch import Tensor

from pyro_wae.penalties.base import Penalty
from pyro_wae.penalties.context import PenaltyContext, laid_out


class PosteriorKL(Penalty):
    r"""The divergence of each datum's posterior from the prior, :math:`E_x KL(q(z \mid x), p(z))`.

    It is what a VAE adds to its cost: ``WAELoss(PosteriorKL(), penalty_weight=1.0, cost=NegativeLogLikelihood())`` is
    the negative ELBO per datum. Beside a penalty on the codes of all data it makes an InfoVAE

    .. math:: E[-\log p(x \mid z)] + (1 - \alpha)\, E_x KL(q(z \mid x), p(z)) + (\alpha + \lambda - 1)\, D(q(z), p(z))

    of which :math:`\alpha = 1` is a WAE and :math:`\alpha = 0, \lambda = 1` a VAE. The nets run once for both.

    In closed form where torch knows one for guide and prior, otherwise :math:`\log q(z \mid x) - \log p(z)` at the
    code. Of several latent sites it is the sum. The guide is stochastic, and both have densities. Prior samples are not
    needed.

    Raises:
        ValueError: When called, outside of WAELoss, with a deterministic guide, or where a density is not known.

    Source: Zhao, Song, Ermon, "InfoVAE: Balancing Learning and Inference in Variational Autoencoders", AAAI 2019,
    arXiv:1706.02262.

    Example:
        >>> import torch
        >>> from pyro_wae import WAELoss
        >>> from pyro_wae.costs import NegativeLogLikelihood
        >>> from pyro_wae.penalties import MMD
        >>> info_vae = WAELoss(100 * MMD() + 0.5 * PosteriorKL(), penalty_weight=1.0, cost=NegativeLogLikelihood())
        >>> from pyro_wae.penalties import PenaltyContext, PosteriorKL
        >>> PosteriorKL()(torch.randn(10, 2), context=PenaltyContext(encoder_kl=lambda: torch.full((1, 10), 0.5)))
        tensor(0.5000)
    """

    needs_prior_draws = False

    def estimate(self, codes: Tensor, prior: Tensor, context: PenaltyContext) -> Tensor:
        if context.encoder_kl is None:
            raise ValueError(
                "PosteriorKL reads the densities of guide and prior, which are known only inside WAELoss, found none. "
                "Write WAELoss(MMD() + 0.1 * PosteriorKL())."
            )
        return laid_out("encoder_kl", context.encoder_kl(), codes.shape[:2]).mean()
