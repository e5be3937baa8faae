"""Draws the figures of docs/theory.md on WAE-GAN and WAE-MMD: discriminator, kernels, witness, U-statistic."""

import math

import numpy as np
import torch
from common import BLUE, GREEN, GREY, INK, ORANGE, RED, new_figure, save

from pyro_wae.kernels import Gaussian, InverseMultiquadratic, Kernel, Laplace, Matern
from pyro_wae.penalties import MMD

GRID = np.linspace(-4, 4, 401)


def normal(x: np.ndarray, mean: float, scale: float) -> np.ndarray:
    """The density of N(mean, scale^2)."""
    return np.exp(-(((x - mean) / scale) ** 2) / 2) / (scale * np.sqrt(2 * np.pi))


def codes_density(x: np.ndarray) -> np.ndarray:
    """Codes in two groups, where the prior is N(0, 1)."""
    return 0.6 * normal(x, -1.3, 0.5) + 0.4 * normal(x, 1.4, 0.6)


def discriminator() -> None:
    """Two densities, and the discriminator that tells them apart best."""
    figure, axes = new_figure(4.4, nrows=2, sharex=True)
    prior, codes = normal(GRID, 0, 1), codes_density(GRID)
    axes[0].fill_between(GRID, prior, color=ORANGE, alpha=0.5, label="prior $p$")
    axes[0].plot(GRID, codes, color=GREEN, label="codes $q$")
    axes[0].set(yticks=[], ylim=(0, 0.62))
    axes[0].legend(loc="upper right")
    axes[1].plot(GRID, prior / (prior + codes), color=INK, label="$D^* = p/(p+q)$")
    axes[1].axhline(0.5, color=GREY, linestyle="--", linewidth=1.5)
    axes[1].set(xlabel="code $z$", ylim=(0, 1.05), yticks=[0, 0.5, 1], xlim=(-3.5, 3.5))
    axes[1].legend(loc="lower right")
    save(figure, "theory_discriminator")


def profiles() -> None:
    """The kernels of the library as functions of the distance."""
    figure, axes = new_figure(3.2)
    distance = torch.linspace(0, 6, 241)[:, None]
    kernels: list[tuple[str, Kernel, str, str]] = [
        ("Gaussian", Gaussian(bandwidth=1.0), BLUE, "-"),
        ("inverse multiquadratic", InverseMultiquadratic(bandwidth=1.0), ORANGE, "-"),
        ("Laplace (Matérn 1/2)", Laplace(bandwidth=1.0), RED, "-"),
        ("Matérn 3/2", Matern(1.5, bandwidth=1.0), GREEN, "--"),
    ]
    for name, kernel, colour, line in kernels:
        values = kernel(distance, torch.zeros(1, 1))[:, 0]
        axes.plot(distance[:, 0], values, color=colour, linestyle=line, label=name)
    axes.set(xlabel="distance, in bandwidths", ylabel="$k$", ylim=(0, 1.03), xlim=(0, 6))
    axes.legend(loc="upper right")
    save(figure, "theory_kernels")


def witness() -> None:
    """The function whose means under codes and prior differ most."""
    figure, axes = new_figure(4.4, nrows=2, sharex=True)
    prior, codes = normal(GRID, 0, 1), codes_density(GRID)
    axes[0].fill_between(GRID, prior, color=ORANGE, alpha=0.5, label="prior $p$")
    axes[0].plot(GRID, codes, color=GREEN, label="codes $q$")
    axes[0].set(yticks=[], ylim=(0, 0.62))
    axes[0].legend(loc="upper right")
    step = GRID[1] - GRID[0]
    for bandwidth, colour in ((0.5, BLUE), (2.0, RED)):
        kernel = np.exp(-((GRID[:, None] - GRID) ** 2) / (2 * bandwidth**2))
        function = kernel @ (codes - prior) * step
        squared = (codes - prior) @ function * step  # the squared norm of the difference of the mean embeddings
        label = f"bandwidth {bandwidth:g}: MMD$^2$ = {squared:.3f}"
        axes[1].plot(GRID, function, color=colour, label=label)
    axes[1].axhline(0, color=GREY, linewidth=1)
    axes[1].set(xlabel="code $z$", xlim=(-3.5, 3.5), ylim=(-0.42, 0.62), yticks=[0])
    axes[1].legend(loc="upper right")
    save(figure, "theory_witness")


def pairs() -> None:
    """The pairs that the U-statistic averages, and how U- and V-statistic scatter under the null."""
    figure, axes = new_figure(3.3, ncols=2, width_ratios=(1, 1.35))
    n = 6
    image = np.ones((2 * n, 2 * n, 3))
    green, orange, grey = (np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)]) / 255 for c in (GREEN, ORANGE, GREY))
    image[:n, :n], image[n:, n:] = 0.3 * green + 0.7, 0.3 * orange + 0.7
    image[:n, n:] = image[n:, :n] = 0.25 * grey + 0.75
    image[range(2 * n), range(2 * n)] = 0.2
    axes[0].imshow(image)
    axes[0].set(xticks=[2.5, 8.5], yticks=[2.5, 8.5], xticklabels=["codes", "prior"], yticklabels=["codes", "prior"])
    axes[0].set_xticks(np.arange(2 * n + 1) - 0.5, minor=True)
    axes[0].set_yticks(np.arange(2 * n + 1) - 0.5, minor=True)
    axes[0].grid(which="minor", color="white", linewidth=1)
    axes[0].tick_params(which="both", length=0)
    axes[0].set_yticklabels(["codes", "prior"], rotation=90, va="center")
    for (x, y), text in {(4, 1): "$+$", (10, 7): "$+$", (8.5, 2.5): "$-$", (2.5, 8.5): "$-$"}.items():
        axes[0].text(x, y, text, ha="center", va="center", fontsize=26)
    torch.manual_seed(0)
    draws = torch.randn(2, 2000, 50, 2)
    bins = np.linspace(-0.05, 0.12, 60)
    for unbiased, colour, name in ((True, GREEN, "U"), (False, RED, "V")):
        penalty = MMD(Gaussian(bandwidth=math.sqrt(2)), unbiased=unbiased)
        values = torch.stack([penalty(q, p) for q, p in zip(*draws, strict=True)]).numpy()
        axes[1].hist(values, bins, color=colour, alpha=0.55, label=f"{name}, mean {values.mean() + 0.0:.3f}")
    axes[1].axvline(0, color=INK, linewidth=1.5)
    axes[1].set(yticks=[], xlabel="estimate of MMD$^2$ $= 0$", xticks=[-0.04, 0, 0.04, 0.08])
    axes[1].legend(loc="upper right")
    save(figure, "theory_u_statistic")


def main() -> None:
    """Writes the figures."""
    for draw in (discriminator, profiles, witness, pairs):
        draw()


if __name__ == "__main__":
    main()
