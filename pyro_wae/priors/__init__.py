"""Learnable priors: modules whose call returns the distribution of one code.

They are used inside a model, ``z = pyro.sample("z", prior())``, and trained with
:class:`~pyro_wae.penalties.PriorLikelihood`, or fitted to the codes of a trained model by :func:`fit`.
"""

from pyro_wae.priors.fitting import fit
from pyro_wae.priors.mixtures import MixturePrior, NormalMixture, VampPrior

__all__ = ["MixturePrior", "NormalMixture", "VampPrior", "fit"]
