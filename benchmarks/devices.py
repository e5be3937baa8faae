"""Where benchmarks run, and how they measure time and memory there."""

import ctypes
import gc
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MIB = 2**20


def add_options(parser: Any) -> None:
    """Adds what all benchmarks ask of the machine."""
    parser.add_argument(
        "--devices",
        nargs="+",
        choices=("cpu", "cuda"),
        default=["cpu", "cuda"],
        help="those that are not there are left out",
    )


def present(devices: list[str]) -> list[str]:
    """Those devices that are there; says which are not."""
    if "cuda" in devices and not torch.cuda.is_available():
        print("No rows for CUDA: torch.cuda.is_available() is False.", flush=True)
        return [device for device in devices if device != "cuda"]
    return devices


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


def describe(devices: list[str], threads: int) -> str:
    """What the devices are."""
    text = f"{os.cpu_count()} CPU cores, of which {threads} used"
    return f"{text}, and {torch.cuda.get_device_name()}" if "cuda" in devices else text
