"""What each part of a training has to keep, and how it gets it back: the knowledge behind a checkpoint."""

from __future__ import annotations

import functools
import inspect
import re
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pyro.infer import SVI
from pyro.infer.elbo import ELBO, ELBOModule
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from pyro_wae._core.programs import wrapped_module
from pyro_wae._core.repr import CallRepr
from pyro_wae.optim import all_states, kinds_of, names_of, restore_states
from pyro_wae.penalties import Penalty

__all__ = ["ModulePiece", "Piece", "describe", "pieces_of", "plain"]

LOSS_OPTIONS_LEFT_OUT = ("max_plate_nesting", "retain_graph", "micro_batch", "process_group")
"""Arguments of a loss that change how and where it is computed, and not what it is."""

ARGUMENTS = "arguments of "
PLAIN: tuple[Any, ...] = (bool, int, float, complex, str, bytes)


class Piece:
    """One thing with a state of its own: what is kept of it, and what must agree before it gets that back.

    Args:
        thing: It has ``state_dict`` and ``load_state_dict``.
    """

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def about(self) -> dict[str, str | None]:
        """What must be the same when it is loaded. None: not made yet, so that anything will do."""
        return {"class": type(self.thing).__name__}

    def differing(self, saved: Mapping[str, str | None]) -> Iterator[tuple[str, str | None, str | None]]:
        """Where a saved :meth:`about` does not suit this piece: the name, and what is in the two places."""
        here = self.about()
        for key in [*saved, *(key for key in here if key not in saved)]:
            there, found = saved.get(key, "missing"), here.get(key, "missing")
            if found is not None and found != there:
                yield key, there, found

    def state(self) -> Any:
        """What is kept."""
        return self.thing.state_dict()

    def restore(self, state: Any) -> None:
        """Takes over what :meth:`state` gave."""
        self.thing.load_state_dict(state)


class ModulePiece(Piece):
    """A module: parameters, buffers and extra state, loaded in place, so that all who hold them see it."""

    def about(self) -> dict[str, str | None]:
        lines: dict[str, str | None] = {}
        if isinstance(self.thing, CallRepr):
            lines["arguments"] = describe(self.thing)
        for prefix, module in self.thing.named_modules():
            dot = f"{prefix}." if prefix else ""
            # Modules of this package know by themselves how to take buffers whose shape the first step decides.
            is_own = type(module).__module__.startswith("pyro_wae.")
            if not is_own:
                kind = (isinstance(module, LazyModuleMixin) and module.cls_to_become) or type(module)
                lines[f"class of {prefix or 'it'}"] = kind.__name__
            if type(module).__module__.startswith("torch.nn."):
                is_lazy = isinstance(module, LazyModuleMixin)
                lines[f"{ARGUMENTS}{prefix or 'it'}"] = None if is_lazy else module.extra_repr()
            for name, value in [*module._parameters.items(), *({} if is_own else module._buffers).items()]:
                if value is not None and name not in module._non_persistent_buffers_set:
                    lines[f"{dot}{name}"] = None if nn.parameter.is_lazy(value) else _shape(value)
        return lines

    def differing(self, saved: Mapping[str, str | None]) -> Iterator[tuple[str, str | None, str | None]]:
        # A discriminator that does not know the codes yet takes over their precision with its state.
        unmade = tuple(
            f"{prefix}." if prefix else ""
            for prefix, module in self.thing.named_modules()
            if isinstance(module, Penalty) and any(map(nn.parameter.is_lazy, module.parameters()))
        )
        for key, there, found in super().differing(saved):
            if key.startswith(ARGUMENTS) and there is None:
                continue
            if key.startswith(unmade) and " " not in key and _sizes(there) == _sizes(found):
                continue
            yield key, there, found

    def state(self) -> Any:
        values = self.thing.state_dict()
        made = {key: value for key, value in values.items() if not nn.parameter.is_lazy(value)}
        return {"values": made, "metadata": getattr(values, "_metadata", {})}

    def restore(self, state: Any) -> None:
        values = OrderedDict(state["values"])
        for key, value in self.thing.state_dict().items():
            if nn.parameter.is_lazy(value):
                values.setdefault(key, value)
        values._metadata = state["metadata"]  # type: ignore[attr-defined]
        self.thing.load_state_dict(values)


class LossPiece(Piece):
    """A loss: its arguments must agree; its modules are pieces of their own."""

    def about(self) -> dict[str, str | None]:
        lines: dict[str, str | None] = {"class": type(self.thing).__name__}
        if isinstance(self.thing, CallRepr):
            arguments = (name for name in inspect.signature(type(self.thing)).parameters)
            lines |= {
                name: describe(getattr(self.thing, name)) for name in arguments if name not in LOSS_OPTIONS_LEFT_OUT
            }
        return lines

    def state(self) -> Any:
        # Guessed at the first step, and guessing again would move an accelerator's random numbers.
        return {"max_plate_nesting": self.thing.max_plate_nesting}

    def restore(self, state: Any) -> None:
        self.thing.max_plate_nesting = state["max_plate_nesting"]


class OptimizerPiece(Piece):
    """A torch optimiser."""

    def about(self) -> dict[str, str | None]:
        lines = super().about()
        for number, group in enumerate(self.thing.param_groups):
            is_lazy = any(nn.parameter.is_lazy(p) for p in group["params"])
            lines[f"group {number}"] = None if is_lazy else ", ".join(_shape(p) for p in group["params"])
        return lines


class PyroOptimPiece(Piece):
    """An optimiser of Pyro's or of :mod:`pyro_wae.optim`, whose states go by the names in Pyro's store."""

    def about(self) -> dict[str, str | None]:
        return dict(kinds_of(self.thing, names_of(self.thing)))

    def differing(self, saved: Mapping[str, str | None]) -> Iterator[tuple[str, str | None, str | None]]:
        here = kinds_of(self.thing, saved)
        for name, there in saved.items():
            if here[name] != there:
                yield name, there, here[name]

    def state(self) -> Any:
        return all_states(self.thing)

    def restore(self, state: Any) -> None:
        restore_states(self.thing, state)


class GeneratorPiece(Piece):
    """A generator of random numbers."""

    def about(self) -> dict[str, str | None]:
        return {"device": self.thing.device.type}

    def state(self) -> Any:
        return self.thing.get_state()

    def restore(self, state: Any) -> None:
        self.thing.set_state(state)


def pieces_of(parts: Mapping[str, Any]) -> dict[str, Piece]:
    """The pieces that the parts of a training are made of, each once, with a name that begins with its part's.

    Raises:
        TypeError: If a part is nothing that has a state.
    """
    pieces: dict[str, Piece] = {}
    for name, part in parts.items():
        if isinstance(part, SVI):
            for role in ("model", "guide"):
                owner = wrapped_module(getattr(part, role))
                if owner is not None:
                    pieces[f"{name}.{role}"] = ModulePiece(owner)
            pieces |= _pieces_of_loss(f"{name}.loss", getattr(part.loss_and_grads, "__self__", None))
            pieces[f"{name}.optim"] = PyroOptimPiece(part.optim)
        elif isinstance(part, ELBO):
            pieces |= _pieces_of_loss(name, part)
        elif isinstance(part, PyroOptim):
            pieces[name] = PyroOptimPiece(part)
        elif isinstance(part, nn.Module):
            pieces[name] = ModulePiece(part)
            if isinstance(part, ELBOModule):
                pieces[f"{name}.elbo"] = LossPiece(part.elbo)
        elif isinstance(part, torch.Generator):
            pieces[name] = GeneratorPiece(part)
        elif isinstance(part, torch.optim.Optimizer):
            pieces[name] = OptimizerPiece(part)
        elif all(callable(getattr(part, method, None)) for method in ("state_dict", "load_state_dict")):
            pieces[name] = Piece(part)
        else:
            raise TypeError(
                f"A checkpoint holds SVIs, modules, optimisers, schedulers, generators and what has state_dict and "
                f"load_state_dict; found {name}={type(part).__name__}. Numbers and texts go into extra: "
                f"extra={{{name!r}: {name}}}."
            )
    seen: set[int] = set()
    return {
        name: piece
        for name, piece in pieces.items()
        if id(piece.thing) not in seen and not seen.add(id(piece.thing))  # type: ignore[func-returns-value]
    }


def describe(value: Any) -> str:
    """A text that is the same in every process, and the same before and after the first step: class and arguments."""
    if isinstance(value, CallRepr):
        parameters = inspect.signature(type(value)).parameters.values()
        arguments = [
            f"{p.name}={describe(getattr(value, p.name))}" for p in parameters if p.kind is not p.VAR_POSITIONAL
        ]
        if any(p.kind is p.VAR_POSITIONAL for p in parameters) and isinstance(value, nn.Module):
            arguments += [describe(list(child)) for child in value.children() if isinstance(child, nn.ModuleList)]
        return f"{type(value).__name__}({', '.join(arguments)})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe(option)}" for key, option in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(describe, value))}]"
    if isinstance(value, nn.Module):
        return type(value).__name__
    if isinstance(value, Tensor):
        return f"tensor of {_shape(value)}"
    if isinstance(value, functools.partial):
        return f"partial({describe(value.func)})"
    if callable(value) and hasattr(value, "__qualname__"):
        return str(value.__qualname__)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def plain(value: Any, where: str) -> Any:
    """The value in such types as ``torch.load`` reads without running code.

    Raises:
        TypeError: If there is anything else in it; `where` begins the name of it.
    """
    if value is None or isinstance(value, torch.dtype | torch.device):
        return value
    if isinstance(value, Tensor):
        if hasattr(value, "full_tensor"):
            raise TypeError(
                f"A checkpoint holds whole tensors, and {where} is a part of one that other processes share (DTensor). "
                "Write torch.distributed.checkpoint.save(wae.state_dict(), checkpoint_id=folder)."
            )
        return value.detach()
    if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    for kind in PLAIN:
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        items = {plain(key, where): plain(item, f"{where}[{key!r}]") for key, item in value.items()}
        return Counter(items) if isinstance(value, Counter) else items
    for sequence in (list, tuple, set):
        if isinstance(value, sequence):
            return sequence(plain(item, f"{where}[{number}]") for number, item in enumerate(value))
    raise TypeError(
        f"A checkpoint holds tensors, numbers, texts, and lists and dicts of them, so that reading it runs no code; "
        f"{where} is {type(value).__name__}. Keep it apart, or write it as one of these."
    )


def _pieces_of_loss(name: str, loss: Any) -> dict[str, Piece]:
    if not isinstance(loss, ELBO):
        return {}
    children = getattr(loss, "named_children", getattr(loss, "modules", None)) if isinstance(loss, CallRepr) else None
    modules = () if children is None else children()
    return {name: LossPiece(loss), **{f"{name}.{key}": ModulePiece(module) for key, module in modules}}


def _shape(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def _sizes(described: str | None) -> str | None:
    return None if described is None else described.partition(" ")[2]
