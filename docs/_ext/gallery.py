"""A Sphinx extension that shows the notebooks of tutorials/, with a gallery page of their pictures.

Sphinx reads only what lies in its own folder, so that the notebooks are copied to docs/tutorials/ before each build.
The gallery shows of each its title, the sentence below it, and the last picture of the cell with the tag "thumbnail".
"""

import base64
import json
from pathlib import Path
from typing import Any

__all__ = ["build_gallery", "setup"]

PAGE = """# Tutorials

Each of these notebooks is self-contained, uses data that come with the package, and takes a few minutes on a laptop. To
run one, install the extra `notebooks` ({{doc}}`../install`), download the notebook below, and open it with
`jupyter lab`. In a clone, `make notebook` installs all that is needed and opens Jupyter on the folder `tutorials/`.

::::{{container}} gallery
{cards}
::::

```{{toctree}}
:hidden:

{names}
```
"""
CARD = """
:::{{container}} card
[![{alt}](thumbnails/{name}.png)]({name}.ipynb)

[**{title}**]({name}.ipynb)

{line}

{{download}}`Download the notebook <{name}.ipynb>`
:::"""
THIS = "[this notebook]({name})"


def build_gallery(source: Path, target: Path) -> list[str]:
    """Writes notebooks, thumbnails and the gallery's page.

    Args:
        source: The folder of the notebooks.
        target: The folder of the pages; it is made.

    Returns:
        The names of the notebooks, without their endings.

    Raises:
        ValueError: If a notebook has no title, no sentence below it, or no picture in a cell with the tag "thumbnail".
    """
    (target / "thumbnails").mkdir(parents=True, exist_ok=True)
    names, cards = [], []
    for path in sorted(source.glob("[0-9]*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        title, line = _heading(path, notebook)
        png, alt = _thumbnail(path, notebook)
        _write(target / "thumbnails" / f"{path.stem}.png", png)
        _write(target / path.name, json.dumps(_as_page(path.name, notebook), indent=1).encode())
        names.append(path.stem)
        cards.append(CARD.format(name=path.stem, title=title, line=line, alt=alt))
    _write(target / "index.md", PAGE.format(cards="\n".join(cards), names="\n".join(names)).encode())
    for stale in [*target.glob("*.ipynb"), *target.glob("thumbnails/*.png")]:
        if stale.stem not in names:
            stale.unlink()
    return names


def _heading(path: Path, notebook: Any) -> tuple[str, str]:
    text = "".join(notebook["cells"][0]["source"])
    parts = [part.replace("\n", " ").strip() for part in text.split("\n\n")]
    if len(parts) < 2 or not parts[0].startswith("# "):
        raise ValueError(f"The first cell of {path.name} must be '# Title', an empty line, and one sentence.")
    return parts[0].removeprefix("# "), parts[1]


def _thumbnail(path: Path, notebook: Any) -> tuple[bytes, str]:
    pictures = [
        (base64.b64decode("".join(output["data"]["image/png"])), _alt(output))
        for cell in notebook["cells"]
        if "thumbnail" in cell["metadata"].get("tags", [])
        for output in cell["outputs"]
        if "image/png" in output.get("data", {})
    ]
    if not pictures:
        raise ValueError(f'{path.name} needs a cell with the tag "thumbnail" and a stored picture.')
    return pictures[-1]


def _alt(output: Any) -> str:
    return output.get("metadata", {}).get("image/png", {}).get("alt", "")


def _as_page(name: str, notebook: Any) -> Any:
    """What differs between the notebook in its folder and on the site."""
    for cell in notebook["cells"]:
        # Seen from tutorials/ the pages are in ../docs/, and seen from docs/tutorials/ in ../.
        source = "".join(cell["source"]).replace("](../docs/", "](../")
        # On the site the notebook's link to itself downloads the file.
        cell["source"] = source.replace(THIS.format(name=name), f"{{download}}`this notebook <{name}>`")
        alts = [alt for output in cell.get("outputs", []) if (alt := _alt(output))]
        if alts:
            cell["metadata"].setdefault("mystnb", {})["image"] = {"alt": " ".join(alts)}
    return notebook


def _write(path: Path, content: bytes) -> None:
    """Leaves a file alone that is as it should be, so that Sphinx does not read it again."""
    if not path.exists() or path.read_bytes() != content:
        path.write_bytes(content)


def _before_reading(app: Any) -> None:
    build_gallery(Path(app.srcdir).parent / "tutorials", Path(app.srcdir) / "tutorials")


def setup(app: Any) -> dict[str, Any]:
    """Registers the extension."""
    app.connect("builder-inited", _before_reading)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
