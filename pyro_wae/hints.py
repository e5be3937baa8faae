"""What a loss says once, because it would otherwise train towards something else than was meant, without an error."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

from pyro import poutine
from torch import nn

from pyro_wae.costs import NegativeLogLikelihood
from pyro_wae.step.observe import Observer
from pyro_wae.step.prior import depends_on_data
from pyro_wae.step.records import Step

__all__ = ["Hints"]

MADE_ANEW = 4
"""Losses of one model, each of a single training step, after which it is said that a loss has a state."""

_trained: list[tuple[Any, weakref.ref[Hints]]] = []
"""The model and guide of the last training steps of each loss, the youngest last."""


class Hints:
    """The hints of one loss, each given at most once.

    Args:
        has_state: Whether the loss learns its penalty weight.
    """

    def __init__(self, *, has_state: bool) -> None:
        self.has_state = has_state
        self.steps = 0
        self._program: Any = None
        self._given: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy may be of another model, as an averaged one.
        return _copy, (self.has_state, self.steps, self._given)

    def evaluated(self, observer: Observer) -> None:
        """Before a loss is evaluated: whether it is that which has been trained."""
        if not self.has_state or self.steps:
            return
        program = _identity(observer)
        others = (ref() for trained, ref in _trained if trained == program)
        if any(other is not None and other is not self and other.steps > 1 for other in others):
            self._say(
                "state",
                "This WAELoss has not been trained, and another one has been, with the same model and guide. A WAELoss "
                "finds its penalty weight while it trains: evaluate with the loss that was trained, or give both a "
                "number: WAELoss(penalty_weight=100.0).",
            )

    def trained(self, observer: Observer, step: Step) -> None:
        """After a training step: whether the loss is used for another model, is made anew, or leaves something out."""
        program = _identity(observer)
        if self._program is None:
            self._program = program
            self._made_anew(program)
        elif all(mine != other for mine, other in zip(self._program, program, strict=True)):
            self._say(
                "program",
                "This WAELoss has been trained with another model and guide. It keeps what it took from their prior "
                "and codes: kernel lengths, the penalty weight, a discriminator. Make a WAELoss for each model.",
            )
        self.steps += 1
        if step.factors or step.once:
            self._factor(observer, [*step.factors, *step.once])
        if observer.condition is None and "condition" not in self._given and step.prior_varies:
            self._given.add("condition")  # asked at the first step alone, which may wait for an accelerator
            if depends_on_data(step.first):
                name = next(iter(step.first.latents))
                warnings.warn(
                    f"The prior of latent site '{name}' differs between data, and WAELoss compares all codes with all "
                    "prior draws, whatever they are conditional on: samples need not belong to their inputs. Name what "
                    "the prior depends on, an argument of the model or an observed site: WAELoss(condition='y').",
                    UserWarning,
                    stacklevel=4,
                )

    def _factor(self, observer: Observer, names: list[str]) -> None:
        costs = observer.cost.values() if isinstance(observer.cost, dict) else [observer.cost]
        if all(isinstance(cost, NegativeLogLikelihood) for cost in costs):
            return
        for name in names:
            self._say(
                f"factor {name}",
                f"pyro.factor '{name}' is a term of the loss, with the sign that it has in Pyro's losses "
                f"(loss.terms.costs['{name}']). The cost is no log-likelihood, and the factor's size beside it is not "
                "what it is in an ELBO: choose its scale by hand, or write WAELoss(cost=NegativeLogLikelihood()).",
            )

    def _made_anew(self, program: Any) -> None:
        youngest = [ref() for trained, ref in _trained[-MADE_ANEW:] if trained == program]
        _trained.append((program, weakref.ref(self)))
        del _trained[:-64]
        # Those that are gone took one step each, or another would have been the youngest since.
        if self.has_state and len(youngest) == MADE_ANEW and all(other is None for other in youngest):
            self._say(
                "anew",
                "A WAELoss has been made anew for each step of one model. Trace_ELBO has no state, and a WAELoss has: "
                "the penalty weight that it finds while it trains, kernel lengths. Make one before the loop.",
            )

    def _say(self, key: str, message: str) -> None:
        if key not in self._given:
            self._given.add(key)
            warnings.warn(message, UserWarning, stacklevel=5)


def _identity(observer: Observer) -> tuple[Any, Any]:
    """What identifies model and guide, whatever handler they are wrapped in at the moment."""
    return _mark(observer.model), _mark(observer.guide)


def _mark(program: Callable[..., Any]) -> tuple[Any, ...]:
    program = poutine.unwrap(program)
    owner = program if isinstance(program, nn.Module) else getattr(program, "__self__", None)
    cells = getattr(program, "__closure__", None) or ()
    return getattr(program, "__code__", None), id(owner), tuple(id(cell.cell_contents) for cell in cells)


def _copy(has_state: bool, steps: int, given: set[str]) -> Hints:
    copy = Hints(has_state=has_state)
    copy.steps, copy._given = steps, set(given)
    return copy
