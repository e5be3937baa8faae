"""What is shipped, and what is said of it in several places."""

import importlib
import importlib.util
import pkgutil
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

import pyro_wae

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
EXTRAS = ("matplotlib", "geomloss", "sklearn", "torchvision", "torchmetrics", "ot")


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def tracked(folder):
    """Files of a folder, without what Python leaves there."""
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".md", ".npz", ".py", ".typed"}
    }


# What is said in several places


def test_version_is_that_of_the_citation_and_of_the_changelog():
    assert yaml.safe_load(read("CITATION.cff"))["version"] == pyro_wae.__version__
    headings = re.findall(r"^## \[(.+?)\]", read("CHANGELOG.md"), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert headings[1:] == [] or headings[1] == pyro_wae.__version__


def test_citation_has_what_the_format_asks_for():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "title", "message", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] == PROJECT["license"]
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= set(reference)


def test_every_extra_is_on_the_page_that_tells_of_them():
    table = read("docs/install.md").partition("| extra |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `([\w-]+)`", table, re.MULTILINE)) == set(PROJECT["optional-dependencies"])


def test_every_benchmark_and_every_table_is_on_a_page():
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
    for path in (ROOT / "docs" / "_generated").glob("*.md"):
        assert f"_generated/{path.name}" in pages, path.name
    named = read("docs/benchmarks.md") + read("Makefile")
    for path in (ROOT / "benchmarks").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "__main__" not in text or f"benchmarks/{path.name}" in named, path.name


def test_only_torch_and_pyro_are_required():
    assert [re.split(r"\W*>=", line)[0] for line in PROJECT["dependencies"]] == ["torch", "pyro-ppl"]


def test_oldest_versions_that_are_promised_are_those_that_are_tested():
    line = next(line for line in read("docs/install.md").splitlines() if "make test-oldest" in line)
    for dependency in PROJECT["dependencies"]:
        assert dependency.replace(">=", " ") in line, dependency
    workflow = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]
    versions = {job: step["with"]["python-version"] for job in workflow for step in workflow[job]["steps"][1:2]}
    assert f">={versions['oldest']}" == PROJECT["requires-python"]
    assert f"Programming Language :: Python :: {versions['newest']}" in PROJECT["classifiers"]
    assert {"run": "make test-oldest"} in workflow["oldest"]["steps"]
    assert {"run": ".ci/run"} in workflow["newest"]["steps"]


# How the house is measured


def test_circles_repeated_lines_and_names_of_a_package_are_counted(tmp_path):
    spec = importlib.util.spec_from_file_location("house", ROOT / "tools" / "house.py")
    house = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(house)
    (tmp_path / "pyro_wae" / "deep").mkdir(parents=True)
    (tmp_path / "docs" / "api").mkdir(parents=True)
    (tmp_path / "docs" / "api" / "page.md").write_text(".. autoclass:: pyro_wae.A\n")
    same = "\n".join(f"x{i} = {i}" for i in range(8))
    files = {
        "__init__.py": '__all__ = ["A", "B"]\n',
        "a.py": f"from pyro_wae.deep import b\n{same}\n",
        "deep/__init__.py": "",
        "deep/b.py": "from pyro_wae.c import f\n",
        # A comment and a docstring between the same lines are no difference.
        "c.py": f'"""Text."""\n\nimport pyro_wae.a\n{same.replace("x4", "# why" + chr(10) + "x4")}\n',
        "d.py": "from pyro_wae.a import x1\n" + "\n".join(same.split("\n")[:6]),  # six lines are no repetition
    }
    for name, text in files.items():
        (tmp_path / "pyro_wae" / name).write_text(text)
    package = house.Package(tmp_path)
    assert package.circles() == ["a.py c.py deep/b.py"]
    assert len(package.repeated()) == 1
    assert {"a.py:2", "c.py:4"} == set(package.repeated()[0].split(" = "))
    assert (package.public(), package.documented()) == (["A", "B"], {"A"})
    calls = [["a.py", 1, "f"], ["c.py", 1, "g"], ["c.py", 1, "g"], ["a.py", 1, "f"]]
    assert house.walk(calls) == {"calls": 4, "functions": 2, "files": 2, "switches": 2}


# Forms


@pytest.mark.parametrize("path", [path for path in FORMS if path.stem != "config"], ids=lambda path: path.stem)
def test_issue_form_is_one(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(form)
    identifiers = []
    for field in form["body"]:
        assert field["type"] in {"markdown", "textarea", "input", "dropdown", "checkboxes"}
        if field["type"] == "markdown":
            assert field["attributes"]["value"]
        else:
            assert field["attributes"]["label"]
            identifiers.append(field["id"])
    assert len(set(identifiers)) == len(identifiers) > 0


def test_there_is_a_form_for_bugs_wishes_and_questions():
    assert {"bug", "feature", "question"} <= {path.stem for path in FORMS}


# What is shipped


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the source distribution."""
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
        folder = f"pyro_wae-{pyro_wae.__version__}.dist-info"
        metadata = Parser().parsestr(wheel.read(f"{folder}/METADATA").decode())
    about = {name for name in names if name.startswith(f"{folder}/")}
    assert names - about == tracked("pyro_wae")
    assert "pyro_wae/py.typed" in names
    assert {name.removeprefix(f"{folder}/") for name in about} == {"METADATA", "RECORD", "WHEEL", "licenses/LICENSE"}
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(required) == sorted(PROJECT["dependencies"])


@pytest.mark.slow
def test_source_distribution_holds_the_package_with_its_tests(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert tracked("pyro_wae") <= names
    assert tracked("tests") <= names
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml"} <= names


@pytest.mark.slow
def test_wheel_alone_imports_and_runs_the_quick_start_without_any_extra(built, tmp_path):
    """In a new environment, which sees the packages of this one but not this repository."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path)], check=True, timeout=60)
    python = tmp_path / "bin" / "python"
    paths = {"base": str(tmp_path), "platbase": str(tmp_path)}
    site = Path(sysconfig.get_path("purelib", vars=paths))
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(site)
    (site / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    modules = [name for _, name, _ in pkgutil.walk_packages(pyro_wae.__path__, "pyro_wae.")]
    modules.remove("pyro_wae.lightning")  # a Lightning module, which is none without Lightning
    assert importlib.import_module(modules[0])
    block = re.search(r"^```python\n(.*?)^```$", read("README.md"), re.MULTILINE | re.DOTALL).group(1)
    block = block.replace("range(10)", "range(1)")
    program = "\n".join(
        [
            "import importlib, sys",
            f"for name in {EXTRAS!r}:",
            "    sys.modules[name] = None",
            f"for name in {modules!r}:",
            "    importlib.import_module(name)",
            "import pyro_wae",
            f"assert pyro_wae.__file__.startswith({str(site)!r}), pyro_wae.__file__",
            block,
        ]
    )
    finished = subprocess.run(
        [str(python), "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("0 Terms(cost=")
