"""What a penalty weight is, and the weights that follow a plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pyro_wae._core import checks
from pyro_wae._core.repr import CallRepr


class Weight(CallRepr, nn.Module):
    """A penalty weight; subclasses define :meth:`~Weight.forward`, and :meth:`~Weight.observe` if they learn.

    What changes in training is in ``state_dict``.
    """

    needs_prior_draws = False
    """Whether :meth:`observe` reads the prior samples."""

    def forward(self, cost: Tensor | None = None) -> float | Tensor:
        """The weight of this step, in units of cost per unit of penalty: a finite number >= 0, or such a scalar tensor.

        Args:
            cost: The mean cost of the step, a detached scalar, for weights that start from it.
        """
        raise NotImplementedError

    def observe(self, cost: Tensor, codes: Tensor, prior: Tensor | None) -> None:
        """Takes in the results of a training step; called once a step, after its loss.

        Args:
            cost: The mean cost, a detached scalar.
            codes: The codes of the step, detached, shape (K, n, d).
            prior: Prior samples, detached, shape (J n, d); None where :attr:`needs_prior_draws` is False and no penalty
                draws any.
        """


class SteppedWeight(Weight):
    """A weight that changes from step to step, and counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0

    def observe(self, cost: Tensor, codes: Tensor, prior: Tensor | None) -> None:
        self.step += 1

    def get_extra_state(self) -> dict[str, Any]:
        """The number of steps, for ``state_dict``."""
        return {"step": self.step}

    def set_extra_state(self, state: Any) -> None:
        """Restores what :meth:`get_extra_state` returned."""
        self.step = state["step"]


class Constant(Weight):
    """One weight for the whole training; a plain number as ``penalty_weight`` becomes this.

    Args:
        weight: lambda, finite and >= 0.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is negative or not finite.
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = _checked("penalty_weight", weight)

    def forward(self, cost: Tensor | None = None) -> float:
        return self.weight

    def __repr__(self) -> str:
        return repr(self.weight)  # which is all that WAELoss has to be given


class Schedule(SteppedWeight):
    """The weight as a function of the training step.

    Args:
        function: f(step) -> weight, for step = 0, 1, 2, ...

    Raises:
        TypeError: If it cannot be called, or, in a step, returns no number.
        ValueError: In a step, if it returns a weight that is negative or not finite.

    Example:
        >>> weight = Schedule(lambda step: 100.0 if step < 1000 else 300.0)
        >>> weight()
        100.0
    """

    def __init__(self, function: Callable[[int], float]) -> None:
        super().__init__()
        self.function = checks.instance(
            "Schedule's function", function, Callable, "a function of the step", write="Schedule(lambda step: 100.0)"
        )

    def forward(self, cost: Tensor | None = None) -> float:
        write = "Schedule(lambda step: 100.0)"
        return checks.number(f"Schedule's weight of step {self.step}", self.function(self.step), least=0, write=write)


class LinearSchedule(SteppedWeight):
    """A weight that changes linearly from one value to another and then stays constant.

    Args:
        start: The weight of the first step.
        end: The weight after ``steps`` steps.
        steps: The number of steps between them, >= 1.

    Raises:
        TypeError: If a weight is not a number, or ``steps`` is not an integer.
        ValueError: If a weight is negative or not finite, or ``steps`` is less than 1.

    Example:
        >>> LinearSchedule(0.0, 100.0, steps=1000)()
        0.0
    """

    def __init__(self, start: float, end: float, *, steps: int) -> None:
        super().__init__()
        write = "LinearSchedule(0.0, 100.0, steps=1000)"
        self.start = checks.number("LinearSchedule's start", start, least=0, write=write)
        self.end = checks.number("LinearSchedule's end", end, least=0, write=write)
        self.steps = checks.whole("LinearSchedule's steps", steps, write="steps=1000")

    def forward(self, cost: Tensor | None = None) -> float:
        return self.start + (self.end - self.start) * min(self.step / self.steps, 1.0)


def as_weight(weight: float | Weight) -> Weight:
    """Makes a :class:`Weight` of a number.

    Raises:
        TypeError: If it is neither.
        ValueError: If the number is negative or not finite.
    """
    return weight if isinstance(weight, Weight) else Constant(weight)


def weight_of_step(weight: Weight, cost: Tensor) -> float | Tensor:
    """The value of a weight in a step, checked; that of a tensor on an accelerator is not read, which would wait.

    Args:
        weight: The weight.
        cost: The mean cost of the step. Where it is not finite, a weight that starts from it need not be finite.

    Raises:
        TypeError: If the value is no number.
        ValueError: If it is negative or not finite, and the cost is finite.
    """
    value = weight(cost)
    if isinstance(value, Tensor) and value.ndim == 0 and value.device.type != "cpu":
        return value
    number = value.detach() if isinstance(value, Tensor) else value
    write = "def forward(self, cost=None): return 100.0"
    try:
        checks.number(f"{type(weight).__name__}'s weight", number, least=0, write=write)
    except ValueError:
        if bool(cost.isfinite()):
            raise
    return value


def _checked(name: str, weight: Any) -> float:
    """A finite number >= 0."""
    if not checks.is_number(weight):
        raise TypeError(
            f"{name} must be a number or one of pyro_wae.weights, found {type(weight).__name__}. "
            "Write penalty_weight=100.0."
        )
    return checks.number(name, weight, least=0, write="penalty_weight=100.0")
