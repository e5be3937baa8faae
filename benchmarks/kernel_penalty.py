"""What a penalty costs, forward and backward, against the number of codes and their size: time, memory and digits.

    python benchmarks/kernel_penalty.py

The penalties of this library stand beside others' ways to compute the same quantity. Each runs in a process of its own,
on codes and prior samples in float32, with a gradient by the codes. Times on a CPU are those of the processor on one
thread, so that other work on the machine counts little, and are given in units of ``1 / (codes @ prior.T)``, taken in
turns with them: a product of matrices and a division for each pair. Where there is CUDA, rows for it are added.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from harness import Benchmark, Report, in_processes, in_turns, made_by, peak_mebibytes, table
from torch import Tensor
from ways import PICTURE, WAYS, Loss

from pyro_wae.kernels.radial import AUTHORS_FACTORS
from pyro_wae.plotting import PALETTE, styled_figure

NOISE = 1e-3
"""How far codes are from the draws that they are compared with where digits are hardest to keep."""

ONCE = 2.0
"""Seconds from which on a pass is taken once only, and not warmed up."""

LEAST_SECONDS = 0.3
"""Passes are repeated for as long at least."""


def gradient(loss: Loss, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """The value, and its gradient by the codes."""
    q = q.detach().requires_grad_()
    value = loss(q, p)
    value.backward()
    return value.detach(), q.grad


def exact(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient of the unbiased estimate in float64, by differences taken a row at a time."""
    q, p, scales = q.double(), p.double(), [2.0 * q.shape[1] * c for c in AUTHORS_FACTORS]
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


def errors(loss: Loss, n: int, d: int, device: str) -> dict[str, float]:
    """Relative errors of value and gradient where codes nearly match the prior, and where they nearly are its draws."""
    torch.manual_seed(1)
    p, found = torch.randn(n, d), {}
    for case, q in (("near", 1.02 * torch.randn_like(p) + 0.02), ("noise", p + NOISE * torch.randn_like(p))):
        value, slope = gradient(loss, q.to(device), p.to(device))
        expected, expected_slope = exact(q, p)
        found[f"{case} value"] = abs(value.item() / expected.item() - 1)
        found[f"{case} gradient"] = ((slope.cpu() - expected_slope).norm() / expected_slope.norm()).item()
    return found


def measure(name: str, n: int, d: int, device: str, args: argparse.Namespace, loss: Loss) -> dict[str, Any]:
    """One way at one size, in this process."""
    torch.manual_seed(0)
    q, p = torch.randn(n, d, device=device), torch.randn(n, d, device=device)
    mebibytes, first = peak_mebibytes(lambda: gradient(loss, q, p), device)
    # As many rows as fit into 256 MiB; the unit grows as the pairs do.
    some = min(n, 2**26 // n)
    product, inverse = q.new_empty(some, n), q.new_empty(some, n)
    runs = {
        "seconds": lambda: gradient(loss, q, p),
        "unit": lambda: torch.reciprocal(torch.mm(q[:some], p.mT, out=product), out=inverse),
        "fresh unit": lambda: 1 / (q[:some] @ p.mT),
    }
    runs["unit"]()
    once = {"seconds": [first]} if first > ONCE else {}
    runs = {key: run for key, run in runs.items() if key not in once}

    def enough(rounds: int, spent: float) -> bool:
        return rounds >= args.repeats and spent >= LEAST_SECONDS

    times = once | in_turns(runs, device, time.process_time, enough)
    middle = {key: statistics.median(t) * (1 if key == "seconds" else n / some) for key, t in times.items()}
    return {
        "way": name, "device": device, "n": n, "d": d, **middle, "passes": len(times["seconds"]),
        "units": middle["seconds"] / middle["unit"],
        "fresh units": middle["seconds"] / middle["fresh unit"],
        "mebibytes": max(mebibytes, 0.0),
        **(errors(loss, n, d, device) if WAYS[name].keeps_digits and n <= args.exact else {}),
    }  # fmt: skip


def measure_all(name: str, device: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One way at all sizes, from the least on; what would take too much is skipped, with the reason."""
    rows: list[dict[str, Any]] = []
    for d in args.dimensions:
        place = {"way": name, "device": device, "d": d}
        try:
            loss = WAYS[name].make(d)
            gradient(loss, *torch.randn(2, 300, d, device=device))  # what is compiled or read once
        except (ImportError, RuntimeError) as error:
            if device == "cpu" and isinstance(error, RuntimeError):
                raise
            rows.append({**place, "skipped": str(error).splitlines()[0]})
            continue
        last: dict[str, Any] | None = None
        for n in sorted(args.sizes):
            # As the pairs at most: what grows with the codes alone is far from both limits.
            reason = "" if last is None else too_much(last, (n / last["n"]) ** 2, args)
            if reason:
                rows.append({**place, "n": n, "skipped": reason})
                break
            last = measure(name, n, d, device, args, loss)
            rows.append(last)
    return rows


def too_much(last: dict[str, Any], growth: float, args: argparse.Namespace) -> str:
    """Why a row that costs so many times the last one is left out; nothing if it is not."""
    gibibytes, seconds = growth * last["mebibytes"] / 1024, growth * last["seconds"]
    if gibibytes > args.gibibytes and last["mebibytes"] > 64:
        return f"would take about {gibibytes:.0f} GiB"
    return f"would take about {seconds:.0f} s" if seconds > args.seconds and last["seconds"] > 0.5 else ""


def number(value: float | None, factor: float = 1.0) -> str:
    """Two or three digits, without an exponent."""
    if value is None:
        return "-"
    value *= factor
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def cost_table(results: list[dict[str, Any]], key: str, factor: float) -> str:
    """A cost of every way at every n, the ways by what they compute."""
    found = {(r["way"], r["n"]): r[key] for r in results}
    sizes, rows, quantity = sorted({n for _, n in found}), [], ""
    for way in WAYS:
        if not any(name == way for name, _ in found):
            continue
        if WAYS[way].quantity != quantity:
            quantity = WAYS[way].quantity
            rows.append([f"*{quantity}*", *([""] * len(sizes))])
        rows.append([way, *(number(found.get((way, n)), factor) for n in sizes)])
    return table(["n =", *(str(n) for n in sizes)], rows)


def named(row: dict[str, Any]) -> str:
    """The way of a row, and where it ran if not on the CPU."""
    return row["way"] if row["device"] == "cpu" else f"{row['way']} (CUDA)"


def page(report: Report) -> str:
    """The tables, what is in them, and the command."""
    results, options, parts = report["results"], report["options"], []
    for device in report["devices"]:
        for d in options["dimensions"]:
            some = [r for r in results if r["device"] == device and r["d"] == d]
            where = f"d = {d}" if device == "cpu" else f"CUDA, d = {d}"
            for title, key, factor in (("units", "units", 1), ("ms", "seconds", 1e3), ("MiB", "mebibytes", 1)):
                parts.append(f"**{where}: {title}**\n\n{cost_table(some, key, factor)}")
    digits = [
        [
            named(r), r["d"],
            *(f"{r[f'{case} {what}']:.0e}" for case in ("near", "noise") for what in ("value", "gradient")),
        ]
        for r in results
        if "near value" in r and r["n"] == max(s["n"] for s in results if "near value" in s)
    ]  # fmt: skip
    skipped = "".join(f"- {line}\n" for line in sorted({reason(r) for r in report["skipped"]}))
    left_out = f"Left out, from the n named on:\n\n{skipped}" if skipped else ""
    tables = "\n\n".join(parts)
    return f"""{tables}

- *units*: time over that of `1 / (codes @ prior.T)`, a product of matrices and a division for each pair, written into
  memory that is there already.
- *ms*: of the processor on one thread, median of {options["repeats"]} passes or more; of one pass from {ONCE:g} s on.
  On CUDA between two events.
- *MiB*: by which the process grows beyond codes and prior samples.
- *biased*: with the pairs of a row with itself, as geomloss and Trace_MMD have it.
- MMD's kernel is `InverseMultiquadratic.multiscale(sqrt(2 d))`; the Gaussian's bandwidth is sqrt(d), the blur of the
  Sinkhorn divergence sqrt(d / 2). `Sinkhorn()` calls geomloss, which lowers the blur in steps, and POT iterates to a
  tolerance of 1e-5. geomloss gives half the square of a distance, POT the root of the sliced one: all have the same
  scale here.

**Digits.** Errors at n = {options["exact"]} relative to float64 and direct differences. *near*: codes of
0.02 + 1.02 N(0, I); *noise*: the prior samples themselves, with {NOISE:g} N(0, I) on top.

{table(["way", "d", "near: value", "gradient", "noise: value", "gradient"], digits)}

{made_by(report)}
As many prior samples as codes, a forward and a backward pass, a process for each row.
{left_out}"""


def reason(skipped: dict[str, Any]) -> str:
    """Why something was left out."""
    at = f", n = {skipped['n']}" if "n" in skipped else ""
    return f"{skipped['way']}, d = {skipped['d']}{at} ({skipped['device']}): {skipped['skipped']}"


def draw(results: list[dict[str, Any]], d: int) -> Any:
    """Time and memory against n on logarithmic axes."""
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    with styled_figure((6.0, 8.6)) as figure:
        panels = figure.subplots(2, 1, sharex=True)
        colours = [*PALETTE[:6], PALETTE[7]]  # without the yellow, which is faint on white
        for axes, key, factor, label in (
            (panels[0], "seconds", 1e3, "milliseconds"), (panels[1], "mebibytes", 1, "MiB")
        ):  # fmt: skip
            for way, colour, marker in zip(PICTURE, colours, "osD^vPX", strict=True):
                points = [r for r in results if (r["way"], r["device"], r["d"]) == (way, "cpu", d)]
                x, y = [r["n"] for r in points], [max(factor * r[key], 1.0) for r in points]
                style = "-" if "MMD()" in way else "--"
                if points:
                    axes.plot(x, y, color=colour, marker=marker, markersize=9, linestyle=style, label=way)
            axes.set(xscale="log", yscale="log", ylabel=label)
            axes.yaxis.set_major_locator(LogLocator())
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            axes.minorticks_off()
            axes.grid(color="#DDDDDD", linewidth=0.8)
        sizes = sorted({r["n"] for r in results})
        panels[0].set_title(f"Forward and backward, d = {d}")
        panels[1].set_xlabel("number of codes (1k is 1,024)")
        panels[1].set_xticks(sizes, [f"{n}" if n < 1024 else f"{n // 1024}k" for n in sizes])
        panels[1].minorticks_off()
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


BENCH = Benchmark(
    __file__,
    page,
    devices=True,
    picture=True,
    smoke={
        "sizes": [100, 300], "dimensions": [4], "exact": 100, "repeats": 1, "devices": ["cpu"],
        "ways": ["MMD()", "authors' formula", "pythae", "geomloss, energy", "EnergyDistance()"],
    },
)  # fmt: skip
BENCH.option("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY")
BENCH.option("--sizes", type=int, nargs="+", default=[256, 512, 2048, 8192, 16384, 65536], help="numbers of codes")
BENCH.option("--dimensions", type=int, nargs="+", default=[8, 64], help="numbers in a code")
BENCH.option("--exact", type=int, default=512, help="most codes whose errors are measured")
BENCH.option("--gibibytes", type=float, default=8.0, help="skips what would take more")
BENCH.option("--seconds", type=float, default=50.0, help="skips passes that would take more")
BENCH.option("--repeats", type=int, default=3, help="least number of passes")


def main(argv: list[str] | None = None) -> None:
    """Measures and reports."""
    args = BENCH.start(argv)
    results: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    for device in args.devices:
        for name in (name for name in args.ways if device in WAYS[name].is_for):
            task = (name, device, args)
            rows = measure_all(*task) if args.smoke else in_processes(args.threads, measure_all, task)[0]
            for found in rows:
                if "skipped" in found:
                    skipped.append(found)
                    print(f"No row for {reason(found)}", flush=True)
                else:
                    results.append(found)
                    where = f"{name}, d = {found['d']}, n = {found['n']} ({device})"
                    print(f"{where}: {found['units']:.3g} units, {found['mebibytes']:.0f} MiB", flush=True)
    parts = {"devices": args.devices, "results": results, "skipped": skipped}
    BENCH.finish(BENCH.report(args, **parts), draw(results, max(args.dimensions)))


if __name__ == "__main__":
    main()
