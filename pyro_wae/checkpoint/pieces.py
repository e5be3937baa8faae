"""What each part of a training has to keep, and how it gets it back: the knowledge behind a checkpoint."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.infer import SVI
from pyro.infer.elbo import ELBO, ELBOModule
from pyro.optim import PyroOptim
from pyro.optim.optim import is_scheduler
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from pyro_wae._core.private import (
    kept_tensors,
    new_clip,
    new_optimizer,
    schedulers_within,
    waiting_states,
    without_states,
)
from pyro_wae._core.programs import owners, wrapped_module
from pyro_wae._core.repr import CallRepr
from pyro_wae.checkpoint.values import describe, plain, shape_of
from pyro_wae.optim import SharedOptim
from pyro_wae.penalties import Penalty

LOSS_OPTIONS_LEFT_OUT = ("max_plate_nesting", "retain_graph", "micro_batch", "process_group", "compile", "others")
"""Arguments of a loss that change how and where it is computed, and not what it is."""

ARGUMENTS = "arguments of "


class Piece:
    """One thing with a state of its own: what is kept of it, and what must agree before it gets that back.

    Args:
        thing: It has ``state_dict`` and ``load_state_dict``.
    """

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def about(self) -> dict[str, str | None]:
        """What must be the same when it is loaded. None: not made yet, so anything will do."""
        lines: dict[str, str | None] = {"class": kind_of(self.thing)}
        if isinstance(self.thing, torch.amp.GradScaler):
            lines["enabled"] = str(self.thing.is_enabled())  # one that is not has no state
        return lines

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

    def rehearse(self, state: Any, parameters: Mapping[str, Tensor]) -> bool:
        """Restores a copy, and lets what is raised pass; False where the thing cannot be copied.

        Args:
            state: What :meth:`state` gave.
            parameters: The values that the checkpoint has for the parameters of Pyro's store.
        """
        try:
            twin = copy.deepcopy(self.thing)
        except Exception:  # whatever an object says to a wish to copy it
            return False
        if twin is self.thing:
            return False
        # Some take out of a state what they have read.
        type(self)(twin).restore(plain(state, "state"))
        return True


class ModulePiece(Piece):
    """A module: parameters, buffers and extra state, loaded in place: all who hold them have the new values."""

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
            for name, value in kept_tensors(module, buffers=not is_own):
                lines[f"{dot}{name}"] = None if nn.parameter.is_lazy(value) else shape_of(value)
        return lines

    def differing(self, saved: Mapping[str, str | None]) -> Iterator[tuple[str, str | None, str | None]]:
        # A discriminator that does not know the codes yet takes over their precision with its state.
        unmade = tuple(
            f"{prefix}." if prefix else ""
            for prefix, module in self.thing.named_modules()
            if isinstance(module, Penalty) and any(map(nn.parameter.is_lazy, module.parameters()))
        )
        for key, there, found in super().differing(saved):
            # Newer torch names a bias that older does not, as of BatchNorm; one that is missing is a missing tensor.
            said = [text and text.replace(", bias=True", "") for text in (there, found)]
            if key.startswith(ARGUMENTS) and (there is None or said[0] == said[1]):
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
        names = (name for name in self._defaults() if name not in LOSS_OPTIONS_LEFT_OUT)
        return {"class": type(self.thing).__name__, **{name: describe(getattr(self.thing, name)) for name in names}}

    def differing(self, saved: Mapping[str, str | None]) -> Iterator[tuple[str, str | None, str | None]]:
        defaults = self._defaults()
        for key, there, found in super().differing(saved):
            # An argument that the version which wrote the checkpoint did not have.
            if there != "missing" or found != describe(defaults[key]):
                yield key, there, found

    def state(self) -> Any:
        # Guessed at the first step, and guessing again would move an accelerator's random numbers.
        # And a site that a dict of costs names, as labels, may be missing in the next batch.
        observed = sorted(getattr(self.thing, "once_observed", ()))
        return {"max_plate_nesting": self.thing.max_plate_nesting, "once_observed": observed}

    def restore(self, state: Any) -> None:
        self.thing.max_plate_nesting = state["max_plate_nesting"]
        getattr(self.thing, "once_observed", set()).update(state.get("once_observed", ()))

    def rehearse(self, state: Any, parameters: Mapping[str, Tensor]) -> bool:
        return True

    def _defaults(self) -> dict[str, Any]:
        if not isinstance(self.thing, CallRepr):
            return {}
        return {name: p.default for name, p in inspect.signature(type(self.thing)).parameters.items()}


class OptimizerPiece(Piece):
    """A torch optimiser."""

    def about(self) -> dict[str, str | None]:
        lines = super().about()
        for number, group in enumerate(self.thing.param_groups):
            is_lazy = any(nn.parameter.is_lazy(p) for p in group["params"])
            lines[f"group {number}"] = None if is_lazy else ", ".join(shape_of(p) for p in group["params"])
        return lines


class PyroOptimPiece(Piece):
    """An optimiser of Pyro's or of :mod:`pyro_wae.optim`, whose states go by the names in Pyro's store."""

    def about(self) -> dict[str, str | None]:
        return dict(self._kinds(self._names()))

    def differing(self, saved: Mapping[str, str | None]) -> Iterator[tuple[str, str | None, str | None]]:
        here = self._kinds(saved)
        for name, there in saved.items():
            if here[name] != there:
                yield name, there, here[name]

    def state(self) -> Any:
        if None in self._names():
            raise ValueError(
                "States are kept by the names of parameters in Pyro's store, found parameters that are not in it. "
                "Write pyro.clear_param_store() only before an SVI is made, and leave module_local_params off."
            )
        return {**waiting_states(self.thing), **self.thing.get_state()}

    def restore(self, state: Any) -> None:
        """Gives the optimiser these states and no others, to parameters in Pyro's store at once.

        Pyro's ``set_state`` is without effect on parameters that have been stepped, and lets the schedulers of
        parameters that have not appeared yet miss their steps.
        """
        optim = self.thing
        if isinstance(optim, SharedOptim):
            optim.restart(state)
            return
        for known in (optim.optim_objs, optim.grad_clip, waiting_states(optim)):
            known.clear()
        optim.set_state(copy.deepcopy(state))
        parameters = dict(pyro.get_param_store().named_parameters())
        for name in [name for name in state if name in parameters]:
            p = parameters[name]
            own = optim.optim_objs[p] = new_optimizer(optim, p)
            optim.grad_clip[p] = new_clip(optim, p)
            saved = waiting_states(optim).pop(name)
            if is_scheduler(own):
                own.load_state_dict(saved["scheduler"])
                own, saved = own.optimizer, saved["optimizer"]
            own.load_state_dict(saved)

    def rehearse(self, state: Any, parameters: Mapping[str, Tensor]) -> bool:
        with _scope_of_store({name: parameters[name] for name in state if name in parameters}):
            PyroOptimPiece(without_states(self.thing)).restore(state)
        return True

    def _names(self) -> list[str | None]:
        """Of the parameters that have a state, or one that waits for them."""
        known = map(pyro.get_param_store().param_name, self.thing.optim_objs)
        return list(dict.fromkeys([*waiting_states(self.thing), *known]))

    def _kinds(self, names: Iterable[str | None]) -> dict[str, str]:
        """The classes of torch optimiser and scheduler that parameters of these names get; nothing is changed."""
        with _scope_of_store({name: torch.zeros(()) for name in names if name is not None}) as parameters:
            made = {name: new_optimizer(self.thing, p) for name, p in parameters.items()}
        return {
            name: f"{kind_of(own.optimizer)} with {kind_of(own)}" if is_scheduler(own) else kind_of(own)
            for name, own in made.items()
        }


class GeneratorPiece(Piece):
    """A generator of random numbers."""

    def about(self) -> dict[str, str | None]:
        return {"device": self.thing.device.type}

    def state(self) -> Any:
        return self.thing.get_state()

    def restore(self, state: Any) -> None:
        self.thing.set_state(state)

    def rehearse(self, state: Any, parameters: Mapping[str, Tensor]) -> bool:
        torch.Generator(self.thing.device).set_state(state)
        return True


def kind_of(thing: Any) -> str:
    """The name of an object's class, with those of the schedulers that it is made of."""
    within = ", ".join(map(kind_of, schedulers_within(thing)))
    return f"{type(thing).__name__}({within})" if within else type(thing).__name__


def pieces_of(parts: Mapping[str, Any]) -> dict[str, Piece]:
    """The pieces that the parts of a training are made of, each once, with a name that begins with its part's.

    Raises:
        TypeError: If a part is nothing that has a state.
        ValueError: If the loss of an SVI is a function around one whose state would be left out.
    """
    pieces: dict[str, Piece] = {}
    for name, part in parts.items():
        if isinstance(part, SVI):
            for role in ("model", "guide"):
                owner = wrapped_module(getattr(part, role))
                if owner is not None:
                    pieces[f"{name}.{role}"] = ModulePiece(owner)
            # SVI(..., loss=elbo.differentiable_loss) has a function of its own for the gradients.
            for function in (part.loss_and_grads, part.loss):
                pieces |= _pieces_of_loss(f"{name}.loss", getattr(function, "__self__", None))
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
        elif not isinstance(part, type) and all(
            callable(getattr(part, method, None)) for method in ("state_dict", "load_state_dict")
        ):
            pieces[name] = Piece(part)
        else:
            raise TypeError(
                f"A checkpoint holds SVIs, modules, optimisers, schedulers, generators and what has state_dict and "
                f"load_state_dict; found {name}={type(part).__name__}. Numbers and texts go into extra: write "
                f"extra={{{name!r}: {name}}}."
            )
    for name, part in parts.items():
        if isinstance(part, SVI):
            _check_loss(name, part, pieces)
    seen: set[int] = set()
    return {
        name: piece
        for name, piece in pieces.items()
        if id(piece.thing) not in seen and not seen.add(id(piece.thing))  # type: ignore[func-returns-value]
    }


def _pieces_of_loss(name: str, loss: Any) -> dict[str, Piece]:
    if not isinstance(loss, ELBO):
        return {}
    modules = loss.named_children() if isinstance(loss, CallRepr) and hasattr(loss, "named_children") else ()
    return {name: LossPiece(loss), **{f"{name}.{key}": ModulePiece(module) for key, module in modules}}


def _check_loss(name: str, svi: SVI, pieces: Mapping[str, Piece]) -> None:
    modules = [piece.thing for piece in pieces.values() if isinstance(piece, ModulePiece)]
    seen = {id(part) for module in modules for part in module.modules()}
    hidden = [part for part in owners(svi.loss) if isinstance(part, Penalty) and id(part) not in seen]
    if hidden:
        raise ValueError(
            f"The loss of {name} is a function around a WAELoss, whose {type(hidden[0]).__name__} has a state that the "
            f"checkpoint does not see. Give the loss too: save_checkpoint(path, {name}={name}, loss=loss), and "
            f"load_checkpoint(path, {name}={name}, loss=loss)."
        )


@contextmanager
def _scope_of_store(values: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Puts parameters into Pyro's store, where an optimiser finds their names, and leaves it as it was."""
    store = pyro.get_param_store()
    try:
        with store.scope():
            yield {name: store.setdefault(name, value.detach()).unconstrained() for name, value in values.items()}
    finally:
        # Leaving a scope cuts the link by which SVI finds the parameters, and reading restores it.
        list(store.values())


def _sizes(described: str | None) -> str | None:
    return None if described is None else described.partition(" ")[2]
