"""Draws the figures of docs/theory.md on latent variable models, optimal transport and the theorem."""

import numpy as np
from common import BLUE, GREEN, GREY, INK, ORANGE, RED, new_figure, save

GRID = np.linspace(-4, 4, 401)


def normal(x: np.ndarray, mean: float = 0.0, scale: float = 1.0) -> np.ndarray:
    """The density of N(mean, scale^2)."""
    return np.exp(-(((x - mean) / scale) ** 2) / 2) / (scale * np.sqrt(2 * np.pi))


def curve(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A generator from one latent dimension to the plane."""
    return 1.6 * z, np.sin(1.8 * z) + 0.25 * z


def latent_variable_models() -> None:
    """The prior, and the model's distribution with a deterministic and with a random decoder."""
    figure, axes = new_figure(2.9, ncols=3)
    axes[0].fill_between(GRID, normal(GRID), color=ORANGE, alpha=0.5)
    axes[0].set(title="prior $p(z)$", xlabel="$z$", yticks=[], xlim=(-3, 3), ylim=(0, 0.5))
    z = np.linspace(-3, 3, 400)
    x, y = curve(z)
    axes[1].scatter(x, y, s=120 * normal(z) + 3, color=BLUE, linewidths=0)
    at = 0.9
    axes[0].plot([at], [normal(np.array(at))], "o", color=INK)
    axes[1].plot(*curve(np.array(at)), "o", color=INK)
    axes[1].set(title="$x = G(z)$")
    u, v = np.meshgrid(np.linspace(-5, 5, 120), np.linspace(-2.2, 2.2, 80))
    density = sum(normal(z[i]) * normal(u, x[i], 0.35) * normal(v, y[i], 0.25) for i in range(0, 400, 4))
    axes[2].contourf(u, v, density / density.max(), [0.02, 0.1, 0.25, 0.45, 0.65, 0.85, 1.01], cmap="Blues")
    axes[2].plot(*curve(np.array(at)), "o", color=INK)
    axes[2].set(title="$x \\sim p_G(x\\,|\\,z)$")
    for panel in axes[1:]:
        panel.set(xlim=(-5, 5), ylim=(-2.2, 2.2), xticks=[], yticks=[], xlabel="data space")
    save(figure, "theory_latent_variables")


def sand_and_hole() -> None:
    """A heap of sand, a hole, and the map that carries the one to the other."""
    figure, axes = new_figure(3.4)
    x = np.linspace(0, 10, 600)
    heap = 2.2 * normal(x, 2.3, 0.8)
    hole = 1.5 * normal(x, 6.4, 0.55) + 0.7 * normal(x, 8.3, 0.5)
    axes.fill_between(x, heap, color=ORANGE, alpha=0.8, linewidth=0)
    axes.fill_between(x, -hole, color=BLUE, alpha=0.35, linewidth=0)
    axes.axhline(0, color=INK, linewidth=1.5)
    here, there = np.cumsum(heap) / heap.sum(), np.cumsum(hole) / hole.sum()
    low, high = 7.4, 9.4  # B
    inside = (x > low) & (x < high)
    axes.fill_between(x, -hole, where=inside, color=BLUE, alpha=0.75, linewidth=0)
    before = np.interp(np.interp([low, high], x, there), here, x)  # the quantiles of B, in the heap
    axes.fill_between(x, heap, where=(x > before[0]) & (x < before[1]), color=RED, alpha=0.75, linewidth=0)
    for level in (0.12, 0.35, 0.6, 0.85):
        start, end = np.interp(level, here, x), np.interp(level, there, x)
        arrow = {"arrowstyle": "->", "color": INK, "connectionstyle": "arc3,rad=-0.28", "linewidth": 1.5}
        axes.annotate("", (end, -0.12), (start, 0.12), arrowprops=arrow)
    axes.text(0.95, 0.9, r"$\mu$", fontsize=22)
    axes.text(5.05, -0.75, r"$\eta$", fontsize=22)
    axes.text(6.3, 0.5, "$T$", fontsize=20)
    axes.text(8.55, -0.85, "$B$", fontsize=18, ha="left")
    axes.text(3.5, 0.62, "$T^{-1}(B)$", fontsize=18)
    axes.set(xlim=(0, 10), ylim=(-1.3, 1.3), xticks=[], yticks=[])
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    save(figure, "theory_sand")


def couplings() -> None:
    """Three joint distributions with the same marginals."""
    figure, axes = new_figure(2.9, ncols=3, sharex=True, sharey=True)
    x = np.linspace(-3, 3, 121)
    source = normal(x, -0.2, 1.0)
    target = 0.5 * normal(x, -1.4, 0.4) + 0.5 * normal(x, 1.2, 0.5)
    here, there = np.cumsum(source) / source.sum(), np.cumsum(target) / target.sum()
    independent = source[:, None] * target
    maps = np.interp(here, there, x)
    best = source[:, None] * normal(x[None, :] - maps[:, None], 0, 0.1)
    # A Gaussian copula between the two: the same marginals, half of the way.
    ranks = np.interp(here, np.cumsum(normal(GRID)) / normal(GRID).sum(), GRID)
    others = np.interp(there, np.cumsum(normal(GRID)) / normal(GRID).sum(), GRID)
    rho = 0.75
    a, b = ranks[:, None], others[None, :]
    copula = np.exp(-(rho**2 * (a**2 + b**2) - 2 * rho * a * b) / (2 * (1 - rho**2)))
    between = independent * copula
    cost = (x[:, None] - x[None, :]) ** 2
    for panel, (name, joint) in zip(
        axes, (("independent", independent), ("another", between), ("optimal", best)), strict=True
    ):
        panel.contourf(x, x, (joint / joint.max()).T, [0.03, 0.1, 0.25, 0.5, 0.75, 1.01], cmap="Greens")
        mean = (joint * cost).sum() / joint.sum()
        panel.set(title=f"{name}\ncost {mean:.1f}", xlabel="$x$", xticks=[], yticks=[], aspect="equal")
        panel.fill_between(x, -3 + 1.6 * source, -3, color=BLUE, alpha=0.6, linewidth=0)
        panel.fill_betweenx(x, -3 + 1.1 * target, -3, color=ORANGE, alpha=0.7, linewidth=0)
        panel.set(xlim=(-3, 3), ylim=(-3, 3))
    axes[0].set_ylabel("$y$")
    save(figure, "theory_couplings")


def divergences() -> None:
    """What divergences say of two thin distributions that move apart."""
    figure, axes = new_figure(2.9, ncols=2, width_ratios=(1, 1.5))
    axes[0].plot([0, 0], [0, 1], color=BLUE, linewidth=5)
    axes[0].plot([0.7, 0.7], [0, 1], color=ORANGE, linewidth=5)
    axes[0].annotate("", (0.66, 0.5), (0.04, 0.5), arrowprops={"arrowstyle": "<->", "color": INK})
    axes[0].text(0.35, 0.55, r"$\theta$", ha="center", fontsize=18)
    axes[0].text(0, 1.06, "$P_X$", ha="center")
    axes[0].text(0.7, 1.06, "$P_G$", ha="center")
    axes[0].set(xlim=(-0.4, 1.1), ylim=(-0.1, 1.25), xticks=[], yticks=[])
    theta = np.linspace(-1, 1, 201)
    axes[1].plot(theta, np.abs(theta), color=GREEN, label="$W_1$")
    axes[1].plot(theta, theta**2, color=GREEN, linestyle="--", label="$W_2^2$")
    for part in (theta[:100], theta[101:]):
        axes[1].plot(part, np.full(len(part), np.log(2)), color=RED, label="JS" if part[0] < 0 else None)
        axes[1].plot(part, np.full(len(part), 1.15), color=GREY, label=r"KL ($=\infty$)" if part[0] < 0 else None)
    axes[1].plot([0], [0], "o", color=INK)
    axes[1].set(xlabel=r"distance $\theta$", ylim=(-0.05, 1.25), yticks=[0, 0.69], yticklabels=["0", r"$\log 2$"])
    axes[1].legend(loc="upper center", bbox_to_anchor=(0.5, 1.28), ncols=4, handlelength=1.1, columnspacing=0.9)
    save(figure, "theory_divergences")


def theorem() -> None:
    """Encoders that all match the prior, and what each costs."""
    figure, axes = new_figure(2.9, ncols=3, sharex=True, sharey=True)
    random = np.random.default_rng(0)
    x = 2 * random.standard_normal(350)
    for panel, rho in zip(axes, (0.0, 0.5, 1.0), strict=True):
        z = rho * x / 2 + np.sqrt(1 - rho**2) * random.standard_normal(350)
        panel.plot(x, z, ".", color=GREEN, markersize=4)
        panel.fill_betweenx(GRID, -6 + 4 * normal(GRID), -6, color=ORANGE, alpha=0.7, linewidth=0)
        panel.set(title=f"$\\rho$ = {rho:g}\ncost {5 - 4 * rho:.0f}", xlabel="$x$", xlim=(-6, 6), ylim=(-3.4, 3.4))
    axes[0].set_ylabel("code $z$")
    save(figure, "theory_theorem")


def relaxation() -> None:
    """The best value of the relaxed objective, for each penalty weight."""
    figure, axes = new_figure(3.0)
    weight = np.geomspace(0.1, 100, 200)
    axes.semilogx(weight, (weight / (1 + weight)) ** 2, color=BLUE, label="cost")
    axes.semilogx(weight, 1 / (1 + weight) ** 2, color=RED, label="penalty $D(Q_Z, P_Z)$")
    axes.semilogx(weight, weight / (1 + weight), color=GREEN, label="cost $+\\ \\lambda\\,D$")
    axes.axhline(1, color=GREY, linestyle="--")
    axes.text(0.11, 1.03, "$W_c(P_X, P_G)$", color="#555555")
    axes.set(xlabel=r"penalty weight $\lambda$", ylim=(0, 1.18))
    axes.legend(loc="center right")
    save(figure, "theory_relaxation")


def main() -> None:
    """Writes the figures."""
    for draw in (latent_variable_models, sand_and_hole, couplings, divergences, theorem, relaxation):
        draw()


if __name__ == "__main__":
    main()
