"""One check for each kind of argument, with one form of error: what was found, what is accepted, what to write."""

from __future__ import annotations

import keyword
import math
import operator
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_wae._core.private import is_transforming

T = TypeVar("T")


def whole(name: str, value: Any, *, least: int | None = 1, most: int | None = None, write: str | None = None) -> int:
    """A whole number within bounds, as an ``int``: Python's, numpy's, or a tensor with one whole number.

    Args:
        name: What the message calls it, such as ``"num_particles"``.
        value: What the user gave.
        least: Smallest number that is accepted, or None.
        most: Largest number that is accepted, or None.
        write: The line to write instead. Default: ``name=least``.

    Raises:
        TypeError: If it is no whole number.
        ValueError: If it is out of bounds.
    """
    accepted = "a whole number" + (f" >= {least}" if most is None else f" from {least} to {most}") * (least is not None)
    write = f"{name}={least}" if write is None else write
    try:
        if _is_bool(value):
            raise TypeError
        found = operator.index(value)
    except (TypeError, RuntimeError):
        raise TypeError(f"{name} must be {accepted}, found {_shown(value)}. Write {write}.") from None
    if (least is not None and found < least) or (most is not None and found > most):
        raise ValueError(f"{name} must be {accepted}, found {_shown(value)}. Write {write}.")
    return found


def number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    write: str,
) -> float:
    """A finite number within bounds, as a ``float``: Python's, numpy's, or a tensor with one number.

    Args:
        name: What the message calls it, such as ``"Gaussian's bandwidth"``.
        value: What the user gave.
        least: Smallest number that is accepted, or None.
        above: Bound that it must exceed, or None.
        most: Largest number that is accepted, or None.
        below: Bound that it must stay below, or None.
        write: The line to write instead.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is not finite or out of bounds.
    """
    bounds = ((">=", least), (">", above), ("<=", most), ("<", below))
    accepted = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)
    accepted = f"a finite number {accepted}".rstrip()
    found = _as_float(value)
    if found is None:
        raise TypeError(f"{name} must be {accepted}, found {_shown(value)}. Write {write}.")
    within = (
        math.isfinite(found)
        and (least is None or found >= least)
        and (above is None or found > above)
        and (most is None or found <= most)
        and (below is None or found < below)
    )
    if not within:
        raise ValueError(f"{name} must be {accepted}, found {_shown(value)}. Write {write}.")
    return found


def numbers(name: str, value: Any, *, above: float, write: str) -> tuple[float, ...]:
    """One finite number or more, as a tuple of ``float``; arguments as of :func:`number`.

    Raises:
        TypeError: If it is no sequence of numbers.
        ValueError: If there is none, or one is not finite or out of bounds.
    """
    is_sequence = isinstance(value, Iterable) and not isinstance(value, bytes) and getattr(value, "ndim", 1) > 0
    value = accepted(name, value, is_sequence, "a sequence of numbers", write=write)
    found = tuple(number(f"Each of {name}", one, above=above, write=write) for one in value)
    if not found:
        raise ValueError(f"{name} must be one or more, found none. Write {write}.")
    return found


def flag(name: str, value: Any, *, write: str | None = None) -> bool:
    """True or False, and nothing that only counts as one.

    Raises:
        TypeError: If it is anything else.
    """
    if not _is_bool(value):
        write = f"{name}=True" if write is None else write
        raise TypeError(f"{name} must be True or False, found {_shown(value)}. Write {write}.")
    return bool(value)


def choice(name: str, value: T, options: Iterable[T], *, write: str | None = None) -> T:
    """One of some values.

    Raises:
        ValueError: If it is another value.
    """
    options = tuple(options)
    # 1 == True, and an array compares elementwise.
    if not any(type(value) is type(option) and value == option for option in options):
        accepted = ", ".join(map(repr, options[:-1])) + (" or " if options[1:] else "") + repr(options[-1])
        write = f"{name}={options[0]!r}" if write is None else write
        raise ValueError(f"{name} must be {accepted}, found {_shown(value)}. Write {write}.")
    return value


def text(name: str, value: Any, what: str, *, write: str) -> str:
    """A string, such as the name of a plate.

    Raises:
        TypeError: If it is anything else.
    """
    return accepted(name, value, isinstance(value, str), what, write=write)


def function(name: str, value: Any, what: str, *, write: str) -> Callable[..., Any]:
    """Something that can be called and is no class.

    Raises:
        TypeError: If it is anything else.
    """
    return accepted(name, value, callable(value) and not isinstance(value, type), what, write=write)


def program(role: str, value: Any) -> Callable[..., Any]:
    """A model or a guide.

    Raises:
        TypeError: If it cannot be called, or is a class.
    """
    return function(f"The {role}", value, "a module or a function", write="WAELoss()(model, guide)")


def tensor(name: str, value: Any, *, write: str) -> Tensor:
    """A dense tensor of real numbers or truth values, on a device where it has values.

    Raises:
        TypeError: If it is anything else.
    """
    is_tensor = isinstance(value, Tensor)
    if not is_tensor or value.layout is not torch.strided or value.is_meta or value.is_complex():
        found = f"{_shown(value)} ({value.dtype}, {value.layout}, {value.device})" if is_tensor else _shown(value)
        raise TypeError(f"{name} must be a dense tensor of real numbers, found {found}. Write {write}.")
    return value


def accepted(name: str, value: T, is_right: bool, what: str, *, write: str) -> T:
    """A value of any kind, which the caller has looked at.

    Raises:
        TypeError: If it is not right.
    """
    if not is_right:
        raise TypeError(f"{name} must be {what}, found {_shown(value)}. Write {write}.")
    return value


def instance(name: str, value: T, kind: Any, what: str, *, write: str) -> T:
    """An object of a class, which may be an abstract one.

    Raises:
        TypeError: If it is anything else.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {what}, found {_shown(value)}. Write {write}.")
    return value


def variable(name: str) -> str:
    """A name by which a line of code may call what has this name, which may hold anything."""
    word = re.sub(r"\W", "_", name)
    return word if word.isidentifier() and not keyword.iskeyword(word) else f"_{word}"


def is_number(value: Any) -> bool:
    """Whether :func:`number` takes it, but for its bounds; for operators, which then return ``NotImplemented``."""
    return _as_float(value) is not None


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def _as_float(value: Any) -> float | None:
    """The value as a float; None if it is a text, a truth value, complex, or several numbers."""
    if isinstance(value, str | bytes) or _is_bool(value) or getattr(value, "ndim", 0) != 0:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _shown(value: Any) -> str:
    """The value as a message shows it: tensors and arrays by their shape, long texts cut off."""
    if getattr(value, "ndim", 0):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{type(value).__name__} {shown[:70]}..."


def no_transform(name: str, changes: str, *, write: str) -> None:
    """Raises ValueError under a transform of ``torch.func``, for what changes something in every step."""
    if is_transforming():
        raise ValueError(
            f"{name} {changes} in every step, and a function that torch.func transforms may change nothing. Write "
            f"{write}, or take the gradients by loss.backward()."
        )
