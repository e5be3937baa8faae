"""What a prior or decoder is conditional on: y for each datum, and its unit beside codes."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_wae._core.checks import variable
from pyro_wae._core.fitted import FittedBuffers
from pyro_wae._core.rows import Site, at_least_float32, working_precision
from pyro_wae.step.program import Program, Run

SPREAD = 4.0
"""The spread of a condition over that of the prior samples, where both are columns of one row. A penalty that sees rows
alone is slow to tell conditions apart that lie closer than codes do, and has few pairs to compare where they lie too
far apart."""


class Condition(FittedBuffers):
    """The y that a model is conditional on, and the unit that it has beside the codes of each penalty.

    In its unit, taken at the first step and kept in ``state_dict``, y has :data:`SPREAD` times the standard deviation
    of the prior samples in total. It is for penalties that see y as further columns of a code; kernels on y have
    lengths of their own.

    Args:
        name: An observed site of the model, or one of its arguments.
        entries: Number of penalties.
    """

    scales: Tensor
    counts = ("_is_known",)

    def __init__(self, name: str, entries: int) -> None:
        super().__init__()
        self.name = name
        self.register_fitted("scales", torch.full((entries,), math.nan))
        self._is_known = [False] * entries

    def fit(self, entry: int, condition: Tensor, prior: Tensor) -> Tensor:
        """The unit of the penalty number `entry`, from conditions (n, c) and prior samples (m, d).

        Raises:
            ValueError: At the first step, if the conditions or the prior samples do not vary.
        """
        if not self._is_known[entry]:
            spread = working_precision(condition).var(0).sum()
            scale = SPREAD * (working_precision(prior.detach()).var(0).sum() / spread).sqrt()
            if not (torch.isfinite(scale) and scale > 0):
                raise ValueError(
                    f"condition='{self.name}' has a total variance of {spread.item():g} over the first batch, from "
                    "which its unit beside a code cannot be taken. Shuffle the data, or take MMD(condition_kernel=...)."
                )
            scales = self.scales.to(scale).clone()
            scales[entry] = scale
            self.set_fitted("scales", scales)
            self._is_known = [known or place == entry for place, known in enumerate(self._is_known)]
        return self.scales[entry]

    def after_loading(self) -> None:
        self._is_known = [not number for number in self.scales.isnan().tolist()]


def read_condition(
    name: str, run: Run, program: tuple[Program, Sequence[Any], Mapping[str, Any]]
) -> tuple[Tensor, bool]:
    """Finds the condition of each datum of this step.

    Args:
        name: An observed site of the model, one of its arguments, or a key of one that is a dict.
        run: A run of model and guide.
        program: The model, its arguments and its keyword arguments.

    Returns:
        The condition, shape (n, c): labels as integers with c = 1, or floats; and whether a mask
        leaves out that of a datum which has a code.

    Raises:
        ValueError: If the name is neither an observed site nor an argument, or there is not a row for each datum.
        TypeError: If the condition is no tensor.
    """
    if name in run.observed:
        site = run.observed[name]
        return _flat(name, site.value_rows()[0]), _lacks_some(site, run)
    given = _given(*program)
    if name not in given:
        is_latent = " It is latent here; a condition is given: obs=..." if name in run.latents else ""
        raise ValueError(
            f"condition='{name}' is neither an observed site of the model nor an argument of this call. Its "
            f"observed sites are {list(run.observed)}, its arguments {list(given)}.{is_latent} "
            f"Write pyro.sample('{name}', ..., obs={variable(name)}) in the data plate, or name an argument."
        )
    return _flat(name, _rows_of(name, given[name], run)), False


def candidates(run: Run, program: tuple[Program, Sequence[Any], Mapping[str, Any]]) -> list[str]:
    """What the prior of a run may be conditional on: arguments that are no data of a cost, and sites observed before.

    None are known of a run that has kept its latent sites alone.
    """
    if not run.observed:
        return []
    nodes = list(run.model.nodes.items())
    data = [node["value"] for _, node in nodes if node["type"] == "sample" and node["is_observed"]]
    given = {name: value for name, value in _given(*program).items() if isinstance(value, Tensor) and value.ndim}
    # The name of an observed site means that site.
    names = [name for name in given if len(given[name]) in (run.data, run.data_size) and name not in run.observed]
    first = min(place for place, (name, _) in enumerate(nodes) if name in run.latents)
    before = [name for name, _ in nodes[:first] if name in run.observed]
    return [name for name in names if not any(given[name] is value for value in data)] + before or names


def _lacks_some(site: Site, run: Run) -> bool:
    """Whether a mask leaves out the condition of a datum that has a code."""
    if site.mask is None:
        return False
    missing = ~site.rows(site.mask.expand(site.value.shape), site.event_dim)
    missing = missing.flatten(2).any(2) if missing.ndim > 2 else missing
    coded = [latent.kept for latent in run.latents.values()]
    return any(bool(missing.any() if kept is None else (missing & kept).any()) for kept in coded)


def _rows_of(name: str, value: Any, run: Run) -> Tensor:
    is_tensor = isinstance(value, Tensor)
    if not is_tensor or value.layout is not torch.strided or value.is_meta:
        found = f"a tensor ({value.layout}, {value.device})" if is_tensor else type(value).__name__
        raise TypeError(
            f"condition='{name}' names an argument of the model, and it is {found} in this call. Give a tensor with a "
            "row for each datum."
        )
    count = len(value) if value.ndim else 0
    index = _subsample(run)
    if run.data_size is not None and count == run.data_size:
        if index is None:
            raise ValueError(
                f"condition='{name}' has {count} rows, of all data, and which of them this step takes is not known: "
                f"plate '{run.plate}' was made outside of the model. Make it in the model, or give {run.data} rows."
            )
        return value[index.to(value.device)]
    if count == run.data:
        # A look at an index on an accelerator would wait for it.
        is_read = run.data_size is None and index is not None and index.device.type == "cpu"
        if is_read and not torch.equal(torch.as_tensor(index), torch.arange(count)):
            raise ValueError(
                f"condition='{name}' has a row for each of {count} data, and plate '{run.plate}' takes them in another "
                "order: whether the rows are in that order is not known. Write, in the data plate, "
                f"pyro.sample('{name}', ..., obs=...) with the rows of its index."
            )
        return value
    whole = "" if run.data_size is None else f", or {run.data_size} for all data"
    raise ValueError(
        f"condition='{name}' has shape {tuple(value.shape)}, and the data plate '{run.plate}' has {run.data} "
        f"data in this step: it needs {run.data} rows{whole}. Give a tensor whose first dimension is the data."
    )


def _subsample(run: Run) -> Tensor | None:
    """The data of this step as the data plate in the model drew or was given them; None if it was made elsewhere."""
    for name, node in run.model.nodes.items():
        # A scope of names puts its own before that of the plate.
        if node["type"] == "sample" and site_is_subsample(node) and name.rpartition("/")[2] == run.plate:
            return torch.as_tensor(node["value"])
    return None


def _flat(name: str, rows: Tensor) -> Tensor:
    rows = at_least_float32(rows.detach())
    flat = rows.flatten(1) if rows.ndim > 1 else rows[:, None]
    is_labels = not flat.is_floating_point() and not flat.is_complex()
    if flat.is_complex() or flat.shape[1] == 0 or (is_labels and flat.shape[1] > 1):
        raise ValueError(
            f"condition='{name}' has rows of shape {tuple(rows.shape[1:])} and {rows.dtype}; it takes one "
            "whole number for each datum, a label, or floats of any shape, which have a distance. Write "
            f"{variable(name)}.float()."
        )
    return flat


def _given(model: Program, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, and what those that are dicts hold."""
    given = _arguments(model, args, kwargs)
    for batch in list(given.values()):
        if isinstance(batch, Mapping):
            given |= {key: value for key, value in batch.items() if key not in given}
    return given


def _arguments(model: Program, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, defaults included."""
    args, kwargs = tuple(args), dict(kwargs)
    while True:
        if isinstance(model, functools.partial):
            part: functools.partial[Any] = model
            model, args, kwargs = part.func, (*part.args, *args), {**part.keywords, **kwargs}
        elif len(args) > 1 and isinstance(args[0], Messenger) and callable(args[1]):
            model, args = args[1], args[2:]  # a handler around the model, such as poutine.scale(model, scale=0.5)
        elif isinstance(model, nn.Module):
            model = model.forward
        else:
            break
    signature = inspect.signature(model)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(value)
        elif kind is not inspect.Parameter.VAR_POSITIONAL:
            arguments[name] = value
    return arguments
