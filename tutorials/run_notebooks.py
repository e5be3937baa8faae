"""Executes the notebooks and stores their outputs.

    python tutorials/run_notebooks.py             # all of them, as long as it takes
    python tutorials/run_notebooks.py 01 03       # those whose names begin so
    python tutorials/run_notebooks.py --smoke     # in seconds, storing nothing

Two things stand in the metadata of a notebook's cells. A cell with the tag "parameters" holds the numbers that decide
how long the notebook takes; the code in its key "smoke" runs after it with ``--smoke``: ``{"smoke": "EPOCHS = 1"}``. A
cell that draws a figure has a text for those who cannot see it, ``{"mystnb": {"image": {"alt": "Sixty samples"}}}``,
which is copied to the figure. One cell shows one figure: a Figure as the last expression, or a figure of pyplot, which
shows itself.

What changes from run to run without meaning, such as times and the version of Python, is not stored.
"""

import argparse
import base64
import io
import math
import os
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
KEPT_OF_CELLS = ("tags", "mystnb", "smoke")
COLOURS, PIXELS = 256, 640
VISIBLE = 2.0  # mean difference of a channel, in 255ths


def notebooks(*beginnings: str) -> list[Path]:
    """The notebooks whose names begin so, or all, in their order."""
    return [path for path in sorted(FOLDER.glob("[0-9]*.ipynb")) if path.name.startswith(beginnings or ("",))]


def tidy(notebook: Any) -> Any:
    """Leaves out what differs between two runs but for the outputs, and describes figures; changes it in place."""
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index:02d}"
        cell.metadata = nbformat.from_dict({key: cell.metadata[key] for key in KEPT_OF_CELLS if key in cell.metadata})
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt")
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                # The picture is there; its name in words says nothing.
                output.data.pop("text/plain", None)
                if alt is not None:
                    output.metadata = nbformat.from_dict({"image/png": {"alt": alt}})
    return notebook


def shrink(png: bytes) -> bytes:
    """A smaller PNG: all 256 greys of a picture without colours, 640 pixels in width and 256 colours of a chart.

    Photographs and other pictures of which 256 colours would lose something that can be seen keep all theirs.
    """
    from PIL import Image, ImageChops, ImageStat

    picture = Image.open(io.BytesIO(png))
    if picture.mode in ("L", "P"):
        return png
    pixels = Image.new("RGB", picture.size, "white")
    pixels.paste(picture, mask=picture.getchannel("A") if "A" in picture.getbands() else None)
    red, green, blue = pixels.split()
    if red == green == blue:
        pixels = red
    else:
        # Charts of many points are large files.
        width = min(PIXELS, pixels.width)
        height = math.ceil(pixels.height * width / pixels.width)
        resized = pixels.resize((width, height), Image.Resampling.LANCZOS)
        chart = resized.quantize(COLOURS, dither=Image.Dither.NONE)
        if max(ImageStat.Stat(ImageChops.difference(chart.convert("RGB"), resized)).mean) < VISIBLE:
            pixels = chart
    small = io.BytesIO()
    pixels.save(small, format="png", optimize=True)
    return small.getvalue()


def shrink_pictures(notebook: Any) -> None:
    """Makes the pictures of the outputs small, in place."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = base64.b64encode(shrink(base64.b64decode(output.data["image/png"]))).decode()


def shorten(notebook: Any) -> None:
    """Puts behind each cell with the tag "parameters" the code of its key "smoke", in place."""
    for index, cell in reversed(list(enumerate(notebook.cells))):
        if "parameters" in cell.metadata.get("tags", []):
            if "smoke" not in cell.metadata:
                raise ValueError(
                    f'Cell {index} has the tag "parameters" and no key "smoke" in its metadata. '
                    'Write {"tags": ["parameters"], "smoke": "EPOCHS = 1"}.'
                )
            notebook.cells.insert(index + 1, nbformat.v4.new_code_cell(cell.metadata["smoke"]))


def execute(notebook: Any, *, smoke: bool = False, timeout: float | None = None) -> Any:
    """Runs all cells in a fresh kernel, in this folder; raises nbclient's error where a cell fails."""
    if smoke:
        shorten(notebook)
    environment = {
        **os.environ,
        # tqdm, which Pyro imports, warns where its bars would be plain text.
        "PYTHONWARNINGS": "ignore:IProgress not found",
    }
    client = NotebookClient(
        notebook, timeout=timeout, startup_timeout=300, kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER)}}, coalesce_streams=True, record_timing=False,
    )  # fmt: skip
    return tidy(client.execute(env=environment))


def main(argv: list[str] | None = None) -> None:
    """Runs what the command line names."""
    parser = argparse.ArgumentParser(description="Executes the notebooks and stores their outputs.")
    parser.add_argument("names", nargs="*", help="beginnings of names; all notebooks if left out")
    parser.add_argument("--smoke", action="store_true", help="run in seconds, and store nothing")
    args = parser.parse_args(argv)
    paths = notebooks(*args.names)
    if not paths:
        parser.error(f"no notebook's name begins with {args.names}; these are {[path.name for path in notebooks()]}")
    for path in paths:
        start = time.perf_counter()
        notebook = execute(nbformat.read(path, as_version=4), smoke=args.smoke)
        if not args.smoke:
            shrink_pictures(notebook)
            nbformat.write(notebook, path)
        seconds, size = time.perf_counter() - start, path.stat().st_size
        print(f"{path.name}: {seconds:.0f} seconds, {size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
