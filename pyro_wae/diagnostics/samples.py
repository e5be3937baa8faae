"""What every test of codes against the prior starts with: two checked sets of rows, and random numbers of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["as_rows", "check_level", "isolated_seed", "new_generator", "prior_rows"]


def as_rows(codes: Tensor, name: str) -> Tensor:
    """Detaches rows of codes after checking that they are finite floats of shape (n, d) with n >= 2 and d >= 1.

    Raises:
        TypeError: If they are no tensor.
        ValueError: If shape, dtype or a value does not fit.
    """
    if not isinstance(codes, Tensor):
        raise TypeError(f"{name} must be a tensor of shape (n, d), found {codes!r}. Write torch.as_tensor({name}).")
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
    """Gives prior draws beside checked codes: the tensor that was given, or fresh draws of a distribution.

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
    if isinstance(prior_draws, bool) or not isinstance(prior_draws, int):
        raise TypeError(
            f"prior_draws must be a whole number of draws a code, found {prior_draws!r}. Write prior_draws=1."
        )
    if prior_draws < 1:
        raise ValueError(f"prior_draws must be at least 1, found {prior_draws}. Write prior_draws=1.")
    n, d = codes.shape
    if not isinstance(prior, Tensor):
        if isinstance(prior, type) or not callable(getattr(prior, "sample", None)):
            raise TypeError(
                f"prior must be draws of shape (m, d) or the distribution of one code, found {prior!r}. "
                f"Write prior=dist.Normal(torch.zeros({d}), 1.0).to_event(1)."
            )
        with isolated_seed(seed, codes.device):
            drawn = prior.sample((prior_draws * n,))
        if not isinstance(drawn, Tensor) or drawn.shape != (prior_draws * n, d):
            found = f"shape {tuple(drawn.shape)}" if isinstance(drawn, Tensor) else type(drawn).__name__
            raise ValueError(
                f"prior must be the distribution of one code of {d} numbers, but prior.sample(({prior_draws * n},)) "
                f"gave {found} in place of {(prior_draws * n, d)}. "
                f"Write prior=dist.Normal(torch.zeros({d}), 1.0).to_event(1)."
            )
        prior = drawn
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


def check_level(level: float) -> None:
    """Raises ValueError unless the level of a test is in (0, 1)."""
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), found {level!r}. Write level=0.05.")


def new_generator(seed: int) -> tuple[torch.Generator, int]:
    """Gives a generator, and a seed for :func:`isolated_seed`, that share no stream with each other or the seed itself.

    The stream of the seed itself is likely the one the codes came from: ``torch.manual_seed(0)`` at the top of a script
    must not make a test with ``seed=0`` draw the codes once more as prior draws, or permute them by their own values.

    Raises:
        TypeError: If the seed is no whole number.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be a whole number, found {seed!r}. Write seed=0.")
    root = torch.Generator().manual_seed(seed)
    own, other = torch.randint(2**62, (2,), generator=root, dtype=torch.int64).tolist()
    return torch.Generator().manual_seed(own), other


@contextmanager
def isolated_seed(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds what draws from torch's global state inside, and puts the state back as it was."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        # torch.manual_seed would reach the devices that are not put back.
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
