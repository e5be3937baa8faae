"""The digits that every tutorial learns from: a part of MNIST bundled with the repository, or all of it."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

BUNDLED = Path(__file__).parent / "data" / "digits.npz"

MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def load_digits(name: str = "bundled", *, root: str | Path = "./mnist") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loads handwritten digits with their labels.

    Args:
        name: ``"bundled"`` for the 10,000 training and 2,000 test digits that come with the repository
            (see ``data/README.md``), or ``"mnist"`` for all 60,000 and 10,000 through torchvision.
        root: Folder of torchvision's MNIST, which is downloaded into it once. Unused for ``"bundled"``.

    Returns:
        ``train_images, train_labels, test_images, test_labels``: images as float32 in [0, 1] of shape
        ``(n, 1, 28, 28)``, labels as int64 of shape ``(n,)``.

    Raises:
        ValueError: If ``name`` is neither of the two.
        ImportError: If ``name`` is ``"mnist"`` and torchvision is not installed.
        RuntimeError: If MNIST is not in ``root`` and cannot be downloaded.
    """
    if name == "bundled":
        with np.load(BUNDLED) as arrays:
            parts = {key: torch.from_numpy(array) for key, array in arrays.items()}
    elif name == "mnist":
        parts = _load_mnist(Path(root))
    else:
        raise ValueError(f'name must be "bundled" or "mnist", but is {name!r}')
    train_images, test_images = (parts[key].unsqueeze(1) / 255 for key in ("train_images", "test_images"))
    return train_images, parts["train_labels"].long(), test_images, parts["test_labels"].long()


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
            f"  - use the digits that come with the repository: --data bundled, or\n"
            f"  - put these four files (packed or unpacked) into {root / 'MNIST' / 'raw'}:\n{files}"
        ) from error
    return {
        "train_images": train.data,
        "train_labels": train.targets,
        "test_images": test.data,
        "test_labels": test.targets,
    }
