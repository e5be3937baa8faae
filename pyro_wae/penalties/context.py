"""What a penalty is told beside codes and prior draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyro_wae._core import checks

_KINDS: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("prior", "prior_log_prob", "encoder_variance", "encoder_kl", "kept"), (Callable, "a function")),
    "sites": (Mapping, "a dict of slices, the columns of each site,"),
    **dict.fromkeys(("condition", "condition_scale"), (Tensor, "a tensor")),
}


@dataclass(frozen=True, kw_only=True)
class PenaltyContext:
    """What is known of the codes and the prior beyond their draws. Everything has a default.

    What takes time to find out is a function, called only by a penalty that needs it.

    Args:
        data_size: Number of data that Q_Z averages over, where it is known and larger than the batch.
        shared_data: Whether row i of the codes and row i of the prior draws (counted modulo the number of data)
            come from the same datum and so are not independent: with masks, or a prior that depends on the data.
        prior: Gives the prior of one code as a distribution with ``batch_shape`` () and ``event_shape`` (d,), or None
            where it is not one distribution.
        prior_log_prob: Maps codes of shape (J, n, d) to the log density of the prior, shape (J, n).
        encoder_variance: Gives the variance of each number of a code given its datum, shape (K, n, d).
        encoder_kl: Gives the Kullback-Leibler divergence of q(z | x) from the prior for each datum, shape (K, n).
        sites: The columns of each latent site in a code, in the model's order; None where a code has no sites.
        kept: Gives which numbers of the codes are not masked, shape (K, n, d), or None if all are.
        condition: The observed y of each datum, shape (n, c), where a penalty is to compare the joint of (z, y) with
            that of (z', y), z' ~ p(z | y): floats, or labels as integers of shape (n, 1). The prior draws then come in
            multiples of the data, as with ``shared_data``.
        condition_scale: Factor of the condition's floats where they stand beside a code as further columns, a scalar.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If ``data_size`` is no whole number >= 1.
    """

    data_size: int | None = None
    shared_data: bool = False
    prior: Callable[[], Any] | None = None
    prior_log_prob: Callable[[Tensor], Tensor] | None = None
    encoder_variance: Callable[[], Tensor] | None = None
    encoder_kl: Callable[[], Tensor] | None = None
    sites: Mapping[str, slice] | None = None
    kept: Callable[[], Tensor | None] | None = None
    condition: Tensor | None = None
    condition_scale: Tensor | None = None

    def __post_init__(self) -> None:
        if self.data_size is not None:
            size = checks.whole("PenaltyContext's data_size", self.data_size, write="PenaltyContext(data_size=60000)")
            object.__setattr__(self, "data_size", size)
        checks.flag("PenaltyContext's shared_data", self.shared_data, write="PenaltyContext(shared_data=True)")
        for name, (kind, what) in _KINDS.items():
            if getattr(self, name) is not None and not isinstance(getattr(self, name), kind):
                write = f"PenaltyContext({name}=None)"
                checks.instance(f"PenaltyContext's {name}", getattr(self, name), kind, f"{what} or None", write=write)
