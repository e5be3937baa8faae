"""What a penalty is, and how a plain function becomes one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyro_wae._repr import CallRepr
from pyro_wae.numerics import at_least_float32

__all__ = ["FunctionPenalty", "Penalty", "PenaltyContext", "as_penalty"]


@dataclass(frozen=True, kw_only=True)
class PenaltyContext:
    """How the rows that a penalty receives were drawn.

    Args:
        data_size: Number of data that Q_Z averages over, where it is known and larger than the batch.
        shared_data: Whether row i of the codes and row i of the prior draws (counted modulo the number of data)
            come from the same datum and so are not independent: with masks, or a prior that depends on the data.
    """

    data_size: int | None = None
    shared_data: bool = False


class Penalty(CallRepr, nn.Module):
    """An estimate of a divergence D(Q_Z, P_Z); subclasses define :meth:`estimate`.

    Example:
        >>> import torch
        >>> from pyro_wae.penalties import MMD
        >>> penalty = MMD()(torch.randn(100, 8), torch.randn(200, 8))
        >>> penalty.shape
        torch.Size([])
    """

    def forward(self, codes: Tensor, prior: Tensor, context: PenaltyContext | None = None) -> Tensor:
        """Estimates the divergence.

        Args:
            codes: Shape (n, d): a code a row, n >= 2. Or (K, n, d) for K particles of each datum, whose
                codes of one datum are not independent draws of Q_Z.
            prior: Shape (m, d): independent prior draws, m >= 2.
            context: How the rows were drawn; the default is independent rows of an unlimited number of data.

        Returns:
            A scalar, in the precision of the codes (float32 at least).

        Raises:
            ValueError: If a shape, dtype or device does not fit, or there are fewer than 2 rows.
        """
        check_codes(codes, prior)
        codes = codes[None] if codes.ndim == 2 else codes
        with torch.autocast(codes.device.type, enabled=False):
            value = self.estimate(at_least_float32(codes), at_least_float32(prior), context or PenaltyContext())
        return value.to(at_least_float32(codes).dtype)

    def estimate(self, codes: Tensor, prior: Tensor, context: PenaltyContext) -> Tensor:
        """Estimates the divergence from checked codes (K, n, d) and prior draws (m, d), outside autocast."""
        raise NotImplementedError


class FunctionPenalty(Penalty):
    """A plain function f(codes, prior) of tensors (n, d) and (m, d) with a scalar value, as a penalty.

    With several particles the function is called once for each, and the values are averaged, so that it
    never sees two codes of one datum.

    Raises:
        ValueError: When called, if the function's value is not a scalar tensor.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def estimate(self, codes: Tensor, prior: Tensor, context: PenaltyContext) -> Tensor:
        chunks = prior.chunk(len(codes)) if len(prior) % len(codes) == 0 else [prior] * len(codes)
        return torch.stack([self._call(particle, draws) for particle, draws in zip(codes, chunks, strict=True)]).mean()

    def _call(self, codes: Tensor, prior: Tensor) -> Tensor:
        value = self.function(codes, prior)
        if not isinstance(value, Tensor) or value.ndim != 0:
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"The penalty {self.function!r} must return a scalar tensor, found {found}. "
                "Reduce it over the codes, for instance by .mean()."
            )
        return value


def as_penalty(penalty: Penalty | Callable[[Tensor, Tensor], Tensor]) -> Penalty:
    """Makes a :class:`Penalty` of a function f(codes, prior).

    Raises:
        TypeError: If it cannot be called.
    """
    if isinstance(penalty, Penalty):
        return penalty
    if callable(penalty) and not isinstance(penalty, type):
        return FunctionPenalty(penalty)
    raise TypeError(
        f"penalty must be a pyro_wae.penalties.Penalty, a function f(codes, prior) or a dict of them by latent site, "
        f"found {penalty!r}. Write WAELoss(MMD()) or WAELoss(lambda codes, prior: ...)."
    )


def check_codes(codes: Tensor, prior: Tensor) -> None:
    """Raises ValueError unless codes (n, d) or (K, n, d) and prior draws (m, d) can be compared."""
    if codes.ndim not in (2, 3) or prior.ndim != 2 or codes.shape[-1] != prior.shape[-1]:
        raise ValueError(
            f"A penalty takes codes of shape (n, d), or (K, n, d) for K particles, and prior draws of shape (m, d); "
            f"found {tuple(codes.shape)} and {tuple(prior.shape)}. Write codes.flatten(1) to make rows."
        )
    if codes.shape[-2] < 2 or len(prior) < 2:
        raise ValueError(
            f"A penalty compares distributions and needs at least 2 data and 2 prior draws, found {codes.shape[-2]} "
            f"and {len(prior)}. Write DataLoader(..., drop_last=True) to leave out a last batch of one."
        )
    if codes.dtype != prior.dtype or not codes.is_floating_point():
        raise ValueError(
            f"Codes and prior draws must have one floating dtype, found {codes.dtype} and {prior.dtype}. "
            f"Make the model's prior with the data's dtype, as in dist.Normal(x.new_zeros(d), 1)."
        )
    if codes.device != prior.device:
        raise ValueError(
            f"Codes and prior draws must be on one device, found {codes.device} and {prior.device}. "
            f"Make the model's prior on the data's device, as in dist.Normal(x.new_zeros(d), 1)."
        )
