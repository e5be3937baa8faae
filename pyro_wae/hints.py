"""What a loss says: once, that it may train towards something else than was meant; and what of it is not finite."""

from __future__ import annotations

import functools
import math
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_wae._core.distributions import distribution_tensors, is_learnable, leaves
from pyro_wae._core.programs import closure_of
from pyro_wae.costs import NegativeLogLikelihood
from pyro_wae.step.condition import candidates
from pyro_wae.step.observe import Observer
from pyro_wae.step.prior import depends_on_data, drawn_beside_codes
from pyro_wae.step.records import Step


@dataclass
class _Training:
    """What is known of a loss in training, also when it is gone: model and guide, itself, and its number of steps."""

    program: Any
    parts: list[weakref.ref[Any]]
    hints: weakref.ref[Hints]
    steps: int = 0

    def is_of(self, program: Any) -> bool:
        """Whether it trains this program; what is gone may have left its place in memory to another."""
        return bool(self.program == program) and all(part() is not None for part in self.parts)


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
        program, _ = _identity(observer)
        if any(other.steps > 1 and other.hints() is not None and other.is_of(program) for other in _trained):
            self._say(
                "state",
                "This WAELoss has not been trained, and another one has been, with the same model and guide. A WAELoss "
                "finds its penalty weight while it trains: evaluate with the loss that was trained, or give both a "
                "number: WAELoss(penalty_weight=100.0).",
            )

    def trained(self, observer: Observer, step: Step, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """After a training step: whether the loss is used for another model, is made anew, or leaves something out."""
        program, parts = _identity(observer)
        if self._training is None:
            self._made_anew(program)
            self._training = _Training(program, parts, weakref.ref(self))
            _trained.append(self._training)
            del _trained[:-64]
        elif all(mine != other for mine, other in zip(self._training.program, program, strict=True)):
            self._say(
                "program",
                "This WAELoss has been trained with another model and guide. It keeps what it took from their prior "
                "and codes: kernel lengths, the penalty weight, a discriminator. Make a WAELoss for each model.",
            )
        self._training.steps += 1
        if step.prior is not None:
            self._lost_gradient(step)
        if self._training.steps == 1:
            self._without_gradient(step)
        if step.factors or step.once:
            self._factor(observer, [*step.factors, *step.once])
        if observer.condition is None and "condition" not in self._given and step.prior_varies:
            self._given.add("condition")  # asked at the first step alone, which may wait for an accelerator
            if (name := depends_on_data(step.first)) is not None:
                found: list[str] = []
                with suppress(ValueError, TypeError):  # of a callable that does not say what its arguments are
                    found = candidates(step.first, (observer.model, args, kwargs))
                among = f" ({', '.join(map(repr, found))})" if len(found) > 1 else ""
                warnings.warn(
                    f"The prior of latent site '{name}' differs between data, and WAELoss compares all codes with all "
                    "prior samples, whatever they are conditional on: samples need not belong to their inputs. Name "
                    f"what the prior depends on, an argument of the model or an observed site{among}: "
                    f"WAELoss(condition={(found or ['y'])[0]!r}).",
                    UserWarning,
                    stacklevel=4,
                )

    def _lost_gradient(self, step: Step) -> None:
        """Whether the prior has learnable parameters whose gradient neither its draws nor the penalty give."""
        beside = drawn_beside_codes(step.first)
        for name, fn in {**{name: site.distribution for name, site in step.first.latents.items()}, **beside}.items():
            if fn.has_rsample or f"gradient {name}" in self._given:
                continue
            parameters = {leaf for tensor in distribution_tensors(fn) for leaf in leaves(tensor)}
            # A penalty may know the prior by its density or its means, which have a gradient where draws have none.
            if parameters and not parameters <= {leaf for value in step.penalties.values() for leaf in leaves(value)}:
                remedy = (
                    "WAELoss(MMD() + PriorLikelihood()), which trains them by the prior's density, take a prior with "
                    "rsample, such as NormalMixture,"
                )
                if name in beside:
                    remedy = (
                        "a mixture as the prior of one site, NormalMixture(dist.Categorical(logits=logits), "
                        "dist.Normal(loc, scale).to_event(1)),"
                    )
                self._say(
                    f"gradient {name}",
                    f"The prior at site '{name}' ({type(fn).__name__}) has learnable parameters but cannot be "
                    f"reparameterised: prior samples give them no gradient. Write {remedy} or detach them if they are "
                    "not to be learned.",
                )

    def _without_gradient(self, step: Step) -> None:
        for name, site in step.first.observed.items():
            costs, learnable = step.costs.get(name), is_learnable(site.distribution)
            if costs is not None and not costs.requires_grad and learnable and bool(costs.any()):  # 0 is meant
                self._say(
                    f"cost {name}",
                    f"The cost of observed site '{name}' has no gradient: the decoder does not learn from it. Write "
                    "a differentiable cost, without .detach(), comparisons or rounding: "
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
        are_gone = all(other.steps == 1 and other.hints() is None and other.is_of(program) for other in youngest)
        if self.has_state and len(youngest) == MADE_ANEW and are_gone:
            self._say(
                "anew",
                "A new WAELoss has been created in each step for the same model. Unlike Trace_ELBO, a WAELoss has a "
                "state, such as the penalty weight that it finds during training. Write loss = WAELoss() once, before "
                "the loop.",
            )

    def _say(self, key: str, message: str) -> None:
        if key not in self._given:
            self._given.add(key)
            warnings.warn(message, UserWarning, stacklevel=5)


@contextmanager
def finite_slopes(step: Step) -> Iterator[None]:
    """Raises ValueError in a backward pass whose gradient at the codes of a site is not finite, before the encoder's.

    On an accelerator, looking would wait for it, and is left out.
    """

    def look(site: str, gradient: Tensor) -> None:
        # Codes are few numbers beside parameters, all of which such a gradient spoils. Where a sum is finite, all is.
        if gradient.device.type == "cpu" and not (math.isfinite(gradient.sum()) or bool(gradient.isfinite().all())):
            raise ValueError(
                f"The loss is finite, and its gradient at the codes of latent site '{site}' is not: a cost, a penalty "
                "or the decoder has an infinite slope, as a root has at 0. Bound it, as in "
                "cost=lambda x, g: ((x - g).square().flatten(1).sum(1) + 1e-12).sqrt()."
            )

    sites = [site for runs in step.runs for run in runs for site in run.latents.values()]
    hooks = [s.value.register_hook(functools.partial(look, s.name)) for s in sites if s.value.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def what_is_not_finite(step: Step) -> str:
    """Why the loss is not finite, in a sentence that names the part."""
    if found := what_is_not_finite_before(step):
        return found
    assert step.terms is not None  # the loss has been added up
    for site, value in step.terms.costs.items():
        if found := _not_finite(value):
            text = f"The cost of observed site '{site}' is {found}: look at the data and at the model's output."
            if site in step.first.observed and _not_finite(step.first.observed[site].value) == "NaN":
                text += " The data hold NaN. Leave what is missing out: dist.Normal(...).mask(~x.isnan()).to_event(1)."
            return text
    for site, value in step.penalties.items():
        if found := _not_finite(value):
            where = f" of latent site '{site}'" if site else ""
            return f"The penalty{where} is {found}, though the codes are finite."
    return (
        f"The loss is not finite, though its parts are: the penalty weight ({float(step.terms.weight):g}) times "
        "the penalty overflows."
    )


def what_is_not_finite_before(step: Step) -> str | None:
    """What a penalty compares that is not finite, in a sentence; None if all of it is."""
    codes, prior = step.rows()
    for site, columns in step.columns.items():
        if found := _not_finite(codes[..., columns]):
            return (
                f"The codes of latent site '{site}' hold {found}: look at the guide's output, or lower the learning "
                "rate."
            )
        if prior is not None and (found := _not_finite(prior[..., columns])):
            return f"The prior samples of latent site '{site}' hold {found}: look at the model's prior."
    if step.condition is not None and (found := _not_finite(step.condition)):
        return f"The condition '{step.condition_name}' holds {found}: look at the data."
    for site, columns in step.columns.items() if step.codes.requires_grad else ():
        if found := _not_finite(step.codes[..., columns]):
            return (
                f"The masked codes of latent site '{site}' hold {found}, which makes the gradient of all parameters "
                "NaN. Write in the guide: x = x.nan_to_num()."
            )
    return None


def _identity(observer: Observer) -> tuple[tuple[Any, Any], list[weakref.ref[Any]]]:
    """What identifies model and guide, and the modules and other objects that it names by their place in memory."""
    parts: list[weakref.ref[Any]] = []
    return (_mark(observer.model, parts), _mark(observer.guide, parts)), parts


def _mark(program: Any, parts: list[weakref.ref[Any]], depth: int = 2) -> Any:
    """What identifies a program, whatever handler is around it and whatever numbers it refers to at the moment."""
    inner: Sequence[Any] = ()
    owner = getattr(program, "__self__", None)
    if isinstance(program, functools.partial):
        inner = [program.func, *program.args, *program.keywords.values()]
        if program.args[1:] and isinstance(program.args[0], Messenger):
            return _mark(program.args[1], parts, depth)
        if len(inner) == 1:
            return _mark(program.func, parts, depth)
    elif hasattr(program, "__code__"):
        inner = closure_of(program) if program.__closure__ else ()
    elif callable(around := getattr(program, "fn", None)) and not isinstance(program, nn.Module):
        return _mark(around, parts, depth)  # a handler that traces or reparametrises
    else:
        owner = program
    if owner is not None:
        with suppress(TypeError):  # of a class that has no place for it
            parts.append(weakref.ref(owner))
    # A function that is made in each step is another one, of the same code; a distribution is not.
    if inner and depth:
        inner = [_mark(p, parts, depth - 1) for p in inner if callable(p) and not isinstance(p, dist.Distribution)]
    return getattr(program, "__code__", None), id(owner), inner if depth else ()


def _copy(has_state: bool, given: set[str]) -> Hints:
    copy = Hints(has_state=has_state)
    copy._given = set(given)
    return copy


def _not_finite(values: Tensor) -> str | None:
    """What is not finite in a tensor, in a word; None where all is."""
    if values.is_meta or not values.is_floating_point() or bool(values.isfinite().all()):
        return None
    return "NaN" if bool(values.isnan().any()) else "infinity"
