"""The codes of one latent site, or of all together, against the prior."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_wae.diagnostics.classifier import ClassifierTest, classifier_test
from pyro_wae.diagnostics.comparison import (
    Coverage,
    Moments,
    WorstDirection,
    Yardstick,
    coverage,
    moments,
    worst_direction,
)
from pyro_wae.diagnostics.gathering import Gathered
from pyro_wae.diagnostics.hypothesis_test import new_generator
from pyro_wae.diagnostics.two_sample import TwoSampleTest, two_sample_test


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
        coordinates: What each number of a code is called: ``"z[0]"``, its site and its place there.
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
        The comparison, and for each prior draw whether it lies in a hole.
    """
    codes, prior, second = (x[:, columns] for x in (gathered.codes, gathered.prior, gathered.second))
    yardstick = Yardstick.of_draws(second)
    x, y = yardstick.measure(codes), yardstick.measure(prior)
    order = torch.randperm(len(x), generator=new_generator(seed)[0], device="cpu").to(x.device)
    mine, theirs = order, order
    if gathered.paired:
        # A code and a prior draw of the same datum are not independent: each datum gives the one or the other.
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
