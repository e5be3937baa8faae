"""Trains a convolutional auto-encoder of colour images: the figure and table of docs/colour_images.md."""

import argparse
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from common import new_figure, save
from pyro.infer import SVI
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyro_wae import WAELoss
from pyro_wae.demo.digits import load_digits
from pyro_wae.demo.judge import frechet_distance
from pyro_wae.demo.nets import deep_head
from pyro_wae.diagnostics import two_sample_test
from pyro_wae.optim import Adam
from pyro_wae.penalties import MMD, PriorLikelihood
from pyro_wae.plotting import as_images, make_mosaic
from pyro_wae.predict import code_rows, reconstruct, sample
from pyro_wae.priors import MixturePrior

TABLE = Path(__file__).parents[1] / "_generated" / "colour_images.md"
LATENT_DIM, WIDTH = 12, 16
SHOWN = 10


# data: page from here
def colour(digits: Tensor) -> Tensor:
    """Digits (n, 1, 28, 28) as images (n, 3, 32, 32) in [0, 1], each in a colour of its own."""
    ink = 0.2 + 0.8 * torch.rand(len(digits), 3, 1, 1)
    return ink * nn.functional.pad(digits, (2, 2, 2, 2))


# data: page to here
# nets: page from here
def down(inputs: int, outputs: int) -> nn.Sequential:
    """Halves the side."""
    # Groups are normalised image by image, which would take the colour out of the first layer's.
    norm = nn.Identity() if inputs == 3 else nn.GroupNorm(8, outputs)
    return nn.Sequential(nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), norm, nn.ReLU())


def up(inputs: int, outputs: int) -> nn.Sequential:
    """Doubles the side."""
    return nn.Sequential(
        nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()
    )  # fmt: skip


class ColourWAE(nn.Module):
    """An auto-encoder of images (n, 3, 32, 32) with a learned mixture as the prior."""

    def __init__(self) -> None:
        super().__init__()
        w, features = WIDTH, 4 * WIDTH * 4 * 4
        self.encoder = nn.Sequential(
            down(3, w), down(w, 2 * w), down(2 * w, 4 * w), nn.Flatten(), *deep_head(features, LATENT_DIM)
        )
        self.decoder = nn.Sequential(
            *deep_head(LATENT_DIM, features), nn.Unflatten(1, (4 * w, 4, 4)), nn.BatchNorm2d(4 * w), nn.ReLU(),
            up(4 * w, 2 * w), up(2 * w, w),
            nn.ConvTranspose2d(w, 3, 4, stride=2, padding=1), nn.Sigmoid(),
        )  # fmt: skip
        self.prior = MixturePrior(100, LATENT_DIM)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        pyro.module("prior", self.prior)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(3), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(self.encoder(x)).to_event(1))


# nets: page to here


def train(wae: ColourWAE, x: Tensor, epochs: int) -> None:
    """Trains with the recipe for learned priors."""
    optimizer = Adam(
        lambda name: {"lr": 3e-2 if name.startswith("prior.") else 1e-3},
        scheduler=lambda adam: CosineAnnealingLR(adam, epochs),
    )
    loss = WAELoss(MMD() + PriorLikelihood(), penalty_weight=100.0)
    svi = SVI(wae.model, wae.guide, optimizer, loss=loss)
    wae.train()
    for epoch in range(epochs):
        for rows in torch.randperm(len(x)).split(100):
            svi.step(x[rows])
        optimizer.step()
        print(f"epoch {epoch + 1}: {loss.terms}", flush=True)
    wae.eval()


def pooled(x: Tensor) -> Tensor:
    """Features of the Frechet distance: 8 x 8 pixels of three colours."""
    return nn.functional.avg_pool2d(x, 4).flatten(1)


@torch.no_grad()
def main() -> None:
    """Writes docs/images/colour_images.png and docs/_generated/colour_images.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=12)
    epochs = parser.parse_args().epochs
    pyro.set_rng_seed(0)
    digits, _, held_out_digits, _ = load_digits(parts=("train", "heldout"))
    x, held_out = colour(digits), colour(held_out_digits)
    wae, start = ColourWAE(), time.perf_counter()
    with torch.enable_grad():
        train(wae, x, epochs)
    seconds = time.perf_counter() - start

    reconstructions = torch.cat([reconstruct(wae.model, wae.guide, part)["x"] for part in held_out.split(500)])
    samples = torch.cat([sample(wae.model, part)["x"] for part in held_out.split(500)])
    codes, prior = code_rows(wae.model, wae.guide, held_out[:1000])
    error = (reconstructions - held_out).square().sum((1, 2, 3)).mean()
    distances = [
        frechet_distance(pooled(images), pooled(held_out))
        for images in (colour(held_out_digits), reconstructions, samples)
    ]
    rows = {
        "squared error of a held-out image": f"{error:.1f}",
        "that of the mean image": f"{(held_out - x.mean(0)).square().sum((1, 2, 3)).mean():.1f}",
        "p-value of 1000 held-out codes against the prior": f"{two_sample_test(codes, prior).p_value:.2f}",
        "Frechet distance of other images of the same digits": f"{distances[0]:.3f}",
        "Frechet distance of reconstructions": f"{distances[1]:.3f}",
        "Frechet distance of samples": f"{distances[2]:.3f}",
        "parameters": f"{sum(parameter.numel() for parameter in wae.parameters()):,}",
        "minutes of training": f"{seconds / 60:.0f}",
    }
    lines = ["| | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows.items()), "", "Made by", ""]
    lines += [
        "    python docs/figures/colour_images.py",
        "",
        f"One seed, {epochs} epochs of 100 steps on two CPU cores.",
    ]
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))

    figure, axes = new_figure(4.4, nrows=4)
    titles = ("data", "reconstructions", "samples", "samples")
    parts = (held_out[:SHOWN], reconstructions[:SHOWN], samples[:SHOWN], samples[SHOWN : 2 * SHOWN])
    for panel, title, images in zip(axes, titles, parts, strict=True):
        panel.imshow(make_mosaic([as_images(images, "images")])[0])
        panel.set_axis_off()
        panel.set_title(title, loc="left")
    torch.save((held_out[:SHOWN], reconstructions[:SHOWN], samples[: 2 * SHOWN]), "/tmp/colour.pt")
    save(figure, "colour_images", colours=96, dpi=75)


if __name__ == "__main__":
    main()
