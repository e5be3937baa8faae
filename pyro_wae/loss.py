"""The Wasserstein auto-encoder loss in the place of Pyro's ELBO."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer.elbo import ELBO, ELBOModule
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn

from pyro_wae._core.batch_norm import batch_norm_at_rest
from pyro_wae._core.numerics import joined, total
from pyro_wae._core.repr import CallRepr
from pyro_wae.costs import Cost, Observation, SquaredError, as_cost
from pyro_wae.distributed import GroupLike, Ranks, check_group
from pyro_wae.runners.micro_batches import MicroBatches, Runs
from pyro_wae.step.compare import (
    PenaltyLike,
    as_option,
    check_names,
    compare,
    compared,
    each_penalty,
    prepare,
    site_label,
)
from pyro_wae.step.condition import Condition, Given
from pyro_wae.step.context import penalty_context
from pyro_wae.step.prior import draw_prior, warn_of_lost_gradient
from pyro_wae.step.program import Particle, Structure, gather_codes, gather_observations, read_structure, run
from pyro_wae.step.records import Codes
from pyro_wae.step.terms import Terms
from pyro_wae.weights import Constant, Constraint, Weight, as_weight

__all__ = ["WAELoss", "WAEModule"]

_NO_RECORDING = (
    "WAELoss(compile=...) has no effect: recorded steps were taken out, because a recording could return wrong values "
    "without notice. Leave the argument out, and compile the nets: encoder = torch.compile(encoder)."
)

CostLike = Cost | Callable[[Tensor, Tensor], Tensor]


class _Step(NamedTuple):
    """The parts of a step, in the form that a recording gives too."""

    loss: Tensor
    cost: Tensor
    penalty: Tensor
    weight: float | Tensor
    costs: dict[str, Tensor]
    penalties: dict[str, Tensor]
    codes: Tensor
    columns: dict[str, slice]
    kept: Tensor | None
    prior: Tensor | None
    condition: Tensor | None

    @property
    def joint(self) -> Codes:
        return Codes(self.codes, self.columns, self.kept)


class WAELoss(CallRepr, ELBO):
    """The Wasserstein auto-encoder's loss: E c(x, G(z)) + weight * D(Q_Z, P_Z).

    It takes the place of ``Trace_ELBO()``. The guide is the encoder Q(z|x), deterministic (``Delta``) or stochastic;
    the model gives the prior P_Z, which needs only to be sampled, and the generator G. The penalty compares the codes
    of all data in a batch *together* with draws of the prior. The loss is a mean per datum, so that it does not
    depend on the size of batch or data set. It may be negative when the penalty is an unbiased estimate.

    Args:
        penalty: A :class:`~pyro_wae.penalties.Penalty`, a function f(codes, prior), or a dict with one of them for
            each latent site (None leaves a site free). A tuple of names as a key compares the joint code of these
            sites; ``*`` in a name stands for any letters. Default: :class:`~pyro_wae.penalties.MMD`.
        cost: A :class:`~pyro_wae.costs.Cost`, a function f(x, g), or a dict with one of them for each observed site.
            Default: :class:`~pyro_wae.costs.SquaredError`.
        penalty_weight: lambda >= 0, in units of cost per unit of penalty: a number, or one of
            ``pyro_wae.weights``. Default: :class:`~pyro_wae.weights.Constraint`, which finds it while training, or
            100 where no penalty draws from the prior.
        data_plate: Name of the plate that holds the data. Default: the one plate around every latent and observed
            site; of several, the subsampled one.
        num_particles: Number of codes for each datum.
        vectorize_particles: Whether to run them at once in an outermost plate.
        max_plate_nesting: Bound on nested plates, needed with ``vectorize_particles``; guessed by one more run
            of model and guide at the first step if not given.
        retain_graph: Passed to ``backward``.
        prior_draws: Prior draws for each code; more lower the variance, and nothing is decoded for them.
        condition: Name of what the prior or the decoder is conditional on, y: an observed site of the model, or one of
            its arguments. The penalty then compares the joint of (z, y) with that of (z', y), z' ~ p(z | y), and not
            only the marginals. Whole numbers are labels, one for each datum; floats of any shape have a distance. An
            observed site that is a condition has no cost, unless ``cost`` names it.
        micro_batch: The most data that model and guide run on at once. A larger batch is split: the gradient is that of
            the whole batch, the memory that of one micro-batch, and the nets run twice. Split are the tensor arguments
            whose length is that of the first tensor argument; others are passed whole.
        process_group: The processes of ``torch.distributed`` whose batches are compared as one: "world" for all of
            them, or a process group. Loss and terms are then those of all data on every rank, and the mean over ranks
            of the gradients, which DDP takes, is that of one process with all data. Default: each rank compares its
            own codes.

    Attributes:
        terms: The :class:`~pyro_wae.step.terms.Terms` of the last step, or None before the first.

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
        compile: Any = False,
    ) -> None:
        _check_count("num_particles", num_particles)
        _check_count("prior_draws", prior_draws)
        if micro_batch is not None:
            _check_count("micro_batch", micro_batch)
        if process_group is not None:
            check_group(process_group)
        if compile is not False:
            warnings.warn(_NO_RECORDING, DeprecationWarning, stacklevel=2)
        self.compile = compile
        if data_plate is not None and not isinstance(data_plate, str):
            raise TypeError(f"data_plate must be a plate's name, found {data_plate!r}. Write data_plate='data'.")
        if condition is not None and not isinstance(condition, str):
            raise TypeError(
                f"condition must be the name of an observed site or of an argument of the model, found "
                f"{type(condition).__name__}. Write condition='y'."
            )
        super().__init__(
            num_particles=num_particles,
            vectorize_particles=vectorize_particles,
            max_plate_nesting=max_plate_nesting,
            retain_graph=retain_graph,
        )
        self.penalty = as_option(penalty)
        self.cost = _options(cost, SquaredError, as_cost)
        self.penalty_weight = self._default_weight() if penalty_weight is None else as_weight(penalty_weight)
        self.data_plate = data_plate
        self.prior_draws = prior_draws
        self.condition = condition
        entries = len(self.penalty) if isinstance(self.penalty, dict) else 1
        self._condition = None if condition is None else Condition(condition, entries)
        self.micro_batch = micro_batch
        self._micro_batches = None if micro_batch is None else MicroBatches(micro_batch)
        self.process_group = process_group
        self._ranks = None if process_group is None else Ranks(process_group)
        self.terms = None

    def __call__(self, model: Callable[..., Any], guide: Callable[..., Any]) -> WAEModule:
        """Binds model and guide into a module, for plain torch optimisers; see :class:`~pyro_wae.loss.WAEModule`."""
        return WAEModule(model, guide, self)

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
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

    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """Estimates the loss.

        Returns:
            The loss per datum.

        Raises:
            ValueError: If model and guide do not fit a WAE, or a part of the loss is NaN.
        """
        with torch.no_grad():
            step = self._run(model, guide, args, kwargs)
        return self._value(step)

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Estimates the loss as a scalar tensor with a graph.

        On an accelerator a NaN is looked for only under ``pyro.validation_enabled()``, because looking waits for the
        device.

        Raises:
            ValueError: If model and guide do not fit a WAE, or a part of the loss is NaN.
        """
        step = self._run(model, guide, args, kwargs)
        if step.loss.device.type == "cpu" or is_validation_enabled():
            self._value(step)
        if torch.is_grad_enabled():
            self._observe(step)
        return step.loss

    def loss_and_grads(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """Estimates the loss and adds its gradients to the parameters'.

        Returns:
            The loss per datum.

        Raises:
            ValueError: If model and guide do not fit a WAE, or a part of the loss is NaN; no gradient is then added.
        """
        if self._ranks is not None:
            self._ranks.start_as_one(functools.partial(self._runs, model, guide, args, kwargs))
        with nullcontext() if self._ranks is None else self._ranks.averaging():
            step = self._run(model, guide, args, kwargs, register=True)
            value = self._value(step)
            if step.loss.requires_grad:
                # Autocast around the whole step would round the slopes of what was computed in full precision.
                with torch.autocast(step.loss.device.type, enabled=False):
                    step.loss.backward(retain_graph=self.retain_graph)
        self._observe(step)
        return value

    def _run(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any, register: bool = False
    ) -> _Step:
        """A step, whose loss has a graph.

        With `register`, the parameters of penalties and costs are shown to Pyro, so that SVI trains them.
        """
        step = self._step((args, kwargs), model, guide, register)
        self.terms = Terms(
            cost=step.cost.detach(),
            penalty=step.penalty.detach(),
            weight=step.weight,
            costs={site: value.detach() for site, value in step.costs.items()},
            penalties={site: value.detach() for site, value in step.penalties.items() if site},
        )
        return step

    def _value(self, step: _Step) -> float:
        """The loss as a number.

        Raises:
            ValueError: If it is NaN.
        """
        value = step.loss.item()
        if math.isnan(value):
            raise ValueError(_nan_message(step, self.condition))
        return value

    def _observe(self, step: _Step) -> None:
        """Shows a training step to the weight."""
        if type(self.penalty_weight).observe is Weight.observe:
            return  # a constant looks at nothing
        codes, draws = compared(self.penalty, step.joint, step.prior)
        seen, draws = codes.masked(draws)
        self.penalty_weight.observe(step.cost.detach(), seen.detach(), None if draws is None else draws.detach())

    def _step(
        self,
        arguments: tuple[Any, Any],
        model: Callable[..., Any],
        guide: Callable[..., Any],
        register: bool,
    ) -> _Step:
        """One step, from the weight if known before, and the arguments and keyword arguments of model and guide."""
        args, kwargs = arguments
        run = functools.partial(self._runs, model, guide, args, kwargs)
        runs = run() if self._ranks is None else self._ranks.gather(run, guide)
        mean_costs = _mean_costs(runs.costs, runs.kept)
        joint = Codes.stack(runs.codes)
        self._prepare(joint, runs.structure, runs.given, register)
        prior = joined(runs.prior) if runs.prior else None
        with nullcontext() if self._ranks is None else self._ranks.same_random_numbers(joint.values):
            penalties = compare(self.penalty, joint, prior, runs.context, runs.structure, runs.given)
        cost = total(mean_costs.values())
        penalty = total(penalties.values()).to(cost.device)
        if runs.prior:
            warn_of_lost_gradient(runs.particles[0], runs.structure, penalty)
        weight = self.penalty_weight(cost.detach())
        return _Step(
            loss=cost + weight * penalty,
            cost=cost,
            penalty=penalty,
            weight=weight,
            costs=mean_costs,
            penalties=penalties,
            codes=joint.values,
            columns=dict(joint.columns),
            kept=joint.kept,
            prior=prior,
            condition=None if runs.given is None else runs.given.values,
        )

    def _runs(self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any) -> Runs:
        """The runs of model and guide on all data of this process."""
        gather = functools.partial(self._gather, model, guide)
        return self._micro_batches.gather(gather, guide, args, kwargs) if self._micro_batches else gather(args, kwargs)

    def _gather(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Runs:
        """Runs model and guide, and keeps what a step needs of the runs."""
        particles, codes, prior, costs, kept = [], [], [], [], []
        structure: Structure | None = None
        given: Given | None = None
        draws = self.prior_draws if self._needs_prior_draws() else 0
        for particle in self._particles(model, guide, args, kwargs):
            structure = structure or read_structure(particle, self.data_plate)
            particles.append(particle)
            codes.append(gather_codes(particle, structure))
            prior += [draw_prior(particle, structure) for _ in range(draws)]
            observations = list(gather_observations(particle, structure))
            if self._condition is not None:
                given = given or self._condition.read(observations, particle, structure, (model, args, kwargs))
                observations = self._reconstructed(observations)
            costs.append(self._costs(observations))
            kept.append(_kept(observations))
        assert structure is not None  # num_particles >= 1
        context = functools.partial(penalty_context, particles, structure)
        return Runs(structure, particles, codes, prior, costs, kept, given, context)

    def _default_weight(self) -> Weight:
        # A prior that cannot be sampled can still be compared with, and gives a constraint nothing to measure by.
        return Constraint() if any(p.needs_prior_draws for p in each_penalty(self.penalty)) else Constant(100.0)

    def _needs_prior_draws(self) -> bool:
        return self.penalty_weight.needs_prior_draws or any(p.needs_prior_draws for p in each_penalty(self.penalty))

    def _particles(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any
    ) -> Iterator[Particle]:
        """The runs of one step. All see the same data."""
        if self.vectorize_particles and self.num_particles > 1:
            if self.max_plate_nesting == math.inf:
                self._guess_max_plate_nesting(model, guide, args, kwargs)
            model, guide = self._vectorized_num_particles(model), self._vectorized_num_particles(guide)
            yield self._get_trace(model, guide, args, kwargs)
            return
        first: Particle | None = None
        for _ in range(self.num_particles):
            particle = self._get_trace(model, guide, args, kwargs, subsample_of=first)
            first = first or particle
            yield particle

    def _get_trace(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: Any,
        kwargs: Any,
        subsample_of: Particle | None = None,
    ) -> Particle:
        return run(model, guide, args, kwargs, max_plate_nesting=self.max_plate_nesting, subsample_of=subsample_of)

    def _guess_max_plate_nesting(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any
    ) -> None:
        # Pyro's own guess computes every log_prob and moves the random numbers of the first step.
        state = pyro.util.get_rng_state()
        with poutine.block(), torch.no_grad(), batch_norm_at_rest():
            particle = self._get_trace(model, guide, args, kwargs)
        pyro.util.set_rng_state(state)
        stacks = [
            site["cond_indep_stack"]
            for trace in (particle.model, particle.guide)
            for site in trace.nodes.values()
            if site["type"] == "sample"
        ]
        self.max_plate_nesting = 1 + max((-f.dim for stack in stacks for f in stack if f.dim is not None), default=0)

    def _costs(self, observations: list[Observation]) -> dict[str, Tensor]:
        names = [observation.name for observation in observations]
        if isinstance(self.cost, dict):
            check_names("cost", self.cost, names, "observed", "SquaredError()")
        return {
            observation.name: (self.cost[observation.name] if isinstance(self.cost, dict) else self.cost).per_datum(
                observation
            )
            for observation in observations
        }

    def _reconstructed(self, observations: list[Observation]) -> list[Observation]:
        """The sites that have a cost: a condition is given, and not to be reconstructed."""
        if isinstance(self.cost, dict) and self.condition in self.cost:
            return observations
        left = [observation for observation in observations if observation.name != self.condition]
        if not left:
            raise ValueError(
                f"The condition '{self.condition}' is the model's only observed site, so that nothing is "
                "reconstructed. Write pyro.sample('x', ..., obs=x) for what the decoder gives."
            )
        return left

    def _prepare(self, codes: Codes, structure: Structure, given: Given | None, register: bool) -> None:
        """Lets penalties make what depends on the size of a code, and shows what is to be trained to Pyro."""
        prepare(self.penalty, codes, structure, given)
        if self._ranks is not None:
            self._ranks.share(self.modules())
        for name, module in self.modules():
            if register and any(parameter.requires_grad for parameter in module.parameters()):
                pyro.module(f"wae_{name}", module)


class WAEModule(ELBOModule):
    """A WAE loss bound to its model and guide, for plain torch optimisers and everything that takes a module.

    ``parameters()`` and ``state_dict()`` hold the model, the guide and what the penalty and cost own: a discriminator,
    a bandwidth. Model and guide may be modules or methods of one. A call gives the differentiable loss.

    Args:
        model: A Pyro model: a module, a module's method, or a function.
        guide: Its guide, likewise.
        loss: The loss.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro_wae import WAELoss
        >>> class AutoEncoder(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.encoder, self.decoder = torch.nn.Linear(5, 2), torch.nn.Linear(2, 5)
        ...     def model(self, x):
        ...         with pyro.plate("data", len(x)):
        ...             z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1).to_event(1))
        ...             pyro.sample("x", dist.Normal(self.decoder(z), 1).to_event(1), obs=x)
        ...     def guide(self, x):
        ...         with pyro.plate("data", len(x)):
        ...             pyro.sample("z", dist.Delta(self.encoder(x)).to_event(1))
        >>> wae = AutoEncoder()
        >>> loss_fn = WAELoss()(wae.model, wae.guide)
        >>> optimiser = torch.optim.Adam(loss_fn.parameters())
        >>> loss_fn(torch.randn(64, 5)).backward()
        >>> optimiser.step()
    """

    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any], loss: WAELoss) -> None:
        nn.Module.__init__(self)
        self.elbo = loss
        for role, program in (("model", model), ("guide", guide)):
            if not callable(program):
                raise TypeError(f"The {role} must be a module or a function, found {program!r}.")
            setattr(self, role, program)
            owner = getattr(program, "__self__", None)
            if isinstance(owner, nn.Module):
                self.add_module(f"{role}_owner", owner)
        for name, module in loss.modules():
            self.add_module(name, module)

    @property
    def terms(self) -> Terms | None:
        """The parts of the last loss."""
        return self.elbo.terms


def _options(given: Any, default: Callable[[], Any], convert: Callable[[Any], Any]) -> Any:
    if given is None:
        return default()
    if isinstance(given, Mapping):
        return {site: convert(option) for site, option in given.items()}
    return convert(given)


def _kept(observations: list[Observation]) -> Tensor | None:
    """Shape (K, n): which data have anything observed; None if all have."""
    masks = [observation.kept for observation in observations]
    known = [mask for mask in masks if mask is not None]
    return torch.stack(known).any(0) if len(known) == len(masks) else None


def _mean_costs(costs: Sequence[Mapping[str, Tensor]], kept: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """The mean over particles and unmasked data of each observed site's cost."""
    masks = [mask for mask in kept if mask is not None]
    mask = joined(masks) if len(masks) == len(kept) else None
    means = {}
    for site in costs[0]:
        values = joined([run_costs[site] for run_costs in costs])
        means[site] = values.mean() if mask is None else values.where(mask, 0.0).sum() / mask.sum().clamp(min=1)
    return means


def _check_count(argument: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{argument} must be a whole number >= 1, found {value!r}. Write {argument}=1.")


def _nan_message(step: _Step, condition: str | None) -> str:
    for site, columns in step.columns.items():
        if step.codes[..., columns].isnan().any():
            return f"The codes of latent site '{site}' hold NaN: look at the guide's output or lower the rate."
    if step.condition is not None and step.condition.isnan().any():
        return f"The condition '{condition}' holds NaN: look at the data."
    for site, value in step.costs.items():
        if value.isnan():
            return f"The cost of observed site '{site}' is NaN: look at the data and at the model's output."
    for site, value in step.penalties.items():
        if value.isnan():
            return "The penalty" + (f" of latent site '{site}'" if site else "") + " is NaN, though the codes are not."
    return "The loss is NaN, though its parts are not: the penalty weight times the penalty overflows."
