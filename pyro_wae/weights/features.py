"""Random features of a kernel, by which many batches are compared at the price of their means."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["RandomFeatures", "trace_of_squared_covariance"]

FACTORS = (0.2, 1.0, 5.0)
"""Squared lengths of the inverse multiquadratic kernels, in the mean squared distance of prior draws."""

LENGTHS = (0.05, 0.15, 0.5)
"""Lengths of the Laplace kernels, in the root of half that distance."""

LEAST_SQUARE = 1e-4
"""Bounds the frequencies: phases of float32 have few digits beyond."""


class RandomFeatures:
    """Features phi with ``phi(x) . phi(y)`` near the mean of six kernels, and 1 for x = y.

    Three are inverse multiquadratic, C / (C + |x - y|^2) with C the mean squared distance of prior draws times 0.2, 1 and
    5, and detect that codes lie elsewhere. Three are Laplace kernels, exp(-|x - y| / s) with s^2 half that distance times
    the squares of 0.05, 0.15 and 0.5, and detect gaps between codes. Each is a mixture of Gaussians over their rate g, so
    its frequencies are Normal with the random variance 2 g: g C is exponential, and 1 / (4 g s^2) has a Gamma
    distribution of shape 1/2.

    Args:
        widths: Shape (F,): the standard deviation of each frequency's components.
        frequencies: Shape (d, F).

    Source: Rahimi, Recht, "Random Features for Large-Scale Kernel Machines", NeurIPS 2007.
    """

    def __init__(self, widths: Tensor, frequencies: Tensor) -> None:
        self.widths = widths
        self.frequencies = frequencies

    @classmethod
    def draw(cls, prior: Tensor, count: int, seed: int) -> RandomFeatures:
        """Draws the frequencies from a generator of their own.

        Args:
            prior: Prior draws, shape (m, d) with m >= 2, which give the length.
            count: The number F of frequencies; there are twice as many features.
            seed: Of the generator.
        """
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.empty(count - count // 2).exponential_(generator=generator) / _cycled(FACTORS, count - count // 2)
        # The square of a standard Normal is twice such a Gamma variable; s^2 is half of the unit.
        square = torch.randn(count // 2, generator=generator).square().clamp(min=LEAST_SQUARE)
        fine = 1 / (square * _cycled(LENGTHS, count // 2).square())
        # Draws that coincide have no spread; any length then detects codes that are elsewhere.
        mean_square = (2 * prior.float().var(0).sum()).clamp(min=torch.finfo(torch.float32).tiny)
        widths = (2 * torch.cat([coarse, fine])).sqrt().to(prior.device) / mean_square.sqrt()
        return cls(widths, widths.new_empty(0, count)).extend(prior.shape[1], seed)

    def extend(self, size: int, seed: int) -> RandomFeatures:
        """The same features for codes of more numbers; on codes that are filled up with zeros they agree.

        Args:
            size: The number d of numbers in a code, no smaller than now.
            seed: Of the generator of what is added.
        """
        generator = torch.Generator().manual_seed(seed + len(self.frequencies))
        added = torch.randn(size - len(self.frequencies), len(self.widths), generator=generator).to(self.widths)
        return RandomFeatures(self.widths, torch.cat([self.frequencies, added * self.widths]))

    def of(self, x: Tensor) -> Tensor:
        """Maps rows (n, d) to features (n, 2 F) in float32, where d may be smaller than that of the frequencies."""
        phases = x.float() @ self.frequencies[: x.shape[1]]
        return torch.cat([phases.cos(), phases.sin()], 1) / math.sqrt(self.frequencies.shape[1])


def _cycled(values: tuple[float, ...], count: int) -> Tensor:
    return torch.tensor(values).repeat(math.ceil(count / len(values)))[:count]


def trace_of_squared_covariance(features: Tensor) -> Tensor:
    """Estimates tr(C^2) of the features' covariance C without bias, from two halves of (n, F) independent rows.

    It is E h(p, p')^2 of the kernel that the features stand for, centred.
    """
    halves = features.tensor_split(2)
    first, second = (half - half.mean(0) for half in halves)
    # tr(A^T A B^T B) = |A B^T|^2, which is (n/2)^2 numbers in place of F^2.
    return (first @ second.T).square().sum() / ((len(first) - 1) * (len(second) - 1))
