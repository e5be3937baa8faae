"""Several processes: averaged gradients, and the exchange within a process group of ``torch.distributed``."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, distributed

__all__ = ["average_gradients"]

GroupLike = distributed.ProcessGroup | Literal["world"]


def average_gradients(parameters: Iterable[Tensor], *, process_group: GroupLike = "world") -> None:
    """Replaces each parameter's gradient by its mean over all ranks, as DDP does in the backward pass.

    It is for a loop of one's own without DDP, between ``backward`` and the optimiser's step. An ``SVI`` does not need
    it: ``WAELoss(process_group=...)`` does it in ``loss_and_grads``. A gradient that is missing on some ranks counts as
    0 there, and one that no rank has stays missing.

    Args:
        parameters: The same parameters on all ranks, in the same order.
        process_group: A process group, or "world" for the default one.

    Raises:
        ValueError: If the parameters are not alike on all ranks, or there is no process group.
        RuntimeError: If another rank has ended, or does not answer within the group's time-out.

    Example:
        >>> import torch
        >>> from pyro_wae import WAELoss
        >>> def step(module, optimizer, x):  # module = WAELoss(process_group="world")(model, guide)
        ...     optimizer.zero_grad()
        ...     module(x).backward()
        ...     average_gradients(module.parameters())
        ...     optimizer.step()
    """
    check_group(process_group)
    group = group_of(process_group)
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    check_same("parameters", [f"{p.dtype} {tuple(p.shape)}" for p in learning], group)
    kinds: dict[Any, list[Tensor]] = {}
    for parameter in learning:
        kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for alike in kinds.values():
        has = alike[0].new_tensor([float(parameter.grad is not None) for parameter in alike])
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in alike]
        flat = torch.cat([has, *(gradient.detach().flatten() for gradient in gradients)])
        with explained(group):
            distributed.all_reduce(flat, group=group)
        counts, *means = (flat / distributed.get_world_size(group)).split([len(alike), *(p.numel() for p in alike)])
        for parameter, count, mean in zip(alike, counts.tolist(), means, strict=True):
            if count:
                parameter.grad = mean.reshape(parameter.shape)


def check_group(group: object) -> None:
    """Raises TypeError unless it is a process group or "world"."""
    if not (isinstance(group, str) and group == "world") and not isinstance(group, distributed.ProcessGroup):
        raise TypeError(
            f"process_group must be 'world', a process group that this rank belongs to, or None, found {group!r}. "
            "Write process_group='world'."
        )


def group_of(group: GroupLike) -> distributed.ProcessGroup:
    if group != "world":
        return group
    if not (distributed.is_available() and distributed.is_initialized()):
        raise ValueError(
            "process_group='world' compares the codes of all ranks, and there is no process group. Call "
            "torch.distributed.init_process_group('gloo') first, in a script that is started by torchrun, or leave "
            "process_group out."
        )
    world = distributed.group.WORLD
    assert world is not None  # is_initialized
    return world


def small_device(group: distributed.ProcessGroup) -> torch.device:
    """Where small messages are sent from: the CPU if the group has a backend there."""
    if "cpu:" in distributed.get_backend_config(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def exchange(numbers: Sequence[int], group: distributed.ProcessGroup) -> list[list[int]]:
    sent = torch.tensor(numbers, device=small_device(group))
    received = sent.new_empty(distributed.get_world_size(group), len(sent))
    with explained(group):
        distributed.all_gather(list(received.unbind()), sent, group=group)
    return received.tolist()


def check_same(what: str, names: Sequence[str], group: distributed.ProcessGroup) -> None:
    marks = exchange([mark("; ".join(names)), len(names)], group)
    other = next((rank for rank, mark in enumerate(marks) if mark != marks[0]), None)
    if other is not None:
        raise ValueError(
            f"The {what} of rank {other} ({marks[other][1]}) are not those of rank 0 ({marks[0][1]}) in name, type or "
            "shape. Make the same nets on all ranks, and load the same checkpoint on all or on none."
        )


def are_equal(loss: Tensor, group: distributed.ProcessGroup) -> bool:
    """True; raises ValueError if ranks have computed other losses. What is not finite is reported elsewhere."""
    bits = exchange(loss.cpu().double().reshape(1).view(torch.int64).tolist(), group)
    losses = torch.tensor(bits).view(torch.float64).flatten().tolist()
    for rank, other in enumerate(losses):
        if abs(other - losses[0]) > 1e-4 * abs(losses[0]):
            raise ValueError(
                f"The loss of all ranks' data is {losses[0]:g} on rank 0 and {other:g} on rank {rank}: an option of "
                "WAELoss differs, such as reduction, or what a function computes that was given as penalty_weight, "
                "penalty or cost. Make the loss with the same arguments on all ranks."
            )
    return True


@contextmanager
def explained(group: distributed.ProcessGroup) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        error.add_note(
            f"pyro_wae: rank {distributed.get_rank(group)} waited for the other ranks of its process group. One has "
            "ended, has fewer steps than this one, or did not answer within the timeout of init_process_group."
        )
        raise


def mark(text: str | bytes) -> int:
    """A number that tells texts apart, the same in every process; never 0."""
    content = text.encode() if isinstance(text, str) else text
    return 1 + int.from_bytes(hashlib.blake2b(content, digest_size=7).digest())
