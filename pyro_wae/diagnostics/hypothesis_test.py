"""What the tests of codes against the prior have in common: checked rows, random numbers of their own, and a result."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_wae._core.checks import whole
from pyro_wae._core.distributions import drawn
from pyro_wae._core.random_state import isolated_seed


@dataclass(frozen=True, kw_only=True)
class HypothesisTest:
    """The result of a test of the null hypothesis that codes are samples of the prior.

    Args:
        p_value: The probability, under the null, of a statistic at least as extreme as the observed one.
        level: Level at which the test was to reject.
    """

    p_value: float
    level: float

    @property
    def rejected(self) -> bool:
        """Whether codes and prior are distinguishable at the level."""
        return self.p_value <= self.level

    def to_dict(self) -> dict[str, Any]:
        """All fields and ``rejected``, as numbers, strings and booleans that JSON takes."""
        return {**dataclasses.asdict(self), "rejected": self.rejected}

    def _sentence(self, found: str) -> str:
        verdict = "rejected" if self.rejected else "not rejected"
        return f"codes = prior {verdict} at level {self.level:g}: p = {self.p_value:.3g}, {found}"


def as_rows(codes: Tensor, name: str) -> Tensor:
    """Detaches rows of codes after checking that they are finite floats of shape (n, d) with n >= 2 and d >= 1.

    Raises:
        TypeError: If they are no tensor.
        ValueError: If shape, dtype or a value does not fit.
    """
    if not isinstance(codes, Tensor):
        raise TypeError(f"{name} must be a tensor of shape (n, d), found {codes!r}. Write torch.as_tensor({name}).")
    if codes.layout != torch.strided or codes.device.type == "meta":
        raise ValueError(
            f"{name} must be a dense tensor with values, found layout {codes.layout} on {codes.device}. Write "
            f"{name}.to_dense()."
        )
    if codes.ndim != 2:
        particles = f" Take one particle of each datum, as in {name}[0]: those of one datum are not independent."
        raise ValueError(
            f"{name} must have shape (n, d), an independent draw a row, found {tuple(codes.shape)}. Write "
            f"{name}.flatten(1) to make rows, or {name}[:, None] of single numbers.{particles * (codes.ndim == 3)}"
        )
    if len(codes) < 2 or codes.shape[1] < 1:
        raise ValueError(
            f"{name} must have at least 2 rows of at least 1 number, found shape {tuple(codes.shape)}. Join the "
            f"batches of a data set first: torch.cat(batches)."
        )
    if not codes.is_floating_point():
        raise ValueError(f"{name} must be floats, found {codes.dtype}. Write {name}.float().")
    rows = codes.detach()
    broken = int((~torch.isfinite(rows)).sum())
    if broken:
        raise ValueError(
            f"{name} must be finite, but {broken} of {rows.numel()} numbers are NaN or infinite. Leave out their rows, "
            f"if that is right: {name}[{name}.isfinite().all(1)]."
        )
    return rows


def prior_rows(codes: Tensor, prior: Tensor | Any, *, prior_draws: int, seed: int) -> Tensor:
    """Prior samples beside checked codes: the tensor that was given, or fresh draws of a distribution.

    Args:
        codes: Shape (n, d).
        prior: Shape (m, d), or the distribution of one code: anything with ``sample(shape)``.
        prior_draws: Draws of a distribution for each code.
        seed: Seed of these draws.

    Returns:
        Shape (m, d), in the dtype and on the device of the codes.

    Raises:
        TypeError: If the prior is neither, or ``prior_draws`` is no whole number.
        ValueError: If shape, dtype or device does not fit, or ``prior_draws`` is less than 1.
    """
    prior_draws = whole("prior_draws", prior_draws)
    n, d = codes.shape
    if not isinstance(prior, Tensor):
        if isinstance(prior, type) or not callable(getattr(prior, "sample", None)):
            raise TypeError(
                f"prior must be draws of shape (m, d) or the distribution of one code, found {prior!r}. "
                f"Write prior=dist.Normal(torch.zeros({d}), 1.0).to_event(1)."
            )
        with isolated_seed(seed, codes.device):
            draws = drawn(prior, prior_draws * n)
        if not isinstance(draws, Tensor) or draws.shape != (prior_draws * n, d):
            found = f"shape {tuple(draws.shape)}" if isinstance(draws, Tensor) else type(draws).__name__
            raise ValueError(
                f"prior must be the distribution of one code of {d} numbers, but prior.sample(({prior_draws * n},)) "
                f"gave {found} in place of {(prior_draws * n, d)}. "
                f"Write prior=dist.Normal(torch.zeros({d}), 1.0).to_event(1)."
            )
        prior = draws
    if prior.dtype != codes.dtype or prior.device != codes.device:
        raise ValueError(
            f"codes and prior must have one dtype and device, found {codes.dtype} on {codes.device} and {prior.dtype} "
            f"on {prior.device}. Make it like the codes, as in dist.Normal(codes.new_zeros({d}), 1).to_event(1), "
            "or write codes.to(prior)."
        )
    draws = as_rows(prior, "prior")
    if draws.shape[1] != d:
        raise ValueError(
            f"codes and prior must have rows of one length, found shapes {(n, d)} and {tuple(draws.shape)}. "
            "Draw the prior of the same latent sites."
        )
    return draws


def new_generator(seed: int) -> tuple[torch.Generator, int]:
    """A generator and a seed for :func:`isolated_seed`, without a stream in common with each other or the seed.

    The stream of the seed itself is likely the one the codes came from: ``torch.manual_seed(0)`` at the top of a script
    must not make a test with ``seed=0`` draw the codes once more as prior samples, or permute them by their own values.

    Raises:
        TypeError: If the seed is no whole number.
    """
    root = torch.Generator().manual_seed(whole("seed", seed, least=-(2**63), most=2**63 - 1, write="seed=0"))
    own, other = torch.randint(2**62, (2,), generator=root, dtype=torch.int64, device="cpu").tolist()
    return torch.Generator().manual_seed(own), other
