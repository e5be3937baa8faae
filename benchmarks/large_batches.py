"""What micro-batches save: memory and time of a step over many data, at once and in parts, and what it is good for.

    python benchmarks/large_batches.py

A convolutional auto-encoder takes steps on random pictures, each case in a process of its own, so that the most
memory that a process has held is that of the case. A second table shows what a batch of this size is good for: the
noise of the penalty's gradient at each size.
"""

import argparse
import math
import statistics
import time
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from harness import MIB, AutoEncoder, Benchmark, Report, in_processes, made_by, peak_mebibytes, seconds, table
from pyro.infer import SVI
from torch import Tensor, nn

from pyro_wae import WAELoss
from pyro_wae.kernels import InverseMultiquadratic
from pyro_wae.optim import SGD
from pyro_wae.penalties import MMD, PenaltyContext

ZDIM = 8
SHIFT = 0.2


def make_net(width: int) -> AutoEncoder:
    """Convolutions on 28 x 28 pictures."""
    encoder = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(2 * width, 4 * width, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * width * 49, ZDIM),
    )
    decoder = nn.Sequential(
        nn.Linear(ZDIM, 4 * width * 49),
        nn.Unflatten(1, (4 * width, 7, 7)),
        nn.ReLU(),
        nn.ConvTranspose2d(4 * width, 2 * width, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 1, 3, padding=1),
    )
    return AutoEncoder(ZDIM, encoder, decoder)


def penalty() -> MMD:
    """With a kernel of given length, so that every batch size has the same; its means are exact, without draws."""
    return MMD(InverseMultiquadratic(math.sqrt(2.0 * ZDIM)), closed_form=True)


def run_case(micro_batch: int | None, device: str, args: argparse.Namespace) -> dict[str, Any]:
    """Takes steps in one way; its gradient in float64 is no tensor, which would end with the process."""
    pyro.set_rng_seed(0)
    net = make_net(args.width).to(device)
    x = torch.rand(args.data, 1, 28, 28, device=device)
    loss = WAELoss(penalty(), penalty_weight=100.0, micro_batch=micro_batch)
    # A few data first, in both ways: what torch loads at its first step is no part of a batch.
    for rows in (None, 16):
        WAELoss(penalty(), micro_batch=rows).loss_and_grads(net.model, net.guide, x[:32])
    net.zero_grad()
    svi = SVI(net.model, net.guide, SGD({"lr": 0.0}), loss=loss)
    mebibytes, _ = peak_mebibytes(lambda: svi.step(x), device)
    # On a CPU the processor's time, which other processes do not lengthen as they do the clock's.
    times = [seconds(lambda: svi.step(x), device, time.process_time) for _ in range(args.steps)]
    net.double()
    value = loss.loss_and_grads(net.model, net.guide, x.double())
    gradient = torch.cat([p.grad.flatten().cpu() for p in net.parameters() if p.grad is not None])
    row = {"device": device, "micro_batch": micro_batch, "peak": MIB * mebibytes, "loss": value}
    return {**row, "seconds": statistics.median(times), "gradient": gradient.numpy()}


def compare(device: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs each case on one device, one after the other."""
    cases = [None, *args.micro_batch]
    results = [in_processes(args.threads, run_case, (rows, device, args))[0] for rows in cases]
    gradients = [torch.from_numpy(result.pop("gradient")) for result in results]
    for result, gradient in zip(results, gradients, strict=True):
        result["difference"] = ((gradient - gradients[0]).norm() / gradients[0].norm()).item()
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


def page(report: Report) -> str:
    """The tables, and how they came about."""
    options, results = report["options"], report["results"]
    whole = {row["device"]: row for row in results if row["micro_batch"] is None}
    header = [
        "`micro_batch`", "peak memory, MiB", "microseconds per datum", "time, over one batch", "gradient differs by",
    ]  # fmt: skip
    rows = [
        [
            f"{row['micro_batch'] or 'None: one batch'}{', CUDA' if row['device'] == 'cuda' else ''}",
            f"{row['peak'] / MIB:.0f}", f"{1e6 * row['seconds'] / options['data']:.0f}",
            f"{row['seconds'] / whole[row['device']]['seconds']:.2f}", f"{row['difference']:.0e}",
        ]
        for row in results
    ]  # fmt: skip
    noises = [[row["n"], f"{row['noise']:.2f}"] for row in report["noise"]]
    return f"""{table(header, rows)}

{table(["codes that the penalty sees", "noise of its gradient"], noises)}

{made_by(report)}
First table: {options["data"]} pictures of 28 x 28 in a step, convolutional nets of width {options["width"]}, codes of
{ZDIM} numbers, a deterministic encoder, and `MMD` in closed form, so that a step has no random numbers.

- *peak memory*: the most that a process held during a step, beyond what nets and data took.
- *microseconds per datum*: time of a step of SVI (on a CPU processor time; the median over {options["steps"]}, after a
  first one), divided by the data.
- *gradient differs by*: norm of the difference from the gradient of one batch, over the norm of that; in float64.

Second table: standard deviation of the gradient of `MMD` by the mean of an encoder, over {options["repeats"]} batches,
divided by the norm of its expectation. The codes are N(m, I) with |m| = {SHIFT}, the prior is N(0, I).
"""


BENCH = Benchmark(
    __file__, page, devices=True, smoke={"data": 1024, "micro_batch": [64], "devices": ["cpu"], "sizes": [64, 256]}
)
BENCH.option("--data", type=int, default=8192, help="in a step")
BENCH.option("--micro-batch", type=int, nargs="+", default=[1024, 256], help="sizes to compare")
BENCH.option("--steps", type=int, default=1, help="to take the time of")
BENCH.option("--width", type=int, default=4, help="of the nets")
BENCH.option("--sizes", type=int, nargs="+", default=[128, 512, 2048, 8192], help="of batches, for the noise")
BENCH.option("--repeats", type=int, default=20, help="batches, for the noise")


def main(argv: list[str] | None = None) -> None:
    """Measures and reports."""
    args = BENCH.start(argv)
    results = [row for device in args.devices for row in compare(device, args)]
    BENCH.finish(BENCH.report(args, results=results, noise=measure_noise(args)))


if __name__ == "__main__":
    main()
