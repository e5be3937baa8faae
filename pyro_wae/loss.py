"""The Wasserstein auto-encoder loss in the place of Pyro's ELBO."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import pyro
import torch
from pyro.infer.elbo import ELBO
from pyro.infer.util import is_validation_enabled
from pyro.params import param_with_module_name
from torch import Tensor, nn

from pyro_wae._core import checks
from pyro_wae._core.fitted import unset_if_it_fails
from pyro_wae._core.private import HANDLERS
from pyro_wae._core.repr import CallRepr
from pyro_wae.costs import Cost, as_costs
from pyro_wae.distributed import GroupLike
from pyro_wae.hints import Hints, finite_slopes, what_is_not_finite, what_is_not_finite_before
from pyro_wae.module import WAEModule
from pyro_wae.runners import make_runner
from pyro_wae.step.condition import Condition
from pyro_wae.step.observe import Observer, trace_pair
from pyro_wae.step.options import PenaltyLike, as_option, each_penalty, site_label
from pyro_wae.step.records import Step, Terms
from pyro_wae.weights import Constant, Constraint, Weight, as_weight
from pyro_wae.weights.base import weight_of_step

CostLike = Cost | Callable[[Tensor, Tensor], Tensor]
Program = Callable[..., Any]


class WAELoss(CallRepr, ELBO):
    r"""The loss of a Wasserstein auto-encoder, in place of ``Trace_ELBO()``: :math:`E\,c(x,G(z)) + \lambda D(Q_Z,P_Z)`.

    The guide is the encoder Q(z|x), deterministic (``Delta``) or stochastic. The model holds the prior P_Z, which needs
    only to be sampled, and the decoder G. The cost c compares a datum with its reconstruction, and the penalty D
    compares the codes of all data in a batch *together*, draws of the aggregated posterior Q_Z, with prior samples. The
    loss is a mean per datum: its scale does not depend on the size of batch or data set. It may be negative, because
    the default penalty is unbiased. Make it once, before the training loop: it keeps the penalty weight that it finds.

    Args:
        penalty: A :class:`~pyro_wae.penalties.Penalty`, a function f(codes, prior), or a dict with one of them for
            each latent site (None leaves a site free). A tuple of names as a key compares the joint code of these
            sites; ``*`` in a name matches any characters. Default: :class:`~pyro_wae.penalties.MMD`.
        cost: A :class:`~pyro_wae.costs.Cost`, a function f(x, g), or a dict with one of them for each observed site.
            Default: :class:`~pyro_wae.costs.SquaredError`.
        penalty_weight: lambda >= 0, in units of cost per unit of penalty: a number, or one of
            ``pyro_wae.weights``. Default: :class:`~pyro_wae.weights.Constraint`, which finds it while training, or
            100 where no penalty draws from the prior.
        data_plate: Name of the plate that holds the data. Default: the one plate around every latent and observed
            site; of several, the one that takes a subsample.
        num_particles: Number of codes for each datum.
        vectorize_particles: Whether to run them at once in an outermost plate.
        max_plate_nesting: Bound on nested plates, needed with ``vectorize_particles``; guessed by one more run
            of model and guide at the first step if not given.
        retain_graph: Passed to ``backward``.
        prior_draws: Number of prior samples for each code; more of them lower the penalty's variance. They are not
            decoded.
        condition: Name of what the prior or the decoder is conditional on, y: an observed site of the model, one of
            its arguments, or a key of an argument that is a dict. The penalty then compares the joint of (z, y) with
            that of (z', y), z' ~ p(z | y), and not only the marginals. Whole numbers are labels, one for each datum,
            and compared by equality; floats of any shape are compared by distance. An observed site that is a condition
            has no cost, unless ``cost`` names it.
        micro_batch: The largest number of data that model and guide run on at once. A larger batch is split: the
            gradient is that of the whole batch, the memory that of one micro-batch, and the nets run twice. Split are
            the tensor arguments, and those in dicts, whose length is that of the first; others are passed whole.
        process_group: The processes of ``torch.distributed`` whose batches are compared as one: "world" for all of
            them, or a process group. Loss and terms are then those of all data on every rank, and the mean over ranks
            of the gradients, which DDP takes, is that of one process with all data. Default: each rank compares its
            own codes.
        reduction: ``"mean"``: the loss per datum. ``"sum"``: that times the number of data, N where the data plate
            takes a part of N. This is the scale of Pyro's own losses: ``weight_decay``, ``clip_norm`` and the learning
            rate of SGD keep their values. ``terms`` are per datum in both cases.
        others: ``strict_enumeration_warning`` and ``ignore_jit_warnings``, booleans that ``Trace_ELBO`` takes. They are
            accepted and have no effect: a WAELoss neither enumerates nor uses ``torch.jit``.

    Attributes:
        terms: The :class:`~pyro_wae.Terms` of the last step, or None before the first.

    Raises:
        ValueError: If an argument is out of range, or, in a step, if model and guide do not fit; the message names
            the site and the line to write instead.
        TypeError: If an argument has the wrong type.

    Source: Tolstikhin, Bousquet, Gelly, Schoelkopf, "Wasserstein Auto-Encoders", 2018, arXiv:1711.01558.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> from pyro_wae import WAELoss
        >>> encoder, decoder = torch.nn.Linear(5, 2), torch.nn.Linear(2, 5)
        >>> def model(x):
        ...     pyro.module("decoder", decoder)
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1).to_event(1))
        ...         pyro.sample("x", dist.Normal(decoder(z), 1).to_event(1), obs=x)
        >>> def guide(x):
        ...     pyro.module("encoder", encoder)
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Delta(encoder(x)).to_event(1))
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=WAELoss())
        >>> loss = svi.step(torch.randn(64, 5))
    """

    terms: Terms | None

    def __init__(
        self,
        penalty: PenaltyLike | Mapping[Any, PenaltyLike | None] | None = None,
        *,
        cost: CostLike | Mapping[str, CostLike] | None = None,
        penalty_weight: float | Weight | None = None,
        data_plate: str | None = None,
        num_particles: int = 1,
        vectorize_particles: bool = False,
        max_plate_nesting: float = math.inf,
        retain_graph: bool | None = None,
        prior_draws: int = 1,
        condition: str | None = None,
        micro_batch: int | None = None,
        process_group: GroupLike | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        **others: Any,
    ) -> None:
        _check_others(others)
        if data_plate is not None:
            checks.text("data_plate", data_plate, "a plate's name", write="data_plate='data'")
        if condition is not None:
            what = "the name of an observed site or of an argument of the model"
            checks.text("condition", condition, what, write="condition='y'")
        super().__init__(
            num_particles=checks.whole("num_particles", num_particles),
            vectorize_particles=checks.flag("vectorize_particles", vectorize_particles),
            max_plate_nesting=_nesting(max_plate_nesting),
            retain_graph=None if retain_graph is None else checks.flag("retain_graph", retain_graph),
        )
        self.penalty = as_option(penalty)
        self.cost = as_costs(cost)
        self.penalty_weight = self._default_weight() if penalty_weight is None else as_weight(penalty_weight)
        self.data_plate = data_plate
        self.prior_draws = checks.whole("prior_draws", prior_draws)
        self.condition = condition
        entries = len(self.penalty) if isinstance(self.penalty, dict) else 1
        self._condition = None if condition is None else Condition(condition, entries)
        self.micro_batch = None if micro_batch is None else checks.whole("micro_batch", micro_batch)
        self.process_group = process_group
        self.reduction = checks.choice("reduction", reduction, ("mean", "sum"))
        self._runner = make_runner(self.micro_batch, process_group)
        self._seen: set[str] = set()
        self.once_observed: set[str] = set()
        self._hints = Hints(has_state=isinstance(self.penalty_weight, Constraint))
        self.terms = None
        self._has_passed = False

    def __call__(self, model: Program, guide: Program) -> WAEModule:
        """Binds model and guide into a module, for plain torch optimisers; see :class:`~pyro_wae.WAEModule`."""
        return WAEModule(model, guide, self)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The penalties, costs and the penalty weight, which are modules, with a name for each."""
        yield "weight", self.penalty_weight
        if self._condition is not None:
            yield "condition", self._condition
        for kind, option in (("penalty", self.penalty), ("cost", self.cost)):
            options = option if isinstance(option, dict) else {"": option}
            names: set[str] = set()
            for sites, module in options.items():
                if module is not None:
                    # A module's name may not hold a dot, a site's may.
                    name = kind + (f"_{site_label(sites).replace('.', '_')}" if sites else "")
                    while name in names:
                        name += "_"
                    names.add(name)
                    yield name, module

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Estimates the loss.

        Returns:
            The loss: per datum, or summed over the data set with ``reduction="sum"``.

        Raises:
            ValueError: If model and guide do not fit a WAE, or a part of the loss is not finite.
        """
        with torch.no_grad(), self._first_or_later():
            return self._value(self._run(self._observer(model, guide), args, kwargs))

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Estimates the loss as a scalar tensor with a graph.

        On an accelerator a loss that is not finite is looked for only under ``pyro.validation_enabled()``, because
        looking waits for the device.

        Raises:
            ValueError: If model and guide do not fit a WAE, or a part of the loss is not finite.
        """
        observer = self._observer(model, guide)
        with self._first_or_later():
            step = self._run(observer, args, kwargs)
            assert step.loss is not None  # it has been added up
            if step.loss.device.type == "cpu" or is_validation_enabled():
                self._value(step)
        self._has_passed = True
        if torch.is_grad_enabled():
            if HANDLERS:  # as of an SVI that was given this method, which trains what it is told of
                self._register()
            self._hints.trained(observer, step, args, kwargs)
            self._show_weight(step)
        return step.loss

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Estimates the loss and adds its gradients to the parameters'.

        Returns:
            The loss, which ``svi.step`` returns: per datum, or summed over the data set with ``reduction="sum"``.

        Raises:
            ValueError: If model and guide do not fit a WAE, or a part of the loss is not finite; no gradient is then
                added. Also if a slope of a finite loss is not finite at the codes; the encoder then has no gradient
                added; on an accelerator and over a process group it is not looked for.
        """
        observer = self._observer(model, guide)
        with self._runner.training(observer, args, kwargs), self._first_or_later():
            step = self._run(observer, args, kwargs)
            self._register()
            value = self._value(step)
            assert step.loss is not None  # it has been added up
            if step.loss.requires_grad:
                # An error on one rank alone would leave the others waiting for its gradients.
                slopes = finite_slopes(step) if self.process_group is None else nullcontext()
                # Autocast around the whole step would round the slopes of what was computed in full precision.
                with torch.autocast(step.loss.device.type, enabled=False), slopes:
                    step.loss.backward(retain_graph=self.retain_graph)
        if torch.is_grad_enabled():  # else an evaluation, as of svi.step under no_grad
            self._hints.trained(observer, step, args, kwargs)
            self._show_weight(step)
        return value

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> tuple[Any, Any]:
        # Of Pyro's interface for a loss; a step reads the traces with more than they say by themselves.
        return trace_pair(model, guide, args, kwargs, self.max_plate_nesting)

    def _observer(self, model: Program, guide: Program) -> Observer:
        reads_prior = self.penalty_weight.needs_prior_draws or any(
            penalty.needs_prior_draws for penalty in each_penalty(self.penalty)
        )
        return Observer(
            model,
            guide,
            cost=self.cost,
            data_plate=self.data_plate,
            prior_draws=self.prior_draws if reads_prior else 0,
            num_particles=self.num_particles,
            vectorize_particles=self.vectorize_particles,
            max_plate_nesting=self.max_plate_nesting,
            condition=self.condition,
            once_observed=self.once_observed,
        )

    def _first_or_later(self) -> AbstractContextManager[None]:
        """Until a step has passed: unsets what one that fails has taken from its numbers, such as a kernel's length."""
        if self._has_passed:
            return nullcontext()
        return unset_if_it_fails(lambda: (module for _, module in self.named_children()))

    def _run(self, observer: Observer, args: Any, kwargs: Any) -> Step:
        """One step, with its loss."""
        if (
            not torch.is_grad_enabled()
            and isinstance(self.penalty_weight, Constraint)
            and self.penalty_weight.step == 0
        ):
            self._hints.evaluated(observer)
        step = self._runner.observe(observer, args, kwargs)
        self.max_plate_nesting = observer.max_plate_nesting
        step.prepare(self.penalty, self._seen)
        with self._runner.comparing(step, self.named_children):
            try:
                penalties = step.compare(self.penalty, self._condition)
            except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
                # A penalty that stumbles over a number that is none knows no site, such as a kernel without a length.
                if found := what_is_not_finite_before(step):
                    raise ValueError(found) from error
                raise
        weight = functools.partial(weight_of_step, self.penalty_weight)
        step = step.add(penalties, weight, per_datum=self.reduction == "mean")
        assert step.loss is not None  # it has been added up
        if self.process_group is not None:
            self._runner.agree(step.loss.detach())
        self.terms = step.terms
        return step

    def _register(self) -> None:
        """Tells Pyro of the parameters of penalties, costs and the weight."""
        for name, module in self.named_children():
            parameters = dict(module.named_parameters())
            learnt = {key: value for key, value in parameters.items() if value.requires_grad}
            # A discriminator of a site that has had no codes yet has no parameters yet.
            if not learnt or any(map(nn.parameter.is_lazy, parameters.values())):
                continue
            for key, value in _in_store(f"wae_{name}", learnt).items():
                pyro.param(key, value)
                _REGISTERED[id(value)] = value

    def _value(self, step: Step) -> float:
        """The loss as a number.

        Raises:
            ValueError: If it is not finite.
        """
        assert step.loss is not None  # it has been added up
        value = step.loss.item()
        if not math.isfinite(value):
            raise ValueError(what_is_not_finite(step))
        self._has_passed = True
        return value

    def _show_weight(self, step: Step) -> None:
        """Shows a training step to the weight, which may learn from it."""
        if type(self.penalty_weight).observe is Weight.observe:
            return  # a constant looks at nothing
        codes, draws = step.compared(self.penalty).rows()
        assert step.balanced_cost is not None  # the loss has been added up
        self.penalty_weight.observe(step.balanced_cost, codes.detach(), None if draws is None else draws.detach())

    def _default_weight(self) -> Weight:
        # A prior that cannot be sampled can still be compared with, and gives a constraint nothing to measure by.
        return Constraint() if any(p.needs_prior_draws for p in each_penalty(self.penalty)) else Constant(100.0)


def _nesting(given: float) -> float:
    is_open = checks.is_number(given) and float(given) == math.inf
    return math.inf if is_open else checks.whole("max_plate_nesting", given, least=0, write="max_plate_nesting=1")


_REGISTERED: weakref.WeakValueDictionary[int, nn.Parameter] = weakref.WeakValueDictionary()
"""What losses of this process have put into Pyro's store."""


def _in_store(name: str, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Parameters by their names in Pyro's store; with a number where another loss has its own under these names."""
    store = dict(pyro.get_param_store().named_parameters())
    for prefix in itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2))):
        named = {param_with_module_name(prefix, key): value for key, value in parameters.items()}
        others = [store[key] for key, value in named.items() if store.get(key, value) is not value]
        if not others:
            break
        if any(_REGISTERED.get(id(other)) is not other for other in others):
            warnings.warn(
                f"Pyro's parameter store has a loaded '{prefix}' of a saved WAELoss, and this WAELoss has parameters "
                "of its own, which are trained under another name. To restore them, use "
                "pyro_wae's save_checkpoint(path, svi=svi) and load_checkpoint(path, svi=svi).",
                UserWarning,
                stacklevel=5,
            )
    return named


def _check_others(others: Mapping[str, Any]) -> None:
    """Warns of an argument that was taken out, and raises TypeError for one that this loss does not take."""
    for name, value in others.items():
        if name == "compile":
            if value is not False:
                warnings.warn(
                    "WAELoss(compile=...) has no effect: recorded steps were taken out, because a recording could "
                    "return wrong values without notice. Leave the argument out, and compile the nets: "
                    "encoder = torch.compile(encoder).",
                    DeprecationWarning,
                    stacklevel=3,
                )
        elif name in ("strict_enumeration_warning", "ignore_jit_warnings"):
            checks.flag(name, value)
        else:
            remedy = _ELBO_ARGUMENTS.get(name, "Its arguments are: " + ", ".join(_arguments()) + ".")
            raise TypeError(f"WAELoss takes no argument {name!r}. {remedy}")


_ELBO_ARGUMENTS = {
    "jit_options": "A step is not traced by torch.jit: leave it out, and write encoder = torch.compile(encoder).",
    "tail_adaptive_beta": "It belongs to TraceTailAdaptive_ELBO, whose weights a WAE has not: leave it out.",
    "max_iarange_nesting": "Write max_plate_nesting.",
    "kernel": "Write the kernel into the penalty: WAELoss(MMD(kernel)).",
    "mmd_scale": "Write WAELoss(penalty_weight=...).",
    "weight": "Write WAELoss(penalty_weight=...).",
    "beta": "Write WAELoss(penalty_weight=...).",
}


def _arguments() -> list[str]:
    return [name for name in inspect.signature(WAELoss).parameters if name != "others"]
