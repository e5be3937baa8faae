"""How often the tests of ``pyro_wae.diagnostics`` tell codes from the prior.

    python benchmarks/two_sample_power.py

The shares of rejections and the times that docs and docstrings state come from here.
"""

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_wae.diagnostics import classifier_test, two_sample_test

Draw = Callable[[int], Tensor]


def two_modes(n: int) -> Tensor:
    """Of 2 coordinates the first has two modes at +-0.8, with the prior's mean and variance."""
    sign = torch.randint(2, (n, 1)) * 2 - 1
    return torch.cat([0.8 * sign + 0.6 * torch.randn(n, 1), torch.randn(n, 1)], 1)


def with_hole(n: int) -> Tensor:
    """Draws of the prior in 2 dimensions, without those within 0.4 of its middle: 7.7 percent of all."""
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
    for run in range(runs):
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


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary(report: dict[str, Any]) -> str:
    """The tables, what is in them, and the command."""
    options, tables = report["options"], {name: table(rows) for name, rows in report["tables"].items()}
    return f"""Made by

    {report["command"]}

with torch {report["torch"]}. Share of tests that reject at level {options["level"]:g}: {options["n"]} codes against the
prior N(0, I), {options["permutations"]} permutations. Over {options["runs"]} runs a share
of 0.5 has a standard error of {0.5 / math.sqrt(options["runs"]):.2f}.

{tables["power"]}

- *aggregated*: `two_sample_test(codes, prior)`.
- *one kernel*: the same with `aggregate=False`: `InverseMultiquadratic()`, its scale from the prior.
- *classifier*: `classifier_test(codes, prior)`.

Processor seconds of one test as it is by default, one thread, d = 8, n codes and n prior draws:

{tables["seconds"]}
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--n", type=int, default=1000, help="codes, and prior draws")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--permutations", type=int, default=99)
    parser.add_argument("--level", type=float, default=0.05)
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 1000], help="numbers of codes to time")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of .json and .md; by default docs/_generated, or in a quick run results/benchmarks",
    )
    parser.add_argument("--smoke", action="store_true", help="run in seconds, to see that everything works")
    args = parser.parse_args(argv)
    if args.smoke:
        args.n, args.runs, args.permutations, args.sizes = 100, 1, 19, [100]
    args.out = args.out or Path("results/benchmarks" if args.smoke else "docs/_generated")
    return args


def main(argv: list[str] | None = None) -> None:
    """Measures and reports."""
    args = parse_args(argv)
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/two_sample_power.py", *(sys.argv[1:] if argv is None else argv)]),
        "torch": torch.__version__.partition("+")[0],
        "options": {key: str(value) if key == "out" else value for key, value in vars(args).items()},
        "tables": {
            "power": [share(name, args.runs, args) for name in CODES],
            "seconds": [seconds(n) for n in args.sizes],
        },
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "two_sample_power.json").write_text(json.dumps(report, indent=2) + "\n")
    (args.out / "two_sample_power.md").write_text(summary(report))
    print(summary(report))


if __name__ == "__main__":
    main()
