"""Recorded steps were taken out; what programs import from here is left for one release, and has no effect.

A recording could return wrong values without notice. A step now always runs as usual.
"""

from __future__ import annotations

from typing import Any

__all__ = ["graph", "inductor"]


def graph(module: Any, inputs: Any) -> Any:
    """Has no effect any more; ``WAELoss(compile=graph)`` warns, and steps run as usual."""
    return module.forward


inductor = graph
