"""The state of every generator that a step may draw from, as one thing that is kept and put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """The states of torch's generators (CPU and all CUDA devices), of numpy's and of Python's."""
    return {
        "torch": torch.get_rng_state(),
        # Asking would start CUDA in a process that does not use it.
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": np.random.get_state(),  # noqa: NPY002 - the state that legacy callers draw from
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Puts back what :func:`random_state` returned."""
    torch.set_rng_state(state["torch"])
    for device, own in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(own, device)
    np.random.set_state(state["numpy"])  # noqa: NPY002
    random.setstate(state["python"])


def same_generators(state: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether torch's generators have the same state in both, and so nothing was drawn between."""
    first, second = ([own["torch"], *own["cuda"]] for own in (state, other))
    return all(map(torch.equal, first, second))


@contextmanager
def restored_random_state() -> Iterator[None]:
    """Puts the states back at the end, whatever is drawn meanwhile."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


@contextmanager
def isolated_seed(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds what draws from torch's global state inside, on the CPU and a device, and puts all states back."""
    with restored_random_state():
        # torch.manual_seed would reach devices that no one has used, and start them.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
