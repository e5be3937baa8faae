"""What a prior or decoder is conditional on: finding y for each datum, and handing it to the penalties."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_wae._core.numerics import at_least_float32, working_precision
from pyro_wae.costs import Observation
from pyro_wae.penalties import Chain, KernelStein, Penalty, PenaltyContext
from pyro_wae.step.program import Particle, Structure
from pyro_wae.step.records import Codes

__all__ = ["Condition", "Given"]

Program = Callable[..., Any]

SPREAD = 4.0
"""The spread of a condition over that of the prior draws, where both are columns of one row. A penalty that sees rows
alone is slow to tell conditions apart that lie closer than codes do, and has few pairs to compare where they lie too
far apart."""


class Condition(nn.Module):
    """The y that a model is conditional on, and the unit that it has beside the codes of each penalty.

    A unit is taken at the first step, so that y has :data:`SPREAD` times the standard deviation of the prior draws in
    total, and is kept in ``state_dict``. It is for penalties that see y as further columns of a code; kernels on y have
    lengths of their own.

    Args:
        name: An observed site of the model, or one of its arguments.
        entries: Number of penalties.
    """

    scales: Tensor

    def __init__(self, name: str, entries: int) -> None:
        super().__init__()
        self.name = name
        self.register_buffer("scales", torch.full((entries,), math.nan))
        self._is_fitted = [False] * entries

    def read(
        self,
        observations: Sequence[Observation],
        particle: Particle,
        structure: Structure,
        program: tuple[Program, Sequence[Any], Mapping[str, Any]],
    ) -> Given:
        """Finds the condition of each datum of this step.

        Args:
            observations: The observed sites of one run.
            particle: That run.
            structure: What its sites are.
            program: The model, its arguments and its keyword arguments.

        Raises:
            ValueError: If the name is neither an observed site nor an argument, or there is not a row for each datum.
            TypeError: If the condition is no tensor.
        """
        for observation in observations:
            if observation.name == self.name:
                rows = observation.layout.rows(observation.value, observation.distribution.event_dim)[0]
                return Given(self, self._as_condition(rows), is_masked=observation.mask is not None)
        arguments = _arguments(*program)
        if self.name not in arguments:
            is_latent = " It is latent here; a condition is given: obs=..." if self.name in structure.latents else ""
            raise ValueError(
                f"condition='{self.name}' is neither an observed site of the model nor an argument of this call. Its "
                f"observed sites are {[o.name for o in observations]}, its arguments {list(arguments)}.{is_latent} "
                f"Write pyro.sample('{self.name}', ..., obs={self.name}) in the data plate, or name an argument."
            )
        return Given(self, self._as_condition(self._rows_of(arguments[self.name], particle, structure)))

    def fit(self, entry: int, condition: Tensor, prior: Tensor) -> Tensor:
        """The unit of the penalty number `entry`, from conditions (n, c) and prior draws (m, d).

        Raises:
            ValueError: At the first step, if the conditions or the prior draws do not vary.
        """
        if not self._is_fitted[entry]:
            spread = working_precision(condition).var(0).sum()
            scale = SPREAD * (working_precision(prior.detach()).var(0).sum() / spread).sqrt()
            if not (torch.isfinite(scale) and scale > 0):
                raise ValueError(
                    f"condition='{self.name}' has a total variance of {spread.item():g} over the first batch, from "
                    "which its unit beside a code cannot be taken. Shuffle the data, or take MMD(condition_kernel=...)."
                )
            with torch.inference_mode(False):
                self.scales = self.scales.to(scale).clone()
                self.scales[entry] = scale
            self._is_fitted[entry] = True
        return self.scales[entry]

    def _rows_of(self, value: Any, particle: Particle, structure: Structure) -> Tensor:
        if not isinstance(value, Tensor):
            raise TypeError(
                f"condition='{self.name}' names an argument of the model, and it is {type(value).__name__} in this "
                "call. Give a tensor with a row for each datum."
            )
        name, layout = next(iter(structure.latents.items()))
        frames = particle.model.nodes[name]["cond_indep_stack"]
        plate = next(frame.name for frame in frames if frame.dim == layout.data_dim)
        count = len(value) if value.ndim else 0
        if count == layout.data:
            return value
        if structure.data_size is not None and count == structure.data_size:
            index = torch.as_tensor(particle.model.nodes[plate]["value"], device=value.device)
            return value[index]
        whole = "" if structure.data_size is None else f", or {structure.data_size} for all data"
        raise ValueError(
            f"condition='{self.name}' has shape {tuple(value.shape)}, and the data plate '{plate}' has {layout.data} "
            f"data in this step: it needs {layout.data} rows{whole}. Give a tensor whose first dimension is the data."
        )

    def _as_condition(self, rows: Tensor) -> Tensor:
        rows = at_least_float32(rows.detach())
        flat = rows.flatten(1) if rows.ndim > 1 else rows[:, None]
        is_labels = not flat.is_floating_point() and not flat.is_complex()
        if flat.is_complex() or flat.shape[1] == 0 or (is_labels and flat.shape[1] > 1):
            raise ValueError(
                f"condition='{self.name}' has rows of shape {tuple(rows.shape[1:])} and {rows.dtype}; it takes one "
                "whole number for each datum, a label, or floats of any shape, which have a distance. Write "
                f"{self.name}.float()."
            )
        return flat

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        value = state_dict.get(prefix + "scales")
        if value is not None and value.shape == self.scales.shape:
            # Assigned and not copied, so that a float64 unit is not rounded to an unset float32 one.
            self.scales = value.detach().clone().to(self.scales.device)
            self._is_fitted = [not number for number in value.isnan().tolist()]
        super()._load_from_state_dict(state_dict, prefix, *args)


@dataclass(frozen=True)
class Given:
    """The conditions of one step.

    Args:
        condition: Where they come from.
        values: Shape (n, c): labels as integers with c = 1, or floats.
        is_masked: Whether a mask leaves some of them out.
    """

    condition: Condition
    values: Tensor
    is_masked: bool = False

    def extend(
        self, context: PenaltyContext, entry: int, penalty: Penalty, codes: Codes, prior: Tensor | None
    ) -> PenaltyContext:
        """Adds the condition to what a penalty learns.

        Args:
            context: What it learns without.
            entry: The penalty's number.
            penalty: The penalty.
            codes: Its codes, before masked data are left out.
            prior: Its prior draws after that, shape (m, d), or None.

        Raises:
            ValueError: If the penalty cannot take a condition, or a mask drops conditions and no codes.
        """
        name = self.condition.name
        for part in penalty.modules():
            if isinstance(part, Chain | KernelStein):
                raise ValueError(
                    f"condition='{name}': {type(part).__name__} compares codes without what they are conditional on. "
                    "Take another penalty, such as MMD()."
                )
        if self.is_masked and codes.kept is None:
            raise ValueError(
                f"condition='{name}' is masked and the latent sites {list(codes.columns)} are not, so that some codes "
                "have no condition. Put both under the mask: with pyro.plate(...), poutine.mask(mask=...): ..."
            )
        values = self.values.to(codes.values.device)
        values = codes.left(values, 0)
        scale = None
        if prior is not None and values.is_floating_point() and any(map(_reads_columns, penalty.modules())):
            scale = self.condition.fit(entry, values, prior)
        return dataclasses.replace(context, condition=values, condition_scale=scale, shared_data=True)


def _reads_columns(part: nn.Module) -> bool:
    return isinstance(part, Penalty) and part.needs_prior_draws and not part.reads_condition


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
