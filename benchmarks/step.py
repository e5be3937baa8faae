"""What a step costs: hand-written PyTorch, Pyro's own losses and WAELoss, as usual, recorded and compiled.

    python benchmarks/step.py

All contenders take their steps in turns, one each, so that their times are comparable on a machine that has other work
to do; what is shown is the median over rounds of the ratio to the hand-written step of the same round. Every step is a
whole one: loss, gradients, optimiser. The table is printed, and written with its numbers to ``--out``.
"""

import argparse
import importlib.util
import json
import os
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.contrib.gp.kernels import RBF
from pyro.infer import SVI, Trace_ELBO, Trace_MMD
from torch import Tensor, nn

import pyro_wae.optim
from pyro_wae import WAELoss
from pyro_wae.penalties import JensenShannon
from pyro_wae.recording import graph

sys.path.insert(0, str(Path(__file__).parents[1] / "tutorials"))

from quickstart import DigitWAE

Step = Callable[[], Any]
LEARNING_RATE, WEIGHT = 1e-3, 100.0
FACTORS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
BASELINE = "plain torch"


class MLP(nn.Module):
    """Nets of one hidden layer of 400, as a Pyro model and guide; a WAE's guide is deterministic, a VAE's a Normal."""

    def __init__(self, zdim: int, *, stochastic: bool) -> None:
        super().__init__()
        self.zdim, self.stochastic = zdim, stochastic
        out = 2 * zdim if stochastic else zdim
        self.encoder = nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, out))
        self.decoder = nn.Sequential(nn.Linear(zdim, 400), nn.ReLU(), nn.Linear(400, 784))

    def model(self, x: Tensor) -> None:
        """The prior and the generator."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.zdim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(x.ndim - 1), obs=x)

    def guide(self, x: Tensor) -> None:
        """The encoder."""
        pyro.module("encoder", self.encoder)
        codes = self.encoder(x)
        with pyro.plate("data", len(x)):
            if self.stochastic:
                loc, scale = codes.chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))
            else:
                pyro.sample("z", dist.Delta(codes).to_event(1))


class Conv(MLP):
    """The same with the nets of tutorials/quickstart.py."""

    def __init__(self, zdim: int, *, stochastic: bool) -> None:
        super().__init__(zdim, stochastic=stochastic)
        nets = DigitWAE(zdim)
        self.encoder, self.decoder = nets.encoder, nets.decoder
        if stochastic:
            self.encoder[-1] = nn.Linear(self.encoder[-1].in_features, 2 * zdim)


class ByHand(nn.Module):
    """The loss of a WAE-MMD without any library: squared error, and the unbiased estimate in float32."""

    def __init__(self, nets: MLP) -> None:
        super().__init__()
        self.nets = nets

    def forward(self, x: Tensor) -> Tensor:
        """The loss of a batch."""
        z = self.nets.encoder(x)
        prior = torch.randn_like(z)
        n, length = len(x), 2.0 * self.nets.zdim
        others = 1 - torch.eye(n)
        within = (kernel(z, z, length) + kernel(prior, prior, length)) * others
        penalty = within.sum() / (n * (n - 1)) - 2 * kernel(z, prior, length).mean()
        return (self.nets.decoder(z) - x).square().flatten(1).sum(1).mean() + WEIGHT * penalty


def kernel(x: Tensor, y: Tensor, length: float) -> Tensor:
    """The sum of inverse multiquadratic kernels of all pairs of rows."""
    squares = (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp(min=0)
    return sum(factor * length / (factor * length + squares) for factor in FACTORS)


def of_module(make: Callable[[], nn.Module], x: Tensor, *, fused: bool, validate: bool = True) -> Step:
    """A step of torch's own loop; the module gives the loss."""
    module = make()
    optimizer = torch.optim.Adam(module.parameters(), lr=LEARNING_RATE, fused=fused or None)

    def step() -> None:
        with pyro.validation_enabled(validate):
            optimizer.zero_grad()
            module(x).backward()
            optimizer.step()

    return step


def of_svi(nets: MLP, x: Tensor, loss: Any, make_optimizer: Callable[..., Any]) -> Step:
    """A step of SVI, with a parameter store of its own."""
    svi = SVI(nets.model, nets.guide, make_optimizer({"lr": LEARNING_RATE}), loss=loss)
    store: dict[str, Any] = {"params": {}, "constraints": {}}

    def step() -> None:
        with pyro.get_param_store().scope(store):
            svi.step(x)

    return step


def wae(**options: Any) -> WAELoss:
    """The loss that is measured."""
    return WAELoss(penalty_weight=WEIGHT, **options)


def contenders(kind: type[MLP], zdim: int, x: Tensor, args: argparse.Namespace) -> dict[str, Step]:
    """A step of each."""

    def nets(stochastic: bool = False) -> MLP:
        pyro.set_rng_seed(0)
        return kind(zdim, stochastic=stochastic).train()

    def bound(loss: WAELoss) -> nn.Module:
        own = nets()
        return loss(own.model, own.guide)

    shared = pyro_wae.optim.Adam
    steps = {
        BASELINE: of_module(lambda: ByHand(nets()), x, fused=True),
        "SVI, Trace_ELBO": of_svi(nets(True), x, Trace_ELBO(), pyro.optim.Adam),
        "SVI, Trace_ELBO, shared Adam": of_svi(nets(True), x, Trace_ELBO(), shared),
        "SVI, WAELoss": of_svi(nets(), x, wae(), pyro.optim.Adam),
        "SVI, WAELoss, shared Adam": of_svi(nets(), x, wae(), shared),
        "SVI, WAELoss, shared Adam, recorded": of_svi(nets(), x, wae(compile=graph), shared),
        "nn.Module": of_module(lambda: bound(wae()), x, fused=True),
        "nn.Module, validation off": of_module(lambda: bound(wae()), x, fused=True, validate=False),
        "nn.Module, recorded": of_module(lambda: bound(wae(compile=graph)), x, fused=True),
        "nn.Module, WAE-GAN": of_module(lambda: bound(wae(penalty=JensenShannon())), x, fused=True),
    }
    if kind is MLP:  # whose decoder takes codes with a dimension of particles
        trace_mmd = Trace_MMD(kernel=RBF(zdim), num_particles=2)
        steps["SVI, Trace_MMD"] = of_svi(nets(True), x, trace_mmd, pyro.optim.Adam)
    if not args.no_compile:
        steps |= {
            "plain torch, compiled": of_module(lambda: torch.compile(ByHand(nets())), x, fused=True),
            "SVI, WAELoss, shared Adam, compiled": of_svi(nets(), x, wae(compile=True), shared),
            "nn.Module, compiled": of_module(lambda: bound(wae(compile=True)), x, fused=True),
        }
    if importlib.util.find_spec("pythae") is not None and kind is MLP:
        steps["pythae, WAE_MMD"] = of_pythae(zdim, x)
    return steps


def of_pythae(zdim: int, x: Tensor) -> Step:
    """A step of pythae's WAE-MMD with its default nets, which have one hidden layer of 512."""
    from pythae.data.datasets import BaseDataset
    from pythae.models import WAE_MMD, WAE_MMD_Config

    model = WAE_MMD(WAE_MMD_Config(input_dim=(784,), latent_dim=zdim))
    data = BaseDataset(x, torch.zeros(len(x)))
    inputs = {"data": data.data}
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        model(inputs).loss.backward()
        optimizer.step()

    return step


def measure(steps: dict[str, Step], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times the steps in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.warm_up):
        for step in steps.values():
            step()
    for _ in range(args.rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return [
        {
            "contender": name,
            "milliseconds": 1000 * statistics.median(times),
            "ratio": statistics.median(t / base for t, base in zip(times, seconds[BASELINE], strict=True)),
        }
        for name, times in seconds.items()
    ]


def summary(report: dict[str, Any]) -> str:
    """The table as Markdown, and under it how it came about."""
    cells = list(dict.fromkeys((result["nets"], result["batch"]) for result in report["results"]))
    found = {(r["contender"], r["nets"], r["batch"]): r for r in report["results"]}
    names = list(dict.fromkeys(result["contender"] for result in report["results"]))
    lines = [
        "| step | " + " | ".join(f"{nets}, {batch}" for nets, batch in cells) + " |",
        "|---|" + "---:|" * len(cells),
    ]
    for name in names:
        row = [found.get((name, *cell)) for cell in cells]
        lines.append(f"| {name} | " + " | ".join(f"{r['ratio']:.2f}" if r else "-" for r in row) + " |")
    base = ", ".join(f"{found[(BASELINE, *cell)]['milliseconds']:.1f} ms ({cell[0]}, {cell[1]})" for cell in cells)
    options = report["options"]
    return (
        "\n".join(lines)
        + f"""

Made by

    {report["command"]}

on {report["machine"]}, torch {report["torch"]}, {options["threads"]} threads.
Time of a step over that of plain torch in the same round, median of {options["rounds"]} rounds.
Plain torch takes {base}.
Nets and batch size stand above each column, and a code has {options["zdim"]} numbers.
All but Pyro's losses compare codes with the default `MMD()`; *plain torch* does it in float32 and with prior draws.
*Shared Adam* is `pyro_wae.optim.Adam`, everything outside of SVI has torch's fused Adam.
"""
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--nets", nargs="*", choices=("MLP", "conv"), default=["MLP", "conv"])
    parser.add_argument("--batch-sizes", nargs="*", type=int, default=[100, 1024])
    parser.add_argument("--zdim", type=int, default=8, help="numbers in a code")
    parser.add_argument("--rounds", type=int, default=50, help="timed steps of each")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before them, in which recordings are made")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-compile", action="store_true", help="leave out what needs a C++ compiler")
    parser.add_argument("--out", type=Path, default=Path("docs/_generated"), help="folder for step.md and step.json")
    parser.add_argument("--smoke", action="store_true", help="run in seconds, to see that everything works")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measures all cells, and prints and writes the table."""
    args = parse_args(argv)
    if args.smoke:
        args.batch_sizes, args.rounds, args.warm_up, args.no_compile = [16], 2, 4, True
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", module="torch|pyro")
    results: list[dict[str, Any]] = []
    for nets in args.nets:
        for batch in args.batch_sizes:
            pyro.set_rng_seed(1)
            x = torch.rand(batch, 784) if nets == "MLP" else torch.rand(batch, 1, 28, 28)
            steps = contenders(MLP if nets == "MLP" else Conv, args.zdim, x, args)
            results += [{"nets": nets, "batch": batch, **result} for result in measure(steps, args)]
    report = {
        "command": shlex.join(["python", "benchmarks/step.py", *(sys.argv[1:] if argv is None else argv)]),
        "machine": f"{os.cpu_count()} CPU cores",
        "torch": torch.__version__,
        "options": {key: str(value) if key == "out" else value for key, value in vars(args).items()},
        "results": results,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "step.json").write_text(json.dumps(report, indent=2) + "\n")
    (args.out / "step.md").write_text(summary(report))
    print(summary(report))


if __name__ == "__main__":
    main()
