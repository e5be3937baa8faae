"""Fits a prior with parameters to the codes, as in ``MMD() + PriorLikelihood()``."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from pyro_wae.penalties.base import Penalty
from pyro_wae.penalties.context import PenaltyContext


class PriorLikelihood(Penalty):
    r"""Trains the prior, and nothing else, by the likelihood of the codes.

    The value is always 0. The gradient is that of the mean of :math:`-\log p_\theta(z)` over codes that are
    detached: it reaches the parameters :math:`\theta` of the model's prior and no code. So in ``WAELoss(MMD() +
    PriorLikelihood())`` the prior is fitted to the codes by maximum likelihood, which lowers KL(Q_Z, P_Z), the codes
    are matched to the prior by the other penalty, and ``terms.penalty`` is the value of that other penalty.

    This gradient is exact where that of a penalty through prior samples is noisy, and it needs no ``rsample``; weights
    of a mixture get theirs. The penalty weight multiplies it: no change for Adam, and with plain SGD a factor of the
    prior's learning rate. At a penalty weight of 0 the prior does not learn.

    Raises:
        ValueError: When called, if the prior's density is not known: outside of WAELoss, under a mask, at one of
            several latent sites, or for a prior without ``log_prob``.

    Warns:
        UserWarning: If the prior has no learnable parameters.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> from pyro_wae.penalties import PenaltyContext, PriorLikelihood
        >>> loc = torch.zeros(2, requires_grad=True)
        >>> context = PenaltyContext(prior_log_prob=dist.Normal(loc, 1.0).to_event(1).log_prob)
        >>> codes = torch.ones(10, 2)
        >>> PriorLikelihood()(codes, context=context).backward()
        >>> loc.grad
        tensor([-1., -1.])
    """

    needs_prior_draws = False

    def estimate(self, codes: Tensor, prior: Tensor, context: PenaltyContext) -> Tensor:
        if not torch.is_grad_enabled():
            return codes.new_zeros(())
        if context.prior_log_prob is None:
            raise ValueError(
                "PriorLikelihood needs the prior's log density, and there is none here. Train through "
                "WAELoss(MMD() + PriorLikelihood()) with a prior that has a log_prob, without masks, and with one "
                "penalty for all latent sites together."
            )
        loss = -context.prior_log_prob(codes.detach()).mean()
        if not loss.requires_grad:
            warnings.warn(
                "PriorLikelihood finds nothing to learn in the prior. Give it parameters, as in "
                "pyro.sample('z', pyro_wae.priors.MixturePrior(50, 8)()), or leave PriorLikelihood out.",
                UserWarning,
                stacklevel=2,
            )
        return loss - loss.detach()
