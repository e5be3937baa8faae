"""Yes-or-no questions that a step asks a tensor, so that a recorded step can go the way of the step before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

__all__ = ["NotRecordable", "answered", "asked", "decide", "is_compiling", "is_recording"]


class NotRecordable(Exception):
    """A step cannot be recorded; the message says why."""


class _Answered:
    """Answers taken from an earlier step, and a truth value for each that says whether it holds in this one."""

    def __init__(self, answers: Sequence[bool], compiles: bool) -> None:
        self.compiles = compiles
        self.left = list(answers)
        self.holds: list[Tensor] = []

    def ask(self, condition: Tensor) -> bool:
        if not self.left:
            raise NotRecordable("it asks tensors other questions than the step before it")
        answer = self.left.pop(0)
        self.holds.append(condition if answer else condition.logical_not())
        return answer


_ANSWERED: ContextVar[_Answered | None] = ContextVar("answered", default=None)
_ASKED: ContextVar[list[bool] | None] = ContextVar("asked", default=None)


def decide(condition: Tensor) -> bool:
    """Whether a truth value is true; while a step is recorded, whether it was so in the step before.

    Args:
        condition: A boolean scalar.
    """
    source = _ANSWERED.get()
    if source is not None:
        return source.ask(condition)
    answer = bool(condition)
    log = _ASKED.get()
    if log is not None:
        log.append(answer)
    return answer


def is_recording() -> bool:
    """Whether what runs is a step that is being recorded."""
    return _ANSWERED.get() is not None


def is_compiling() -> bool:
    """Whether it will be compiled too, so that one expression for the whole is better than parts by hand."""
    source = _ANSWERED.get()
    return source is not None and source.compiles


@contextmanager
def asked() -> Iterator[list[bool]]:
    """Collects the answers of a step."""
    answers: list[bool] = []
    token = _ASKED.set(answers)
    try:
        yield answers
    finally:
        _ASKED.reset(token)


@contextmanager
def answered(answers: Sequence[bool], *, compiles: bool) -> Iterator[list[Tensor]]:
    """Records a step with the answers of an earlier one; collects boolean scalars that say whether they hold.

    Raises:
        NotRecordable: If the step asks another number of questions.
    """
    source = _Answered(answers, compiles)
    token = _ANSWERED.set(source)
    try:
        with torch.autograd.set_multithreading_enabled(False):  # what runs in another thread would not see this
            yield source.holds
    finally:
        _ANSWERED.reset(token)
    if source.left:
        raise NotRecordable("it asks tensors fewer questions than the step before it")
