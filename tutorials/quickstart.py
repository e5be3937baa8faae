"""Quickstart: a Wasserstein auto-encoder that learns to write digits, in about two minutes on two CPU cores.

    python tutorials/quickstart.py

The encoder gives each digit a code of eight numbers, and the decoder makes a digit of a code. Training lowers the
squared error of the digits that come back (the cost), and keeps the codes of all digits together distributed as the
prior (the penalty). How much the penalty weighs is found while training. A code drawn from the prior then is one that
the decoder knows, and comes out as a new digit.
Pictures and figures are written to results/quickstart/.
"""

import argparse
import json
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from digits import load_digits
from overview import overview
from pyro.infer import SVI
from torch import Tensor, nn
from tqdm import tqdm

from pyro_wae import WAELoss
from pyro_wae.penalties import MMD
from pyro_wae.plotting import codes_and_prior, image_grid, loss_curves, reconstructions


class DigitWAE(nn.Module):
    """A convolutional auto-encoder of 28x28 images, as a Pyro model and guide."""

    def __init__(self, zdim: int):
        super().__init__()
        self.zdim = zdim
        # GroupNorm, not BatchNorm: it treats each digit alone. BatchNorm would tie the codes of a batch together,
        # and the penalty, which sees them together, would look better than it is.
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 4, stride=2, padding=1), nn.GroupNorm(8, 16), nn.ReLU(),  # 16 x 14 x 14
            nn.Conv2d(16, 32, 4, stride=2, padding=1), nn.GroupNorm(8, 32), nn.ReLU(),  # 32 x 7 x 7
            nn.Flatten(), nn.Linear(32 * 7 * 7, 128), nn.ReLU(),
            nn.Linear(128, zdim),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(zdim, 128), nn.ReLU(), nn.Linear(128, 32 * 7 * 7),
            nn.Unflatten(1, (32, 7, 7)), nn.BatchNorm2d(32), nn.ReLU(),
            nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1), nn.Sigmoid(),
        )  # fmt: skip

    def model(self, x: Tensor) -> None:
        """The prior of the codes and the decoder."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.zdim), 1.0).to_event(1))
            # The cost compares x with this distribution's mean; no likelihood is computed, so the scale is idle.
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(3), obs=x)

    def guide(self, x: Tensor) -> None:
        """The encoder: one code for each digit, without noise."""
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(self.encoder(x)).to_event(1))


def train(wae: DigitWAE, images: Tensor, args: argparse.Namespace) -> dict[str, list[float]]:
    """Trains on the images and returns each epoch's mean cost, penalty and penalty weight."""
    optimizer = pyro.optim.CosineAnnealingLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": args.learning_rate}, "T_max": args.epochs}
    )
    loss = WAELoss(MMD(), penalty_weight=args.penalty_weight)
    svi = SVI(wae.model, wae.guide, optimizer, loss=loss)

    history: dict[str, list[float]] = {"cost": [], "penalty": [], "weight": []}
    wae.train()
    progress = tqdm(range(args.epochs), unit="epoch")
    for _ in progress:
        terms = []
        for batch in torch.randperm(len(images), device=images.device).split(args.batch_size):
            svi.step(images[batch])
            terms.append(torch.tensor([loss.terms.cost, loss.terms.penalty, loss.terms.weight]))
        optimizer.step()  # lowers the learning rate
        cost, penalty, weight = torch.stack(terms).mean(0).tolist()
        for key, value in (("cost", cost), ("penalty", penalty), ("weight", weight)):
            history[key].append(value)
        progress.set_postfix(cost=f"{cost:.1f}", penalty=f"{penalty:+.4f}", weight=f"{weight:.0f}")
    return history


@torch.no_grad()
def evaluate(wae: DigitWAE, images: Tensor, labels: Tensor, out: Path) -> dict[str, float]:
    """Draws the pictures of digits that were not trained on, and measures on them."""
    wae.eval()
    codes = wae.encoder(images)
    outputs = wae.decoder(codes)
    prior = torch.randn_like(codes)
    samples = wae.decoder(prior[:100])

    pictures = {
        "overview": overview(images, outputs, samples, codes, prior, labels),
        "samples": image_grid(samples, cmap="gray_r", title="New digits, from draws of the prior"),
        "reconstructions": reconstructions(
            images[:30], outputs[:30], cmap="gray_r", title="Test digits, and what their codes give back"
        ),
        "codes": codes_and_prior(codes, prior, labels, title="Codes of test digits, where they fit the prior worst"),
    }
    for name, figure in pictures.items():
        figure.savefig(out / f"{name}.png")

    # How far from 0 the estimate strays by chance is seen on pairs of prior draws, which do match.
    mmd = MMD()
    null = torch.stack([mmd(torch.randn_like(codes), torch.randn_like(codes)) for _ in range(20)])
    return {
        "test_cost": (outputs - images).square().sum((1, 2, 3)).mean().item(),
        "test_mmd2": mmd(codes, prior).item(),
        "null_mmd2_std": null.std().item(),
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", choices=("bundled", "mnist"), default="bundled", help="12,000 digits, or all 70,000")
    parser.add_argument("--root", default="./mnist", help="folder of the full MNIST")
    parser.add_argument("--out", type=Path, default=Path("results/quickstart"), help="folder for what is made")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--zdim", type=int, default=8, help="numbers in a code")
    parser.add_argument("--penalty-weight", type=float, help="a constant; without it the training finds the weight")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="run in seconds, to see that everything works")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Trains, evaluates, and says what was reached."""
    args = parse_args(argv)
    pyro.set_rng_seed(args.seed)
    train_images, _, test_images, test_labels = load_digits(args.data, root=args.root)
    if args.smoke:
        args.epochs = 1
        train_images, test_images, test_labels = train_images[:200], test_images[:200], test_labels[:200]
    args.out.mkdir(parents=True, exist_ok=True)

    wae = DigitWAE(args.zdim).to(args.device)
    start = time.perf_counter()
    history = train(wae, train_images.to(args.device), args)
    seconds = time.perf_counter() - start
    loss_curves(history).savefig(args.out / "losses.png")
    reached = evaluate(wae, test_images.to(args.device), test_labels, args.out)

    options = {key: str(value) if key == "out" else value for key, value in vars(args).items()}
    metrics = {**reached, "seconds": seconds, "history": history, "options": options}
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(f"""
    cost of a test digit (squared error)   {reached["test_cost"]:8.2f}
    MMD^2 of test codes and prior          {reached["test_mmd2"]:+8.4f}
    ... of prior draws and prior           {0:+8.4f} +- {reached["null_mmd2_std"]:.4f}
    penalty weight of the last epoch       {history["weight"][-1]:8.0f}
    seconds of training                    {seconds:8.0f}

    Pictures and metrics.json are in {args.out}/""")


if __name__ == "__main__":
    main()
