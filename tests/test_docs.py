import importlib
import math
import re
from inspect import isclass, isroutine
from pathlib import Path

import pyro
import pytest
import torch

from pyro_wae.penalties import kernel_means

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# What a block prints, shown beneath it.
SHOWN = re.compile(r"^```python\n(?:.*?)^```\n+^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Epochs of a page's training, and how many are enough to see that it runs.
SHORTER = {"README.md": ("range(10)", "range(1)")}
NUMBER = re.compile(r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?")
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


def same(shown, printed):
    """Whether two lines differ in rounding at most, as they may between machines and versions of torch."""
    if NUMBER.sub("0", shown) != NUMBER.sub("0", printed):
        return False
    pairs = zip(*([float(n.replace(",", "")) for n in NUMBER.findall(line)] for line in (shown, printed)), strict=True)
    # Below a millionth, and in a unit of the last digit, numbers here are noise.
    return all(math.isclose(a, b, rel_tol=0.1, abs_tol=1e-6) or abs(a - b) <= 0.0101 for a, b in pairs)


@pytest.fixture
def as_found(monkeypatch):
    """Leaves to the next test what a page changes for the whole process."""
    monkeypatch.setattr(kernel_means, "_REGISTRY", dict(kernel_means._REGISTRY))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    pyro.clear_param_store()


# Pages that train nets for more than a few seconds.
LONG = {"evaluation.md", "hyperparameters.md", "missing.md"}
RUNNING = [
    pytest.param(page, id=page.name, marks=pytest.mark.slow if page.name in LONG else ())
    for page in PAGES
    if code(page).strip()
]


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
@pytest.mark.parametrize("page", RUNNING)
def test_code_of_page_runs_and_prints_what_the_page_shows(page, as_found, capsys):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    # dataclasses look their module up by name, so that the page needs one that exists.
    program = code(page).replace(*SHORTER.get(page.name, ("", "")))
    exec(compile(program, str(page), "exec"), {"__name__": __name__})
    printed = capsys.readouterr().out.splitlines()
    for shown in SHOWN.findall(page.read_text(encoding="utf-8")):
        for line in shown.splitlines():
            assert any(same(line, other) for other in printed), line


def test_pages_with_code_are_found():
    assert {"README.md", "CONTRIBUTING.md", "migration.md", "penalties.md", "theory.md"} <= {
        page.name for page in PAGES if code(page).strip()
    }


def test_a_page_that_shows_another_number_than_is_printed_is_found():
    assert same("mean 0.0224, negative in 56%", "mean 0.0223, negative in 55%")
    assert not same("cost 5.03", "cost 6.03")
    assert not same("cost 5.03", "price 5.03")
    assert same("error 3e-08", "error 9e-08")


# Names that other modules of the package import and users do not, and an old name that warns.
INTERNAL = {"Linear", "all_states", "kinds_of", "names_of", "restore_states", "GroupLike", "Ranks", "check_group"}
MODULES = ["checkpoint", "costs", "diagnostics", "distributed", "kernels", "lightning", "optim"]
MODULES += ["penalties", "plotting", "predict", "priors", "weights"]


@pytest.mark.parametrize("name", ["pyro_wae", *(f"pyro_wae.{module}" for module in MODULES)])
def test_every_public_class_and_function_has_an_entry_in_the_api_reference(name):
    module = importlib.import_module(name)
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    entries = re.findall(r"\.\. auto(?:class|function):: (?:[\w.]+\.)?(\w+)", text)
    public = set(module.__all__) - INTERNAL
    objects = {n for n in public if isclass(getattr(module, n)) or isroutine(getattr(module, n))}
    assert objects - set(entries) == set()


# Pictures of measurements, which other commands draw.
MEASURED = {"kernel_penalty", "overview", "report", "scvi_umap", "step", "zoo"}
PICTURES = sorted(path for path in (ROOT / "docs" / "images").glob("*.png") if path.stem not in MEASURED)


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)
def test_every_figure_is_light_drawn_by_a_command_and_shown_with_a_description(path):
    assert path.stat().st_size <= 60_000
    scripts = "".join(script.read_text(encoding="utf-8") for script in (ROOT / "docs" / "figures").glob("*.py"))
    assert f'"{path.stem}"' in scripts
    shown = re.compile(rf"```{{image}} images/{path.stem}\.png\n:alt: \w+")
    assert any(shown.search(page.read_text(encoding="utf-8")) for page in PAGES)
