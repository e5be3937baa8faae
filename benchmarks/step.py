"""What a step costs: hand-written PyTorch, Pyro's own losses and WAELoss.

    python benchmarks/step.py

All contenders take their steps in turns, one each, and are measured by the time of the processor, because the machine
may have other work to do; what is shown is the median over rounds of the ratio to the hand-written step of the same
round. Every step is a whole one: loss, gradients, optimiser. Where there is CUDA, columns for it are added, timed
between events, with rows for bf16 autocast.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from harness import AutoEncoder, Benchmark, Report, in_bfloat16, in_turns, made_by, ratios, table
from pyro.contrib.gp.kernels import RBF
from pyro.infer import SVI, Trace_ELBO, Trace_MMD
from torch import Tensor, nn
from torch.nn.functional import softplus

import pyro_wae.optim
from pyro_wae import WAELoss
from pyro_wae.demo.nets import DigitWAE
from pyro_wae.penalties import JensenShannon
from pyro_wae.plotting import PALETTE, styled_figure
from pyro_wae.weights import Constraint
from pyro_wae.weights.constraint import WARM_UP

Step = Callable[[], Any]
LEARNING_RATE, WEIGHT = 1e-3, 100.0
FACTORS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
BASELINE = "plain torch"
LEAST_ROUNDS = 10
CONSTRAINT = "SVI, WAELoss, shared Adam, Constraint"
PERIOD = 8
"""After its first steps a Constraint moves its weight on every eighth step, and the mean of eight is what one costs."""


class Random(AutoEncoder):
    """The same with an encoder that draws its codes, as a VAE needs it."""

    def code(self, codes: Tensor) -> Any:
        """A Normal distribution."""
        loc, scale = codes.chunk(2, -1)
        return dist.Normal(loc, scale.exp()).to_event(1)


def make_nets(kind: str, zdim: int, device: torch.device, *, stochastic: bool = False) -> AutoEncoder:
    """One hidden layer of 400, or the nets of pyro_wae.demo."""
    pyro.set_rng_seed(0)
    out = 2 * zdim if stochastic else zdim
    if kind == "MLP":
        encoder = nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, out))
        decoder = nn.Sequential(nn.Linear(zdim, 400), nn.ReLU(), nn.Linear(400, 784))
    else:
        nets = DigitWAE(zdim)
        encoder, decoder = nets.encoder, nets.decoder
        encoder[-1] = nn.Linear(encoder[-1].in_features, out)
    return (Random if stochastic else AutoEncoder)(zdim, encoder, decoder).train().to(device)


class ByHand(nn.Module):
    """The loss of a WAE-MMD without any library: squared error, and the unbiased estimate in float32."""

    def __init__(self, nets: AutoEncoder) -> None:
        super().__init__()
        self.nets = nets

    def forward(self, x: Tensor) -> Tensor:
        """The loss of a batch."""
        z = self.nets.encoder(x)
        return (self.nets.decoder(z) - x).square().flatten(1).sum(1).mean() + WEIGHT * self.penalty(z)

    def penalty(self, z: Tensor) -> Tensor:
        """MMD^2."""
        prior = torch.randn_like(z)
        n, length = len(z), 2.0 * self.nets.zdim
        others = 1 - torch.eye(n, device=z.device)
        within = (kernel(z, z, length) + kernel(prior, prior, length)) * others
        return within.sum() / (n * (n - 1)) - 2 * kernel(z, prior, length).mean()


class AdversaryByHand(ByHand):
    """The loss of a WAE-GAN without any library; one backward pass serves both players."""

    def __init__(self, nets: AutoEncoder) -> None:
        super().__init__(nets)
        sizes = [nets.zdim, 512, 512, 512, 512]
        layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
        self.judge = nn.Sequential(*layers, nn.Linear(512, 1))

    def penalty(self, z: Tensor) -> Tensor:
        """The generator's term, and that of the discriminator with a weight and value of its own."""
        prior = torch.randn_like(z)
        fixed = {name: parameter.detach() for name, parameter in self.judge.named_parameters()}
        generator = softplus(-torch.func.functional_call(self.judge, fixed, (z,))).mean()
        logits = self.judge(torch.cat([z.detach(), prior]))
        own = softplus(logits[: len(z)]).mean() + softplus(-logits[len(z) :]).mean()
        return generator + (own - own.detach()) / WEIGHT


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


def of_svi(nets: AutoEncoder, x: Tensor, loss: Any, make_optimizer: Callable[..., Any]) -> Step:
    """A step of SVI, with a parameter store of its own."""
    svi = SVI(nets.model, nets.guide, make_optimizer({"lr": LEARNING_RATE}), loss=loss)
    store: dict[str, Any] = {"params": {}, "constraints": {}}

    def step() -> None:
        with pyro.get_param_store().scope(store):
            svi.step(x)

    return step


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


def wae(**options: Any) -> WAELoss:
    """The loss that is measured."""
    return WAELoss(**{"penalty_weight": WEIGHT} | options)


def late_constraint(zdim: int, device: torch.device) -> Constraint:
    """A constraint after its first steps, in which it moves at every step; of codes like the prior's."""
    weight = Constraint(initial=WEIGHT)
    for _ in range(WARM_UP):
        codes, prior = torch.randn(2, 100, zdim, device=device)
        weight.observe(codes.new_ones(()), codes[None], prior)
    return weight


def contenders(kind: str, zdim: int, x: Tensor, args: argparse.Namespace) -> dict[str, Step]:
    """A step of each."""

    def nets(stochastic: bool = False) -> AutoEncoder:
        return make_nets(kind, zdim, x.device, stochastic=stochastic)

    def bound(*, compiled: bool = False, **options: Any) -> Any:
        own = nets()
        own.registers = False  # the module that is bound has the parameters, and Pyro's store has no part
        if compiled:
            own.encoder.compile()
            own.decoder.compile()
        module = wae(**options)(own.model, own.guide)
        if "penalty" in options:
            module(x)  # makes the discriminator, which does not know the size of a code before
        return module

    shared = pyro_wae.optim.Adam
    steps = {
        BASELINE: of_module(ByHand(nets()), x),
        "SVI, Trace_ELBO": of_svi(nets(True), x, Trace_ELBO(), pyro.optim.Adam),
        "SVI, Trace_ELBO, shared Adam": of_svi(nets(True), x, Trace_ELBO(), shared),
        "SVI, WAELoss": of_svi(nets(), x, wae(), pyro.optim.Adam),
        "SVI, WAELoss, shared Adam": of_svi(nets(), x, wae(), shared),
        CONSTRAINT: of_svi(nets(), x, wae(penalty_weight=late_constraint(zdim, x.device)), shared),
        "nn.Module": of_module(bound(), x),
        "nn.Module, validation off": of_module(bound(), x, validate=False),
        "nn.Module, WAE-GAN": of_module(bound(penalty=JensenShannon()), x),
        "plain torch, WAE-GAN": of_module(AdversaryByHand(nets()).to(x.device), x),
    }
    if kind == "MLP":  # whose decoder takes codes with a dimension of particles
        trace_mmd = Trace_MMD(kernel=RBF(zdim).to(x.device), num_particles=2)
        steps["SVI, Trace_MMD"] = of_svi(nets(True), x, trace_mmd, pyro.optim.Adam)
        try:
            steps["pythae, WAE_MMD"] = of_pythae(zdim, x)
        except ImportError as error:
            print(f'No row for pythae: {error}. Run: pip install "pyro-wae[bench]"', flush=True)
    if not args.no_compile:
        steps |= {
            "plain torch, compiled": of_module(torch.compile(ByHand(nets())), x),
            "nn.Module, nets compiled": of_module(bound(compiled=True), x),
        }
    if x.device.type == "cuda":
        steps |= {
            "plain torch, bf16": of_module(ByHand(nets()), x, bfloat16=True),
            "nn.Module, bf16": of_module(bound(), x, bfloat16=True),
        }
    return steps


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

    def enough(rounds: int, spent: float) -> bool:
        return rounds == args.rounds or (rounds >= LEAST_ROUNDS and spent > args.seconds)

    periods = {name: PERIOD if name == CONSTRAINT else 1 for name in steps}
    runs = {name: lambda name=name: [steps[name]() for _ in range(periods[name])] for name in steps}
    # On a CPU that other programs use too, only the time of the processor can be compared.
    times = in_turns(runs, device, time.process_time, enough)
    times = {name: [taken / periods[name] for taken in own] for name, own in times.items()}
    results = []
    for name, (low, middle, high) in ratios(times, BASELINE).items():
        own = times[name]
        results.append(
            {
                "contender": name, "milliseconds": 1000 * statistics.median(own), "rounds": len(own),
                "ratio": middle, "low": low, "high": high,
            }
        )  # fmt: skip
    return results


def import_seconds(processes: int) -> float:
    """Seconds of the processor that ``import pyro_wae`` takes after torch and Pyro, in fresh processes.

    The first of them writes the bytecode, which an installation has, and does not count.
    """
    setup = "import time, torch, pyro, pyro.infer; begin = time.process_time()"
    program = f"{setup}; import pyro_wae; print(time.process_time() - begin)"
    with tempfile.TemporaryDirectory() as folder:
        kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        options = {"capture_output": True, "text": True, "env": kept | {"PYTHONPYCACHEPREFIX": folder}}
        runs = [subprocess.run([sys.executable, "-c", program], **options) for _ in range(1 + processes)]
    return statistics.median(float(run.stdout) for run in runs[1:])


def heading(nets: str, batch: int, device: str) -> str:
    """The name of a column."""
    return f"{nets}, {batch}" + (", CUDA" if device == "cuda" else "")


def page(report: Report) -> str:
    """The table, and how it came about."""
    results, options = report["results"], report["options"]
    cells = list(dict.fromkeys((r["nets"], r["batch"], r["device"]) for r in results))
    found = {(r["contender"], r["nets"], r["batch"], r["device"]): r for r in results}
    rows = []
    for name in dict.fromkeys(r["contender"] for r in results):
        row = [found.get((name, *cell)) for cell in cells]
        rows.append([name, *(f"{r['ratio']:.2f}" if r else "-" for r in row)])
    base = ", ".join(f"{found[(BASELINE, *cell)]['milliseconds']:.1f} ms ({heading(*cell)})" for cell in cells)
    rounds = ", ".join(str(found[(BASELINE, *cell)]["rounds"]) for cell in cells)
    return f"""{table(["step", *(heading(*cell) for cell in cells)], rows)}

{made_by(report)}
Time of the processor of a step over that of plain torch in the same round, median of {rounds} rounds.
Plain torch takes {base}.
Nets and batch size stand above each column, and a code has {options["zdim"]} numbers.
All but Pyro's losses and WAE-GAN compare codes with the default `MMD()`; *plain torch* takes the authors' seven inverse
multiquadratic kernels, in float32 and with prior samples. Its WAE-GAN has a discriminator of four layers of 512, which
takes one step and has no penalty on its slope.
The penalty weight is a number, or where it is named the default, a `Constraint`.
In the rows of *nn.Module* neither model nor guide calls `pyro.module`, since the bound module has the parameters.
*Shared Adam* is `pyro_wae.optim.Adam`, everything outside of SVI has torch's fused Adam.
pythae has nets of its own, with one hidden layer of 512 in place of 400.
A `Constraint` is measured after its first {WARM_UP} steps, as the mean of {PERIOD} steps.
`import pyro_wae` takes {1000 * report["import_seconds"]:.0f} ms of the processor after torch and Pyro, with its
bytecode there (median of {options["imports"]} processes).
"""


def draw(results: list[dict[str, Any]]) -> Any:
    """The ratios as dots, with their quartiles."""
    rows = list(dict.fromkeys(r["contender"] for r in results))
    cells = list(dict.fromkeys((r["nets"], r["batch"], r["device"]) for r in results))
    with styled_figure((6.0, 2.0 + 0.45 * len(rows))) as figure:
        axes = figure.subplots()
        axes.axvline(1, color="#8C8C8C", linewidth=1.5)
        for index, cell in enumerate(cells):
            # Beside each other, as the dots of one contender often fall together.
            shift = 0.5 * (index - (len(cells) - 1) / 2) / len(cells)
            some = [r for r in results if (r["nets"], r["batch"], r["device"]) == cell]
            axes.errorbar(
                [r["ratio"] for r in some], [rows.index(r["contender"]) + shift for r in some],
                xerr=[[r["ratio"] - r["low"] for r in some], [r["high"] - r["ratio"] for r in some]],
                fmt="osD^vPX*"[index % 8], color=PALETTE[index % len(PALETTE)], markersize=7, elinewidth=1.5,
                label=heading(*cell),
            )  # fmt: skip
        axes.set(xscale="log", ylim=(len(rows) - 0.4, -0.6))
        low, high = axes.get_xlim()
        ticks = [tick for tick in (0.25, 0.5, 1, 2, 4, 8, 16, 32) if low <= tick <= high]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_yticks(range(len(rows)), rows, fontsize=12)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="#DDDDDD", linewidth=0.8)
        axes.set_axisbelow(True)
        note = "Trace_ELBO compares no codes, plain torch all pairs:\nat batch 1024 these are different amounts of work"
        figure.supxlabel(f"time of a step over that of plain torch\n{note}", fontsize=13)
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


BENCH = Benchmark(
    __file__,
    page,
    # Nets this small gain nothing from more threads, and the time of the processor is that of all of them.
    threads=1,
    devices=True,
    picture=True,
    smoke={
        "nets": ["MLP"], "batch_sizes": [16], "devices": ["cpu"], "threads": 1, "rounds": 2, "warm_up": 3,
        "no_compile": True, "imports": 1,
    },
)  # fmt: skip
BENCH.option("--nets", nargs="*", choices=("MLP", "conv"), default=["MLP", "conv"])
BENCH.option("--batch-sizes", nargs="*", type=int, default=[100, 1024])
BENCH.option("--zdim", type=int, default=8, help="numbers in a code")
BENCH.option("--rounds", type=int, default=100, help="most timed steps of each")
BENCH.option("--seconds", type=float, default=50.0, help=f"after which no round starts but the first {LEAST_ROUNDS}")
BENCH.option("--warm-up", type=int, default=4, help="steps before them")
BENCH.option("--imports", type=int, default=5, help="processes that import the package")
BENCH.option("--no-compile", action="store_true", help="leave out what needs a C++ compiler")


def main(argv: list[str] | None = None) -> None:
    """Measures all cells."""
    args = BENCH.start(argv)
    results: list[dict[str, Any]] = []
    for device, nets, batch in itertools.product(args.devices, args.nets, args.batch_sizes):
        pyro.set_rng_seed(1)
        x = torch.rand(batch, 784) if nets == "MLP" else torch.rand(batch, 1, 28, 28)
        found = measure(contenders(nets, args.zdim, x.to(device), args), device, args)
        results += [{"nets": nets, "batch": batch, "device": device, **result} for result in found]
        print(f"{heading(nets, batch, device)}: {found[0]['rounds']} rounds", flush=True)
    BENCH.finish(BENCH.report(args, results=results, import_seconds=import_seconds(args.imports)), draw(results))


if __name__ == "__main__":
    main()
