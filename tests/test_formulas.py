"""Formulas of the pages show without a network: MathJax lies beside them, and a browser that is cut off sets them."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("sphinx", reason="needs the extra docs")
pytest.importorskip("myst_nb", reason="needs the extra docs")

DOCS = Path(__file__).parents[1] / "docs"
CONF = """
extensions = ["myst_parser", "sphinx.ext.mathjax", "sphinx-mathjax-offline"]
exclude_patterns = ["_build", "_generated", "tutorials", "api"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
html_theme = "basic"
"""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
WITH_TEX = [page.stem for page in sorted(DOCS.glob("*.md")) if "$" in CODE.sub("", page.read_text(encoding="utf-8"))]
QUICK = ("theory", "penalties")
TEX = re.compile(r"\\[a-zA-Z({\[]|\$\$|\^\{|_\{")
UNSEEN = ("script", "style", "pre", "code", "mjx-assistive-mml", "title")

needs_mathjax = pytest.mark.skipif(
    find_spec("sphinx-mathjax-offline") is None, reason="needs sphinx-mathjax-offline, of the extra docs"
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")


class Shown(HTMLParser):
    """What a reader sees of a page as text, the formulas that were set, and those that could not be."""

    def __init__(self, html):
        super().__init__()
        self.text, self.set, self.errors, self.inside = [], 0, 0, []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag in UNSEEN:
            self.inside.append(tag)
        self.set += tag == "mjx-container"
        self.errors += tag == "mjx-merror"

    def handle_endtag(self, tag):
        if self.inside and tag == self.inside[-1]:
            self.inside.pop()

    def handle_data(self, data):
        if not self.inside:
            self.text.append(data)

    @property
    def raw_tex(self):
        return TEX.findall(" ".join(self.text))


def build(conf, source, target):
    target.mkdir(parents=True, exist_ok=True)
    (target / "conf.py").write_text(conf)
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", "-c", str(target), str(source), str(target / "html")]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return target / "html"


def opened(page):
    """The page as a browser without any network shows it."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += ["--allow-file-access-from-files", "--virtual-time-budget=30000", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    return build(CONF, DOCS, tmp_path_factory.mktemp("pages"))


@needs_mathjax
@needs_chromium
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in WITH_TEX])
def test_page_opened_without_a_network_shows_no_tex(pages, name):
    written = (pages / f"{name}.html").read_text(encoding="utf-8")
    shown = Shown(opened(pages / f"{name}.html"))
    assert shown.set == len(re.findall(r'class="math notranslate', written)) > 0
    assert shown.errors == 0
    assert shown.raw_tex == []


@needs_mathjax
@needs_chromium
@pytest.mark.slow
def test_without_its_script_the_page_shows_tex(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "index.md").write_text("# A page\n\n$$\\frac{a}{b}$$\n")
    page = build(CONF, source, tmp_path / "built") / "index.html"
    assert Shown(opened(page)).raw_tex == []
    (page.parent / "_static" / "mathjax" / "tex-chtml.js").unlink()
    assert Shown(opened(page)).raw_tex
