"""What a step costs: hand-written PyTorch, Pyro's own losses and WAELoss, as usual, recorded and compiled.

    python benchmarks/step.py

All contenders take their steps in turns, one each, so that their times are comparable on a machine that has other work
to do; what is shown is the median over rounds of the ratio to the hand-written step of the same round. Every step is a
whole one: loss, gradients, optimiser. The table is printed, and written with its numbers and a picture. Where there is
CUDA, columns for it are added, timed between events, with rows for bf16 autocast and for CUDA graphs.
"""

import argparse
import itertools
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
from devices import add_options, describe, in_bfloat16, present, seconds
from pictures import save
from pyro.contrib.gp.kernels import RBF
from pyro.infer import SVI, Trace_ELBO, Trace_MMD
from pyro_wae.recording import graph
from torch import Tensor, nn
from torch.fx import GraphModule

import pyro_wae.optim
from pyro_wae import WAELoss
from pyro_wae.penalties import JensenShannon
from pyro_wae.plotting import PALETTE, styled_figure
from pyro_wae.weights import Constraint

sys.path.insert(0, str(Path(__file__).parents[1] / "tutorials"))

from quickstart import DigitWAE

Step = Callable[[], Any]
LEARNING_RATE, WEIGHT = 1e-3, 100.0
FACTORS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
BASELINE = "plain torch"
LEAST_ROUNDS = 10


class MLP(nn.Module):
    """Nets of one hidden layer of 400, as a Pyro model and guide; a WAE's guide is deterministic, a VAE's a Normal."""

    def __init__(self, zdim: int, *, stochastic: bool) -> None:
        super().__init__()
        self.zdim, self.stochastic, self.registers = zdim, stochastic, True
        out = 2 * zdim if stochastic else zdim
        self.encoder = nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, out))
        self.decoder = nn.Sequential(nn.Linear(zdim, 400), nn.ReLU(), nn.Linear(400, 784))

    def model(self, x: Tensor) -> None:
        """The prior and the generator."""
        if self.registers:
            pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.zdim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(x.ndim - 1), obs=x)

    def guide(self, x: Tensor) -> None:
        """The encoder."""
        if self.registers:
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
        others = 1 - torch.eye(n, device=x.device)
        within = (kernel(z, z, length) + kernel(prior, prior, length)) * others
        penalty = within.sum() / (n * (n - 1)) - 2 * kernel(z, prior, length).mean()
        return (self.nets.decoder(z) - x).square().flatten(1).sum(1).mean() + WEIGHT * penalty


def kernel(x: Tensor, y: Tensor, length: float) -> Tensor:
    """The sum of inverse multiquadratic kernels of all pairs of rows."""
    squares = (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp(min=0)
    return sum(factor * length / (factor * length + squares) for factor in FACTORS)


def of_module(module: Any, x: Tensor, *, validate: bool = True, bfloat16: bool = False) -> Step:
    """A step of torch's own loop; the module gives the loss."""
    optimizer = torch.optim.Adam(module.parameters(), lr=LEARNING_RATE, fused=True)
    loss = in_bfloat16(module) if bfloat16 else module

    def step() -> None:
        with pyro.validation_enabled(validate):
            optimizer.zero_grad()
            loss(x).backward()
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
    return WAELoss(**{"penalty_weight": WEIGHT} | options)


def cuda_graph(module: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """Compiles a recording and launches it as one CUDA graph."""
    return torch.compile(module, mode="reduce-overhead")


def contenders(kind: type[MLP], zdim: int, x: Tensor, args: argparse.Namespace) -> dict[str, Step]:
    """A step of each."""

    def nets(stochastic: bool = False) -> MLP:
        pyro.set_rng_seed(0)
        return kind(zdim, stochastic=stochastic).train().to(x.device)

    def bound(**options: Any) -> Any:
        own = nets()
        own.registers = False  # the module that is bound has the parameters, and nothing asks Pyro's store
        return wae(**options)(own.model, own.guide)

    shared = pyro_wae.optim.Adam
    steps = {
        BASELINE: of_module(ByHand(nets()), x),
        "SVI, Trace_ELBO": of_svi(nets(True), x, Trace_ELBO(), pyro.optim.Adam),
        "SVI, Trace_ELBO, shared Adam": of_svi(nets(True), x, Trace_ELBO(), shared),
        "SVI, WAELoss": of_svi(nets(), x, wae(), pyro.optim.Adam),
        "SVI, WAELoss, shared Adam": of_svi(nets(), x, wae(), shared),
        "SVI, WAELoss, shared Adam, recorded": of_svi(nets(), x, wae(compile=graph), shared),
        "SVI, WAELoss, shared Adam, Constraint": of_svi(nets(), x, wae(penalty_weight=Constraint()), shared),
        "nn.Module": of_module(bound(), x),
        "nn.Module, validation off": of_module(bound(), x, validate=False),
        "nn.Module, recorded": of_module(bound(compile=graph), x),
        "nn.Module, WAE-GAN": of_module(bound(penalty=JensenShannon()), x),
    }
    if kind is MLP:  # whose decoder takes codes with a dimension of particles
        trace_mmd = Trace_MMD(kernel=RBF(zdim).to(x.device), num_particles=2)
        steps["SVI, Trace_MMD"] = of_svi(nets(True), x, trace_mmd, pyro.optim.Adam)
        try:
            steps["pythae, WAE_MMD"] = of_pythae(zdim, x)
        except ImportError as error:
            print(f'No row for pythae: {error}. Run: pip install "pyro-wae[bench]"', flush=True)
    if not args.no_compile:
        steps |= {
            "plain torch, compiled": of_module(torch.compile(ByHand(nets())), x),
            "SVI, WAELoss, shared Adam, compiled": of_svi(nets(), x, wae(compile=True), shared),
            "nn.Module, compiled": of_module(bound(compile=True), x),
        }
    if x.device.type == "cuda":
        steps |= {
            "plain torch, bf16": of_module(ByHand(nets()), x, bfloat16=True),
            "nn.Module, bf16": of_module(bound(), x, bfloat16=True),
            "plain torch, CUDA graph": of_module(torch.compile(ByHand(nets()), mode="reduce-overhead"), x),
            "nn.Module, CUDA graph": of_module(bound(compile=cuda_graph), x),
        }
    return steps


def of_pythae(zdim: int, x: Tensor) -> Step:
    """A step of pythae's WAE-MMD with its default nets, which have one hidden layer of 512."""
    from pythae.models import WAE_MMD, WAE_MMD_Config

    model = WAE_MMD(WAE_MMD_Config(input_dim=(784,), latent_dim=zdim)).to(x.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        model({"data": x}).loss.backward()
        optimizer.step()

    return step


def measure(steps: dict[str, Step], device: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times the steps in turns."""
    for name in list(steps):
        try:
            for _ in range(args.warm_up):
                steps[name]()
        except RuntimeError as error:
            if device == "cpu":
                raise
            print(f"No row for {name}: {str(error).splitlines()[0]}", flush=True)
            del steps[name]
    times: dict[str, list[float]] = {name: [] for name in steps}
    begin = time.perf_counter()
    for index in range(args.rounds):
        if index >= LEAST_ROUNDS and time.perf_counter() - begin > args.seconds:
            break
        for name, step in steps.items():
            times[name].append(seconds(step, device, time.perf_counter))
    results = []
    for name, own in times.items():
        ratios = [t / base for t, base in zip(own, times[BASELINE], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        results.append(
            {
                "contender": name, "milliseconds": 1000 * statistics.median(own), "rounds": len(own),
                "ratio": middle, "low": low, "high": high,
            }
        )  # fmt: skip
    return results


def heading(nets: str, batch: int, device: str) -> str:
    """The name of a column."""
    return f"{nets}, {batch}" + (", CUDA" if device == "cuda" else "")


def of_cell(results: list[dict[str, Any]], cell: tuple[str, int, str]) -> list[dict[str, Any]]:
    """What was measured in one column."""
    return [r for r in results if (r["nets"], r["batch"], r["device"]) == cell]


def summary(report: dict[str, Any]) -> str:
    """The table as Markdown, and under it how it came about."""
    results, options = report["results"], report["options"]
    cells = list(dict.fromkeys((r["nets"], r["batch"], r["device"]) for r in results))
    found = {(r["contender"], r["nets"], r["batch"], r["device"]): r for r in results}
    lines = ["| step | " + " | ".join(heading(*cell) for cell in cells) + " |", "|---|" + "---:|" * len(cells)]
    for name in dict.fromkeys(r["contender"] for r in results):
        row = [found.get((name, *cell)) for cell in cells]
        lines.append(f"| {name} | " + " | ".join(f"{r['ratio']:.2f}" if r else "-" for r in row) + " |")
    base = ", ".join(f"{found[(BASELINE, *cell)]['milliseconds']:.1f} ms ({heading(*cell)})" for cell in cells)
    rounds = ", ".join(str(found[(BASELINE, *cell)]["rounds"]) for cell in cells)
    return (
        "\n".join(lines)
        + f"""

Made by

    {report["command"]}

on {report["machine"]}, torch {report["torch"]}.
Time of a step over that of plain torch in the same round, median of {rounds} rounds.
Plain torch takes {base}.
Nets and batch size stand above each column, and a code has {options["zdim"]} numbers.
All but Pyro's losses compare codes with the default `MMD()`; *plain torch* does it in float32 and with prior draws.
The penalty weight is a number, or where it is named the default, a `Constraint`.
In the rows of *nn.Module* neither model nor guide calls `pyro.module`, since the bound module has the parameters.
*Shared Adam* is `pyro_wae.optim.Adam`, everything outside of SVI has torch's fused Adam.
pythae has nets of its own, with one hidden layer of 512 in place of 400.
"""
    )


def draw(results: list[dict[str, Any]]) -> Any:
    """The ratios as dots, with their quartiles."""
    rows = list(dict.fromkeys(r["contender"] for r in results))
    cells = list(dict.fromkeys((r["nets"], r["batch"], r["device"]) for r in results))
    with styled_figure((6.0, 1.6 + 0.45 * len(rows))) as figure:
        axes = figure.subplots()
        axes.axvline(1, color="#8C8C8C", linewidth=1.5)
        for index, cell in enumerate(cells):
            # Beside each other, as the dots of one contender often fall together.
            shift = 0.5 * (index - (len(cells) - 1) / 2) / len(cells)
            some = of_cell(results, cell)
            axes.errorbar(
                [r["ratio"] for r in some], [rows.index(r["contender"]) + shift for r in some],
                xerr=[[r["ratio"] - r["low"] for r in some], [r["high"] - r["ratio"] for r in some]],
                fmt="osD^vPX*"[index % 8], color=PALETTE[index % len(PALETTE)], markersize=7, elinewidth=1.5,
                label=heading(*cell),
            )  # fmt: skip
        axes.set(xscale="log", ylim=(len(rows) - 0.4, -0.6))
        ticks = [tick for tick in (0.25, 0.5, 1, 2, 4, 8, 16, 32) if in_view(tick, axes.get_xlim())]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_yticks(range(len(rows)), rows, fontsize=12)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="#DDDDDD", linewidth=0.8)
        axes.set_axisbelow(True)
        figure.supxlabel("time of a step over that of plain torch", fontsize=14)
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def in_view(value: float, limits: tuple[float, float]) -> bool:
    """Whether an axis shows a value."""
    return limits[0] <= value <= limits[1]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--nets", nargs="*", choices=("MLP", "conv"), default=["MLP", "conv"])
    parser.add_argument("--batch-sizes", nargs="*", type=int, default=[100, 1024])
    parser.add_argument("--zdim", type=int, default=8, help="numbers in a code")
    parser.add_argument("--rounds", type=int, default=100, help="most timed steps of each")
    parser.add_argument(
        "--seconds",
        type=float,
        default=50.0,
        help=f"for a column, after which no round starts but the first {LEAST_ROUNDS}",
    )
    parser.add_argument("--warm-up", type=int, default=4, help="steps before them, in which recordings are made")
    # Nets this small gain nothing from more, and the table is then that of most machines.
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    add_options(parser)
    parser.add_argument("--no-compile", action="store_true", help="leave out what needs a C++ compiler")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of .json and .md; by default docs/_generated, or in a quick run results/benchmarks",
    )
    parser.add_argument("--picture", type=Path, help="by default docs/images/step.png, or in a quick run a file in OUT")
    parser.add_argument("--smoke", action="store_true", help="run in seconds, to see that everything works")
    args = parser.parse_args(argv)
    if args.smoke:
        args.nets, args.batch_sizes, args.devices, args.threads = ["MLP"], [16], ["cpu"], 1
        args.rounds, args.warm_up, args.no_compile = 2, 3, True
    args.out = args.out or Path("results/benchmarks" if args.smoke else "docs/_generated")
    args.picture = args.picture or (args.out / "step.png" if args.smoke else Path("docs/images/step.png"))
    return args


def main(argv: list[str] | None = None) -> None:
    """Measures all cells, and prints and writes the table."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", module="torch|pyro|pydantic|pythae")
    devices = present(args.devices)
    results: list[dict[str, Any]] = []
    for device, nets, batch in itertools.product(devices, args.nets, args.batch_sizes):
        pyro.set_rng_seed(1)
        x = torch.rand(batch, 784) if nets == "MLP" else torch.rand(batch, 1, 28, 28)
        kind = MLP if nets == "MLP" else Conv
        found = measure(contenders(kind, args.zdim, x.to(device), args), device, args)
        results += [{"nets": nets, "batch": batch, "device": device, **result} for result in found]
        print(f"{heading(nets, batch, device)}: {found[0]['rounds']} rounds", flush=True)
    report = {
        "command": shlex.join(["python", "benchmarks/step.py", *(sys.argv[1:] if argv is None else argv)]),
        "machine": describe(devices, args.threads),
        "torch": torch.__version__.partition("+")[0],
        "options": {key: str(value) if key in ("out", "picture") else value for key, value in vars(args).items()},
        "results": results,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "step.json").write_text(json.dumps(report, indent=2) + "\n")
    (args.out / "step.md").write_text(summary(report))
    save(draw(results), args.picture)
    print(summary(report))


if __name__ == "__main__":
    main()
