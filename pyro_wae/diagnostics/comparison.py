"""The codes of one latent site, or of all together, against the prior: tests, moments, direction, coverage, noise."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_wae._core.random_state import isolated_seed
from pyro_wae.diagnostics.classifier import ClassifierTest, classifier_test
from pyro_wae.diagnostics.gathering import Gathered
from pyro_wae.diagnostics.hypothesis_test import new_generator
from pyro_wae.diagnostics.two_sample import TwoSampleTest, two_sample_test
from pyro_wae.penalties.sliced import MaxSlicedWasserstein, transport_along

FAR_QUANTILE = 0.99
"""A point is far from a set if its nearest neighbour there is farther than this share of prior samples have theirs."""

OUTLIER_FACTOR, OUTLIER_DISTANCE = 2.0, 1.0
"""An outlier is so many times farther from the nearest prior sample than any of these is, and so many deviations away.
In few dimensions the outermost samples alone would be outliers by the first, and in many by the second."""

NEGLIGIBLE = 1e-6
"""A direction of the prior is constant if its variance is below this share of that along the widest."""

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
        """Measures prior samples of shape (m, d)."""
        spread = prior.std(0)
        constant = spread <= 8 * torch.finfo(prior.dtype).eps * prior.abs().amax(0)
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
            two codes for each coordinate, or under a constant prior.
        narrowest_null: The same of a second set of prior samples.
        widest: The same where it is largest.
        widest_null: The same of a second set of prior samples.
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
    """The direction of largest discrepancy between codes and prior samples.

    Args:
        weights: Unit vector, in coordinates measured in prior standard deviations.
        distance: The Wasserstein distance W_2 along it, in prior standard deviations.
        distance_null: The same between two sets of prior samples, along their own direction of largest discrepancy.
    """

    weights: tuple[float, ...]
    distance: float
    distance_null: float


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Regions that the prior covers and the codes do not, and the reverse.

    Args:
        radius: The 0.99 quantile of the distances from prior samples to the nearest of a second set of them, in
            prior standard deviations.
        holes: Share of prior samples with no code within the radius; 0.01 are expected if codes match the prior, and
            more of few prior samples, because the quantile of few distances is uncertain.
        stray: Share of codes with no prior sample within the radius; 0.01 likewise.
        outliers: Codes that lie at least one prior standard deviation, and twice as far as any prior sample, from the
            nearest prior sample: their places in the data.
    """

    radius: float
    holes: float
    stray: float
    outliers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Noise:
    """How much of the codes' variance is the encoder's noise and not the data's.

    Args:
        share: E Var(z | x) over Var(z), summed over coordinates: 0 for a deterministic encoder, 1 for codes that
            do not depend on the data.
        by_coordinate: The same for each coordinate.
    """

    share: float
    by_coordinate: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The codes of one site, or of all together, against the prior.

    Args:
        site: The site's name, or ``"joint"``.
        two_sample: The kernel two-sample test.
        classifier: The classifier test.
        moments: Mean and covariance.
        direction: The direction of largest discrepancy.
        coverage: Holes and strays.
        noise: The encoder's.
        coordinates: The name of each coordinate of a code: its site and index, as ``"z[0]"``.
    """

    site: str
    two_sample: TwoSampleTest
    classifier: ClassifierTest
    moments: Moments
    direction: WorstDirection
    coverage: Coverage
    noise: Noise
    coordinates: tuple[str, ...]

    @property
    def size(self) -> int:
        """How many numbers a code has."""
        return len(self.moments.mean)

    def loadings(self) -> str:
        """The largest weights of the direction of largest discrepancy, as text."""
        weights = self.direction.weights
        ranked = sorted(range(len(weights)), key=lambda i: -abs(weights[i]))
        large = [i for i in ranked[:4] if abs(weights[i]) >= 0.1] or ranked[:1]
        return " ".join(f"{weights[i]:+.2f} {self.coordinates[i]}" for i in large) + " ..." * (len(ranked) > len(large))


def compare_site(
    name: str, gathered: Gathered, columns: slice, *, test_codes: int, permutations: int, level: float, seed: int
) -> tuple[Comparison, Tensor]:
    """Compares the columns of one site.

    Returns:
        The comparison, and for each prior sample whether it lies in a hole.
    """
    codes, prior, second = (x[:, columns] for x in (gathered.codes, gathered.prior, gathered.second))
    yardstick = Yardstick.of_draws(second)
    x, y = yardstick.measure(codes), yardstick.measure(prior)
    order = torch.randperm(len(x), generator=new_generator(seed)[0], device="cpu").to(x.device)
    mine, theirs = order, order
    if gathered.paired:
        # A code and a prior sample of the same datum are not independent: each datum gives the one or the other.
        mine, theirs = order[: len(order) // 2], order[len(order) // 2 :]
    found, in_hole = coverage(codes, prior, second, yardstick)
    outliers = tuple(gathered.positions[list(found.outliers)].tolist())
    coordinates = [f"{site}[{i}]" for site, own in gathered.columns.items() for i in range(own.stop - own.start)]
    comparison = Comparison(
        site=name,
        two_sample=two_sample_test(
            x[mine[:test_codes]], y[theirs[:test_codes]], permutations=permutations, level=level, seed=seed
        ),
        classifier=classifier_test(x[mine], y[theirs], level=level, seed=seed),
        moments=moments(codes, prior, second, yardstick),
        direction=worst_direction(codes, prior, second, yardstick, seed=seed),
        coverage=dataclasses.replace(found, outliers=outliers),
        noise=_noise(codes, gathered.noise[columns]),
        coordinates=tuple(coordinates[columns]),
    )
    return comparison, in_hole


def _noise(codes: Tensor, within: Tensor) -> Noise:
    total = codes.var(0)
    shares = (within / total).where(within > 0, 0.0).clamp(max=1)
    share = (within.sum() / total.sum()).item() if within.any() else 0.0
    return Noise(share=min(share, 1.0), by_coordinate=tuple(shares.tolist()))


def moments(codes: Tensor, prior: Tensor, second: Tensor, yardstick: Yardstick) -> Moments:
    """Compares mean and covariance.

    Args:
        codes: Shape (n, d).
        prior: Prior samples, shape (n, d).
        second: As many more, for the sampling noise.
        yardstick: The prior's mean and standard deviation.
    """
    n, d = codes.shape
    x, y, null = (yardstick.measure(rows).double() for rows in (codes, prior, second))
    narrowest = widest = narrowest_null = widest_null = None
    if n > 2 * d and bool((prior != prior[0]).any()):
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
    """Counts prior samples without codes and codes without prior samples; arguments as of :func:`moments`.

    Distances of nearest neighbours say little in many dimensions, where all are about equal: a hole is then seen only
    if it is wide.

    Returns:
        The shares, and for each prior sample whether it lies in a hole, shape (n,).
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
    # By a product of matrices equal rows would have a distance of rounding, and the radius may be 0 where rows repeat.
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cat([torch.cdist(block, others, compute_mode=exact).amin(1) for block in rows.split(BLOCK_ROWS)])


def _covariance(rows: Tensor) -> Tensor:
    return torch.cov(rows.mT).reshape(rows.shape[1], rows.shape[1])


def _eigenvalue_ratio(rows: Tensor) -> float | None:
    values = torch.linalg.eigvalsh(_covariance(rows.double()))
    singular = values[0] <= torch.finfo(rows.dtype).eps * values[-1]
    return None if singular else (values[-1] / values[0]).item()
