"""Pyro's parameter store as plain tensors and names, and the way back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro.distributions import constraints as pyro_constraints
from torch import nn
from torch.distributions import constraints as torch_constraints
from torch.distributions.constraints import Constraint

from pyro_wae._core.checks import variable
from pyro_wae.checkpoint.pieces import ModulePiece, Piece
from pyro_wae.checkpoint.values import plain

_CONSTRAINTS = {module.__name__: module for module in (torch_constraints, pyro_constraints)}


def store_state(pieces: Mapping[str, Piece]) -> dict[str, Any]:
    """The store: values of the parameters that are in no module, and for all others which module's they are.

    Raises:
        ValueError: If a parameter is that of a module which is not among the pieces.
    """
    owners = {id(p): [name, key] for name, module in _modules(pieces) for key, p in module.named_parameters()}
    state: dict[str, Any] = {"values": {}, "owned": {}, "constraints": {}}
    lost = []
    given = _constraints_of_store()
    for name, p in pyro.get_param_store().named_parameters():
        if id(p) in owners:
            state["owned"][name] = owners[id(p)]
        elif "$$$" in name or isinstance(p, nn.Parameter):
            lost.append(name)
        else:
            state["values"][name] = p.detach()
        state["constraints"][name] = _encode(given[name])
    if lost:
        module = variable(lost[0].split("$$$")[0].split(".")[0])
        raise ValueError(
            f"Parameters {lost} of Pyro's store belong to modules that the checkpoint does not see, as where model or "
            f"guide is a function. Give these modules too, as in save_checkpoint(path, svi=svi, {module}={module}). If "
            "an earlier training left them behind, write pyro.clear_param_store() before this one."
        )
    return state


def differing_parameters(state: Mapping[str, Any]) -> Iterator[str]:
    """A line for everything in which a saved store does not suit this process's."""
    here = dict(pyro.get_param_store().named_parameters())
    for name in here:
        if name not in state["values"] and name not in state["owned"]:
            yield f"parameter {name!r}: missing in the checkpoint (pyro.clear_param_store() removes what is not needed)"
    for name, value in state["values"].items():
        if name in here and (here[name].shape, here[name].dtype) != (value.shape, value.dtype):
            found = f"{here[name].dtype} {tuple(here[name].shape)}"
            yield f"parameter {name!r}: {value.dtype} {tuple(value.shape)} in the checkpoint, {found} here"
        if name not in here and _decode(state["constraints"][name]) is None:
            yield (
                f"parameter {name!r}: its constraint {state['constraints'][name]['class']} is not one of Pyro's, so "
                "that the parameter must exist (svi.evaluate_loss(x) makes it)"
            )


def saved_parameters(state: Mapping[str, Any], states: Mapping[str, Any]) -> dict[str, Any]:
    """The unconstrained values that a checkpoint has for the store's parameters, those of modules included."""
    of_modules = {name: states[piece]["values"][key] for name, (piece, key) in state["owned"].items()}
    return {**of_modules, **state["values"]}


def restore_store(state: Mapping[str, Any], pieces: Mapping[str, Piece]) -> None:
    """Puts the saved parameters into the store: modules' as their own, which have been loaded, others by value."""
    store = pyro.get_param_store()
    modules = {name: dict(module.named_parameters()) for name, module in _modules(pieces)}
    here, given = dict(store.named_parameters()), _constraints_of_store()
    for name, (piece, key) in state["owned"].items():
        _put(name, modules[piece][key], here, given.get(name) or _decode(state["constraints"][name]))
    for name, value in state["values"].items():
        if name in here:
            with torch.no_grad():
                here[name].copy_(value)
        else:
            _put(name, value.clone().requires_grad_(), here, _decode(state["constraints"][name]))
    list(store.values())  # reading restores the link by which SVI finds the parameters


def _put(name: str, parameter: torch.Tensor, here: Mapping[str, torch.Tensor], constraint: Constraint | None) -> None:
    store = pyro.get_param_store()
    if name in here and here[name] is not parameter:
        del store[name]
    store.set_state({"params": {name: parameter}, "constraints": {name: constraint or torch_constraints.real}})


def _modules(pieces: Mapping[str, Piece]) -> Iterator[tuple[str, nn.Module]]:
    return ((name, piece.thing) for name, piece in pieces.items() if isinstance(piece, ModulePiece))


def _constraints_of_store() -> dict[str, Constraint]:
    store = pyro.get_param_store()
    given = store.get_state()["constraints"]
    list(store.values())  # get_state cuts the link by which SVI finds the parameters, and reading restores it
    return given


def _encode(value: Any) -> Any:
    if isinstance(value, Constraint):
        kind = type(value)
        is_known = kind.__module__ in _CONSTRAINTS
        values = {key: _encode(item) for key, item in vars(value).items()} if is_known else {}
        return {"module": kind.__module__, "class": kind.__qualname__, "values": values}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    return plain(value, "a constraint")


def _decode(value: Any) -> Any:
    """The constraint again, or None where its class is not one of torch's or Pyro's."""
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = getattr(_CONSTRAINTS.get(value["module"]), value["class"], None)
    if not (isinstance(kind, type) and issubclass(kind, Constraint)):
        return None
    constraint = kind.__new__(kind)
    vars(constraint).update({key: _decode(item) for key, item in value["values"].items()})
    return constraint
