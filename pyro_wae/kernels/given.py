"""What users bring as a kernel: a :class:`~pyro_wae.kernels.Kernel`, a Pyro GP kernel, a module, a function."""

from __future__ import annotations

from collections.abc import Callable

import pyro
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_wae.kernels import FunctionKernel, Kernel

__all__ = ["ModuleKernel", "as_kernel"]


class ModuleKernel(FunctionKernel):
    """A torch or Pyro module as a frozen kernel, Pyro's GP kernels included.

    Its parameters stop requiring gradients: a kernel that learnt to lower its own discrepancy would
    end at a constant.

    Args:
        function: A module that maps (n, d) and (m, d) to (n, m).
    """

    def __init__(self, function: nn.Module) -> None:
        super().__init__(function)
        function.requires_grad_(False)

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        if not isinstance(self.function, PyroModule):
            return super().gram(x, y)
        # A PyroModule writes its parameters into the param store under names as short as "lengthscale", where
        # two kernels would overwrite each other and SVI would find parameters that nobody trains.
        store = pyro.get_param_store()
        with poutine.block(), store.scope():
            values = super().gram(x, y)
        # Leaving a scope strips the store's parameters of the link by which SVI finds them; reading restores it.
        list(store.values())
        return values


def as_kernel(kernel: Kernel | Callable[[Tensor, Tensor], Tensor]) -> Kernel:
    """Makes a :class:`~pyro_wae.kernels.Kernel` of whatever serves as one.

    Raises:
        TypeError: If it cannot be called.
    """
    if isinstance(kernel, Kernel):
        return kernel
    if isinstance(kernel, nn.Module):
        return ModuleKernel(kernel)
    if callable(kernel) and not isinstance(kernel, type):
        return FunctionKernel(kernel)
    raise TypeError(
        f"kernel must be a pyro_wae.kernels.Kernel or a function k(x, y), found {kernel!r}. "
        "Write MMD(InverseMultiquadratic.multiscale()) or MMD(lambda x, y: ...)."
    )
