"""What checkpoints of format 1 call things that have other names now."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

FORMER_TEXTS: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    # The argument was the square of a length.
    (
        r"\bInverseMultiquadratic\(scale=(None|[\d.e+-]+)\)",
        lambda found: f"InverseMultiquadratic(bandwidth={_root(found[1])})",
    ),
    (r"\bLinear\(start=", "LinearSchedule(start="),
    # Numbers are kept as they are understood, and were kept as they were given.
    (r"=(-?\d+)(?=[,)]|$)", r"=\1.0"),
)
"""Patterns in descriptions, and what is written in their place today."""

COMPOSED = re.compile(r"(SequentialLR|ChainedScheduler)\(.*\)$")
UNSAID = ("enabled",)
"""Lines that descriptions did not have."""


def agreed_in_format_1(key: str, there: str | None, here: str | None) -> bool:
    """Whether two descriptions that differ are of the same thing, the first in the words of format 1."""
    if there == "missing" and key in UNSAID:
        return True
    if there is None or here is None:
        return False
    # Of composed schedulers only the class was kept.
    return _today(there) == _today(here) or there == COMPOSED.sub(r"\1", here)


def _today(text: str) -> str:
    for pattern, now in FORMER_TEXTS:
        text = re.sub(pattern, now, text)
    return text


def _root(squared: str) -> str:
    return squared if squared == "None" else repr(math.sqrt(float(squared)))
