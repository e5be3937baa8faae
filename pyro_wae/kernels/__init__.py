"""Kernels k(x, y) on codes, as modules without trainable parameters.

A bandwidth that is left as ``None`` is computed from the prior samples of the first call of a penalty; see
:meth:`Kernel.fit`. Kernels add and multiply: ``Gaussian() + 0.5 * Laplace()``.
"""

from pyro_wae.kernels.base import Kernel, Product, Scaled, Sum
from pyro_wae.kernels.conditional import Conditional, SameLabel, UnitMean
from pyro_wae.kernels.energy import Energy
from pyro_wae.kernels.function import FunctionKernel, ModuleKernel, as_kernel
from pyro_wae.kernels.radial import (
    Gaussian,
    InverseMultiquadratic,
    Laplace,
    Matern,
    MultiScale,
    RadialKernel,
    RationalQuadratic,
)

__all__ = [
    "Conditional",
    "Energy",
    "FunctionKernel",
    "Gaussian",
    "InverseMultiquadratic",
    "Kernel",
    "Laplace",
    "Matern",
    "ModuleKernel",
    "MultiScale",
    "Product",
    "RadialKernel",
    "RationalQuadratic",
    "SameLabel",
    "Scaled",
    "Sum",
    "UnitMean",
    "as_kernel",
]
