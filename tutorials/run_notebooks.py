"""Executes the notebooks and stores their outputs.

    python tutorials/run_notebooks.py             # all of them, as long as it takes
    python tutorials/run_notebooks.py 01 03       # those whose names begin so
    python tutorials/run_notebooks.py --smoke     # in seconds, storing nothing

What changes from run to run without meaning, such as times and the version of Python, is not stored.
"""

import argparse
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
KEPT_OF_CELLS = ("tags", "mystnb")


def notebooks(*beginnings: str) -> list[Path]:
    """The notebooks whose names begin so, or all, in their order."""
    return [path for path in sorted(FOLDER.glob("[0-9]*.ipynb")) if path.name.startswith(beginnings or ("",))]


def tidy(notebook: Any) -> Any:
    """Leaves out what differs between two runs of the same notebook but for its outputs; changes it in place."""
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index:02d}"
        cell.metadata = nbformat.from_dict({key: cell.metadata[key] for key in KEPT_OF_CELLS if key in cell.metadata})
        for output in cell.get("outputs", []):
            if "data" in output:
                # The picture is there; its name in words says nothing.
                output.data.pop("text/plain", None) if "image/png" in output.data else None
    return notebook


def execute(notebook: Any, *, smoke: bool = False, timeout: float | None = None) -> Any:
    """Runs all cells in a fresh kernel, in this folder; raises nbclient's error where a cell fails."""
    environment = {
        **os.environ,
        "PYRO_WAE_SMOKE": "1" if smoke else "0",
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
            nbformat.write(notebook, path)
        seconds, size = time.perf_counter() - start, path.stat().st_size
        print(f"{path.name}: {seconds:.0f} seconds, {size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
