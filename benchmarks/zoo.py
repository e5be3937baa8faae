"""Any prior that can be sampled: trains one auto-encoder with fourteen of them, and tests the codes against each.

    python benchmarks/zoo.py

Data, nets, guide, penalty, its weight and the optimiser's settings are the same for all; only the prior of the model
is another. The data are small images of two blurred bars, each of random place, direction, length, width and
brightness, drawn afresh for every batch: no code is learnt by heart, and every new image is held-out data.
After each training the table is written to ``--out`` with all its numbers.
"""

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from harness import Benchmark, Report, made_by, progress, table
from pyro import poutine
from pyro.distributions import transforms
from pyro.infer import SVI
from torch import Tensor, nn
from torch.distributions import constraints, transform_to
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyro_wae import WAELoss
from pyro_wae.diagnostics import two_sample_test
from pyro_wae.kernels import Laplace, MultiScale
from pyro_wae.optim import Adam
from pyro_wae.penalties import MMD
from pyro_wae.predict import code_rows

SIDE = 12
HELD_OUT = 1000
LEVEL = 0.05

Prior = Callable[[], Tensor]


def normal() -> Tensor:
    """The standard Normal in the plane."""
    return pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def uniform() -> Tensor:
    """The Uniform distribution on a cube."""
    return pyro.sample("z", dist.Uniform(-torch.ones(3), 1.0).to_event(1))


def laplace() -> Tensor:
    """Two Laplace variables: a peak, and heavier tails than a Normal's."""
    return pyro.sample("z", dist.Laplace(torch.zeros(2), 1.0).to_event(1))


def student_t() -> Tensor:
    """Two variables of Student's t with three degrees of freedom: no fourth moment."""
    return pyro.sample("z", dist.StudentT(3.0, torch.zeros(2), 1.0).to_event(1))


def mixture() -> Tensor:
    """Five Normals in a circle."""
    angles = torch.arange(5) * (2 * math.pi / 5)
    centres = 2 * torch.stack([angles.cos(), angles.sin()], -1)
    components = dist.Normal(centres, 0.5).to_event(1)
    return pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones(5)), components))


def pinwheel() -> Tensor:
    """Points that are given, drawn with replacement."""
    return pyro.sample("z", dist.Empirical(PINWHEEL, torch.zeros(len(PINWHEEL))))


def von_mises() -> Tensor:
    """Two angles: a torus."""
    angles = pyro.sample("z", dist.VonMises(torch.zeros(2), 1.5).to_event(1))
    return torch.cat([angles.cos(), angles.sin()], -1)  # the decoder sees a torus, without a cut


def sphere() -> Tensor:
    """The uniform distribution on the unit sphere: hyperspherical codes."""
    return pyro.sample("z", dist.ProjectedNormal(torch.zeros(3)))


def dirichlet() -> Tensor:
    """The shares of three parts."""
    return pyro.sample("z", dist.Dirichlet(torch.full((3,), 1.5)))


def low_rank() -> Tensor:
    """Four numbers that move together."""
    factor = torch.tensor([[1.0], [0.5], [-0.5], [-1.0]])
    return pyro.sample("z", dist.LowRankMultivariateNormal(torch.zeros(4), factor, torch.full((4,), 0.2)))


def flow() -> Tensor:
    """A Normal pushed through a flow."""
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    return pyro.sample("z", dist.TransformedDistribution(base, [make_spline()]))


def hierarchical() -> Tensor:
    """z2 given z1."""
    z1 = pyro.sample("z1", dist.Normal(torch.zeros(1), 1.0).to_event(1))
    z2 = pyro.sample("z2", dist.Normal((2 * z1).sin(), 0.3).to_event(1))
    return torch.cat([z1, z2], -1)


def hidden_markov() -> Tensor:
    """Three time steps of two numbers, seen through noise."""
    start, step, noise = (dist.Normal(torch.zeros(2), scale).to_event(1) for scale in (1.0, 0.6, 0.2))
    return pyro.sample("z", dist.GaussianHMM(start, 0.8 * torch.eye(2), step, torch.eye(2), noise, duration=3))


def one_hot() -> Tensor:
    """One of three classes, and a style."""
    k = pyro.sample("k", dist.OneHotCategorical(torch.ones(3)))
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    return torch.cat([k, z], -1)


PRIORS: dict[str, Prior] = {
    "standard Normal": normal,
    "Uniform cube": uniform,
    "Laplace": laplace,
    "StudentT(3)": student_t,
    "Gaussian mixture": mixture,
    "pinwheel": pinwheel,
    "von Mises torus": von_mises,
    "sphere": sphere,
    "Dirichlet": dirichlet,
    "low-rank Normal": low_rank,
    "spline flow": flow,
    "hierarchical": hierarchical,
    "Gaussian HMM": hidden_markov,
    "one-hot and Normal": one_hot,
}


def make_pinwheel(points: int, seed: int = 0) -> Tensor:
    """Points of a wheel with five bent arms, shape (points, 2)."""
    generator = torch.Generator().manual_seed(seed)
    along, across = torch.randn(2, points, generator=generator)
    radius, across = 1 + 0.3 * along, 0.15 * across
    angle = torch.arange(points) % 5 * (2 * math.pi / 5) + 0.25 * radius.exp()
    x = radius * angle.cos() - across * angle.sin()
    return torch.stack([x, radius * angle.sin() + across * angle.cos()], -1)


@functools.cache
def make_spline(seed: int = 0) -> Any:
    """A coupling of rational splines that makes a Normal a crescent; fitted once, and fixed from then on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        spline = transforms.spline_coupling(3, hidden_dims=[32])
        prior = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [spline])
        optimizer = torch.optim.Adam(spline.parameters(), lr=2e-2)
        for _ in range(100):
            x, y, z = torch.randn(3, 256)
            loss = -prior.log_prob(torch.stack([x, 0.3 * x.square() - 0.3 + 0.5 * y, z], -1)).mean()
            prior.clear_cache()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return spline.requires_grad_(False)


PINWHEEL = make_pinwheel(20_000)


class ZooWAE(nn.Module):
    """An auto-encoder of small pictures, the same for every prior."""

    def __init__(self, prior: Prior, hidden: int = 256):
        super().__init__()
        self.prior = prior
        with poutine.block(), poutine.trace() as tracer:
            decoder_input = prior()
        self.sites = {name: site["fn"] for name, site in tracer.trace.nodes.items() if site["type"] == "sample"}
        self.sizes = [fn.event_shape.numel() for fn in self.sites.values()]
        self.encoder = make_net(SIDE**2, hidden, sum(self.sizes))
        self.decoder = make_net(decoder_input.numel(), hidden, SIDE**2)

    def model(self, x: Tensor) -> None:
        """The prior and the decoder."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = self.prior()
            pyro.sample("x", dist.Normal(self.decoder(z.flatten(1)), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """The encoder, whose output is cut into the prior's sites and sent to their supports."""
        pyro.module("encoder", self.encoder)
        parts = self.encoder(x).split(self.sizes, -1)
        with pyro.plate("data", len(x)):
            for (name, prior), part in zip(self.sites.items(), parts, strict=True):
                pyro.sample(name, code(part, prior))


def code(part: Tensor, prior: Any) -> Any:
    """What the guide samples: a point of the prior's support, or, where that is discrete, a relaxed choice."""
    if prior.support is constraints.one_hot:
        return dist.OneHotCategoricalStraightThrough(logits=part)
    # A mixture's support is that of its components, by a name that transform_to does not know.
    support = getattr(prior.support, "base_constraint", prior.support)
    value = transform_to(support)(part.unflatten(-1, prior.event_shape))
    return dist.Delta(value, event_dim=len(prior.event_shape))


def make_net(inputs: int, hidden: int, outputs: int) -> nn.Module:
    """Two hidden layers. A ReLU can bend sharply, as an encoder must that tears the data into clusters."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )  # fmt: skip


def draw_pictures(n: int) -> Tensor:
    """Pictures of two blurred bars, shape (n, SIDE^2), made of twelve random numbers each."""
    axis = torch.linspace(-1, 1, SIDE)
    across, down = axis.repeat(SIDE), axis.repeat_interleave(SIDE)
    u = torch.rand(6, 2, n, 1)
    x, y = across - (u[0] - 0.5), down - (u[1] - 0.5)
    direction, length, width, brightness = math.pi * u[2], 0.3 + 0.4 * u[3], 0.12 + 0.15 * u[4], 0.5 + 0.5 * u[5]
    along = x * direction.cos() + y * direction.sin()
    beside = y * direction.cos() - x * direction.sin()
    return (brightness * torch.exp(-0.5 * ((along / length).square() + (beside / width).square()))).sum(0)


def make_loss(args: argparse.Namespace) -> WAELoss:
    """The loss of all trainings; its kernel is short, so that it sees what is fine in a prior, such as arms."""
    penalty = MMD(MultiScale(Laplace(), [0.1]))
    return WAELoss(penalty, penalty_weight=args.penalty_weight, prior_draws=args.prior_draws)


def train(prior: Prior, seed: int, args: argparse.Namespace) -> ZooWAE:
    """Trains with one prior."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    wae = ZooWAE(prior)
    optimizer = Adam({"lr": args.learning_rate}, scheduler=lambda optimizer: CosineAnnealingLR(optimizer, args.steps))
    svi = SVI(wae.model, wae.guide, optimizer, loss=make_loss(args))
    for _ in range(args.steps):
        svi.step(draw_pictures(args.batch_size))
        optimizer.step()  # lowers the learning rate
    return wae.eval()


def measure(wae: ZooWAE, args: argparse.Namespace) -> dict[str, Any]:
    """Tests the codes of held-out images against as many prior samples, and returns the cost per image."""
    x = draw_pictures(args.held_out)
    codes, draws = code_rows(wae.model, wae.guide, x)
    test = two_sample_test(codes, draws, permutations=args.permutations, level=LEVEL)
    loss = make_loss(args)
    loss.loss(wae.model, wae.guide, x)
    assert loss.terms is not None
    return {"cost": loss.terms.cost.item(), "p_value": test.p_value, "standardized": test.standardized}


def run(name: str, seed: int, args: argparse.Namespace) -> tuple[dict[str, Any], ZooWAE]:
    """Trains and measures one prior with one seed."""
    start = time.perf_counter()
    wae = train(PRIORS[name], seed, args)
    seconds = time.perf_counter() - start
    return {"prior": name, "seed": seed, **measure(wae, args), "seconds": seconds}, wae


def plane(name: str, rows: Tensor) -> Tensor:
    """Codes or prior samples in the two coordinates of the figure."""
    if name == "von Mises torus":  # its surface in space, seen obliquely from above
        around, tube = rows.T
        radius = 2 + tube.cos()
        return torch.stack([radius * around.sin(), 0.8 * tube.sin() - 0.6 * radius * around.cos()], -1)
    if name == "Dirichlet":  # the triangle as it is, seen from in front
        return rows @ torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]])
    if name == "one-hot and Normal":  # the three classes as corners of a triangle
        return rows[:, :3] @ torch.tensor([[-4.0, 0.0], [4.0, 0.0], [0.0, 7.0]]) + rows[:, 3:]
    return rows[:, :2]


def draw_zoo(pairs: dict[str, tuple[Tensor, Tensor]]) -> Any:
    """One panel a prior: codes over prior samples; the legend stands in a panel of its own."""
    from pyro_wae.plotting import BLUE, GREY, styled_figure

    columns = 3
    rows = math.ceil((len(pairs) + 1) / columns)
    with styled_figure((6.0, 2.1 * rows)) as figure:
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes in grid:
            axes.set_axis_off()
        for axes, (name, pair) in zip(grid, pairs.items(), strict=False):
            codes, draws = (rows.numpy() for rows in pair)
            axes.scatter(*draws.T, s=6, c=GREY, alpha=0.7, linewidths=0, label="prior samples")
            axes.scatter(*codes.T, s=3, c=BLUE, alpha=0.6, linewidths=0, label="codes of\nheld-out\nimages")
            low, high = np.quantile(draws, (0.002, 0.998), axis=0)
            middle, half = (low + high) / 2, 0.6 * (high - low).max()
            axes.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] - half, middle[1] + half))
            axes.set_aspect("equal")
            axes.set_title(name, fontsize=13, pad=3)
        handles, labels = grid[0].get_legend_handles_labels()
        grid[-1].legend(handles, labels, loc="center", frameon=False, fontsize=13, markerscale=4, handletextpad=0)
    return figure


def page(report: Report) -> str:
    """The table, and how it came about."""
    options, rows = report["options"], []
    for name in dict.fromkeys(row["prior"] for row in report["results"]):
        results = [row for row in report["results"] if row["prior"] == name]
        p_values = ", ".join(f"{row['p_value']:.3f}" for row in results)
        deviations = ", ".join(f"{row['standardized']:.1f}" for row in results)
        cost, seconds = (statistics.fmean(row[key] for row in results) for key in ("cost", "seconds"))
        rows.append([name, p_values, deviations, f"{cost:.2f}", f"{seconds:.0f}"])
    header = ["prior", "p of each seed", "standard deviations under the null", "cost", "seconds"]
    return f"""{table(header, rows)}

{made_by(report)}
{options["steps"]} steps with batches of {options["batch_size"]} images, and {options["prior_draws"]}
prior samples for each.

- *p*: of the aggregated two-sample test of {options["held_out"]} codes of held-out images and as many prior samples.
- *standard deviations under the null*: the statistic of the kernel that distinguishes them best, in these.
- *cost*: squared error per image; {report["variance"]:.2f} without any code, the variance of the images.
- *seconds*: wall time of a training.
"""


BENCH = Benchmark(
    __file__,
    page,
    picture=True,
    smoke={"seeds": [0], "steps": 2, "batch_size": 20, "held_out": 40, "permutations": 19},
)
BENCH.option("--priors", nargs="+", choices=list(PRIORS), default=list(PRIORS), metavar="PRIOR")
BENCH.option("--seeds", type=int, nargs="+", default=[0, 1, 2])
BENCH.option("--steps", type=int, default=2000)
BENCH.option("--batch-size", type=int, default=256)
BENCH.option("--learning-rate", type=float, default=3e-3)
BENCH.option("--penalty-weight", type=float, default=3000.0)
BENCH.option("--prior-draws", type=int, default=4, help="prior samples for each code")
BENCH.option("--held-out", type=int, default=HELD_OUT, help="images of the test")
BENCH.option("--permutations", type=int, default=499)


def main(argv: list[str] | None = None) -> None:
    """Trains, measures and reports."""
    args = BENCH.start(argv)
    pyro.set_rng_seed(0)
    report = BENCH.report(args, variance=draw_pictures(20_000).var(0).sum().item(), results=[])
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, seed in progress([(name, seed) for seed in args.seeds for name in args.priors], "zoo", unit="training"):
        result, wae = run(name, seed, args)
        if name not in pairs:
            codes, draws = code_rows(wae.model, wae.guide, draw_pictures(args.held_out))
            pairs[name] = plane(name, codes), plane(name, draws)
        report["results"].append(result)
        BENCH.write(report)
    BENCH.finish(report, draw_zoo(pairs))


if __name__ == "__main__":
    main()
