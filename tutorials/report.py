"""A report on the codes of digits that were not trained on, from the demo's auto-encoder.

    python tutorials/report.py

Trains as pyro_wae.demo does with --prior normal, prints the report, and writes it, its figure and its numbers to
results/report/. Takes the options of the demo, and --epochs 10 unless told otherwise.
"""

import json
import sys
from pathlib import Path

import pyro
import torch

from pyro_wae.demo.__main__ import parse_args, train
from pyro_wae.demo.digits import load_digits
from pyro_wae.demo.nets import DigitWAE
from pyro_wae.diagnostics import report

CODES = 2000


def main(argv: list[str]) -> None:
    """Trains with the prior N(0, I), and reports on digits that are held out of the training set."""
    args = parse_args(["--epochs", "10", "--prior", "normal", "--out", "results/report", *argv])
    pyro.set_rng_seed(args.seed)
    train_images, _, heldout, _ = load_digits(args.data, root=args.root, parts=("train", "heldout"))
    if args.smoke:
        args.epochs = 1
        train_images, heldout = train_images[:200], heldout[:200]
    wae = DigitWAE(args.zdim).to(args.device)
    train(wae, train_images.to(args.device), args)

    wae.eval()
    # In batches of the training's size, because the report compares BatchNorm's train and eval mode; and shuffled,
    # because the digits come writer by writer.
    shuffled = heldout[torch.randperm(len(heldout))][:CODES].to(args.device)
    found = report(wae.model, wae.guide, batches=shuffled.split(args.batch_size))
    print(found)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.txt").write_text(f"{found}\n")
    (out / "report.json").write_text(json.dumps(found.to_dict(), indent=2) + "\n")
    found.plot(cmap="gray_r").savefig(out / "report.png", dpi=100)


if __name__ == "__main__":
    main(sys.argv[1:])
