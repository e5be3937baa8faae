"""Wasserstein auto-encoders for Pyro: swap ``Trace_ELBO()`` for ``WAELoss()``."""

import importlib
from typing import Any

from pyro_wae.loss import WAELoss
from pyro_wae.module import WAEModule
from pyro_wae.step.records import Terms

__version__ = "0.1.0"

__all__ = ["Terms", "WAELoss", "WAEModule", "__version__"]

_SUBMODULES = (
    "checkpoint",
    "costs",
    "diagnostics",
    "distributed",
    "kernels",
    "lightning",
    "optim",
    "penalties",
    "plotting",
    "predict",
    "priors",
    "recording",
    "weights",
)


def __getattr__(name: str) -> Any:
    """Imports a submodule when it is first used, as in ``pyro_wae.optim.Adam``."""
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_SUBMODULES])
