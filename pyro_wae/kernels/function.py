"""Functions and modules as kernels, Pyro's GP kernels included."""

from __future__ import annotations

import sys
from collections.abc import Callable

from torch import Tensor, nn

from pyro_wae._core import checks
from pyro_wae._core.rows import at_least_float32, working_precision
from pyro_wae.kernels.base import Kernel


class FunctionKernel(Kernel):
    """A plain function k(x, y) of tensors (n, d) and (m, d) with values of shape (n, m), as a kernel.

    Args:
        function: Called with codes in their own precision (float32 at least).

    Raises:
        TypeError: If it cannot be called.
        ValueError: When called, if the function's value is not a tensor of shape (n, m).
    """

    is_function = True

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = checks.function(
            "FunctionKernel's function",
            function,
            "a function of tensors (n, d) and (m, d) with values (n, m)",
            write="FunctionKernel(lambda x, y: ...)",
        )

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        values = self.function(at_least_float32(x), at_least_float32(y))
        if not isinstance(values, Tensor) or values.shape != (len(x), len(y)):
            found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"The kernel {self.function!r} takes tensors of shape ({len(x)}, d) and ({len(y)}, d) and must "
                f"return shape ({len(x)}, {len(y)}), found {found}. Return one value for each pair of rows."
            )
        return working_precision(values)


class ModuleKernel(FunctionKernel):
    """A torch or Pyro module as a frozen kernel, Pyro's GP kernels included.

    Its parameters stop requiring gradients: a kernel that learnt to lower its own discrepancy would
    end at a constant.

    Args:
        function: A module that maps (n, d) and (m, d) to (n, m).
    """

    def __init__(self, function: nn.Module) -> None:
        write = "ModuleKernel(pyro.contrib.gp.kernels.RBF(d))"
        super().__init__(checks.instance("ModuleKernel's function", function, nn.Module, "a torch module", write=write))
        function.requires_grad_(False)
        # Where a PyroModule exists Pyro has been imported; kernels themselves need PyTorch alone.
        pyro_nn = sys.modules.get("pyro.nn")
        self._is_pyro_module = pyro_nn is not None and isinstance(function, pyro_nn.PyroModule)

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        if not self._is_pyro_module:
            return super().gram(x, y)
        import pyro

        # A PyroModule writes its parameters into the param store under names as short as "lengthscale", where
        # two kernels would overwrite each other and SVI would find parameters that nobody trains.
        store = pyro.get_param_store()
        with pyro.poutine.block(), store.scope():
            values = super().gram(x, y)
        # Leaving a scope strips the store's parameters of the link by which SVI finds them; reading restores it.
        list(store.values())
        return values


def as_kernel(kernel: Kernel | Callable[[Tensor, Tensor], Tensor], *, name: str = "kernel") -> Kernel:
    """Makes a :class:`~pyro_wae.kernels.Kernel` of whatever serves as one.

    Args:
        kernel: A kernel, a module or a function k(x, y).
        name: What the message calls it.

    Raises:
        TypeError: If it cannot be called.
    """
    if isinstance(kernel, Kernel):
        return kernel
    if isinstance(kernel, nn.Module):
        return ModuleKernel(kernel)
    what = "a pyro_wae.kernels.Kernel or a function k(x, y)"
    write = f"MMD({name}=InverseMultiquadratic.multiscale()) or MMD({name}=lambda x, y: ...)"
    return FunctionKernel(checks.function(name, kernel, what, write=write))
