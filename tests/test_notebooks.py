import base64
import io
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parents[1]
TUTORIALS = ROOT / "tutorials"
for folder in (TUTORIALS, ROOT / "docs" / "_ext"):
    sys.path.insert(0, str(folder))

from gallery import build_gallery  # noqa: E402
from run_notebooks import notebooks, shorten, shrink, shrink_pictures, tidy  # noqa: E402

PATHS = notebooks()
MACHINE = re.compile(r"(?<![\w.:/)\]])/[A-Za-z][\w.-]*/[\w.-]|\b[A-Z]:\\|site-packages|ipykernel_\d| at 0x[0-9a-f]{6}")
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)(#[^)]*)?\)")

every_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def outputs_of(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def words_of(notebook):
    """All text of a notebook, and of its outputs all but the pictures."""
    parts = [cell.source for cell in notebook.cells]
    for output in outputs_of(notebook):
        parts.append(output.get("text", ""))
        parts += [json.dumps(value) for kind, value in output.get("data", {}).items() if not kind.startswith("image/")]
    return "\n".join(parts)


def test_there_are_notebooks():
    assert PATHS


@pytest.mark.slow
@every_notebook
def test_notebook_runs(path):
    finished = subprocess.run(
        [sys.executable, str(TUTORIALS / "run_notebooks.py"), path.stem, "--smoke"],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert path.name in finished.stdout


@every_notebook
def test_stored_outputs_are_those_of_one_run_from_top_to_bottom(path):
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


@every_notebook
def test_stored_outputs_have_pictures_with_words_for_them_and_no_error_or_warning(path):
    outputs = outputs_of(nbformat.read(path, as_version=4))
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert pictures
    assert all(picture.metadata["image/png"]["alt"] for picture in pictures)


@every_notebook
def test_notebook_is_valid_and_tidy(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    stored = json.loads(nbformat.writes(notebook))
    assert stored == json.loads(nbformat.writes(tidy(notebook)))


@every_notebook
def test_notebook_names_no_folder_of_the_machine_it_ran_on(path):
    assert not MACHINE.search(words_of(nbformat.read(path, as_version=4)))


@every_notebook
def test_notebook_is_small(path):
    assert path.stat().st_size < 400_000


@every_notebook
def test_notebook_is_self_contained_with_lines_that_fit_a_page(path):
    code = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    lines = "\n".join(code).splitlines()
    assert max(map(len, lines)) <= 88
    modules = {path.stem for path in TUTORIALS.glob("*.py")}
    assert not [line for line in lines if re.match(r"(from|import) (\w+)", line) and line.split()[1] in modules]


@every_notebook
def test_links_of_notebook_lead_to_files(path):
    texts = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
    for link in LINK.finditer("\n".join(texts)):
        assert (TUTORIALS / link.group(1)).exists(), link.group(0)


def a_notebook(*cells):
    return nbformat.from_dict({"cells": list(cells), "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


def a_png(values):
    from PIL import Image

    file = io.BytesIO()
    picture = Image.new("RGBA", (len(values), 1))
    picture.putdata(values)
    picture.save(file, format="png")
    return file.getvalue()


def pixels_of(png):
    from PIL import Image

    return list(Image.open(io.BytesIO(png)).convert("RGB").tobytes())


def test_quick_run_changes_the_parameters_and_nothing_else():
    first, last = (
        {"cell_type": "code", "source": "EPOCHS = 9", "metadata": {"tags": ["parameters"], "smoke": smoke}}
        for smoke in ("EPOCHS = 1", "N = 2")
    )
    notebook = a_notebook(first, {"cell_type": "code", "source": "train(EPOCHS)", "metadata": {}}, last)
    shorten(notebook)
    sources = [cell.source for cell in notebook.cells]
    assert sources == ["EPOCHS = 9", "EPOCHS = 1", "train(EPOCHS)", "EPOCHS = 9", "N = 2"]


def test_parameters_without_a_quick_run_are_an_error():
    cell = {"cell_type": "code", "source": "EPOCHS = 9", "metadata": {"tags": ["parameters"]}}
    with pytest.raises(ValueError, match=r'Cell 0 has the tag "parameters" and no key "smoke".*Write'):
        shorten(a_notebook(cell))


def test_figures_take_their_text_from_the_cell():
    cell = cell_with_picture(metadata={"mystnb": {"image": {"alt": "Sixty samples"}}})
    cell["outputs"][0]["data"]["text/plain"] = "<Figure>"
    output = tidy(a_notebook(cell)).cells[0].outputs[0]
    assert output.metadata["image/png"]["alt"] == "Sixty samples"
    assert list(output.data) == ["image/png"]


def test_pictures_keep_256_greys():
    greys = [(value, value, value, 255) for value in range(256)]
    assert pixels_of(shrink(a_png(greys))) == [value for pixel in greys for value in pixel[:3]]


def test_pictures_keep_their_colours_and_lie_on_white():
    assert pixels_of(shrink(a_png([(255, 0, 0, 255), (0, 0, 255, 0)]))) == [255, 0, 0, 255, 255, 255]


def test_charts_are_at_most_640_pixels_wide():
    from PIL import Image

    assert Image.open(io.BytesIO(shrink(a_png([(255, 0, 0, 255)] * 900)))).size[0] == 640


def test_stored_pictures_are_smaller_keep_many_colours_and_shrink_once():
    noise = [(*random.Random(index).randbytes(3), 255) for index in range(900)]
    assert pixels_of(shrink(a_png(noise))) == [value for pixel in noise for value in pixel[:3]]
    cell = cell_with_picture()
    cell["outputs"][0]["data"]["image/png"] = base64.b64encode(a_png(noise)).decode()
    notebook = a_notebook(cell)
    shrink_pictures(notebook)
    first = notebook.cells[0].outputs[0].data["image/png"]
    assert len(base64.b64decode(first)) < len(a_png(noise))
    shrink_pictures(notebook)
    assert notebook.cells[0].outputs[0].data["image/png"] == first


def test_every_notebook_is_a_page_with_a_card_in_the_gallery(tmp_path):
    names = build_gallery(TUTORIALS, tmp_path)
    page = (tmp_path / "index.md").read_text(encoding="utf-8")
    assert names == [path.stem for path in PATHS]
    for path in PATHS:
        assert page.count(f"]({path.stem}.ipynb)") == 2
        assert f"\n{path.stem}\n" in page
        assert (tmp_path / "thumbnails" / f"{path.stem}.png").stat().st_size > 1000
        nbformat.validate(nbformat.read(tmp_path / path.name, as_version=4))
    assert "tutorials/index" in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")


def cell_with_picture(**changes):
    output = {"output_type": "display_data", "data": {"image/png": "aGVsbG8="}, "metadata": {"image/png": {"alt": "A"}}}
    code = {"cell_type": "code", "source": "1", "metadata": {"tags": ["thumbnail"]}, "outputs": [output]}
    return code | changes


def heading(text):
    return {"cell_type": "markdown", "source": text, "metadata": {}}


def test_gallery_shows_title_sentence_and_the_last_picture_of_the_tagged_cell(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    cells = [
        heading("# Title\n\nOne\nline.\n\nMore, [there](../docs/weights.md), [this notebook](01_a.ipynb)."),
        cell_with_picture(),
    ]
    (source / "01_a.ipynb").write_text(json.dumps({"cells": cells}))
    target.mkdir()
    (target / "00_gone.ipynb").write_text("{}")
    assert build_gallery(source, target) == ["01_a"]
    page = (target / "index.md").read_text()
    assert "[**Title**](01_a.ipynb)\n\nOne line.\n" in page
    assert "[![A](thumbnails/01_a.png)](01_a.ipynb)" in page
    assert (target / "thumbnails" / "01_a.png").read_bytes() == b"hello"
    first, second = json.loads((target / "01_a.ipynb").read_text())["cells"]
    assert "[there](../weights.md)" in first["source"]
    assert "{download}`this notebook <01_a.ipynb>`" in first["source"]
    assert "{download}`Download the notebook <01_a.ipynb>`" in page
    assert second["metadata"]["mystnb"]["image"]["alt"] == "A"
    assert not (target / "00_gone.ipynb").exists()


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        pytest.param([heading("Title")], "The first cell of 01_a.ipynb must be", id="no title"),
        pytest.param([heading("# Title")], "The first cell of 01_a.ipynb must be", id="no sentence"),
        pytest.param([heading("# T\n\nS"), cell_with_picture(metadata={})], 'tag "thumbnail"', id="no tag"),
        pytest.param([heading("# T\n\nS"), cell_with_picture(outputs=[])], "stored picture", id="no picture"),
    ],
)
def test_gallery_says_what_a_notebook_lacks(cells, message, tmp_path):
    (tmp_path / "01_a.ipynb").write_text(json.dumps({"cells": cells}))
    with pytest.raises(ValueError, match=message):
        build_gallery(tmp_path, tmp_path / "target")
