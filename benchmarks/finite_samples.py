"""What the transport penalties say of finite samples.

    python benchmarks/finite_samples.py

The figures that docstrings and docs state of values at Q_Z = P_Z, of the scale of the codes that has the lowest mean
penalty, of Sinkhorn's blur and of pooled particles come from here.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from harness import Benchmark, Report, made_by, table_of
from torch import Tensor
from torch.nn.functional import normalize

from pyro_wae.kernels import InverseMultiquadratic
from pyro_wae.penalties import (
    MMD,
    MaxSlicedWasserstein,
    Penalty,
    Sinkhorn,
    SlicedWasserstein,
    SphericalSlicedWasserstein,
)

Make = Callable[[], Penalty]

TRANSPORT: list[Make] = [SlicedWasserstein, MaxSlicedWasserstein, Sinkhorn, SphericalSlicedWasserstein]
DIMENSIONS = (8, 64)
SCALES = torch.linspace(0.2, 1.2, 21)
REFERENCE = "MMD(InverseMultiquadratic.multiscale())"
REFERENCE_WEIGHT = 100


def reference() -> Penalty:
    """The penalty that :data:`REFERENCE` names, with the kernels of the authors' code."""
    return MMD(InverseMultiquadratic.multiscale())


def law(make: Make) -> Callable[[Tensor], Tensor]:
    """What makes prior samples of normal ones: nothing, or on the sphere the division by their norm."""
    return (lambda z: normalize(z, dim=-1)) if make is SphericalSlicedWasserstein else (lambda z: z)


def mean_value(make: Make, n: int, d: int, batches: int, scale: float = 1.0) -> float:
    """The mean penalty of n prior samples, multiplied by a scale, against n others; the same draws for every scale."""
    torch.manual_seed(0)
    values = []
    with torch.no_grad():
        for _ in range(batches):
            codes, prior = law(make)(torch.randn(2, n, d))
            values.append(make()(scale * codes, prior).item())
    return sum(values) / batches


def best_scale(make: Make, n: int, d: int, batches: int) -> str:
    """The scale of the codes with the lowest mean penalty, by the parabola through the lowest points of a grid."""
    values = [mean_value(make, n, d, batches, scale) for scale in SCALES.tolist()]
    k = min(range(len(values)), key=values.__getitem__)
    if k in (0, len(values) - 1):
        return f"{'<' if k == 0 else '>'} {SCALES[k]:.1f}"
    low, middle, high = values[k - 1 : k + 2]
    return f"{SCALES[k] + (SCALES[1] - SCALES[0]) / 2 * (low - high) / (low - 2 * middle + high):.2f}"


def gradient_norm(make: Make, like: Make, n: int, d: int, batches: int) -> float:
    """Root mean square norm of the gradient at codes 0.2 + 1.2 N(0, I), in the place where ``like`` compares them."""
    torch.manual_seed(0)
    squares = []
    for _ in range(batches):
        codes, prior = (0.2 + 1.2 * torch.randn(n, d)).requires_grad_(), torch.randn(n, d)
        placed = law(like)(codes).detach().requires_grad_()
        (slope,) = torch.autograd.grad(make()(placed, law(like)(prior)), placed)
        if like is SphericalSlicedWasserstein:  # only what moves a code along the sphere
            slope = slope - (slope * placed).sum(1, keepdim=True) * placed
        squares.append(slope.square().sum().item())
    return math.sqrt(sum(squares) / batches)


def transport_row(make: Make, d: int, args: argparse.Namespace) -> dict[str, Any]:
    """One penalty in one dimension."""
    spherical = make is SphericalSlicedWasserstein
    weight = REFERENCE_WEIGHT * gradient_norm(reference, make, 100, d, args.batches)
    weight /= gradient_norm(make, make, 100, d, args.batches)
    return {
        "penalty": f"`{make.__name__}()`",
        "d": d,
        "value, n = 100": f"{mean_value(make, 100, d, args.batches):.2g}",
        f"value, n = {args.large}": f"{mean_value(make, args.large, d, args.large_batches):.2g}",
        "scale": "-" if spherical else best_scale(make, 100, d, args.batches),
        "weight": f"{weight:.2g}" if weight < REFERENCE_WEIGHT else f"{weight:.0f}",
    }


def blur_row(fraction: float, d: int, args: argparse.Namespace) -> dict[str, Any]:
    """One blur of Sinkhorn, in spreads sqrt(2 d), in one dimension."""

    def make() -> Penalty:
        return Sinkhorn(blur=fraction * math.sqrt(2 * d))

    shift, widths = torch.zeros(d), torch.ones(d)
    shift[0], widths[1], widths[2] = 1.0, 0.5, 1.5
    torch.manual_seed(0)
    cosines = []
    for _ in range(args.batches):
        noise = torch.randn(100, d)
        codes = (shift + widths * noise).requires_grad_()
        (slope,) = torch.autograd.grad(make()(codes, torch.randn(100, d)), codes)
        # The optimal map between the populations takes a code back to its noise.
        cosines.append(torch.cosine_similarity(slope.flatten(), (codes.detach() - noise).flatten(), dim=0).item())
    return {
        "d": d,
        "blur": f"{fraction:g}",
        "scale": best_scale(make, 100, d, args.batches),
        "cosine": f"{sum(cosines) / len(cosines):.2f}",
    }


def particle_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """SlicedWasserstein at Q_Z = P_Z for 4 particles of 100 data, d = 8, when their codes are independent or equal."""
    penalty, rows = SlicedWasserstein(), []
    for name, alike in (("independent", False), ("equal", True)):
        torch.manual_seed(0)
        sums = [0.0, 0.0, 0.0]
        for _ in range(args.batches):
            codes, prior = torch.randn(4, 100, 8), torch.randn(400, 8)
            if alike:
                codes = codes[:1].expand(4, -1, -1)
            quarters = [penalty(z, p).item() / 4 for z, p in zip(codes, prior.split(100), strict=True)]
            found = [penalty(codes.flatten(0, 1), prior).item(), penalty(codes, prior).item(), sum(quarters)]
            sums = [a + b / args.batches for a, b in zip(sums, found, strict=True)]
        columns = ("pooled", "averaged", "averaged, a quarter of the draws each")
        rows.append({"codes of a datum": name, **{c: f"{v:.3f}" for c, v in zip(columns, sums, strict=True)}})
    return rows


def page(report: Report) -> str:
    """The tables, what is in them, and the command."""
    options, tables = report["options"], {name: table_of(rows) for name, rows in report["tables"].items()}
    return f"""{made_by(report)}
Prior N(0, I), on the sphere the uniform law; n codes and n draws; means of
{options["batches"]} batches, or of {options["large_batches"]} at n = {options["large"]}.

{tables["transport"]}

- *value*: the mean penalty when Q_Z = P_Z.
- *scale*: that of the codes, over the prior's, for which the mean penalty is least, at n = 100.
- *weight*: {REFERENCE_WEIGHT} times the norm of the gradient of `{REFERENCE}` over that of the
  penalty, for 100 codes of 0.2 + 1.2 N(0, I), on the sphere divided by their norm.

`Sinkhorn` at n = 100 by its blur, in spreads of the prior (default 0.5). *cosine*: mean cosine of the gradient with
that of W_2^2 between the populations, for codes with one coordinate shifted by 1, one of width 0.5 and one of 1.5.

{tables["blur"]}

`SlicedWasserstein` when Q_Z = P_Z, for 4 particles of 100 data, d = 8, and 400 prior samples:

{tables["particles"]}
"""


BENCH = Benchmark(__file__, page, smoke={"batches": 1, "large": 200, "large_batches": 1, "blurs": [0.5]})
BENCH.option("--batches", type=int, default=40)
BENCH.option("--large", type=int, default=1000, help="codes in a large batch")
BENCH.option("--large-batches", type=int, default=10)
BENCH.option("--blurs", type=float, nargs="+", default=[0.1, 0.25, 0.5, 1.0], help="in spreads")


def main(argv: list[str] | None = None) -> None:
    """Measures and reports."""
    args = BENCH.start(argv)
    tables = {
        "transport": [transport_row(make, d, args) for make in TRANSPORT for d in DIMENSIONS],
        "blur": [blur_row(fraction, d, args) for d in DIMENSIONS for fraction in args.blurs],
        "particles": particle_rows(args),
    }
    BENCH.finish(BENCH.report(args, tables=tables))


if __name__ == "__main__":
    main()
