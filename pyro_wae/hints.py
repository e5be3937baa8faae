"""What a loss says once, because it would otherwise train towards something else than was meant, without an error."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyro import poutine
from torch import nn

from pyro_wae._core.distributions import distribution_tensors
from pyro_wae.costs import NegativeLogLikelihood
from pyro_wae.step.observe import Observer
from pyro_wae.step.prior import depends_on_data
from pyro_wae.step.records import Step


@dataclass
class _Training:
    """What is known of a loss in training, also when it is gone: model and guide, itself, and its number of steps."""

    program: Any
    hints: weakref.ref[Hints]
    steps: int = 0


MADE_ANEW = 4
"""Losses of one model, each of a single training step, after which it is said that a loss has a state."""

_trained: list[_Training] = []
"""The trainings that have begun, the youngest last, each without its loss."""


class Hints:
    """The hints of one loss, each given at most once.

    Args:
        has_state: Whether the loss learns its penalty weight.
    """

    def __init__(self, *, has_state: bool) -> None:
        self.has_state = has_state
        self._training: _Training | None = None
        self._given: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy may be of another model, as an averaged one.
        return _copy, (self.has_state, self._given)

    def evaluated(self, observer: Observer) -> None:
        """Before a loss whose weight has seen no step is evaluated: whether another one has been trained."""
        program = _identity(observer)
        if any(other.program == program and other.steps > 1 and other.hints() is not None for other in _trained):
            self._say(
                "state",
                "This WAELoss has not been trained, and another one has been, with the same model and guide. A WAELoss "
                "finds its penalty weight while it trains: evaluate with the loss that was trained, or give both a "
                "number: WAELoss(penalty_weight=100.0).",
            )

    def trained(self, observer: Observer, step: Step) -> None:
        """After a training step: whether the loss is used for another model, is made anew, or leaves something out."""
        program = _identity(observer)
        if self._training is None:
            self._made_anew(program)
            self._training = _Training(program, weakref.ref(self))
            _trained.append(self._training)
            del _trained[:-64]
        elif all(mine != other for mine, other in zip(self._training.program, program, strict=True)):
            self._say(
                "program",
                "This WAELoss has been trained with another model and guide. It keeps what it took from their prior "
                "and codes: kernel lengths, the penalty weight, a discriminator. Make a WAELoss for each model.",
            )
        self._training.steps += 1
        if self._training.steps == 1:
            self._without_gradient(step)
        if step.factors or step.once:
            self._factor(observer, [*step.factors, *step.once])
        if observer.condition is None and "condition" not in self._given and step.prior_varies:
            self._given.add("condition")  # asked at the first step alone, which may wait for an accelerator
            if (name := depends_on_data(step.first)) is not None:
                warnings.warn(
                    f"The prior of latent site '{name}' differs between data, and WAELoss compares all codes with all "
                    "prior draws, whatever they are conditional on: samples need not belong to their inputs. Name what "
                    "the prior depends on, an argument of the model or an observed site: WAELoss(condition='y').",
                    UserWarning,
                    stacklevel=4,
                )

    def _without_gradient(self, step: Step) -> None:
        for name, site in step.first.observed.items():
            costs, learnt = step.costs.get(name), (t.requires_grad for t in distribution_tensors(site.distribution))
            if costs is not None and not costs.requires_grad and any(learnt) and bool(costs.any()):  # 0 is meant
                self._say(
                    f"gradient {name}",
                    f"The cost of observed site '{name}' has no gradient: the decoder does not learn from it. Write "
                    "a cost without .detach(), comparisons and rounding: "
                    "lambda x, g: (x - g).square().flatten(1).sum(1).",
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
        youngest = _trained[-MADE_ANEW:]
        are_gone = all(other.program == program and other.steps == 1 and other.hints() is None for other in youngest)
        if self.has_state and len(youngest) == MADE_ANEW and are_gone:
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


def _copy(has_state: bool, given: set[str]) -> Hints:
    copy = Hints(has_state=has_state)
    copy._given = set(given)
    return copy
