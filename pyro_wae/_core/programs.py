"""A model or a guide: the modules behind it, what it is called with, and runs of it that leave nothing behind."""

from __future__ import annotations

import dis
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_wae._core.batch_norm import batch_norm_at_rest
from pyro_wae._core.random_state import restored_random_state

LIBRARIES = ("torch", "pyro")
"""Packages whose functions refer to nothing of the user's by global names."""


def owners(program: Any) -> list[nn.Module]:
    """All modules that a program is made of, each once, the outermost only.

    These are the program itself, the owner of a bound method, what a :class:`functools.partial`, a decorator with
    ``__wrapped__`` or a Pyro handler (``poutine.scale(module, scale=0.1)``) is around, and what a plain function
    refers to: by its closure, its defaults and the global names that it reads. Of an object that is no module, its
    attributes are searched. A function or an object that is found by a global name is searched in turn if it is
    defined in the same package. Lists, tuples, sets and dicts are searched one level deep.

    Example:
        >>> from pyro import poutine
        >>> decoder = nn.Linear(2, 3)
        >>> owners(poutine.scale(lambda z: decoder(z), scale=0.1))
        [Linear(in_features=2, out_features=3, bias=True)]
    """
    found = list(_modules_in(program, set()))
    inner = {id(part) for module in found for part in module.modules() if part is not module}
    return [module for module in found if id(module) not in inner]


@contextmanager
def trial_run() -> Iterator[None]:
    """Wraps runs of which nothing is kept: random state, BatchNorm and the handlers outside do not notice them."""
    with restored_random_state(), poutine.block(), torch.no_grad(), batch_norm_at_rest():
        yield
    torch.clear_autocast_cache()  # torch 2.6 keeps casts without their gradient


def wrapped_module(program: Any) -> nn.Module | None:
    """The module that a program is, or is a method of, or is wrapped around; a function's references do not count."""
    if isinstance(program, nn.Module):
        return program
    return next(
        (m for inner in _wrapped(program) if callable(inner) and (m := wrapped_module(inner)) is not None), None
    )


def _wrapped(program: Any) -> Iterator[Any]:
    """What a bound method, a partial, a decorated function or one of Pyro's handlers is around."""
    if isinstance(owner := getattr(program, "__self__", None), nn.Module):
        yield owner
        return
    # Pyro's handlers keep what they are around as an argument of a partial, those that trace as `fn`.
    yield from (getattr(program, name, None) for name in ("func", "fn", "__wrapped__"))
    if isinstance(program, functools.partial):
        yield from program.args


def _modules_in(program: Any, seen: set[int]) -> Iterator[nn.Module]:
    if id(program) in seen:
        return
    seen.add(id(program))
    if isinstance(program, nn.Module):
        yield program
        return
    if isinstance(program, type) or not callable(program):
        return
    bound = list(_wrapped(program))
    read: list[Any] = []
    package = _package(program)
    if isinstance(program, FunctionType):
        bound += closure_of(program)
        bound += [*(program.__defaults__ or ()), *(program.__kwdefaults__ or {}).values()]
        if package not in LIBRARIES:
            names = dict.fromkeys(_global_names(program.__code__))
            read += [program.__globals__[name] for name in names if name in program.__globals__]
    elif isinstance(program, functools.partial):
        bound += program.keywords.values()
    elif package not in LIBRARIES:
        # A method of an object that is no module, or an object that can itself be called.
        method = program if isinstance(program, MethodType) else program.__call__
        owner = getattr(method, "__self__", None)
        bound += getattr(owner, "__dict__", {}).values()
        read.append(getattr(method, "__func__", None))
    for thing in _with_items(bound):
        yield from _modules_in(thing, seen)
    for thing in _with_items(read):
        if isinstance(thing, nn.Module) or _package(thing) == package:
            yield from _modules_in(thing, seen)


def _with_items(values: Iterable[Any]) -> Iterator[Any]:
    """The values, with those that lists, tuples, sets and dicts among them hold in their place."""
    for value in values:
        if isinstance(value, Mapping):
            yield from value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            yield from value
        else:
            yield value


def _package(program: Any) -> str:
    """The outermost package that a function, or the class of an object, is defined in."""
    home = getattr(program, "__module__", None)
    return home.partition(".")[0] if isinstance(home, str) else ""


def _global_names(code: CodeType) -> Iterator[str]:
    """The global names that a function and those within it read, without names of attributes."""
    yield from (step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)


def closure_of(function: Any) -> list[Any]:
    """What the names in a function's closure stand for, of those that have been assigned."""
    contents = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):
            contents.append(cell.cell_contents)
    return contents


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors with a dimension among arguments and in dicts of them, in order."""
    if isinstance(value, Tensor):
        if value.ndim:
            yield value
    elif isinstance(value, Mapping):
        for own in value.values():
            yield from tensors_of(own)


def part_of(value: Any, rows: slice, length: int) -> Any:
    """The rows of a tensor of the given length, and of those in a dict; anything else as it is."""
    if isinstance(value, Mapping):
        return {name: part_of(own, rows, length) for name, own in value.items()}
    return value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == length else value


def add_note(error: Exception, args: Sequence[Any], kwargs: Mapping[str, Any], *programs: Any) -> None:
    """Adds a note to an error of a run of model or guide, if an argument is not what data of their nets usually are."""
    # Torch names its types in many ways: "same dtype", "scalar type Double", "Input type (double)".
    nets = [module for program in programs for module in owners(program)] if "type" in str(error) else []
    dtypes = [weight.dtype for net in nets for weight in net.parameters() if weight.is_floating_point()]
    named: list[tuple[str, Any]] = [(f"Argument {place}", value) for place, value in enumerate(args, 1)]
    named += kwargs.items()
    notes: list[tuple[str, str | None]] = []
    for place, (name, value) in enumerate(named):
        if isinstance(value, Mapping):  # a batch, of which any item may be the data
            notes += [(f"{name}[{key!r}]", _what_is_wrong(own, dtypes, is_first=False)) for key, own in value.items()]
        else:
            is_first = not place and (bool(args) or len(named) == 1)  # keywords are in any order
            # What is an index into data that come after it is no data.
            may_be_index = isinstance(value, Tensor) and value.ndim == 1 and not value.is_floating_point()
            is_first = is_first and not (may_be_index and _holds_tensor([other for _, other in named[1:]]))
            notes.append((name, _what_is_wrong(value, dtypes, is_first=is_first)))
    if args and isinstance(args[0], list | tuple) and isinstance(error, TypeError | AttributeError):
        notes.append(
            ("Argument 1", f"a {type(args[0]).__name__}. If it is a batch of a loader, write svi.step(*batch)")
        )
    if found := next(((name, note) for name, note in notes if note), None):
        error.add_note(f"pyro_wae: {found[0]} of model and guide is {found[1]}.")


def _what_is_wrong(value: Any, dtypes: Sequence[torch.dtype], *, is_first: bool) -> str | None:
    """What an argument is that data are not, and what to write; None for what may be data of nets of these dtypes."""
    if not isinstance(value, Tensor):
        if hasattr(value, "toarray"):  # of SciPy
            found = f"a sparse matrix ({type(value).__name__})"
            return f"{found}. Write torch.tensor(x.toarray()).float(), a batch at a time"
        if hasattr(value, "__array__"):
            return f"{type(value).__name__}, and data are a tensor. Write torch.as_tensor(x)"
        # An option of the model may be anything, and a batch may be any object that holds tensors.
        if not is_first or _holds_tensor(value):
            return None
        return f"{type(value).__name__}, and data are a tensor. Write torch.tensor(x)"
    if value.layout is not torch.strided:
        return f"a sparse tensor ({value.layout}). Write x.to_dense(), a batch at a time"
    if value.is_meta:
        return "on the meta device, where a tensor has no values. Write x.to('cpu') before the values are lost"
    if dtypes and value.is_floating_point() and value.dtype not in dtypes:
        return f"of {value.dtype}, and nets have parameters of {dtypes[0]}. Write x.to({dtypes[0]})"
    if not is_first:
        return None
    if value.numel() == 0:
        return f"empty, of shape {tuple(value.shape)}. Write if len(x): svi.step(x)"
    if value.ndim == 0:
        return "a single number, and data have a dimension of their own. Write x.reshape(1, -1)"
    write = "torch.view_as_real(x).flatten(-2)" if value.is_complex() else "x.float()"
    return None if value.is_floating_point() else f"of {value.dtype}, in which nothing is drawn. Write {write}"


def _holds_tensor(value: Any, depth: int = 3) -> bool:
    """Whether a value is a tensor, or a container or an object that holds one."""
    if isinstance(value, Tensor):
        return True
    parts = list(vars(value).values()) if hasattr(value, "__dict__") else []
    parts += [getattr(value, name, None) for name in getattr(value, "__slots__", ())]
    parts += value.values() if isinstance(value, Mapping) else ()
    parts += value if isinstance(value, list | tuple | set | frozenset) else ()
    return depth > 0 and any(_holds_tensor(part, depth - 1) for part in parts)
