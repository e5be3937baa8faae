"""What micro-batches save: memory and time of a step over many data, at once and in parts, and what it is good for.

    python benchmarks/large_batches.py

A convolutional auto-encoder takes steps on random pictures, each case in a process of its own, so that the most
memory that a process has held is that of the case. A second table shows what a batch of this size is good for: the
noise of the penalty's gradient at each size.
"""

import argparse
import gc
import json
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from devices import MIB, add_options, describe, present
from pyro.infer import SVI
from torch import Tensor, nn

from pyro_wae import WAELoss
from pyro_wae.kernels import InverseMultiquadratic
from pyro_wae.optim import SGD
from pyro_wae.penalties import MMD, PenaltyContext

ZDIM = 8
SHIFT = 0.2


class AutoEncoder(nn.Module):
    """Convolutions on 28 x 28 pictures; the encoder is deterministic."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 4 * width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * width * 49, ZDIM),
        )
        self.decoder = nn.Sequential(
            nn.Linear(ZDIM, 4 * width * 49),
            nn.Unflatten(1, (4 * width, 7, 7)),
            nn.ReLU(),
            nn.ConvTranspose2d(4 * width, 2 * width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 1, 3, padding=1),
        )

    def model(self, x: Tensor) -> None:
        """Prior and generator."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(ZDIM), 1).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1).to_event(3), obs=x)

    def guide(self, x: Tensor) -> None:
        """Encoder."""
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(self.encoder(x)).to_event(1))


def penalty() -> MMD:
    """With a kernel of given length, so that every batch size has the same; its means are exact, without draws."""
    return MMD(InverseMultiquadratic(2.0 * ZDIM), closed_form=True)


def peak(device: torch.device) -> int:
    """The most bytes that the process has held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run_case(micro_batch: int | None, gradient: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Takes steps in one way, and leaves its gradient in float64 in a file."""
    device = torch.device(args.device)
    pyro.set_rng_seed(0)
    net = AutoEncoder(args.width).to(device)
    x = torch.rand(args.data, 1, 28, 28, device=device)
    loss = WAELoss(penalty(), penalty_weight=100.0, micro_batch=micro_batch)
    # A few data first, in both ways: what torch loads at its first step is no part of a batch.
    for rows in (None, 16):
        WAELoss(penalty(), micro_batch=rows).loss_and_grads(net.model, net.guide, x[:32])
    net.zero_grad()
    gc.collect()
    before = peak(device)
    svi = SVI(net.model, net.guide, SGD({"lr": 0.0}), loss=loss)
    # On a CPU the processor's time, which other processes do not lengthen as they do the clock's.
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds = []
    for _ in range(1 + args.steps):
        start = clock()
        svi.step(x)
        seconds.append(clock() - start)
    result = {"micro_batch": micro_batch, "peak": peak(device) - before, "seconds": statistics.median(seconds[1:])}
    net.double()
    result["loss"] = loss.loss_and_grads(net.model, net.guide, x.double())
    torch.save(torch.cat([p.grad.flatten().cpu() for p in net.parameters() if p.grad is not None]), gradient)
    return result


def compare(device: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs each case on one device in a process of its own."""
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        whole: Tensor | None = None
        for rows in [0, *args.micro_batch]:
            path = Path(folder) / f"{rows}.pt"
            options = {"case": rows, "gradient": path, "data": args.data, "steps": args.steps, "width": args.width}
            options |= {"threads": args.threads, "device": device}
            command = [sys.executable, __file__, *(f"--{key}={value}" for key, value in options.items())]
            print(f"micro_batch={rows or None} on {device}", file=sys.stderr)
            finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            result = {"device": device, **json.loads(finished.stdout)}
            gradient = torch.load(path)
            whole = gradient if whole is None else whole
            result["difference"] = ((gradient - whole).norm() / whole.norm()).item()
            results.append(result)
    return results


def noise(n: int, args: argparse.Namespace) -> Tensor:
    """Gradients of the penalty by the mean of n codes, shape (repeats, d), where the truth is SHIFT off the prior's."""
    pyro.set_rng_seed(n)
    prior = dist.Normal(torch.zeros(ZDIM), 1.0).to_event(1)
    context, estimate = PenaltyContext(prior=lambda: prior), penalty()
    gradients = []
    for _ in range(args.repeats):
        mean = torch.full((ZDIM,), SHIFT / ZDIM**0.5, requires_grad=True)
        value = estimate(mean + torch.randn(n, ZDIM), torch.randn(2, ZDIM), context)
        gradients += torch.autograd.grad(value, mean)
    return torch.stack(gradients).double()


def measure_noise(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The relative noise of the gradient at each size of a batch."""
    gradients = {n: noise(n, args) for n in args.sizes}
    # All estimates are unbiased: the largest batches tell the expectation best.
    truth = gradients[max(args.sizes)].mean(0).norm().item()
    return [{"n": n, "noise": gradient.var(0).sum().sqrt().item() / truth} for n, gradient in gradients.items()]


def summary(report: dict[str, Any]) -> str:
    """The tables as Markdown, and under them how they came about."""
    options, results = report["options"], report["results"]
    whole = {row["device"]: row for row in results if row["micro_batch"] is None}
    lines = [
        "| `micro_batch` | peak memory, MiB | microseconds per datum | time, over one batch | gradient differs by |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['micro_batch'] or 'None: one batch'}{', CUDA' if row['device'] == 'cuda' else ''} "
        f"| {row['peak'] / MIB:.0f} "
        f"| {1e6 * row['seconds'] / options['data']:.0f} | {row['seconds'] / whole[row['device']]['seconds']:.2f} "
        f"| {row['difference']:.0e} |"
        for row in results
    ]
    lines += ["", "| codes that the penalty sees | noise of its gradient |", "|---:|---:|"]
    lines += [f"| {row['n']} | {row['noise']:.2f} |" for row in report["noise"]]
    return (
        "\n".join(lines)
        + f"""

Made by

    {report["command"]}

on {report["machine"]}, torch {report["torch"]}.
First table: {options["data"]} pictures of 28 x 28 in a step, convolutional nets of width {options["width"]}, codes of
{ZDIM} numbers, a deterministic encoder, and `MMD` in closed form, so that a step has no random numbers.

- *peak memory*: the most that a process held during its steps, beyond what nets, data and steps of 32 data took.
- *microseconds per datum*: time of a step of SVI (on a CPU processor time; the median over {options["steps"]}, after a
  first one), divided by the data.
- *gradient differs by*: norm of the difference from the gradient of one batch, over the norm of that; in float64.

Second table: standard deviation of the gradient of `MMD` by the mean of an encoder, over {options["repeats"]} batches,
divided by the norm of its expectation. The codes are N(m, I) with |m| = {SHIFT}, the prior is N(0, I).
"""
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=int, default=8192, help="in a step")
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[1024, 256], help="sizes to compare")
    parser.add_argument("--steps", type=int, default=1, help="to take the time of")
    parser.add_argument("--width", type=int, default=4, help="of the nets")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[128, 512, 2048, 8192], help="of batches, for the noise"
    )
    parser.add_argument("--repeats", type=int, default=20, help="batches, for the noise")
    parser.add_argument("--threads", type=int, default=1)
    add_options(parser)
    parser.add_argument("--device", help=argparse.SUPPRESS)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--gradient", type=Path, help=argparse.SUPPRESS)
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of .json and .md; by default docs/_generated, or in a quick run results/benchmarks",
    )
    parser.add_argument("--smoke", action="store_true", help="run in seconds, to see that everything works")
    args = parser.parse_args(argv)
    if args.smoke:
        args.data, args.micro_batch, args.devices = 1024, [64], ["cpu"]
        args.sizes = [64, 256]
    args.out = args.out or Path("results/benchmarks" if args.smoke else "docs/_generated")
    return args


def main(argv: list[str] | None = None) -> None:
    """Measures and reports."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.case is not None:
        print(json.dumps(run_case(args.case or None, args.gradient, args)))
        return
    devices = present(args.devices)
    report: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/large_batches.py", *(sys.argv[1:] if argv is None else argv)]),
        "machine": describe(devices, args.threads),
        "torch": torch.__version__.partition("+")[0],
        "options": {key: str(value) if key == "out" else value for key, value in vars(args).items()},
        "results": [row for device in devices for row in compare(device, args)],
        "noise": measure_noise(args),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "large_batches.json").write_text(json.dumps(report, indent=2) + "\n")
    (args.out / "large_batches.md").write_text(summary(report))
    print(summary(report))


if __name__ == "__main__":
    main()
