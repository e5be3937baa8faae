"""Sphinx settings. `make docs` builds the pages, without a network."""

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from inspect import isclass, isfunction
from pathlib import Path
from typing import Any

import pyro_wae

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "pyro_wae"
author = "The pyro_wae developers"
project_copyright = author
release = version = pyro_wae.__version__

extensions = [
    "gallery",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
# Ships MathJax with the pages, for readers without a network; where it is not installed, pages load it from its server.
if find_spec("sphinx-mathjax-offline"):
    extensions.append("sphinx-mathjax-offline")
exclude_patterns = ["_build", "_generated"]
nitpicky = True

# Links into other projects need their inventories from the network, so that they are made on request only:
#     PYRO_WAE_DOCS_INTERSPHINX=1 make docs
if os.environ.get("PYRO_WAE_DOCS_INTERSPHINX", "0") not in ("", "0"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "pyro": ("https://docs.pyro.ai/en/stable", None),
    }

EXTERNAL = (
    "torch|nn|Tensor|pyro|dist|collections|typing|Any|Callable|Mapping|Sequence|Iterable|Iterator"
    "|matplotlib|Figure|numpy|np"
)
# Names of other projects stay plain text where there is no inventory; a wrong name of this project is an error.
nitpick_ignore_regex = [
    (r"py:.*", rf"({EXTERNAL})(\..*)?"),
    (r"py:.*", r"(bool|dict|float|int|list|None|object|optional|str|tuple|type|[A-Z]\w+Error)"),
]

# Type variables, and type aliases: of images and codes, and of models and guides.
nitpick_ignore = [
    ("py:class", "pyro_wae.penalties.kernel_means.F"),
    ("py:class", "pyro_wae.priors.fitting.Prior"),
    ("py:class", "Program"),
    ("py:class", "Rows"),
    ("py:class", "os.PathLike"),
]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_use_unqualified_type_names = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = "pyro_wae"
html_static_path = ["_static"]
html_css_files = ["pages.css", "gallery.css"]
html_copy_source = False
html_show_sphinx = False

PUBLIC_MODULES = (
    "pyro_wae",
    "pyro_wae.penalties",
    "pyro_wae.kernels",
    "pyro_wae.costs",
    "pyro_wae.weights",
    "pyro_wae.priors",
    "pyro_wae.predict",
    "pyro_wae.diagnostics",
    "pyro_wae.optim",
    "pyro_wae.checkpoint",
    "pyro_wae.plotting",
)


def _public_names() -> dict[str, str]:
    """Maps where a class or function is defined to the name by which users import it."""
    names = {}
    for module_name in PUBLIC_MODULES:
        module = import_module(module_name)
        for name in module.__all__:
            value = getattr(module, name)
            if isclass(value) or isfunction(value):
                names[f"{value.__module__}.{value.__qualname__}"] = f"{module_name}.{name}"
    return names


PUBLIC_NAMES = _public_names()


def resolve_public_name(app: Any, env: Any, node: Any, content: Any) -> Any:
    """Finds what a type hint names by the file that defines it on the page of its public name."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or PUBLIC_NAMES.get(target, target) == target:
        return None
    domain = env.domains["py"]
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", PUBLIC_NAMES[target], node, content)


def setup(app: Any) -> None:
    """Registers what these settings define."""
    app.connect("missing-reference", resolve_public_name)
