"""What the examples of this folder share: the digits, an auto-encoder for them, and a command line."""

import argparse
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_wae.demo.digits import load_digits

PIXELS = 28 * 28


class DigitWAE(nn.Module):
    """A small auto-encoder of flattened digits, as a Pyro model and guide."""

    def __init__(self, zdim: int = 8, hidden: int = 256):
        super().__init__()
        self.zdim = zdim
        self.encoder = nn.Sequential(nn.Linear(PIXELS, hidden), nn.ReLU(), nn.Linear(hidden, zdim))
        self.decoder = nn.Sequential(nn.Linear(zdim, hidden), nn.ReLU(), nn.Linear(hidden, PIXELS), nn.Sigmoid())

    def model(self, x: Tensor) -> None:
        """The prior of the codes and the decoder."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.zdim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """The encoder: one code for each digit, without noise."""
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(self.encoder(x)).to_event(1))


def digits(count: int | None = None) -> Tensor:
    """The first of the bundled training digits, or all 10,000, as rows of shape (n, 784) in [0, 1]."""
    train_images, *_ = load_digits()
    return train_images[:count].flatten(1)


def parse_args(name: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line of an example."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=200, help="digits in a step, those of all processes together")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/scale") / name, help="folder for what is written")
    parser.add_argument("--smoke", action="store_true", help="run in seconds, to see that everything works")
    args = parser.parse_args(argv)
    args.digits = None
    if args.smoke:
        args.epochs, args.digits = 2, 1000
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def device_of(rank: int) -> torch.device:
    """The GPU of a process, counted on its own machine, or the CPU where there is none."""
    return torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
