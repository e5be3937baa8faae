"""A penalty's own training inside a recorded step, as one operation of which the recording sees no part."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor, nn

from pyro_wae.decisions import is_recording

__all__ = ["SelfTraining", "train_when_replayed"]


class SelfTraining(Protocol):
    """A penalty with parameters that it trains itself."""

    def train_on(self, codes: Tensor, prior: Tensor) -> None:
        """Trains its parameters on codes (n, d) and prior draws (m, d)."""


_PENALTIES: weakref.WeakValueDictionary[int, SelfTraining] = weakref.WeakValueDictionary()


def train_when_replayed(penalty: SelfTraining, module: nn.Module, codes: Tensor, prior: Tensor) -> None:
    """Leaves a mark in the step that is being recorded: here the penalty trains itself.

    Args:
        penalty: The penalty.
        module: What its training changes.
        codes: Shape (n, d).
        prior: Shape (m, d).
    """
    _PENALTIES[id(penalty)] = penalty
    state = [tensor.detach() for tensor in (*module.parameters(), *module.buffers())]
    _train(codes.detach(), prior.detach(), state, id(penalty))


@torch.library.custom_op("pyro_wae::train_penalty", mutates_args=("state",))
def _train(codes: Tensor, prior: Tensor, state: Sequence[Tensor], penalty: int) -> None:
    if is_recording():
        return
    # Inside an operation automatic differentiation is off, and a thread of its own is where it is on.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(_PENALTIES[penalty].train_on, codes.detach(), prior.detach()).result()


@_train.register_fake
def _(codes: Tensor, prior: Tensor, state: Sequence[Tensor], penalty: int) -> None:
    return None
