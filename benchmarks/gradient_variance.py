"""How much noise closed-form kernel means take out of the gradient of MMD^2.

    python benchmarks/gradient_variance.py

The gradient of ``MMD(kernel, closed_form=True)`` has the noise of the codes alone; with ``closed_form=False`` that of
the prior samples is added, and more draws for each code (``WAELoss(..., prior_draws=4)``) lower it. Measured are the
variance given the codes, and the total variance, with fresh codes, of the gradient by the mean of an encoder.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from harness import Benchmark, Report, made_by, progress, table
from torch import Tensor

from pyro_wae.kernels import Gaussian, InverseMultiquadratic, Kernel
from pyro_wae.penalties import MMD, PenaltyContext

SHIFT, SCALE = 0.2, 1.2

# The lengths that are taken from the prior N(0, I), given here, so that every estimate has the very same kernel.
KERNELS: dict[str, Callable[[int], Kernel]] = {
    "Gaussian": lambda d: Gaussian(bandwidth=math.sqrt(d)),
    "7-scale IMQ": lambda d: InverseMultiquadratic.multiscale(bandwidth=math.sqrt(2.0 * d)),
}


def estimates(kernel: Kernel, zdim: int, draws: list[int]) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The penalties to compare, as functions of codes (n, d) and max(draws) n prior samples."""
    prior = dist.Normal(torch.zeros(zdim), 1.0).to_event(1)
    context = PenaltyContext(prior=lambda: prior)
    exact, sampled = MMD(kernel, closed_form=True), MMD(kernel, closed_form=False)

    def with_draws(count: int) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda codes, prior: sampled(codes, prior[: count * len(codes)], context)

    functions = {f"False, prior_draws={count}": with_draws(count) for count in draws}
    return {"True": lambda codes, prior: exact(codes, prior, context), **functions}


def spread(gradients: list[Tensor]) -> float:
    """The trace of the covariance of some gradients, from their scatter."""
    return torch.stack(gradients).double().flatten(1).var(0).sum().item()


def measure(name: str, zdim: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures one kernel in one dimension."""
    pyro.set_rng_seed(0)
    functions = estimates(KERNELS[name](zdim), zdim, args.prior_draws)
    given: dict[str, list[Tensor]] = {key: [] for key in functions}
    total: dict[str, list[Tensor]] = {key: [] for key in functions}
    seconds: dict[str, list[float]] = {key: [] for key in functions}
    fixed = (SHIFT + SCALE * torch.randn(args.codes, zdim)).requires_grad_()
    for _ in progress(range(args.repeats), f"{name}, d = {zdim}"):
        mean = torch.full((zdim,), SHIFT, requires_grad=True)
        fresh = mean + SCALE * torch.randn(args.codes, zdim)
        prior = torch.randn(max(args.prior_draws) * args.codes, zdim)
        for key, function in functions.items():
            start = time.perf_counter()
            given[key].append(torch.autograd.grad(function(fixed, prior), fixed)[0])
            seconds[key].append(time.perf_counter() - start)
            total[key].append(torch.autograd.grad(function(fresh, prior), mean, retain_graph=True)[0])
    # Without noise of the prior there is one gradient given the codes: what the others estimate.
    given_square = given["True"][0].double().square().sum().item()
    # |E g|^2, freed of the noise that the mean of the repeats still has.
    exact = torch.stack(total["True"]).double()
    total_square = exact.mean(0).square().sum().item() - spread(total["True"]) / len(exact)
    return [
        {
            "kernel": name,
            "d": zdim,
            "closed_form": key,
            "given_codes": spread(given[key]) / given_square,
            "total": spread(total[key]) / total_square,
            "total_over_exact": spread(total[key]) / spread(total["True"]),
            "seconds": statistics.median(seconds[key]),
        }
        for key in functions
    ]


def page(report: Report) -> str:
    """The table, and how it came about."""
    header = ["kernel", "d", "closed_form", "given the codes", "total", "total, over closed form's", "ms"]
    rows = [
        [
            row["kernel"], row["d"], row["closed_form"], f"{row['given_codes']:.3f}", f"{row['total']:.3f}",
            f"{row['total_over_exact']:.2f}", f"{1000 * row['seconds']:.1f}",
        ]
        for row in report["results"]
    ]  # fmt: skip
    options = report["options"]
    return f"""{table(header, rows)}

{made_by(report)}
{options["codes"]} codes of {SHIFT} + {SCALE} N(0, I),
prior N(0, I), kernels of the default length, {options["repeats"]} repeats.

- *given the codes*: variance of the gradient by the codes, over prior samples, for one set of codes; summed over all
  numbers and divided by the squared norm of the gradient without that noise.
- *total*: variance, over codes and prior samples, of the gradient by the mean of an encoder whose codes are
  mean + {SCALE} N(0, I); summed and divided by the squared norm of its expectation.
- *ms*: median wall time of a value and its gradient by the codes.
"""


BENCH = Benchmark(__file__, page, smoke={"repeats": 10, "prior_draws": [1, 4]})
BENCH.option("--codes", type=int, default=100, help="in a batch")
BENCH.option("--zdim", type=int, nargs="+", default=[8, 64], help="numbers in a code")
BENCH.option("--prior-draws", type=int, nargs="+", default=[1, 4, 16], help="for each code")
BENCH.option("--repeats", type=int, default=200)


def main(argv: list[str] | None = None) -> None:
    """Measures and reports."""
    args = BENCH.start(argv)
    results = [row for zdim in args.zdim for name in KERNELS for row in measure(name, zdim, args)]
    BENCH.finish(BENCH.report(args, results=results))


if __name__ == "__main__":
    main()
