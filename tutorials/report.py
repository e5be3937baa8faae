"""A report on the codes of digits that were not trained on, from the quickstart's auto-encoder.

    python tutorials/report.py

Trains as pyro_wae.demo does, prints the report, and writes its picture and figures to results/report/.
Takes the options of the demo, and --epochs 10 --learning-rate 1e-3 unless told otherwise.
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


def main(argv: list[str]) -> None:
    """Trains, and reports on test digits."""
    args = parse_args(["--epochs", "10", "--learning-rate", "1e-3", "--out", "results/report", *argv])
    pyro.set_rng_seed(args.seed)
    train_images, _, test_images, _ = load_digits(args.data, root=args.root)
    if args.smoke:
        args.epochs = 1
        train_images, test_images = train_images[:200], test_images[:200]
    wae = DigitWAE(args.zdim).to(args.device)
    train(wae, train_images.to(args.device), args)

    wae.eval()
    # In batches of the training's size, for the sake of BatchNorm, and shuffled: the digits come writer by writer.
    shuffled = test_images[torch.randperm(len(test_images))].to(args.device)
    found = report(wae.model, wae.guide, batches=shuffled.split(args.batch_size))
    print(found)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(found.to_dict(), indent=2) + "\n")
    found.plot(cmap="gray_r").savefig(out / "report.png", dpi=100)


if __name__ == "__main__":
    main(sys.argv[1:])
