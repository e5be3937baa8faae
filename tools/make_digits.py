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
SIZES = {True: {"train": 10_000, "heldout": 3_000}, False: {"test": 2_000}}
"""Digits to take from MNIST's training set, in parts without a common one, and from its test set."""


def balanced_indices(labels: np.ndarray, size: int) -> np.ndarray:
    """Ascending indices of a subset in which every class has the share that it has in the labels, 0, 1, ..."""
    exact = np.bincount(labels) * size / len(labels)
    quotas = np.floor(exact).astype(int)
    largest_remainders = np.argsort(quotas - exact, kind="stable")[: size - quotas.sum()]
    quotas[largest_remainders] += 1
    chosen = []
    for label, quota in enumerate(quotas):
        members = np.flatnonzero(labels == label)
        chosen.append(members[np.arange(quota) * len(members) // max(quota, 1)])
    return np.sort(np.concatenate(chosen))


def make_digits(root: str) -> dict[str, np.ndarray]:
    """Images (size, 28, 28) and labels (size,) of each part as uint8; MNIST is downloaded if it is not there."""
    from torchvision.datasets import MNIST

    arrays = {}
    for is_train, sizes in SIZES.items():
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
