"""What became slower: the newest numbers of the timing benchmarks beside earlier ones.

    python benchmarks/compare.py [EARLIER]

EARLIER is a revision of git (by default HEAD, the numbers that are committed), a folder or a file of them. Compared are
times over that of something else measured in the same run, because times themselves move with the machine.
"""

import argparse
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import TABLES, table

ROWS = {
    "step": (("contender", "nets", "batch", "device"), "ratio"),
    "kernel_penalty": (("way", "n", "d", "device"), "units"),
    "large_batches": (("micro_batch", "device"), "over one batch"),
}
"""By what a row is known, and what is compared; of ``large_batches`` it is worked out below."""


def of_report(name: str, report: dict[str, Any]) -> dict[tuple[Any, ...], float]:
    """The time of each row."""
    keys, value = ROWS[name]
    rows = [{"device": "cpu", **row} for row in report["results"]]
    if name == "large_batches":
        whole = {row["device"]: row["seconds"] for row in rows if row["micro_batch"] is None}
        rows = [{**row, value: row["seconds"] / whole[row["device"]]} for row in rows]
    return {tuple(row[key] for key in keys): row[value] for row in rows}


def read(source: str, name: str) -> dict[str, Any] | None:
    """The report of one benchmark in a file, a folder or a revision; None where it is not there."""
    path = Path(source)
    if path.is_file():
        return json.loads(path.read_text()) if path.stem == name else None
    if path.is_dir():
        path = path / f"{name}.json"
        return json.loads(path.read_text()) if path.is_file() else None
    shown = subprocess.run(["git", "show", f"{source}:{TABLES}/{name}.json"], capture_output=True, text=True)
    return json.loads(shown.stdout) if shown.returncode == 0 else None


def slower(
    name: str, before: dict[tuple[Any, ...], float], after: dict[tuple[Any, ...], float], limit: float
) -> Iterator[list[str]]:
    """The rows that take more than ``limit`` longer, the worst first."""
    ratios = {key: after[key] / before[key] for key in after if before.get(key)}
    for key in sorted(ratios, key=ratios.__getitem__, reverse=True):
        if ratios[key] > 1 + limit:
            where = ", ".join(str(part) for part in key)
            yield [name, where, f"{before[key]:.3g}", f"{after[key]:.3g}", f"{ratios[key]:.2f}"]


def main(argv: list[str] | None = None) -> None:
    """Prints the rows that became slower."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("earlier", nargs="?", default="HEAD", help="revision, folder or file of the earlier numbers")
    parser.add_argument("--newest", default=str(TABLES), help="folder or file of the newest numbers")
    parser.add_argument("--limit", type=float, default=0.05, help="what is let pass, as a share")
    args = parser.parse_args(argv)
    rows: list[list[str]] = []
    compared = 0
    for name in ROWS:
        before, after = (read(source, name) for source in (args.earlier, args.newest))
        if before is None or after is None:
            print(f"Not compared: {name}, which is not in {args.earlier if before is None else args.newest}.")
            continue
        old, new = of_report(name, before), of_report(name, after)
        compared += len(old.keys() & new.keys())
        rows += slower(name, old, new, args.limit)
        for title, keys in (("gone", old.keys() - new.keys()), ("new", new.keys() - old.keys())):
            if keys:
                print(f"{name}, {title}: {'; '.join(sorted(', '.join(map(str, key)) for key in keys))}")
    print(f"{len(rows)} of {compared} rows became slower by more than {args.limit:.0%}.")
    if rows:
        print(table(["benchmark", "row", "before", "after", "ratio"], rows))


if __name__ == "__main__":
    main()
