"""The goals for speed beside what was measured.

    python benchmarks/goals.py

It reads what ``benchmarks/step.py`` and ``benchmarks/kernel_penalty.py`` have written.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import TABLES, table

Row = tuple[str, str, float, float]
"""What is measured, where, the goal (at most) and the figure."""

SMALL, LARGE, CONV = ("MLP", 100), ("MLP", 1024), ("conv", 100)
SHARED = "SVI, WAELoss, shared Adam"


def of_steps(report: dict[str, Any]) -> Iterator[Row]:
    """Ratios of the times of whole steps on the CPU, and the time of the import."""
    ratios = {(r["contender"], r["nets"], r["batch"]): r["ratio"] for r in report["results"] if r["device"] == "cpu"}

    def beside(name: str, base: str, cell: tuple[str, int], goal: float, *, extra: bool = False) -> Iterator[Row]:
        if (name, *cell) in ratios and (base, *cell) in ratios:
            own, other = ratios[(name, *cell)], ratios[(base, *cell)]
            what = f"{name}: more than {base}, in steps of plain torch" if extra else f"{name}, over {base}"
            yield what, f"{cell[0]}, batch {cell[1]}", goal, own - other if extra else own / other

    yield from beside("SVI, WAELoss", "SVI, Trace_ELBO", SMALL, 1.0)
    yield from beside("SVI, WAELoss", "SVI, Trace_ELBO", LARGE, 1.2)
    yield from beside("SVI, WAELoss", "SVI, Trace_ELBO", CONV, 1.0)
    yield from beside("nn.Module", "plain torch", SMALL, 1.2)
    yield from beside("nn.Module", "plain torch", CONV, 1.05)
    yield from beside("nn.Module, WAE-GAN", "plain torch, WAE-GAN", SMALL, 1.2)
    yield from beside(f"{SHARED}, Constraint", SHARED, SMALL, 0.02, extra=True)
    if "import_seconds" in report:
        yield "import pyro_wae, ms", "after torch and Pyro", 50, 1000 * report["import_seconds"]


def of_kernels(results: list[dict[str, Any]]) -> Iterator[Row]:
    """Units and MiB of a kernel penalty with seven scales, and the energy distance over geomloss's."""
    found = {(r["way"], r["n"], r["d"]): r for r in results if r["device"] == "cpu"}

    def cost(way: str, n: int, key: str, unit: str, goal: float, d: int = 64) -> Iterator[Row]:
        if (way, n, d) in found:
            yield f"{way}, {unit}", f"n = {n}, d = {d}", goal, found[(way, n, d)][key]

    for n, d in ((256, 8), (2048, 64)):
        ours, theirs = found.get(("EnergyDistance()", n, d)), found.get(("geomloss, energy", n, d))
        if ours and theirs:
            yield "EnergyDistance(), over geomloss", f"n = {n}, d = {d}", 1.0, ours["seconds"] / theirs["seconds"]
    for n in (2048, 8192):
        yield from cost("MMD()", n, "units", "units in place", 15)
        yield from cost("MMD()", n, "fresh units", "units", 15)
        yield from cost("MMD(), compiled", n, "units", "units in place", 8)
        yield from cost("MMD(), compiled", n, "fresh units", "units", 8)
        yield from cost("MMD(), closed form, compiled", n, "units", "units in place", 8)
    yield from cost("MMD()", 16384, "mebibytes", "MiB", 64)
    yield from cost("MMD(), closed form", 65536, "mebibytes", "MiB", 1024)


def main(argv: list[str] | None = None) -> None:
    """Prints the table and writes it beside its sources."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--results", type=Path, default=TABLES, help="folder of the .json files")
    folder = parser.parse_args(argv).results
    steps, kernels = (json.loads((folder / f"{name}.json").read_text()) for name in ("step", "kernel_penalty"))
    rows = [
        [what, where, f"{goal:g}", f"{figure:.2f}", "yes" if float(f"{figure:.2f}") <= goal else "no"]
        for what, where, goal, figure in (*of_steps(steps), *of_kernels(kernels["results"]))
    ]
    goals = table(["what", "where", "goal: at most", "measured", "met"], rows) + "\n"
    (folder / "speed_goals.md").write_text(goals)
    print(goals)


if __name__ == "__main__":
    main()
