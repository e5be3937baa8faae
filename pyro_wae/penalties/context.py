"""What is known of codes and prior samples beyond their numbers, and how both are laid out by it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_wae._core import checks

_KINDS: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("prior", "prior_log_prob", "encoder_variance", "encoder_kl", "kept"), (Callable, "a function")),
    "sites": (Mapping, "a dict of slices, the columns of each site,"),
    **dict.fromkeys(("condition", "condition_scale"), (Tensor, "a tensor")),
}


@dataclass(frozen=True, eq=False, kw_only=True)
class PenaltyContext:
    """What is known of the codes and the prior beyond their draws. Everything has a default.

    What takes time to compute is a function, called only by a penalty that needs it.

    Args:
        data_size: Number of data that Q_Z averages over, where it is known and larger than the batch.
        shared_data: Whether row i of the codes and row i of the prior samples (counted modulo the number of data)
            come from the same datum and so are not independent: with masks, or a prior that depends on the data.
        prior: Returns the prior of one code as a distribution with ``batch_shape`` () and ``event_shape`` (d,), or None
            where it is not one distribution.
        prior_log_prob: Maps codes of shape (J, n, d) to the log density of the prior, shape (J, n).
        encoder_variance: Returns the variance of each coordinate of a code given its datum, shape (K, n, d).
        encoder_kl: Returns the Kullback-Leibler divergence of q(z | x) from the prior for each datum, shape (K, n).
        sites: The columns of each latent site in a code, in the model's order; None where a code has no sites.
        kept: Returns where codes are not masked, booleans of shape (K, n, d), or None without a mask.
        condition: The observed y of each datum, shape (n, c), where a penalty is to compare the joint of (z, y) with
            that of (z', y), z' ~ p(z | y): floats, or labels as integers of shape (n, 1). The prior samples then come
            in multiples of the data, as with ``shared_data``.
        condition_scale: Factor of the condition's floats where they stand beside a code as further columns, a scalar.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If ``data_size`` is not an integer >= 1.
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
        if not isinstance(self.shared_data, bool):
            shared = checks.flag(
                "PenaltyContext's shared_data", self.shared_data, write="PenaltyContext(shared_data=True)"
            )
            object.__setattr__(self, "shared_data", shared)
        for name, (kind, what) in _KINDS.items():
            if getattr(self, name) is not None and not isinstance(getattr(self, name), kind):
                write = f"PenaltyContext({name}=None)"
                checks.instance(f"PenaltyContext's {name}", getattr(self, name), kind, f"{what} or None", write=write)


def laid_out(name: str, found: Any, shape: torch.Size) -> Tensor:
    """What one of a context's functions has returned, expanded to a shape.

    Raises:
        ValueError: If it does not expand.
    """
    try:
        expanded: Tensor = found.expand(shape)
    except (AttributeError, RuntimeError) as error:
        what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"{found!r}"
        raise ValueError(
            f"PenaltyContext's {name} must return a tensor of shape {tuple(shape)} here, found {what}. Write "
            f"PenaltyContext({name}=lambda: values), with values of that shape."
        ) from error
    return expanded


def share_out(prior: Tensor, codes: Tensor, context: PenaltyContext) -> Tensor:
    """The prior samples (m, d) that each of K particles (K, n, d) is compared with, shape (K, m / K, d) or (K, m, d).

    A share has 2 rows or more, and where rows come from data one of each datum; where it cannot, each has all.
    """
    particles, n, d = codes.shape
    unit = particles * (n if context.shared_data else 1)
    is_shared = len(prior) % unit == 0 and len(prior) >= 2 * particles
    return prior.reshape(particles, -1, d) if is_shared else prior.expand(particles, -1, -1)


def join(
    codes: Tensor, prior: Tensor, context: PenaltyContext, columns: Tensor
) -> tuple[Tensor, Tensor, PenaltyContext]:
    """Sets a datum's condition beside each of its codes and of its prior samples.

    Args:
        codes: Shape (K, n, d).
        prior: Shape (J n, d): J draws of each datum, one block after the other.
        context: How they were drawn.
        columns: Shape (n, c), the condition as numbers.

    Returns:
        Shapes (K, n, d + c) and (J n, d + c), and a context for them: without a condition, with shared data.

    Raises:
        ValueError: If the condition has not a row for each datum, or the prior samples are no multiple of the data.
    """
    n, d = codes.shape[1:]
    repeats, rest = divmod(len(prior), n)
    if len(columns) != n or rest or not repeats:
        raise ValueError(
            f"A condition has a row for each datum, and prior sample i has the datum of code i: with {n} data found "
            f"{len(columns)} rows of the condition and {len(prior)} prior samples. Draw the prior once or several "
            "times for each datum."
        )
    columns = columns.detach().to(codes)
    joint = torch.cat([codes, columns.expand(len(codes), *columns.shape)], dim=2)
    draws = torch.cat([prior, columns.repeat(repeats, 1)], dim=1)
    # p(z, y) and p(z | y) differ by a factor that codes and prior samples of one datum share.
    own = context.prior_log_prob
    log_prob = None if own is None else lambda rows: own(rows[..., :d])
    return joint, draws, dataclasses.replace(
        context, condition=None, shared_data=True, prior=None, prior_log_prob=log_prob, kept=None
    )  # fmt: skip
