"""The parts of a loss, readable after a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Terms:
    """Cost, penalty and weight of the last loss, as detached scalars on the device; reading a number waits for it.

    Args:
        cost: Mean cost per datum, all observed sites together.
        penalty: The penalty, before its weight; with one penalty for each site, their sum.
        weight: The penalty weight. The loss is ``cost + weight * penalty``.
        costs: The same cost by observed site.
        penalties: The same penalty by latent site; empty where one penalty compares the joint code.
    """

    cost: Tensor
    penalty: Tensor
    weight: float | Tensor
    costs: Mapping[str, Tensor] = field(default_factory=dict)
    penalties: Mapping[str, Tensor] = field(default_factory=dict)

    def as_dict(self) -> dict[str, float]:
        """All parts as numbers, for a logger: ``cost``, ``penalty``, ``weight``, ``cost/x``, ``penalty/z`` ..."""
        numbers = {"cost": float(self.cost), "penalty": float(self.penalty), "weight": float(self.weight)}
        numbers |= {f"cost/{site}": float(value) for site, value in self.costs.items()}
        return numbers | {f"penalty/{site}": float(value) for site, value in self.penalties.items()}

    def __repr__(self) -> str:
        return f"Terms({', '.join(f'{name}={value:.6g}' for name, value in self.as_dict().items())})"
