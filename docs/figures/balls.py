"""Trains a VAE and a WAE with two latent dimensions on thirty digits, and draws their posteriors as balls."""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from common import GREEN, INK, ORANGE, RED, new_figure, save
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import nn

from pyro_wae import WAELoss
from pyro_wae.demo.digits import load_digits
from pyro_wae.kernels import InverseMultiquadratic
from pyro_wae.optim import Adam
from pyro_wae.penalties import MMD

NOISE = 0.3
DECODER_SCALE = 2.0
STEPS = 2500


class AutoEncoder(nn.Module):
    """Two latent dimensions; the encoder's noise is learned, or kept at a number."""

    def __init__(self, noise: float | None) -> None:
        super().__init__()
        self.noise = noise
        self.encoder = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 4))
        self.decoder = nn.Sequential(nn.Linear(2, 128), nn.ReLU(), nn.Linear(128, 784), nn.Sigmoid())

    def posterior(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the posterior of each datum."""
        loc, log_scale = self.encoder(x).chunk(2, -1)
        return loc, log_scale.exp() if self.noise is None else torch.full_like(loc, self.noise)

    def model(self, x: torch.Tensor) -> None:
        """The prior and the decoder."""
        pyro.module("net", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), DECODER_SCALE).to_event(1), obs=x)

    def guide(self, x: torch.Tensor) -> None:
        """The encoder."""
        loc, scale = self.posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))


def train(net: AutoEncoder, loss: object, x: torch.Tensor) -> None:
    """Takes the same number of steps on the same data, whatever the loss."""
    svi = SVI(net.model, net.guide, Adam({"lr": 1e-3}), loss=loss)
    for _ in range(STEPS):
        svi.step(x)


def draw(axes: object, net: AutoEncoder, x: torch.Tensor, title: str) -> None:
    """The prior's circles, the mixture of all posteriors, and the posterior of each datum."""
    with torch.no_grad():
        loc, scale = (part.numpy() for part in net.posterior(x))
    side = np.linspace(-3.2, 3.2, 161)
    u, v = np.meshgrid(side, side)
    mixture = sum(
        np.exp(-(((u - a) / s) ** 2 + ((v - b) / t) ** 2) / 2) / (2 * np.pi * s * t * len(loc))
        for (a, b), (s, t) in zip(loc, scale, strict=True)
    )
    levels = np.array([0.012, 0.035, 0.07, 0.12, 1.0])
    axes.contourf(u, v, mixture, levels, colors=["#d5efe4", "#a9dec9", "#7cc9ac", "#4fb18c"])
    angle = np.linspace(0, 2 * np.pi, 100)
    for radius in (1, 2):
        axes.plot(radius * np.cos(angle), radius * np.sin(angle), color=ORANGE, linestyle="--", linewidth=2)
    for (a, b), (s, t) in zip(loc, scale, strict=True):
        axes.plot(a + s * np.cos(angle), b + t * np.sin(angle), color=RED, linewidth=1.2)
    axes.set(title=title, xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), xticks=[], yticks=[], aspect="equal")


def main() -> None:
    """Writes docs/images/theory_balls.png and prints what the page says of it."""
    x = load_digits(parts=["test"])[0][:30].flatten(1)
    nets = {}
    for name, noise, loss in (
        ("VAE", None, TraceMeanField_ELBO()),
        (
            "WAE",
            NOISE,
            WAELoss(
                MMD(InverseMultiquadratic.multiscale()), num_particles=4, penalty_weight=300.0, vectorize_particles=True
            ),
        ),
    ):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        nets[name] = AutoEncoder(noise)
        train(nets[name], loss, x)
    figure, axes = new_figure(4.8, nrows=3, ncols=2, height_ratios=(7, 1, 1))
    chosen = x[:7]
    for column, (name, net) in enumerate(nets.items()):
        draw(axes[0, column], net, x, name)
        with torch.no_grad():
            loc, scale = net.posterior(x)
            rows = [net.decoder(loc[:7] + scale[:7] * torch.randn(7, 2)) for _ in range(1)]
            codes = loc + scale * torch.randn(500, *loc.shape)
            error = (net.decoder(codes) - x).square().sum(-1).mean()
        spread = codes.flatten(0, 1).std(0).mean()
        print(f"{name}: squared error {error:.1f}, noise {scale.mean():.2f}, spread of the mixture {spread:.2f}")
        for row, images in enumerate([chosen, *rows], 1):
            strip = images.reshape(-1, 28, 28).permute(1, 0, 2).reshape(28, -1)
            axes[row, column].imshow(strip.clamp(0, 1), cmap="gray_r", vmin=0, vmax=1)
            axes[row, column].set(xticks=[], yticks=[])
            for edge in axes[row, column].spines.values():
                edge.set_visible(False)
    for row, label in ((1, "data"), (2, "recon-\nstruction")):
        axes[row, 0].set_ylabel(label, rotation=0, ha="right", va="center", color=INK, fontsize=13)
    axes[0, 0].plot([], [], color=RED, label="$Q(z|x)$")
    axes[0, 0].plot([], [], color=GREEN, linewidth=8, alpha=0.6, label="$Q_Z$")
    axes[0, 0].plot([], [], color=ORANGE, linestyle="--", label="prior")
    axes[0, 0].legend(loc="lower left", fontsize=11, handlelength=1.2, borderaxespad=0.1)
    save(figure, "theory_balls", colours=40)


if __name__ == "__main__":
    main()
