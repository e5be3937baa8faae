"""Links of README, CONTRIBUTING and the docs' pages lead somewhere, as far as that is seen without a network."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "api").glob("*.md")),
    *sorted((ROOT / ".github").rglob("*.md")),
]
CODE = re.compile(r"^(`{3,}|~{3,})[^{\n]*\n.*?^\1$", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"(?<![`}])`[^`\n]+`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"```\{(?:image|figure|include|literalinclude)\} (\S+)|<img src=\"([^\"]+)\"")
DOC = re.compile(r"\{doc\}`(?:[^`<]*<)?([^`<>]+)>?`")
REF = re.compile(r"\{ref\}`(?:[^`<]*<)?([^`<>]+)>?`")
HEADING = re.compile(r"^#{1,6} +(.+?)\s*$", re.MULTILINE)
LABEL = re.compile(r"^\(([\w-]+)\)=$", re.MULTILINE)


def text_of(page):
    return CODE.sub("", page.read_text(encoding="utf-8"))


def slug(heading):
    """The anchor that GitHub and MyST give a heading."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")


def anchors(page):
    text = text_of(page)
    return {slug(heading) for heading in HEADING.findall(text)} | set(LABEL.findall(text))


def broken_links(page):
    """What a page refers to and is not there."""
    text = text_of(page)
    for file in (first or second for first, second in FILE.findall(text)):
        if not file.startswith("http") and not (page.parent / file).is_file():
            yield file
    for target in LINK.findall(INLINE_CODE.sub("", text)):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or anchor.startswith("pyro_wae."):  # Sphinx knows objects
            continue
        linked = page.parent / path if path else page
        if not linked.exists() or (anchor and linked.suffix == ".md" and anchor not in anchors(linked)):
            yield target
    for name in DOC.findall(text):
        base = ROOT / "docs" if name.startswith("/") else page.parent
        name = name.lstrip("/")
        # The gallery and its notebooks are copied from their folder when the pages are built.
        found = [base / f"{name}.md"] + [ROOT / f"{name}.ipynb"] * name.startswith("tutorials/")
        if name != "tutorials/index" and not any(path.is_file() for path in found):
            yield name
    labels = {label for other in PAGES for label in LABEL.findall(text_of(other))}
    yield from set(REF.findall(text)) - labels


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_page_lead_somewhere(page):
    assert list(broken_links(page)) == []


@pytest.mark.parametrize(
    "line",
    [
        "[a](missing.md)",
        "[a](#no-such-heading)",
        "[a](other.md#no-such-heading)",
        "{doc}`missing`",
        "{doc}`text <missing>`",
        "{ref}`text <no-such-label>`",
        "```{image} missing.png\n```",
        '<img src="missing.png">',
    ],
)
def test_broken_link_is_found(tmp_path, line):
    (tmp_path / "other.md").write_text("# A heading\n")
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n[fine](other.md#a-heading) [here](#title)\n\n```python\nx[0](y)\n```\n\n{line}\n")
    assert len(list(broken_links(page))) == 1
