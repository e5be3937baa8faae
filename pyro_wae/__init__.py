"""Wasserstein auto-encoders for Pyro: swap ``Trace_ELBO()`` for ``WAELoss()``."""

from pyro_wae import costs, kernels, penalties, weights
from pyro_wae.loss import WAELoss

__version__ = "0.1.0"

__all__ = ["WAELoss", "__version__", "costs", "kernels", "penalties", "weights"]
