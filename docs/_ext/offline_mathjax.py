"""A Sphinx extension that ships MathJax with the pages, so a reader without a network sees formulas and no TeX.

The files are those of the npm package ``mathjax`` 3.2.2, which the Python package ``sphinx-mathjax-offline`` carries
unchanged. The extra ``docs`` installs it beside Sphinx, and a build needs neither npm nor a network. The script's
digest is compared with that of the npm package. Where the Python package is missing, the pages are built all the same,
with a message, and load MathJax from its public server.
"""

import hashlib
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sphinx.errors import ExtensionError
from sphinx.util import logging

__all__ = ["copy_mathjax", "mathjax_folder", "setup"]

PACKAGE = "sphinx-mathjax-offline"
SCRIPT = "tex-chtml-full.js"
FONTS = Path("output", "chtml", "fonts")
# Of mathjax-3.2.2.tgz, package/es5/tex-chtml-full.js, from the npm registry.
SHA256 = "91b005503c5d1f0958bf4d73ada1a3be33596b2c4ab5da22277f1b0d3149b5a4"

logger = logging.getLogger(__name__)


def mathjax_folder() -> Path | None:
    """Returns the installed folder of MathJax, or None where the package is not installed.

    Raises:
        ExtensionError: If the script in it is not that of MathJax 3.2.2.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "static" / "mathjax"
    digest = hashlib.sha256((folder / SCRIPT).read_bytes()).hexdigest()
    if digest != SHA256:
        raise ExtensionError(f"{folder / SCRIPT} is not that of MathJax 3.2.2. Write: pip install {PACKAGE}==0.0.2")
    return folder


def copy_mathjax(folder: Path, target: Path) -> None:
    """Copies what a page of TeX formulas loads: one script, and the fonts that it draws with."""
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / SCRIPT, target / SCRIPT)
    shutil.copytree(folder / FONTS, target / FONTS, dirs_exist_ok=True)


def _point_to_mathjax(app: Any, config: Any) -> None:
    if mathjax_folder() is None:
        logger.info(f"Formulas will need a network: MathJax is not installed. Write: pip install {PACKAGE}==0.0.2")
        return
    config.mathjax_path = f"mathjax/{SCRIPT}"


def _before_reading(app: Any) -> None:
    folder = mathjax_folder()
    if app.builder.format == "html" and folder is not None:
        copy_mathjax(folder, Path(app.outdir) / "_static" / "mathjax")


def setup(app: Any) -> dict[str, Any]:
    """Registers the extension."""
    app.connect("config-inited", _point_to_mathjax)
    app.connect("builder-inited", _before_reading)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
