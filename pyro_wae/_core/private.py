"""Private names of torch and Pyro that this package cannot do without, each with the reason."""

from pyro.poutine.runtime import _PYRO_STACK as HANDLERS
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

__all__ = ["HANDLERS", "BatchNorm"]

# HANDLERS: a micro-batch runs again in the backward pass, after SVI's handlers have been left, and must run under them.
# BatchNorm: the one base of BatchNorm1d, 2d, 3d and SyncBatchNorm; torch has no public name for it.
