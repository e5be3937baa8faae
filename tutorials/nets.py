"""The nets of the digits: convolutions, and between them and the codes two residual blocks on either side."""

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
