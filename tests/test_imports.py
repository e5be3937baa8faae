"""Imports run one way, as the map of the house in CONTRIBUTING.md says."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pyro_wae"
FILES = sorted(PACKAGE.rglob("*.py"))


def rooms():
    """The row of the map in which each module or package stands."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.partition("| modules |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| ((?:`\w+` ?)+)\|", table, re.MULTILINE)
    return {name: number for number, row in enumerate(rows) for name in re.findall(r"\w+", row)}


def module_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(path):
    """Modules of the package that a file imports when it runs, whole names without "pyro_wae."."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    only_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    modules = {module_of(file) for file in FILES}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in only_types:
            continue
        assert node.level == 0, f"{path}: relative import"
        package, _, module = (node.module or "").partition(".")
        if package == "pyro_wae":
            for alias in node.names:
                whole = f"{module}.{alias.name}".lstrip(".")
                yield whole if whole in modules else module


def test_every_module_is_on_the_map_and_nothing_else():
    assert set(rooms()) == {module_of(path).partition(".")[0] for path in FILES} - {""}


def test_a_module_imports_from_rooms_above_it():
    row, wrong = rooms(), {}
    row[""] = row["loss"]  # what `from pyro_wae import WAELoss` imports
    for path in FILES:
        room = module_of(path).partition(".")[0]
        for other in {module.partition(".")[0] for module in imported(path)} - {room} if room else ():
            if row[other] >= row[room] or other == "loss":  # __init__ imports what it likes
                wrong[str(path.relative_to(PACKAGE))] = other
    assert wrong == {}


def edges():
    """What each file imports. A name from a package runs its __init__, except from inside the package."""
    for path in FILES:
        module = module_of(path)
        yield module, {other for other in imported(path) if not f"{module}.".startswith(f"{other}.")}


def test_no_two_files_import_each_other_on_any_way_around():
    imports, done, walked = dict(edges()), set(), []

    def visit(module):
        assert module not in walked, " -> ".join([*walked[walked.index(module) :], module])
        if module in done:
            return
        walked.append(module)
        for other in imports[module]:
            visit(other)
        walked.pop()
        done.add(module)

    for module in imports:
        visit(module)


@pytest.mark.parametrize("module", ["", "diagnostics", "runners", "step.observe", "weights"])
def test_the_imports_of_a_file_are_found(module):
    expected = {
        "": "loss",
        "diagnostics": "diagnostics.report",
        "runners": "runners.ranks",
        "step.observe": "step.prior",
        "weights": "weights.constraint",
    }
    assert expected[module] in dict(edges())[module]
