"""The auto-encoder of digits: convolutions, and between them and the codes two residual blocks on either side."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

WIDTH = 256


class Residual(nn.Module):
    """``x + Linear(SiLU(Linear(LayerNorm(x))))``: a layer that starts near the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.change = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.change(x)


def deep_head(inputs: int, outputs: int) -> list[nn.Module]:
    """The layers between features of an image and its code, in either direction."""
    return [nn.Linear(inputs, WIDTH), Residual(WIDTH), Residual(WIDTH), nn.SiLU(), nn.Linear(WIDTH, outputs)]


def digit_encoder(zdim: int) -> nn.Sequential:
    """Maps images (n, 1, 28, 28) to codes (n, zdim)."""
    # GroupNorm, not BatchNorm: it treats each digit alone. BatchNorm makes the codes of a batch depend on each other,
    # and the penalty, which compares them together, is then smaller than for independent codes.
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1), nn.GroupNorm(8, 16), nn.ReLU(),  # 16 x 14 x 14
        nn.Conv2d(16, 32, 4, stride=2, padding=1), nn.GroupNorm(8, 32), nn.ReLU(),  # 32 x 7 x 7
        nn.Flatten(), *deep_head(32 * 7 * 7, zdim),
    )  # fmt: skip


def digit_decoder(zdim: int) -> nn.Sequential:
    """Maps codes (n, zdim) to images (n, 1, 28, 28)."""
    return nn.Sequential(
        *deep_head(zdim, 32 * 7 * 7), nn.Unflatten(1, (32, 7, 7)), nn.BatchNorm2d(32), nn.ReLU(),
        nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1), nn.Sigmoid(),
    )  # fmt: skip


class StandardNormal(nn.Module):
    """The fixed prior N(0, I); like a learned prior, a module whose call returns the distribution of one code."""

    def __init__(self, zdim: int):
        super().__init__()
        self.register_buffer("loc", torch.zeros(zdim))

    def forward(self) -> Any:
        return dist.Normal(self.loc, 1.0).to_event(1)


class DigitWAE(nn.Module):
    """A convolutional auto-encoder of 28x28 images, as a Pyro model and guide; the prior is N(0, I) or a module."""

    def __init__(self, zdim: int, prior: nn.Module | None = None):
        super().__init__()
        self.zdim = zdim
        self.encoder, self.decoder = digit_encoder(zdim), digit_decoder(zdim)
        self.prior = StandardNormal(zdim) if prior is None else prior

    def model(self, x: Tensor) -> None:
        """The prior of the codes and the decoder."""
        pyro.module("decoder", self.decoder)
        pyro.module("prior", self.prior)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            # The cost compares x with this distribution's mean; no likelihood is computed, so the scale has no effect.
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(3), obs=x)

    def guide(self, x: Tensor) -> None:
        """The encoder: one code for each digit, without noise."""
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(self.encoder(x)).to_event(1))
