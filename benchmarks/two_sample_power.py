"""How often the tests of ``pyro_wae.diagnostics`` tell codes from the prior.

    python benchmarks/two_sample_power.py

The shares of rejections and the times that docs and docstrings state come from here.
"""

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import Benchmark, Report, made_by, progress, table_of
from torch import Tensor

from pyro_wae.diagnostics import classifier_test, two_sample_test

Draw = Callable[[int], Tensor]


def two_modes(n: int) -> Tensor:
    """Of 2 coordinates the first has two modes at +-0.8, with the prior's mean and variance."""
    sign = torch.randint(2, (n, 1)) * 2 - 1
    return torch.cat([0.8 * sign + 0.6 * torch.randn(n, 1), torch.randn(n, 1)], 1)


def with_hole(n: int) -> Tensor:
    """Samples of the prior in 2 dimensions, without those within 0.4 of its middle: 7.7 percent of all."""
    rows = torch.randn(2 * n + 100, 2)
    return rows[rows.norm(dim=1) > 0.4][:n]


def correlated(n: int) -> Tensor:
    """8 coordinates, of which the first two have a correlation of 0.5."""
    rows = torch.randn(n, 8)
    rows[:, 1] = 0.5 * rows[:, 0] + math.sqrt(0.75) * rows[:, 1]
    return rows


def shifted(n: int) -> Tensor:
    """8 coordinates, the first of which is shifted by 0.2."""
    rows = torch.randn(n, 8)
    rows[:, 0] += 0.2
    return rows


CODES: dict[str, tuple[int, Draw]] = {
    "scale 1.1": (8, lambda n: 1.1 * torch.randn(n, 8)),
    "one coordinate shifted by 0.2": (8, shifted),
    "two coordinates correlated by 0.5": (8, correlated),
    "two modes, mean and variance the prior's": (2, two_modes),
    "a hole of radius 0.4": (2, with_hole),
    "scale 0.97": (64, lambda n: 0.97 * torch.randn(n, 64)),
}


def share(name: str, runs: int, args: argparse.Namespace) -> dict[str, Any]:
    """The share of rejections by each test; the same draws for all."""
    d, draw = CODES[name]
    rejected = {"aggregated": 0, "one kernel": 0, "classifier": 0}
    for run in progress(range(runs), name):
        torch.manual_seed(run)
        codes, prior = draw(args.n), torch.distributions.Normal(torch.zeros(d), 1.0)
        options: dict[str, Any] = {"level": args.level, "seed": run}
        rejected["aggregated"] += two_sample_test(codes, prior, permutations=args.permutations, **options).rejected
        single = two_sample_test(codes, prior, aggregate=False, permutations=args.permutations, **options)
        rejected["one kernel"] += single.rejected
        rejected["classifier"] += classifier_test(codes, prior, **options).rejected
    return {"codes": name, "d": d, **{test: f"{count / runs:.2f}" for test, count in rejected.items()}}


def seconds(n: int) -> dict[str, Any]:
    """Processor time of each test as it is by default, for n codes of 8 numbers and n draws."""
    torch.manual_seed(0)
    codes, prior = torch.randn(n, 8), torch.randn(n, 8)
    found: dict[str, Any] = {"n": n}
    for name, test in (
        ("aggregated", lambda: two_sample_test(codes, prior)),
        ("one kernel", lambda: two_sample_test(codes, prior, aggregate=False)),
        ("classifier", lambda: classifier_test(codes, prior)),
    ):
        start = time.process_time()
        test()
        found[name] = f"{time.process_time() - start:.2g}"
    return found


def page(report: Report) -> str:
    """The tables, what is in them, and the command."""
    options, tables = report["options"], {name: table_of(rows) for name, rows in report["tables"].items()}
    return f"""{made_by(report)}
Share of tests that reject at level {options["level"]:g}: {options["n"]} codes against the prior N(0, I),
{options["permutations"]} permutations. Over {options["runs"]} runs a share of 0.5 has a
standard error of {0.5 / math.sqrt(options["runs"]):.2f}.

{tables["power"]}

- *aggregated*: `two_sample_test(codes, prior)`.
- *one kernel*: the same with `aggregate=False`: `InverseMultiquadratic()`, its bandwidth from the prior.
- *classifier*: `classifier_test(codes, prior)`.

Processor seconds of one test as it is by default, one thread, d = 8, n codes and n prior samples:

{tables["seconds"]}
"""


BENCH = Benchmark(__file__, page, smoke={"n": 100, "runs": 1, "permutations": 19, "sizes": [100]})
BENCH.option("--n", type=int, default=1000, help="codes, and prior samples")
BENCH.option("--runs", type=int, default=10)
BENCH.option("--permutations", type=int, default=99)
BENCH.option("--level", type=float, default=0.05)
BENCH.option("--sizes", type=int, nargs="+", default=[500, 1000], help="numbers of codes to time")


def main(argv: list[str] | None = None) -> None:
    """Measures and reports."""
    args = BENCH.start(argv)
    power = [share(name, args.runs, args) for name in CODES]
    BENCH.finish(BENCH.report(args, tables={"power": power, "seconds": [seconds(n) for n in args.sizes]}))


if __name__ == "__main__":
    main()
