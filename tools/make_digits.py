"""Makes digits.npz, the part of MNIST that comes with the package.

    python tools/make_digits.py --root ./mnist

No random number is drawn: each class gives its share of the digits (its share of MNIST, rounded by largest
remainders), evenly spaced through MNIST's own order, so that early and late writers are represented alike.
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np

DIGITS = Path(__file__).parents[1] / "pyro_wae" / "demo" / "digits.npz"


def balanced_indices(labels: np.ndarray, size: int) -> np.ndarray:
    """Indices of a subset in which every class has the share it has in ``labels``.

    Args:
        labels: Class of every datum, shape ``(n,)``, integers from 0.
        size: How many data to take, at most ``n``.

    Returns:
        Ascending indices into ``labels``, shape ``(size,)``.

    Raises:
        ValueError: If ``size`` exceeds the number of labels.
    """
    if size > len(labels):
        raise ValueError(f"size must be at most the number of labels, {len(labels)}, but is {size}")
    exact = np.bincount(labels) * size / len(labels)
    quotas = np.floor(exact).astype(int)
    largest_remainders = np.argsort(quotas - exact, kind="stable")[: size - quotas.sum()]
    quotas[largest_remainders] += 1
    chosen = []
    for label, quota in enumerate(quotas):
        members = np.flatnonzero(labels == label)
        chosen.append(members[np.arange(quota) * len(members) // max(quota, 1)])
    return np.sort(np.concatenate(chosen))


def make_digits(
    root: str, *, train_size: int = 10_000, heldout_size: int = 3_000, test_size: int = 2_000
) -> dict[str, np.ndarray]:
    """Takes two balanced parts of MNIST's training set without a common digit, and one of its test set.

    Args:
        root: Folder of torchvision's MNIST, downloaded if it is not there.
        train_size: Digits to take from the 60,000 training digits.
        heldout_size: Digits to take from those that are left of them.
        test_size: Digits to take from the 10,000 test digits.

    Returns:
        ``train_images``, ``heldout_images`` and ``test_images``, uint8 of shape ``(size, 28, 28)``, and
        ``train_labels``, ``heldout_labels`` and ``test_labels``, uint8 of shape ``(size,)``.
    """
    from torchvision.datasets import MNIST

    arrays = {}
    for is_train, sizes in ((True, {"train": train_size, "heldout": heldout_size}), (False, {"test": test_size})):
        mnist = MNIST(root, train=is_train, download=True)
        images, labels = mnist.data.numpy(), mnist.targets.numpy()
        for part, size in sizes.items():
            chosen = balanced_indices(labels, size)
            arrays[f"{part}_images"], arrays[f"{part}_labels"] = images[chosen], labels[chosen].astype(np.uint8)
            images, labels = np.delete(images, chosen, 0), np.delete(labels, chosen)
    return arrays


def main() -> None:
    """Writes digits.npz and prints the checksums that digits.md lists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="./mnist", help="folder of torchvision's MNIST (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=DIGITS, help="file to write (default: %(default)s)")
    args = parser.parse_args()
    arrays = make_digits(args.root)
    np.savez_compressed(args.out, **arrays)
    for name, array in arrays.items():
        print(f"{name:15s} {array.shape!s:16s} sha256 {hashlib.sha256(array.tobytes()).hexdigest()}")
    print(f"{args.out.name:30s} sha256 {hashlib.sha256(args.out.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
