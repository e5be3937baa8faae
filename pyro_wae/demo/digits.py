"""The digits that demo and tutorials learn from: a part of MNIST that comes with the package, or all of it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

BUNDLED = Path(__file__).with_name("digits.npz")

PARTS = ("train", "heldout", "test")

MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


HELD_OUT_OF_MNIST = 11
"""One in so many of MNIST's training digits is held out where that part is loaded.

The number is odd: digits at even and at odd places of the training set are two populations, which a two-sample test of
their pixels distinguishes, and every twelfth would be of one of them alone.
"""


def load_digits(
    name: str = "bundled", *, root: str | Path = "./mnist", parts: Sequence[str] = ("train", "test")
) -> tuple[Tensor, ...]:
    """Loads handwritten digits with their labels.

    Args:
        name: ``"bundled"`` for the 10,000 training, 3,000 held-out and 2,000 test digits that come with the package
            (see ``digits.md``), or ``"mnist"`` for all 60,000 and 10,000 through torchvision.
        root: Folder of torchvision's MNIST, which is downloaded into it once. Unused for ``"bundled"``.
        parts: What to load. ``"heldout"`` are digits of MNIST's training set that are not trained on: of
            ``"mnist"`` every eleventh, and ``"train"`` beside it are the other 54,545. Codes are compared with the
            prior on these, because MNIST's test set is of other writers, and another population than the training set.

    Returns:
        Images and labels of each part, ``train_images, train_labels, test_images, test_labels`` by default: images as
        float32 in [0, 1] of shape ``(n, 1, 28, 28)``, labels as int64 of shape ``(n,)``.

    Raises:
        ValueError: If ``name`` or a part is none of these.
        ImportError: If ``name`` is ``"mnist"`` and torchvision is not installed.
        RuntimeError: If MNIST is not in ``root`` and cannot be downloaded.
    """
    if name not in ("bundled", "mnist"):
        raise ValueError(f'name must be "bundled" or "mnist", but is {name!r}')
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ValueError(f"parts must be of {PARTS}, but one is {unknown[0]!r}")
    if name == "bundled":
        with np.load(BUNDLED) as arrays:
            keys = [f"{part}_{what}" for part in parts for what in ("images", "labels")]
            found = {key: torch.from_numpy(arrays[key]) for key in keys}
    else:
        found = _load_mnist(Path(root))
        if "heldout" in parts:
            held_out = torch.arange(len(found["train_labels"])) % HELD_OUT_OF_MNIST == 0
            for key in ("images", "labels"):
                whole = found[f"train_{key}"]
                found[f"heldout_{key}"], found[f"train_{key}"] = whole[held_out], whole[~held_out]
    return tuple(
        array
        for part in parts
        for array in (found[f"{part}_images"].unsqueeze(1) / 255, found[f"{part}_labels"].long())
    )


def _load_mnist(root: Path) -> dict[str, Tensor]:
    try:
        from torchvision.datasets import MNIST
    except ImportError as error:
        raise ImportError(
            'The full MNIST is read through torchvision: pip install "pyro-wae[tutorials]". '
            "Without it, use the bundled digits: --data bundled"
        ) from error
    try:
        train, test = (MNIST(str(root), train=train, download=True) for train in (True, False))
    except (RuntimeError, OSError) as error:
        files = "\n".join(f"    {file}.gz" for file in MNIST_FILES)
        raise RuntimeError(
            f"MNIST is not in {root} and could not be downloaded. Without a network, either\n"
            f"  - use the digits that come with the package: --data bundled, or\n"
            f"  - put these four files (packed or unpacked) into {root / 'MNIST' / 'raw'}:\n{files}"
        ) from error
    return {
        "train_images": train.data,
        "train_labels": train.targets,
        "test_images": test.data,
        "test_labels": test.targets,
    }
