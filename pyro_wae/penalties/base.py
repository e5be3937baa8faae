"""The base class of penalties, sums and multiples of them, and plain functions as penalties."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pyro_wae._core import checks
from pyro_wae._core.repr import CallRepr
from pyro_wae._core.rows import at_least_float32
from pyro_wae.kernels import Kernel
from pyro_wae.penalties.context import PenaltyContext, join, share_out


class Penalty(CallRepr, nn.Module):
    """An estimate of a divergence D(Q_Z, P_Z); subclasses define :meth:`~Penalty.estimate`.

    Example:
        >>> import torch
        >>> from pyro_wae.penalties import MMD
        >>> penalty = MMD()(torch.randn(100, 8), torch.randn(200, 8))
        >>> penalty.shape
        torch.Size([])
    """

    __array_ufunc__ = None  # numpy's numbers then leave `number * penalty` to __rmul__

    needs_prior_draws = True
    """Whether :meth:`estimate` reads the prior samples; without, a prior need not be sampled at all."""

    reads_condition = False
    """Whether :meth:`estimate` reads the context's condition itself. All others that read prior samples receive the
    condition beside codes and prior samples, as further columns, and no condition in the context."""

    accepts_condition = True
    """Whether it can compare codes beside what they are conditional on."""

    def prepare(self, codes: Tensor) -> None:
        """Makes what depends on the size d of a code, such as a discriminator; called before :meth:`estimate`.

        Args:
            codes: Shape (K, n, d).
        """

    def fit(self, prior: Tensor) -> None:
        """Sets every length that is still unset, from prior samples of shape (m, d); by default, of the parts."""
        for part in self.children():
            if isinstance(part, Penalty):
                part.fit(prior)

    def prepare_sites(self, codes: Tensor, sites: Mapping[str, slice] | None) -> None:
        """Calls :meth:`prepare`, for codes whose latent sites may be known by their columns."""
        self.prepare(codes)

    def beside(self, codes: Tensor, condition: Tensor | None) -> Tensor:
        """Codes (K, n, d) with c more columns for a condition (n, c), for what depends on their number alone.

        Raises:
            ValueError: If the penalty accepts no condition, or it has another shape.
        """
        if condition is None:
            return codes
        for part in self.modules():
            if isinstance(part, Penalty) and not part.accepts_condition:
                raise ValueError(
                    f"{type(part).__name__} accepts no condition: it compares codes without what they are conditional "
                    "on. Take another penalty, such as MMD()."
                )
        if condition.ndim != 2 or (not condition.is_floating_point() and condition.shape[1] != 1):
            raise ValueError(
                f"A condition has shape (n, c), and (n, 1) if it holds labels, found {tuple(condition.shape)} of "
                f"{condition.dtype}. Write labels[:, None], or y.float().flatten(1) for what has a distance."
            )
        return torch.cat([codes, codes.new_zeros(*codes.shape[:-1], condition.shape[1])], dim=-1)

    def forward(self, codes: Tensor, prior: Tensor | None = None, context: PenaltyContext | None = None) -> Tensor:
        """Estimates the divergence.

        Args:
            codes: Shape (n, d): a code a row, n >= 2. Or (K, n, d) for K particles of each datum, whose
                codes of one datum are not independent draws of Q_Z.
            prior: Shape (m, d): independent prior samples, m >= 2. None where :attr:`needs_prior_draws` is False.
            context: How the rows were drawn; the default is independent rows of an unlimited number of data.

        Returns:
            A scalar, in the precision of the codes (float32 at least).

        Raises:
            TypeError: If codes or prior are not tensors, or the context is not a :class:`PenaltyContext`.
            ValueError: If a shape, dtype or device does not fit, or rows are missing or fewer than 2.
        """
        if not (isinstance(codes, Tensor) and isinstance(prior, Tensor | None)):
            raise TypeError(
                f"codes and prior must be tensors, of shapes (n, d) and (m, d), found {type(codes).__name__} and "
                f"{type(prior).__name__}. Write penalty(torch.as_tensor(codes), torch.as_tensor(prior))."
            )
        context = PenaltyContext() if context is None else context
        if prior is None:
            if self.needs_prior_draws:
                raise ValueError(
                    f"{self!r} compares codes with prior samples, found none. Write penalty(codes, prior)."
                )
            prior = codes.new_empty(2, codes.shape[-1])
        if not isinstance(context, PenaltyContext):
            raise TypeError(
                f"context must be a PenaltyContext, found {context!r}. Write PenaltyContext(data_size=60000)."
            )
        # Under autocast an encoder may give half precision where the prior is float32: they are compared in float32.
        codes, prior = at_least_float32(codes), at_least_float32(prior)
        check_codes(codes, prior)
        codes = codes[None] if codes.ndim == 2 else codes
        with torch.inference_mode(False):  # what is made there could never be trained
            self.prepare_sites(self.beside(codes, context.condition), context.sites)
        with torch.autocast(codes.device.type, enabled=False):
            value = self.estimate_with_condition(codes, prior, context)
        return value.to(codes.dtype)

    def estimate_with_condition(self, codes: Tensor, prior: Tensor, context: PenaltyContext) -> Tensor:
        """What :meth:`estimate` returns for codes and prior samples joined with the condition if the context has one.

        Raises:
            ValueError: If the condition is made of labels, and the penalty needs numbers.
        """
        condition, scale = context.condition, context.condition_scale
        if condition is not None and self.needs_prior_draws and not self.reads_condition:
            if not condition.is_floating_point():
                raise ValueError(
                    f"{type(self).__name__} compares rows of numbers, and the condition holds labels "
                    f"({condition.dtype}). Give it torch.nn.functional.one_hot(labels, classes).float() as the "
                    "condition, or write MMD(), which compares labels by equality."
                )
            codes, prior, context = join(codes, prior, context, condition if scale is None else condition * scale)
        return self.estimate(codes, prior, context)

    def estimate(self, codes: Tensor, prior: Tensor, context: PenaltyContext) -> Tensor:
        """Estimates the divergence from checked codes (K, n, d) and prior samples (m, d), outside autocast."""
        raise NotImplementedError(f"{type(self).__name__} is no penalty yet. Define estimate(codes, prior, context).")

    def __add__(self, other: Penalty) -> Penalty:
        return SumPenalty(self, other) if isinstance(other, Penalty) else NotImplemented

    def __rmul__(self, factor: float) -> Penalty:
        return ScaledPenalty(self, factor) if checks.is_number(factor) else NotImplemented

    __mul__ = __rmul__


class SumPenalty(Penalty):
    """The sum of penalties, usually written with ``+``: ``MMD() + 0.1 * SlicedWasserstein()``.

    Raises:
        TypeError: If one of them is not a penalty.
        ValueError: If there is none.
    """

    reads_condition = True

    def __init__(self, *penalties: Penalty) -> None:
        super().__init__()
        write = "MMD() + SlicedWasserstein()"
        if not penalties:
            raise ValueError(f"SumPenalty takes one of its penalties or more, found none. Write {write}.")
        self.penalties = nn.ModuleList(
            checks.instance("Each of SumPenalty's penalties", penalty, Penalty, "a penalty", write=write)
            for penalty in penalties
        )
        self.needs_prior_draws = any(penalty.needs_prior_draws for penalty in penalties)

    def fit(self, prior: Tensor) -> None:
        for penalty in self.parts():
            penalty.fit(prior)

    def prepare_sites(self, codes: Tensor, sites: Mapping[str, slice] | None) -> None:
        for penalty in self.parts():
            penalty.prepare_sites(codes, sites)

    def estimate(self, codes: Tensor, prior: Tensor, context: PenaltyContext) -> Tensor:
        return functools.reduce(
            operator.add, (part.estimate_with_condition(codes, prior, context) for part in self.parts())
        )

    def parts(self) -> list[Penalty]:
        """The penalties that are added."""
        return [penalty for penalty in self.penalties if isinstance(penalty, Penalty)]

    def __repr__(self) -> str:
        return f"({' + '.join(map(repr, self.penalties))})"


class ScaledPenalty(Penalty):
    """A penalty times a number >= 0, usually written ``0.1 * penalty``.

    Raises:
        TypeError: If one of them is of another kind.
        ValueError: If the number is negative or not finite.
    """

    reads_condition = True

    def __init__(self, penalty: Penalty, factor: float) -> None:
        super().__init__()
        self.penalty = checks.instance("ScaledPenalty's penalty", penalty, Penalty, "a penalty", write="0.1 * MMD()")
        self.factor = checks.number("A penalty's factor", factor, least=0, write=f"0.1 * {penalty!r}")
        self.needs_prior_draws = penalty.needs_prior_draws

    def prepare_sites(self, codes: Tensor, sites: Mapping[str, slice] | None) -> None:
        self.penalty.prepare_sites(codes, sites)

    def estimate(self, codes: Tensor, prior: Tensor, context: PenaltyContext) -> Tensor:
        return self.factor * self.penalty.estimate_with_condition(codes, prior, context)

    def __repr__(self) -> str:
        return f"{self.factor} * {self.penalty!r}"


class FunctionPenalty(Penalty):
    """A plain function f(codes, prior) of tensors (n, d) and (m, d) with a scalar value, as a penalty.

    With several particles the function is called once for each, never with two codes of one datum, and the values are
    averaged.

    Raises:
        TypeError: If it cannot be called.
        ValueError: When called, if the function's value is not a scalar tensor.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        what = "a function of codes (n, d) and prior samples (m, d) with a scalar value"
        self.function = checks.function(
            "FunctionPenalty's function", function, what, write="FunctionPenalty(lambda codes, prior: ...)"
        )

    def estimate(self, codes: Tensor, prior: Tensor, context: PenaltyContext) -> Tensor:
        shares = share_out(prior, codes, context)
        return torch.stack([self._call(particle, draws) for particle, draws in zip(codes, shares, strict=True)]).mean()

    def _call(self, codes: Tensor, prior: Tensor) -> Tensor:
        value = self.function(codes, prior)
        is_tensor = isinstance(value, Tensor)
        if not is_tensor or value.ndim != 0 or not value.is_floating_point() or value.is_meta:
            of = f" of {value.dtype} on {value.device}" if is_tensor and value.ndim == 0 else ""
            found = f"shape {tuple(value.shape)}{of}" if is_tensor else type(value).__name__
            raise ValueError(
                f"The penalty {self.function!r} must return a scalar tensor of floats, found {found}. "
                "Reduce it over the codes: write ....mean()."
            )
        return value


def as_penalty(penalty: Penalty | Callable[[Tensor, Tensor], Tensor]) -> Penalty:
    """Makes a :class:`Penalty` of a function f(codes, prior).

    Raises:
        TypeError: If it cannot be called.
    """
    if isinstance(penalty, Penalty):
        return penalty
    if callable(penalty) and not isinstance(penalty, type | Kernel):
        return FunctionPenalty(penalty)
    raise TypeError(
        f"penalty must be a pyro_wae.penalties.Penalty, a function f(codes, prior) or a dict of them by latent site, "
        f"found {penalty!r}. Write WAELoss(MMD()), WAELoss(MMD(kernel)) or WAELoss(lambda codes, prior: ...)."
    )


def check_codes(codes: Tensor, prior: Tensor) -> None:
    """Raises ValueError unless codes (n, d) or (K, n, d) and prior samples (m, d) can be compared."""
    if codes.layout != torch.strided or prior.layout != torch.strided:
        raise ValueError(
            f"Codes and prior samples must be dense, found {codes.layout} and {prior.layout}. Write codes.to_dense()."
        )
    is_empty = 0 in (*codes.shape[:-2], *codes.shape[-1:])
    if codes.ndim not in (2, 3) or prior.ndim != 2 or codes.shape[-1] != prior.shape[-1] or is_empty:
        raise ValueError(
            f"A penalty takes codes of shape (n, d), or (K, n, d) for K particles, and prior samples of shape (m, d); "
            f"found {tuple(codes.shape)} and {tuple(prior.shape)}. Write codes.flatten(1) to make rows of one d."
        )
    if codes.shape[-2] < 2 or len(prior) < 2:
        raise ValueError(
            f"A penalty compares distributions and needs at least 2 data and 2 prior samples, found {codes.shape[-2]} "
            f"and {len(prior)}. Write DataLoader(..., drop_last=True) to leave out a last batch of one."
        )
    if codes.dtype != prior.dtype or not codes.is_floating_point():
        raise ValueError(
            f"Codes and prior samples must have one floating dtype, found {codes.dtype} and {prior.dtype}. "
            f"Make the model's prior with the data's dtype, as in dist.Normal(x.new_zeros(d), 1)."
        )
    if codes.device != prior.device:
        raise ValueError(
            f"Codes and prior samples must be on one device, found {codes.device} and {prior.device}. "
            f"Make the model's prior on the data's device, as in dist.Normal(x.new_zeros(d), 1)."
        )
