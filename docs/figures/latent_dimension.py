"""Trains the quick start's networks with several latent dimensions: the figure and table of docs/hyperparameters.md."""

from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from common import BLUE, GREEN, ORANGE, new_figure, save
from pyro.infer import SVI
from torch import Tensor, nn

from pyro_wae import WAELoss
from pyro_wae.demo.digits import load_digits
from pyro_wae.diagnostics import classifier_test
from pyro_wae.optim import Adam
from pyro_wae.penalties import EnergyDistance
from pyro_wae.predict import code_rows, reconstruct, sample

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "_generated" / "latent_dimension.md"
DIMENSIONS = (2, 4, 8, 16, 32)
EPOCHS = 10


def run(latent_dim: int, train: Tensor, held_out: Tensor) -> tuple[float, float, float]:
    """Held-out squared error, accuracy of the classifier test, and energy distance of samples to held-out digits."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    encoder = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, latent_dim))
    decoder = nn.Sequential(nn.Linear(latent_dim, 256), nn.ReLU(), nn.Linear(256, 784), nn.Sigmoid())

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(latent_dim), 1).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(encoder(x)).to_event(1))

    svi = SVI(model, guide, Adam({"lr": 1e-3}), loss=WAELoss())
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(train)).split(100):
            svi.step(train[rows])
    error = (reconstruct(model, guide, held_out)["x"] - held_out).square().sum(-1).mean().item()
    codes, prior = code_rows(model, guide, held_out)
    accuracy = classifier_test(codes, prior).accuracy
    distance = EnergyDistance()(sample(model, held_out)["x"], held_out).item()
    return error, accuracy, distance


def main() -> None:
    """Writes docs/images/latent_dimension.png and docs/_generated/latent_dimension.md."""
    train, _, held_out, _ = load_digits(parts=("train", "heldout"))
    train, held_out = train.flatten(1), held_out.flatten(1)
    rows = []
    lines = [
        "| latent dimension | held-out squared error | classifier test | energy distance of samples |",
        "|---:|---:|---:|---:|",
    ]
    for d in DIMENSIONS:
        rows.append(run(d, train, held_out))
        error, accuracy, distance = rows[-1]
        lines.append(f"| {d} | {error:.1f} | {accuracy:.1%} | {distance:.3f} |")
        print(lines[-1], flush=True)
    lines += [
        "",
        "Made by",
        "",
        "    python docs/figures/latent_dimension.py",
        "",
        f"The quick start's networks, the default loss, {EPOCHS} epochs, one seed; 3000 held-out digits and as many",
        "samples.",
    ]
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    figure, axes = new_figure(2.9, ncols=3)
    titles = ("squared error\n(held-out)", "classifier test\n(codes)", "energy distance\n(samples)")
    for panel, values, title, colour in zip(axes, zip(*rows, strict=True), titles, (BLUE, GREEN, ORANGE), strict=True):
        panel.semilogx(DIMENSIONS, values, "o-", color=colour, base=2)
        panel.set(title=title, xlabel="dimension", xticks=[2, 8, 32], xticklabels=["2", "8", "32"])
        panel.set_ylim(bottom=0.5 if "classifier" in title else 0)
    save(figure, "latent_dimension")


if __name__ == "__main__":
    main()
