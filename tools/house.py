"""The size of the house, and the way of one step through it: a table with a column for each checkout.

    python tools/house.py [CHECKOUT ...]

Lines are all lines of ``*.py``. A step is the second call of ``WAELoss().loss_and_grads`` with a Normal prior and a
Delta guide, run in a process of its own; counted are the calls that Python makes within the package.
``--list`` names what stands behind the counts of records, names, circles and repeated lines.
"""

import argparse
import ast
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

PACKAGE = "pyro_wae"
WINDOW = 7
"""Lines that are the same in two places from which on they count as repeated."""

PROGRAM = """
import json, sys
import pyro, torch
import pyro.distributions as dist
from pyro.infer import Trace_ELBO
from pyro_wae import WAELoss

encoder, decoder = torch.nn.Linear(784, 8), torch.nn.Linear(8, 784)

def model(x):
    pyro.module("decoder", decoder)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(8), 1).to_event(1))
        pyro.sample("x", dist.Normal(decoder(z), 1).to_event(1), obs=x)

def guide(x):
    pyro.module("encoder", encoder)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Delta(encoder(x)).to_event(1))

def elbo_guide(x):
    pyro.module("encoder", encoder)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(encoder(x), 1).to_event(1))

def walked(loss, guide, folder):
    x, calls, records = torch.rand(100, 784), [], set()
    loss.loss_and_grads(model, guide, x)
    def note(frame, event, _):
        code = frame.f_code
        if event != "call":
            return
        if folder in code.co_filename:
            calls.append((code.co_filename.rpartition(folder)[2], code.co_firstlineno, code.co_name))
        elif code.co_name in ("__init__", "__new__") and code.co_filename.startswith("<"):  # made by the library
            first = frame.f_locals[code.co_varnames[0]]
            kind = first if isinstance(first, type) else type(first)
            if kind.__module__.startswith("pyro_wae"):
                records.add(kind.__name__)
    sys.setprofile(note)
    loss.loss_and_grads(model, guide, x)
    sys.setprofile(None)
    return calls, sorted(records)

print(json.dumps([walked(WAELoss(), guide, "/pyro_wae/"), walked(Trace_ELBO(), elbo_guide, "/pyro/infer/")]))
"""


def lines(folder: Path) -> int:
    """Lines of all Python files of a folder."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in folder.rglob("*.py"))


def steps(checkout: Path) -> list[tuple[list[list[Any]], list[str]]]:
    """Of a step of WAELoss and one of Trace_ELBO: the calls [file, line, name] in order, and the records made."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    finished = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"The step of {checkout} failed:\n{finished.stderr}")
    return json.loads(finished.stdout.splitlines()[-1])


def walk(calls: list[list[Any]]) -> dict[str, int]:
    """Calls, functions, files and changes of file from one call to the next."""
    files = [file for file, *_ in calls]
    switches = sum(before != after for before, after in pairwise(files))
    functions = len({tuple(call) for call in calls})
    return {"calls": len(calls), "functions": functions, "files": len(set(files)), "switches": switches}


class Package:
    """The package of a checkout, read and not imported."""

    def __init__(self, checkout: Path) -> None:
        self.checkout, root = checkout, checkout / PACKAGE
        self.texts = {str(path.relative_to(root)): path.read_text(encoding="utf-8") for path in root.rglob("*.py")}
        self.trees = {name: ast.parse(text) for name, text in sorted(self.texts.items())}

    def public(self) -> list[str]:
        """The names in all ``__all__``, as often as they stand there."""
        lists = (node for tree in self.trees.values() for node in tree.body if isinstance(node, ast.Assign))
        lists = (node.value for node in lists if ast.unparse(node.targets[0]) == "__all__")
        return [item.value for node in lists for item in ast.walk(node) if isinstance(item, ast.Constant)]

    def documented(self) -> set[str]:
        """The names that have a directive of autodoc on a page of docs/api."""
        text = "".join(path.read_text(encoding="utf-8") for path in (self.checkout / "docs" / "api").glob("*.md"))
        return {name.rpartition(".")[2] for name in re.findall(r"\.\. auto(?!module|summary)\w+:: +([\w.]+)", text)}

    def imports(self, name: str) -> Iterator[str]:
        """The files of the package that a file imports, wherever in it."""
        files = {_module(file): file for file in self.trees}
        for node in ast.walk(self.trees[name]):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE:
                module = str(node.module)
                yield from (files.get(f"{module}.{alias.name}", files[module]) for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from (files[alias.name] for alias in node.names if alias.name in files)

    def circles(self) -> list[str]:
        """Sets of files of which each imports all others, on some way around."""
        reached = {name: set(self.imports(name)) - {name} for name in self.trees}
        for middle in self.trees:
            for name in self.trees:
                if middle in reached[name]:
                    reached[name] |= reached[middle]
        circles = {frozenset(b for b in reached[a] if a in reached[b]) for a in self.trees}
        return [" ".join(sorted(circle)) for circle in circles if circle]

    def repeated(self) -> list[str]:
        """Pairs of places with WINDOW equal lines or more, leaving out blank lines, comments, docstrings, imports."""
        code = {name: _code(text, self.trees[name]) for name, text in self.texts.items()}
        places: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
        for name, rows in code.items():
            for index in range(len(rows) - WINDOW + 1):
                places[tuple(line for _, line in rows[index : index + WINDOW])].append((name, index))
        pairs = {(a, b) for same in places.values() for i, a in enumerate(same) for b in same[i + 1 :]}
        # A pair whose neighbours above are a pair as well goes on what has been counted.
        first = [(a, b) for a, b in pairs if ((a[0], a[1] - 1), (b[0], b[1] - 1)) not in pairs]
        return sorted(" = ".join(f"{name}:{code[name][index][0]}" for name, index in pair) for pair in first)


def _module(file: str) -> str:
    """The name of the module in a file of the package."""
    return ".".join([PACKAGE, *(part for part in Path(file).with_suffix("").parts if part != "__init__")])


def _code(text: str, tree: ast.Module) -> list[tuple[int, str]]:
    """The lines that are code, with their numbers."""
    left_out: set[int] = set()
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text or isinstance(node, ast.Import | ast.ImportFrom):
            left_out |= set(range(node.lineno, node.end_lineno + 1))
    rows = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if number not in left_out)
    return [(number, line) for number, line in rows if line and not line.startswith("#")]


def figures(checkout: Path) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The column of a checkout, and the lists behind it."""
    package, ((ours, records), (elbo, _)) = Package(checkout), steps(checkout)
    step, other = walk(ours), walk(elbo)
    size = {name: len(text.splitlines()) for name, text in package.texts.items()}
    longest = max(size, key=size.__getitem__)
    names, documented = package.public(), package.documented()
    lists = {
        "records made in a step": records,
        "public names without a page": sorted(set(names) - documented),
        "circles": package.circles(),
        "repeated lines": package.repeated(),
    }
    return {
        "lines of the package": sum(size.values()),
        "lines of tests": lines(checkout / "tests"),
        "lines of benchmarks": lines(checkout / "benchmarks"),
        "files of the package": len(size),
        "longest file": f"{longest}, {size[longest]}",
        "files over 400 lines": sum(length > 400 for length in size.values()),
        **{f"a step: {what}": count for what, count in step.items()},
        **{f"a step of Trace_ELBO: {what}": count for what, count in other.items()},
        "a step: kinds of records": len(records),
        "entries of all __all__": len(names),
        "different names in them": len(set(names)),
        "of these in docs/api": len(set(names) & documented),
        "circles of imports": len(lists["circles"]),
        f"pairs of places with {WINDOW} equal lines or more": len(lists["repeated lines"]),
    }, lists


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", metavar="CHECKOUT", nargs="*", type=Path, help="folders; by default this one")
    parser.add_argument("--list", action="store_true", help="name what is counted")
    args = parser.parse_args(argv)
    checkouts = [path.resolve() for path in args.checkouts] or [Path(__file__).resolve().parents[1]]
    found = [figures(path) for path in checkouts]
    print("| figure | " + " | ".join(path.name for path in checkouts) + " |")
    print("|---|" + "---:|" * len(checkouts))
    for name in found[0][0]:
        print(f"| {name} | " + " | ".join(str(column[name]) for column, _ in found) + " |")
    if args.list:
        for path, (_, lists) in zip(checkouts, found, strict=True):
            for title, items in lists.items():
                print(f"\n{path.name}, {title}: {', '.join(items)}")


if __name__ == "__main__":
    main()
