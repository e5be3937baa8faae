"""What a kernel penalty costs, forward and backward, against the number of codes: time, memory and digits.

    python benchmarks/kernel_penalty.py

Each way to compute it runs in a process of its own, on codes and prior draws in float32 with a gradient by the codes.
Times are those of the processor on one thread, so that other work on the machine counts little, and are given in units
of ``1 / (codes @ prior.T)``, taken in turns with them: a product of matrices and a division for each pair.
"""

import argparse
import json
import math
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
from pyro.contrib.gp import kernels as pyro_kernels
from torch import Tensor

from pyro_wae.kernels import AUTHORS_FACTORS, Gaussian, InverseMultiquadratic
from pyro_wae.penalties import MMD, PenaltyContext, blocks

Loss = Callable[[Tensor, Tensor], Tensor]

DIMENSION = 64
NOISE = 1e-3
"""How far codes are from the draws that they are compared with where digits are hardest to keep."""


def authors_kernel() -> InverseMultiquadratic:
    """Seven scales around C = 2 d, that of the prior N(0, I)."""
    return InverseMultiquadratic.multiscale(scale=2.0 * DIMENSION)


def whole_matrices() -> Loss:
    """MMD with the matrices of all pairs in float64, differentiated automatically."""
    blocks.MOST_PAIRS = blocks.MOST_RADIAL_PAIRS = sys.maxsize
    return MMD(authors_kernel())


def compiled() -> Loss:
    """MMD with a compiled kernel."""
    penalty = MMD(authors_kernel())
    penalty.kernel.compile()
    return penalty


def closed_form() -> Loss:
    """MMD with the prior's means in closed form."""
    penalty, prior = MMD(authors_kernel()), dist.Normal(torch.zeros(DIMENSION), 1.0).to_event(1)
    return lambda q, p: penalty(q, p, PenaltyContext(prior=lambda: prior))


def of_squares(squares: Tensor) -> Tensor:
    """The seven kernels of squared distances, one after the other."""
    return sum(2 * DIMENSION * c / (2 * DIMENSION * c + squares) for c in AUTHORS_FACTORS)


def by_product(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances by one product of matrices."""
    return x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.mT


def by_differences(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances by all differences, an (n, m, d) tensor."""
    return (x[:, None] - y).square().sum(2)


def estimate(squares: Loss, q: Tensor, p: Tensor) -> Tensor:
    """The unbiased estimate by three matrices in float32."""
    qq, pp, qp = of_squares(squares(q, q)), of_squares(squares(p, p)), of_squares(squares(q, p))
    n, m = len(q), len(p)
    within = (qq.sum() - qq.diagonal().sum()) / (n * (n - 1)) + (pp.sum() - pp.diagonal().sum()) / (m * (m - 1))
    return within - 2 * qp.mean()


def stacked(q: Tensor, p: Tensor) -> Tensor:
    """The same by one matrix of codes and prior draws together."""
    n, m, both = len(q), len(p), torch.cat([q, p])
    gram = of_squares(by_product(both, both))
    qq, pp, qp = gram[:n, :n], gram[n:, n:], gram[:n, n:]
    within = (qq.sum() - qq.diagonal().sum()) / (n * (n - 1)) + (pp.sum() - pp.diagonal().sum()) / (m * (m - 1))
    return within - 2 * qp.mean()


def authors(q: Tensor, p: Tensor) -> Tensor:
    """The formula of the authors' code: three matrices of distances, and for each scale a sum without the diagonal."""
    n, off = len(q), 1 - torch.eye(len(q))
    qq, pp, qp = by_product(q, q), by_product(p, p), by_product(q, p)
    total = q.new_zeros(())
    for c in AUTHORS_FACTORS:
        scale = 2 * DIMENSION * c
        within = (off * (scale / (scale + qq) + scale / (scale + pp))).sum() / (n * (n - 1))
        total = total + within - 2 * (scale / (scale + qp)).sum() / n**2
    return total


def differences_at_each_scale(q: Tensor, p: Tensor) -> Tensor:
    """All differences, and that for each scale and pair of sets again."""
    total = q.new_zeros(())
    for c in AUTHORS_FACTORS:
        scale = 2 * DIMENSION * c
        qq, pp, qp = (scale / (scale + by_differences(x, y)) for x, y in ((q, q), (p, p), (q, p)))
        n = len(q)
        total = total + (qq.sum() + pp.sum() - 2 * n) / (n * (n - 1)) - 2 * qp.mean()
    return total


def trace_mmd() -> Loss:
    """The formula of pyro.infer.Trace_MMD, a biased estimate, with seven of Pyro's kernels."""
    kernel = None
    for c in AUTHORS_FACTORS:
        length = torch.tensor(math.sqrt(DIMENSION * c))
        part = pyro_kernels.RationalQuadratic(DIMENSION, lengthscale=length, scale_mixture=torch.tensor(1.0))
        kernel = part if kernel is None else pyro_kernels.Sum(kernel, part)
    return lambda q, p: kernel(q).mean() + kernel(p).mean() - 2 * kernel(q, p).mean()


def geomloss_gaussian() -> Loss:
    """The biased estimate of geomloss, which has no inverse multiquadratic kernel."""
    from geomloss import SamplesLoss

    return SamplesLoss("gaussian", blur=math.sqrt(DIMENSION), backend="tensorized")


WAYS: dict[str, Callable[[], Loss]] = {
    "MMD()": lambda: MMD(authors_kernel()),
    "MMD(), compiled": compiled,
    "MMD(), closed form": closed_form,
    "whole matrices, float64": whole_matrices,
    "whole matrices, float32": lambda: lambda q, p: estimate(by_product, q, p),
    "one matrix of both": lambda: stacked,
    "authors' formula": lambda: authors,
    "Trace_MMD's formula": trace_mmd,
    "direct differences": lambda: lambda q, p: estimate(by_differences, q, p),
    "differences at each scale": lambda: differences_at_each_scale,
    "MMD(Gaussian())": lambda: MMD(Gaussian(math.sqrt(DIMENSION))),
    "geomloss, Gaussian": geomloss_gaussian,
}
OURS = ("MMD()", "MMD(), compiled", "MMD(), closed form")
BIASED = ("Trace_MMD's formula", "geomloss, Gaussian")
OTHER_KERNEL = ("MMD(Gaussian())", "geomloss, Gaussian")
PER_PAIR = {"direct differences": 6 * 4 * DIMENSION, "differences at each scale": 42 * 4 * DIMENSION}
"""Bytes for each pair of those that take most."""


def gradient(loss: Loss, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """The value, and its gradient by the codes."""
    q = q.detach().requires_grad_()
    value = loss(q, p)
    value.backward()
    return value.detach(), q.grad


def exact(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient of the unbiased estimate in float64, by differences taken a row at a time."""
    q, p, scales = q.double(), p.double(), [2.0 * DIMENSION * c for c in AUTHORS_FACTORS]
    n, total, pull = len(q), 0.0, torch.zeros_like(q)
    constant = len(scales)  # of a row with itself
    for index in range(n):
        for rows, others, weight, own in (
            (q, q, 1 / (n * (n - 1)), constant), (p, p, 1 / (n * (n - 1)), constant), (q, p, -2 / n**2, 0.0)
        ):  # fmt: skip
            delta = rows[index] - others
            squares = delta.square().sum(1)
            total += weight * (sum((s / (s + squares)).sum() for s in scales) - own)
            if rows is q:
                slopes = sum(-s / (s + squares).square() for s in scales)
                pull[index] += (2 if others is q else 1) * 2 * weight * (slopes @ delta)
    return total, pull


def errors(name: str, loss: Loss, n: int) -> dict[str, float]:
    """Relative errors of value and gradient where codes nearly match the prior, and where they nearly are its draws."""
    if name in (*BIASED, *OTHER_KERNEL, "MMD(), closed form"):
        return {}
    torch.manual_seed(1)
    p, found = torch.randn(n, DIMENSION), {}
    for case, q in (("near", 1.02 * torch.randn_like(p) + 0.02), ("noise", p + NOISE * torch.randn_like(p))):
        value, slope = gradient(loss, q, p)
        expected, expected_slope = exact(q, p)
        found[f"{case} value"] = abs(value.item() / expected.item() - 1)
        found[f"{case} gradient"] = ((slope - expected_slope).norm() / expected_slope.norm()).item()
    return found


def peak_memory(*, reset: bool = False) -> float:
    """The most MiB that this process has held, on Linux since it was last reset."""
    if reset and sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")
    if sys.platform == "linux":
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(name: str, n: int, repeats: int, exact_up_to: int) -> dict[str, Any]:
    """One way at one size, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    loss, q, p = WAYS[name](), torch.randn(n, DIMENSION), torch.randn(n, DIMENSION)
    gradient(loss, q[:300], p[:300])  # what is taken or compiled once
    before = peak_memory(reset=True)
    gradient(loss, q, p)
    peak = peak_memory() - before
    # As many rows as fit into 256 MiB; the unit grows as the pairs do.
    some = min(n, 2**26 // n)
    times: dict[str, list[float]] = {"seconds": [], "unit": [], "unit in place": []}
    product, inverse = torch.empty(some, n), torch.empty(some, n)
    for _ in range(repeats):
        for key, run in (
            ("seconds", lambda: gradient(loss, q, p)),
            ("unit", lambda: 1 / (q[:some] @ p.mT)),
            ("unit in place", lambda: torch.reciprocal(torch.mm(q[:some], p.mT, out=product), out=inverse)),
        ):
            start = time.process_time()
            run()
            times[key].append((time.process_time() - start) * (1 if key == "seconds" else n / some))
    middle = {key: statistics.median(values) for key, values in times.items()}
    return {
        "way": name, "n": n, **middle, "times": times,
        "units": middle["seconds"] / middle["unit"],
        "units in place": middle["seconds"] / middle["unit in place"],
        "mebibytes": peak,
        **(errors(name, loss, n) if n <= exact_up_to else {}),
    }  # fmt: skip


def slope(results: list[dict[str, Any]]) -> float:
    """The exponent of seconds in n, by least squares on logarithms."""
    x, y = [math.log(r["n"]) for r in results], [math.log(r["seconds"]) for r in results]
    return statistics.linear_regression(x, y).slope


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown, numbers to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary(report: dict[str, Any]) -> str:
    """The tables, what is in them, and the command."""
    results, options = report["results"], report["options"]
    costs = [
        [
            r["way"], str(r["n"]), f"{r['seconds']:.3g}", f"{r['units']:.3g}", f"{r['units in place']:.3g}",
            f"{r['mebibytes']:.0f}",
        ]
        for r in results
    ]  # fmt: skip
    digits = [
        [
            r["way"],
            str(r["n"]),
            *(f"{r[f'{case} {what}']:.0e}" for case in ("near", "noise") for what in ("value", "gradient")),
        ]
        for r in results
        if "near value" in r
    ]
    growth = [
        [name, f"{report['growth'][name]:.2f}", ", ".join(str(r["n"]) for r in results if r["way"] == name)]
        for name in report["growth"]
    ]
    return f"""Made by

    {report["command"]}

with torch {report["torch"]}, each row in a process of its own, on one thread. d = {DIMENSION}, as many prior draws as
codes, seven inverse multiquadratic kernels unless named otherwise; a forward and a backward pass.

{table(["way", "n", "seconds", "units", "units in place", "MiB"], costs)}

- *seconds*: of the processor, median of {options["repeats"]}.
- *units*: over those of `1 / (codes @ prior.T)`, a product of matrices and a division for each pair; *in place*:
  of the same with its results written into memory that is there already.
- *MiB*: by which the process grows beyond codes and prior draws.

Exponents of the seconds in n, by least squares:

{table(["way", "exponent", "n"], growth)}

Errors relative to float64 and direct differences. *near*: codes of 0.02 + 1.02 N(0, I); *noise*: the prior draws
themselves, with {NOISE:g} N(0, I) on top.

{table(["way", "n", "near: value", "gradient", "noise: value", "gradient"], digits)}
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 2048, 8192], help="numbers of codes")
    parser.add_argument("--others", type=int, default=2048, help="most codes for all ways but MMD()")
    parser.add_argument("--exact", type=int, default=512, help="most codes whose errors are measured")
    parser.add_argument("--gibibytes", type=float, default=8.0, help="skips what would take more")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of .json and .md; by default docs/_generated, or in a quick run results/benchmarks",
    )
    parser.add_argument("--smoke", action="store_true", help="run in seconds, to see that everything works")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "N"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.smoke:
        args.sizes, args.others, args.exact, args.repeats = [100, 300], 0, 100, 1
    args.out = args.out or Path("results/benchmarks" if args.smoke else "docs/_generated")
    return args


def in_a_process(name: str, n: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measures one way at one size in a fresh process."""
    options = ["--repeats", str(args.repeats), "--exact", str(args.exact)]
    command = [sys.executable, __file__, "--one", name, str(n), *options]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> None:
    """Measures and reports."""
    args = parse_args(argv)
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]), args.repeats, args.exact)))
        return
    results = []
    for n in args.sizes:
        for name in WAYS:
            if args.smoke and name == "MMD(), compiled":  # which takes a while to compile
                continue
            if (n > args.others and name not in OURS) or PER_PAIR.get(name, 0) * n**2 > args.gibibytes * 2**30:
                continue
            results.append(in_a_process(name, n, args))
            print(f"{name}, n = {n}: {results[-1]['units']:.3g} units, {results[-1]['mebibytes']:.0f} MiB", flush=True)
    counts = {name: sum(r["way"] == name for r in results) for name in WAYS}
    report: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/kernel_penalty.py", *(sys.argv[1:] if argv is None else argv)]),
        "torch": torch.__version__.partition("+")[0],
        "options": {key: str(value) if key == "out" else value for key, value in vars(args).items()},
        "results": results,
        "growth": {name: slope([r for r in results if r["way"] == name]) for name in WAYS if counts[name] > 1},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "kernel_penalty.json").write_text(json.dumps(report, indent=2) + "\n")
    (args.out / "kernel_penalty.md").write_text(summary(report))
    print(summary(report))


if __name__ == "__main__":
    main()
