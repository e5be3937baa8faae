"""The page "Works with": each row names a version, a line, and a test that is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLE = (ROOT / "docs" / "works_with.md").read_text(encoding="utf-8").partition("| library |")[2].partition("\n\n")[0]
ROWS = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in TABLE.splitlines()[2:]]


def test_the_table_has_rows():
    assert len(ROWS) > 10


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_names_a_version_a_line_and_a_test(row):
    _, version, line, test = row
    assert re.match(r"\d+\.\d+", version) or version == "none"
    assert re.fullmatch(r"`.+`", line)
    path, name = re.fullmatch(r"`(tests/test_\w+\.py)::(test_\w+)`", test).groups()
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
