"""What all benchmarks share: the command line, the machine, times taken in turns, tables, files and pictures.

A benchmark makes a ``Benchmark`` of its file and of the function that writes its page, adds its options, and holds its
contenders.
"""

import argparse
import ctypes
import gc
import io
import json
import multiprocessing
import os
import re
import resource
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from tqdm import tqdm

MIB = 2**20
TABLES, PICTURES, QUICK = Path("docs/_generated"), Path("docs/images"), Path("results/benchmarks")

Report = dict[str, Any]


class Benchmark:
    """The command line of a benchmark, and the files that it writes.

    Args:
        file: The benchmark's own file, which names what it writes.
        page: Makes the Markdown of a report.
        smoke: The options of a quick run.
        threads: Threads of torch where ``--threads`` does not say otherwise.
        devices: Whether it has rows for CUDA.
        picture: Whether it draws one.
    """

    def __init__(
        self,
        file: str,
        page: Callable[[Report], str],
        *,
        smoke: dict[str, Any],
        threads: int = 1,
        devices: bool = False,
        picture: bool = False,
    ) -> None:
        self.name, self.page, self.smoke = Path(file).stem, page, smoke
        self.parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        self.option = self.parser.add_argument
        self.option("--threads", type=int, default=threads)
        if devices:
            found = {"nargs": "+", "choices": ("cpu", "cuda"), "default": ["cpu", "cuda"]}
            self.option("--devices", **found, help="those that are not there are left out")
        self.option("--out", type=Path, help=f"folder of .json and .md; by default {TABLES}, or in a quick run {QUICK}")
        if picture:
            where = PICTURES / f"{self.name}.png"
            self.option("--picture", type=Path, help=f"by default {where}, or in a quick run a file in OUT")
        self.option("--smoke", action="store_true", help="run in seconds, to see that everything works")

    def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
        """Reads the command line."""
        args = self.parser.parse_args(argv)
        args.argv = sys.argv[1:] if argv is None else argv
        if args.smoke:
            vars(args).update(self.smoke)
        args.out = args.out or (QUICK if args.smoke else TABLES)
        if hasattr(args, "picture"):
            args.picture = args.picture or (args.out if args.smoke else PICTURES) / f"{self.name}.png"
        return args

    def start(self, argv: list[str] | None = None) -> argparse.Namespace:
        """Reads the command line, and sets up this process by it."""
        args = self.parse(argv)
        set_up(args.threads)
        if "cuda" in getattr(args, "devices", []) and not torch.cuda.is_available():
            print("No rows for CUDA: torch.cuda.is_available() is False.", flush=True)
            args.devices = [device for device in args.devices if device != "cuda"]
        return args

    def report(self, args: argparse.Namespace, **parts: Any) -> Report:
        """What is written as JSON: how the numbers came about, and the numbers."""
        options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        cores = f"{os.cpu_count()} CPU cores, of which {args.threads} used"
        gpu = f", and {torch.cuda.get_device_name()}" if "cuda" in getattr(args, "devices", []) else ""
        return {
            "command": shlex.join(["python", f"benchmarks/{self.name}.py", *options.pop("argv")]),
            "machine": cores + gpu,
            "torch": torch.__version__.partition("+")[0],
            "options": options,
            **parts,
        }

    def write(self, report: Report, figure: Any = None) -> None:
        """Writes numbers, page and picture, or what there is of them so far."""
        options = report["options"]
        out, name = Path(options["out"]), options.get("name", self.name)
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
        (out / f"{name}.md").write_text(self.page(report))
        if figure is not None:
            save(figure, Path(options["picture"]))

    def finish(self, report: Report, figure: Any = None) -> None:
        """Writes everything, and prints the page."""
        self.write(report, figure)
        print(self.page(report))


def set_up(threads: int) -> None:
    """Sets the threads of torch, and silences libraries that stand beside this one."""
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", module="torch|pyro|ot|pythae|pydantic")


def in_processes(threads: int, function: Callable[..., Any], *calls: tuple[Any, ...]) -> list[Any]:
    """What a function returns of each tuple of arguments, all at the same time, each in a fresh process."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(calls), fresh, initializer=set_up, initargs=(threads,)) as pool:
        return list(pool.map(function, *zip(*calls, strict=True)))


def made_by(report: Report) -> str:
    """The sentence under a table that says how to make it again."""
    return f"Made by\n\n    {report['command']}\n\non {report['machine']}, torch {report['torch']}."


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Markdown, with columns of numbers to the right."""
    header, cells = list(header), [[str(cell) for cell in row] for row in rows]
    rule = []
    for index in range(len(header)):
        column = [row[index] for row in cells]
        rule.append("---:" if all(re.fullmatch(r"[-\d .,±<>+e%]*", cell) for cell in column) else "---")
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *cells])


def table_of(rows: list[dict[str, Any]]) -> str:
    """Rows whose keys are the header."""
    return table(rows[0], (row.values() for row in rows))


def progress(items: Iterable[Any], label: str, **options: Any) -> Any:
    """A bar for what takes long."""
    return tqdm(items, desc=label, leave=False, mininterval=2, **options)


def save(figure: Any, path: Path) -> None:
    """Saves a figure as a PNG of 64 colours, which lines and text need no more of."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    whole = io.BytesIO()
    figure.savefig(whole, format="png")
    Image.open(whole).convert("RGB").quantize(64).save(path, optimize=True)


def seconds(run: Callable[[], Any], device: str, clock: Callable[[], float]) -> float:
    """Time of a call by the clock given; on CUDA between two events on the device."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    begin = clock()
    run()
    return clock() - begin


def in_turns(
    runs: dict[str, Callable[[], Any]],
    device: str,
    clock: Callable[[], float],
    enough: Callable[[int, float], bool],
) -> dict[str, list[float]]:
    """Times of calls that take turns, one each a round, so that other work on the machine meets all alike.

    ``enough`` says after how many rounds, and seconds spent in them, it ends.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    rounds, spent = 0, 0.0
    while not enough(rounds, spent):
        for name, run in runs.items():
            times[name].append(seconds(run, device, clock))
            spent += times[name][-1]
        rounds += 1
    return times


def ratios(times: dict[str, list[float]], base: str) -> dict[str, tuple[float, float, float]]:
    """Quartiles, the median in the middle, of each time over that of the base in the same round."""
    return {
        name: tuple(
            statistics.quantiles([t / b for t, b in zip(own, times[base], strict=True)], n=4, method="inclusive")
        )
        for name, own in times.items()
    }


def peak_mebibytes(run: Callable[[], Any], device: str) -> tuple[float, float]:
    """The most MiB that a call held beyond what was there before, and its seconds (of the processor, on a CPU)."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        taken = seconds(run, device, time.process_time)
        return (torch.cuda.max_memory_allocated() - before) / MIB, taken
    before = _resident_mebibytes(reset=True)
    taken = seconds(run, device, time.process_time)
    return _resident_mebibytes() - before, taken


def _resident_mebibytes(*, reset: bool = False) -> float:
    """The most MiB that this process has held, on Linux since it was last reset."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB
    if reset:
        # What an earlier call has freed and the C library still holds would hide what the next one takes.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def in_bfloat16(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss inside autocast, on the device of what it is called with."""

    def run(*tensors: Tensor) -> Tensor:
        with torch.autocast(tensors[0].device.type, torch.bfloat16):
            return loss(*tensors)

    return run


class AutoEncoder(nn.Module):
    """Nets as a Pyro model and guide with a standard Normal prior and a deterministic encoder."""

    def __init__(self, zdim: int, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.zdim, self.encoder, self.decoder, self.registers = zdim, encoder, decoder, True

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
            pyro.sample("z", self.code(codes))

    def code(self, codes: Tensor) -> Any:
        """The distribution of a code."""
        return dist.Delta(codes).to_event(1)
