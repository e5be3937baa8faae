"""The goals for speed beside what was measured.

    python benchmarks/goals.py

It reads what ``benchmarks/step.py`` and ``benchmarks/kernel_penalty.py`` have written.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = tuple[str, str, float, float]
"""What is measured, where, the goal (at most) and the figure."""

DIMENSION = 64


def of_steps(results: list[dict[str, Any]]) -> Iterator[Row]:
    """Ratios of the times of whole steps."""
    ratios = {(r["contender"], r["nets"], r["batch"]): r["ratio"] for r in results if r["device"] == "cpu"}
    cells = list(dict.fromkeys((nets, batch) for _, nets, batch in ratios))

    def over(name: str, base: str, goal: float, *only: tuple[str, int]) -> Iterator[Row]:
        for cell in only or cells:
            if (name, *cell) in ratios and (base, *cell) in ratios:
                ratio = ratios[(name, *cell)] / ratios[(base, *cell)]
                yield f"{name}, over {base}", f"{cell[0]}, batch {cell[1]}", goal, ratio

    yield from over("SVI, WAELoss", "SVI, Trace_ELBO", 1.0)
    yield from over("nn.Module", "plain torch", 1.2, ("MLP", 100))
    yield from over("nn.Module", "plain torch", 1.05, ("conv", 100))
    yield from over("nn.Module, compiled", "plain torch", 0.70)
    yield from over("nn.Module, compiled", "plain torch, compiled", 1.05)


def of_kernels(results: list[dict[str, Any]]) -> Iterator[Row]:
    """Units and MiB of a kernel penalty with seven scales."""
    found = {(r["way"], r["n"]): r for r in results if r["device"] == "cpu" and r["d"] == DIMENSION}

    def cost(way: str, n: int, key: str, unit: str, goal: float) -> Iterator[Row]:
        if (way, n) in found:
            yield f"{way}, {unit}", f"n = {n}, d = {DIMENSION}", goal, found[(way, n)][key]

    for n in (2048, 8192):
        yield from cost("MMD()", n, "units", "units in place", 15)
        yield from cost("MMD()", n, "fresh units", "units", 15)
        yield from cost("MMD(), compiled", n, "units", "units in place", 8)
        yield from cost("MMD(), compiled", n, "fresh units", "units", 8)
        yield from cost("MMD(), closed form, compiled", n, "units", "units in place", 8)
    yield from cost("MMD()", 16384, "mebibytes", "MiB", 64)
    yield from cost("MMD(), closed form", 65536, "mebibytes", "MiB", 1024)


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = ["| what | where | goal: at most | measured | met |", "|---|---|---:|---:|---|"]
    for what, where, goal, figure in rows:
        met = "yes" if float(f"{figure:.2f}") <= goal else "no"
        lines.append(f"| {what} | {where} | {goal:g} | {figure:.2f} | {met} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Prints the table and writes it beside its sources."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("docs/_generated"), help="folder of the .json files")
    folder = parser.parse_args(argv).results
    steps = json.loads((folder / "step.json").read_text())["results"]
    kernels = json.loads((folder / "kernel_penalty.json").read_text())["results"]
    goals = table([*of_steps(steps), *of_kernels(kernels)])
    (folder / "speed_goals.md").write_text(goals)
    print(goals)


if __name__ == "__main__":
    main()
