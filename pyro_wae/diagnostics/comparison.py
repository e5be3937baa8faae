"""How codes differ from prior draws: moments, direction of largest discrepancy, coverage. Plain tensors, no Pyro."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_wae._core.numerics import squared_distances
from pyro_wae._core.random_state import isolated_seed
from pyro_wae.penalties.sliced import MaxSlicedWasserstein, transport_along

FAR_QUANTILE = 0.99
"""A point is far from a sample if its nearest neighbour there is farther than this share of prior draws have theirs."""

OUTLIER_FACTOR, OUTLIER_DISTANCE = 2.0, 1.0
"""An outlier is so many times farther from the nearest prior draw than any prior draw is, and so many deviations away.
In few dimensions the outermost draws alone would be outliers by the first, and in many by the second."""

NEGLIGIBLE = 1e-6
"""A coordinate of the prior is constant if its deviation is below this share of its size, and a line if the variance is
below this share of that along the widest."""

BLOCK_ROWS = 1000


@dataclass(frozen=True)
class Yardstick:
    """Mean and standard deviation of the prior in each coordinate, by which codes and draws are measured.

    Args:
        mean: Shape (d,).
        spread: Shape (d,); 1 where the prior is constant.
    """

    mean: Tensor
    spread: Tensor

    @classmethod
    def of_draws(cls, prior: Tensor) -> Yardstick:
        """Measures prior draws of shape (m, d)."""
        spread = prior.std(0)
        constant = spread <= NEGLIGIBLE * prior.abs().amax(0)
        return cls(prior.mean(0), spread.where(~constant, 1.0))

    def measure(self, rows: Tensor) -> Tensor:
        """Rows (n, d) with the prior's mean as 0 and its standard deviation as 1 in each coordinate."""
        return (rows - self.mean) / self.spread


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Mean and covariance of codes beside the prior's.

    Args:
        mean: Mean of the codes less the prior's, in prior standard deviations, for each coordinate.
        spread: Standard deviation of the codes over the prior's, for each coordinate.
        prior_mean: The prior's mean.
        prior_spread: The prior's standard deviation.
        narrowest: Variance of the codes over the prior's along the line where that is smallest; None with fewer than
            two codes for each coordinate.
        narrowest_null: The same of a second set of prior draws.
        widest: The same where it is largest.
        widest_null: The same of a second set of prior draws.
        eigenvalue_ratio: Largest over smallest eigenvalue of the codes' covariance; None where that is singular.
        prior_eigenvalue_ratio: That of the prior's.
    """

    mean: tuple[float, ...]
    spread: tuple[float, ...]
    prior_mean: tuple[float, ...]
    prior_spread: tuple[float, ...]
    narrowest: float | None
    narrowest_null: float | None
    widest: float | None
    widest_null: float | None
    eigenvalue_ratio: float | None
    prior_eigenvalue_ratio: float | None


@dataclass(frozen=True, kw_only=True)
class WorstDirection:
    """The direction of largest discrepancy between codes and prior draws.

    Args:
        weights: Unit vector, in coordinates measured in prior standard deviations.
        distance: The Wasserstein distance W_2 along it, in prior standard deviations.
        distance_null: The same between two sets of prior draws, along their own direction of largest discrepancy.
    """

    weights: tuple[float, ...]
    distance: float
    distance_null: float


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Regions that the prior covers and the codes do not, and the reverse.

    Args:
        radius: The 0.99 quantile of the distances from prior draws to the nearest of a second set of them, in
            prior standard deviations.
        holes: Share of prior draws with no code within the radius; 0.01 are expected if codes match the prior.
        stray: Share of codes with no prior draw within the radius; 0.01 likewise.
        outliers: Codes that lie at least one prior standard deviation, and twice as far as any prior draw, from the
            nearest prior draw: their places in the data.
    """

    radius: float
    holes: float
    stray: float
    outliers: tuple[int, ...]


def moments(codes: Tensor, prior: Tensor, second: Tensor, yardstick: Yardstick) -> Moments:
    """Compares mean and covariance.

    Args:
        codes: Shape (n, d).
        prior: Prior draws, shape (n, d).
        second: As many more, for the sampling noise.
        yardstick: The prior's mean and standard deviation.
    """
    n, d = codes.shape
    x, y, null = (yardstick.measure(rows).double() for rows in (codes, prior, second))
    narrowest = widest = narrowest_null = widest_null = None
    if n > 2 * d:
        values, vectors = torch.linalg.eigh(_covariance(y))
        wide = values > NEGLIGIBLE * values[-1]
        whiten = vectors[:, wide] / values[wide].sqrt()
        ratios, null_ratios = (
            torch.linalg.eigvalsh(whiten.mT @ _covariance(rows) @ whiten).clamp(min=0) for rows in (x, null)
        )
        narrowest, widest = ratios[0].item(), ratios[-1].item()
        narrowest_null, widest_null = null_ratios[0].item(), null_ratios[-1].item()
    return Moments(
        mean=tuple(x.mean(0).tolist()),
        spread=tuple(x.std(0).tolist()),
        prior_mean=tuple(yardstick.mean.tolist()),
        prior_spread=tuple(yardstick.spread.tolist()),
        narrowest=narrowest,
        narrowest_null=narrowest_null,
        widest=widest,
        widest_null=widest_null,
        eigenvalue_ratio=_eigenvalue_ratio(codes),
        prior_eigenvalue_ratio=_eigenvalue_ratio(prior),
    )


def worst_direction(codes: Tensor, prior: Tensor, second: Tensor, yardstick: Yardstick, *, seed: int) -> WorstDirection:
    """Seeks the direction of largest discrepancy; arguments as of :func:`moments`.

    Source: Deshpande et al., "Max-Sliced Wasserstein Distance and its use for GANs", 2019, arXiv:1904.05877.
    """
    x, y, null = (yardstick.measure(rows) for rows in (codes, prior, second))
    seeker = MaxSlicedWasserstein(steps=30, restarts=8)
    with isolated_seed(seed, codes.device):
        weights, null_weights = seeker.search(x[None], y), seeker.search(null[None], y)
    # An eigenvector and its negative are one line: the sign is that in which the codes lie higher.
    weights = weights if (x.mean(0) - y.mean(0)) @ weights >= 0 else -weights
    return WorstDirection(
        weights=tuple(weights.tolist()),
        distance=transport_along(weights[None], x[None], y, 2).sqrt().item(),
        distance_null=transport_along(null_weights[None], null[None], y, 2).sqrt().item(),
    )


def coverage(codes: Tensor, prior: Tensor, second: Tensor, yardstick: Yardstick) -> tuple[Coverage, Tensor]:
    """Counts prior draws without codes and codes without prior draws; arguments as of :func:`moments`.

    Distances of nearest neighbours say little in many dimensions, where all are about equal: a hole is then seen only
    if it is wide.

    Returns:
        The shares, and for each prior draw whether it lies in a hole, shape (n,).
    """
    x, y, null = (yardstick.measure(rows) for rows in (codes, prior, second))
    expected = _nearest(null, y)
    radius, farthest = expected.quantile(FAR_QUANTILE).item(), expected.max().item()
    in_hole, from_prior = _nearest(y, x) > radius, _nearest(x, y)
    found = Coverage(
        radius=radius,
        holes=in_hole.double().mean().item(),
        stray=(from_prior > radius).double().mean().item(),
        outliers=tuple(torch.nonzero(from_prior > max(OUTLIER_FACTOR * farthest, OUTLIER_DISTANCE)).flatten().tolist()),
    )
    return found, in_hole


def _nearest(rows: Tensor, others: Tensor) -> Tensor:
    """The distance from each row to the nearest of the others."""
    return torch.cat([squared_distances(block, others).amin(1).sqrt() for block in rows.split(BLOCK_ROWS)])


def _covariance(rows: Tensor) -> Tensor:
    return torch.cov(rows.mT).reshape(rows.shape[1], rows.shape[1])


def _eigenvalue_ratio(rows: Tensor) -> float | None:
    values = torch.linalg.eigvalsh(_covariance(rows.double()))
    singular = values[0] <= torch.finfo(rows.dtype).eps * values[-1]
    return None if singular else (values[-1] / values[0]).item()
