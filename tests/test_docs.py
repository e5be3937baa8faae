import re
from pathlib import Path

import pyro
import pytest
import torch

from pyro_wae.penalties import kernel_means

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def code(page):
    """The Python blocks of a page as one program, in which every line stands where it does in the page."""
    text = page.read_text(encoding="utf-8")
    program = [""] * (text.count("\n") + 1)
    for block in BLOCK.finditer(text):
        start = text.count("\n", 0, block.start(1))
        lines = block.group(1).splitlines()
        program[start : start + len(lines)] = lines
    return "\n".join(program)


@pytest.fixture
def as_found(monkeypatch):
    """Leaves to the next test what a page changes for the whole process."""
    monkeypatch.setattr(kernel_means, "_REGISTRY", dict(kernel_means._REGISTRY))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    pyro.clear_param_store()


@pytest.mark.parametrize("page", [page for page in PAGES if code(page).strip()], ids=lambda page: page.name)
def test_code_of_page_runs(page, as_found):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    # dataclasses look their module up by name, so that the page needs one that exists.
    exec(compile(code(page), str(page), "exec"), {"__name__": __name__})


def test_pages_with_code_are_found():
    assert {"README.md", "CONTRIBUTING.md", "index.md", "migration.md", "penalties.md", "theory.md"} <= {
        page.name for page in PAGES if code(page).strip()
    }
