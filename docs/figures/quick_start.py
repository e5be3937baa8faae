"""Runs the README's quick start as it is printed, and draws the samples that it ends with."""

import re
from pathlib import Path
from typing import Any

from common import save

from pyro_wae.plotting import image_grid

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Writes docs/images/quick_start.png."""
    import pyro

    program = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert program is not None
    names: dict[str, Any] = {}
    pyro.set_rng_seed(0)
    exec(program.group(1), names)
    save(image_grid(names["digits"].reshape(-1, 28, 28), columns=10), "quick_start", colours=0, dpi=100)


if __name__ == "__main__":
    main()
