"""What a step over several processes costs: a model with measured constants, and runs to hold it against.

    python benchmarks/scale.py

A rank has n codes of d numbers and the nets' work for them; each rank compares the N = W n codes of all W ranks. So
a step takes n c + N^2 b on a rank, and a rank receives (W - 1) n (8 d + 4) bytes of codes, prior samples and costs. The
constants c and b are taken from one process; runs with several, over gloo, show what they foretell.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import pyro
import torch
from harness import Benchmark, Report, in_processes, made_by, table
from pyro.infer import SVI
from step import make_nets
from torch import distributed

from pyro_wae import WAELoss
from pyro_wae.optim import Adam
from pyro_wae.penalties import MMD

PAPER_RANKS = (1, 8, 64)
FLOPS_OF_PROFILE = 120
"""Operations of a pair for the default kernel and its slope: a root and four exponentials of about 25 each."""

RATES = {"data-centre GPU": 60e12 / 2, "consumer GPU": 60e12 / 64}
"""Operations a second in float64, of GPUs with 60e12 in float32: orders of size from data sheets, not measured here."""

SHARE_OF_PEAK = 0.3


def pair_flops(d: int) -> float:
    """Operations for each of the n^2 ordered pairs of codes, of which half are computed.

    A pair takes d + 2 multiplications and additions for its distance, and d + 1 for the gradient of each of its ends.
    """
    return (2 * (d + 2) + 4 * (d + 1) + FLOPS_OF_PROFILE) / 2


def bytes_received(ranks: int, codes: int, d: int) -> int:
    """What a rank receives in a step: codes, prior samples and a cost of each datum of the others, in float32."""
    return (ranks - 1) * codes * (8 * d + 4)


def take_steps(rank: int, ranks: int, codes: int, store: Path | None, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step on a rank, and the bytes that it receives."""
    d, received = args.zdim, [0]
    net = make_nets("MLP", d, torch.device("cpu"))
    if store is not None:
        distributed.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=ranks)
        gather = distributed.all_gather

        def counted(parts: Any, sent: Any, **options: Any) -> Any:
            received[0] += (ranks - 1) * sent.numel() * sent.element_size()
            return gather(parts, sent, **options)

        distributed.all_gather = counted
    pyro.set_rng_seed(1 + rank)
    loss = WAELoss(MMD(), penalty_weight=100.0, process_group=None if store is None else "world")
    svi, x, times = SVI(net.model, net.guide, Adam({"lr": 1e-3}), loss=loss), torch.rand(codes, 784), []
    for step in range(2 + args.steps):
        received[0], begin = 0, time.process_time()
        svi.step(x)
        if step >= 2:
            times.append(time.process_time() - begin)
    if store is not None:
        distributed.destroy_process_group()
    return {"seconds": statistics.median(times), "bytes": received[0]}


def measure(ranks: int, codes: int, args: argparse.Namespace) -> dict[str, Any]:
    """A run with so many ranks: the mean of their seconds."""
    with tempfile.TemporaryDirectory() as folder:
        store = None if ranks == 1 else Path(folder) / "store"
        calls = [(rank, ranks, codes, store, args) for rank in range(ranks)]
        found = in_processes(args.threads, take_steps, *calls)
    seconds = statistics.fmean(one["seconds"] for one in found)
    return {"ranks": ranks, "codes": codes, "seconds": seconds, "bytes": found[0]["bytes"]}


def constants(runs: list[dict[str, Any]]) -> tuple[float, float, float]:
    """The a, c and b of seconds = a + n c + n^2 b, by least squares of relative errors over runs of one process."""
    n = torch.tensor([run["codes"] for run in runs], dtype=torch.float64)
    t = torch.tensor([run["seconds"] for run in runs], dtype=torch.float64)
    columns = torch.stack([1 / t, n / t, n.square() / t], 1)
    found = torch.linalg.lstsq(columns, torch.ones_like(t)[:, None]).solution[:, 0].clamp(min=0)
    return found[0].item(), found[1].item(), found[2].item()


def page(report: Report) -> str:
    """The tables, and how they came about."""
    options = report["options"]
    a, c, b = report["constants"]
    d = options["zdim"]
    rows, beyond = [], []
    for run in report["results"]:
        ranks, n = run["ranks"], run["codes"]
        model = a + n * c + (ranks * n) ** 2 * b
        if ranks > 1:
            beyond.append(run["seconds"] - model)
        rows.append([
            ranks, n, ranks * n, f"{bytes_received(ranks, n, d):,}", f"{run['bytes']:,}",
            f"{1e3 * model:.0f}", f"{1e3 * run['seconds']:.0f}", f"{100 * (ranks * n) ** 2 * b / model:.0f}",
        ])  # fmt: skip
    paper = [
        [
            ranks, *(f"{c / pairs:,.1f}" if pairs else "-" for pairs in (b * ranks**2, b * ranks)),
            f"{bytes_received(ranks, 1024, d) / 2**20:.1f}",
        ]
        for ranks in PAPER_RANKS
    ]  # fmt: skip
    crossing = ["ranks", "codes of a rank where pairs take as long as nets", "of all", "MiB received for 1024 codes"]
    rates = []
    for n in (1024, 4096, 16384, 65536):
        flops = n**2 * pair_flops(d)
        milliseconds = [1e3 * flops / (SHARE_OF_PEAK * rate) for rate in RATES.values()]
        rates.append([n, f"{flops / 1e9:,.2f}", *(f"{value:,.2f}" for value in milliseconds)])
    header = ["ranks", "codes of a rank", "of all", "bytes received: model", "measured", "ms: model", "measured"]
    return f"""{table([*header, "pairs, % of the model"], rows)}

{table(crossing, paper)}

{table(["codes of all ranks", "GFLOP of pairs in float64", *(f"ms, {name}" for name in RATES)], rates)}

{made_by(report)}
Steps of SVI over nets with one hidden layer of 400, codes of {d} numbers, `MMD()` in closed form, ranks over gloo.
Milliseconds are those of the processor, the median of {options["steps"]} steps, the mean over ranks.
The model has the constants of one process: {1e3 * a:.1f} ms for a step, {1e6 * c:.0f} microseconds for the nets of a
datum, {1e9 * b:.1f} nanoseconds for a pair.
Runs with several ranks differ from the model by {1e3 * min(beyond):+.0f} to {1e3 * max(beyond):+.0f} ms. The model
leaves out the exchange itself and the mean of the gradients.
The second table follows from the constants. The third one is on paper, and has not been run on a GPU:
{pair_flops(d):.0f} operations a pair, at {SHARE_OF_PEAK:.0%} of 30 TFLOP/s, half of the rate in float32, and of
0.94 TFLOP/s, a sixty-fourth of it.
"""


BENCH = Benchmark(__file__, page, smoke={"alone": [64, 128], "ranks": [2], "codes": [64], "steps": 2})
BENCH.option("--alone", type=int, nargs="+", default=[128, 256, 512, 1024, 2048], help="codes of one process")
BENCH.option("--ranks", type=int, nargs="+", default=[2, 4], help="numbers of processes")
BENCH.option("--codes", type=int, nargs="+", default=[128, 512], help="codes of each of several processes")
BENCH.option("--zdim", type=int, default=8, help="numbers in a code")
BENCH.option("--steps", type=int, default=7, help="steps to take the time of")


def main(argv: list[str] | None = None) -> None:
    """Measures and reports."""
    args = BENCH.start(argv)
    alone = [measure(1, codes, args) for codes in args.alone]
    several = [measure(ranks, codes, args) for ranks, codes in itertools.product(args.ranks, args.codes)]
    BENCH.finish(BENCH.report(args, results=[*alone, *several], constants=constants(alone)))


if __name__ == "__main__":
    main()
