"""What docstrings, comments and pages cite stands in the bibliography, and is linked where it says it is."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIBLIOGRAPHY = ROOT / "docs" / "bibliography.md"
TEXT = BIBLIOGRAPHY.read_text(encoding="utf-8")
IDENTIFIER = re.compile(r"(?:arXiv: ?|arxiv\.org/abs/)(\d{4}\.\d{4,5})|(?:doi: ?|doi\.org/)(10\.[^\s,;)\]\"]*[\w])")
CITING = [
    *sorted((ROOT / "pyro_wae").rglob("*.py")),
    *sorted((ROOT / "benchmarks").glob("*.py")),
    *sorted((ROOT / "tutorials").glob("*.py")),
    *sorted((ROOT / "tutorials").glob("*.ipynb")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "README.md",
    ROOT / "CITATION.cff",
]


def plain(text):
    return " ".join(re.sub(r"[*_]", "", text).lower().split())


def identifiers(text):
    return {first or second for first, second in IDENTIFIER.findall(text)}


def cited_titles(path):
    """The titles, in quotes, of the part of a docstring that begins with "Source:"."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            source = (ast.get_docstring(node) or "").partition("Source:")[2].partition("\n\n")[0]
            yield from re.findall(r'"([^"]+?)[,.]?"', source)


@pytest.mark.parametrize("path", CITING, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_cited_is_in_the_bibliography(path):
    assert identifiers(path.read_text(encoding="utf-8")) - identifiers(TEXT) == set()
    if path.is_relative_to(ROOT / "pyro_wae"):
        assert [title for title in cited_titles(path) if plain(title) not in plain(TEXT)] == []


def test_every_docstring_with_a_source_gives_titles():
    files = [path for path in CITING if path.suffix == ".py" and list(cited_titles(path))]
    assert len(files) > 10


@pytest.mark.parametrize("kind", ["arXiv", "doi"])
def test_links_of_the_bibliography_lead_where_they_say(kind):
    address = {"arXiv": r"https://arxiv\.org/abs/", "doi": r"https://doi\.org/"}[kind]
    links = re.findall(rf"\[{kind}:([^\]]+)\]\({address}([^)]+)\)", TEXT)
    assert links
    assert all(said == linked for said, linked in links)
    assert len({said for said, _ in links}) == len(links)
