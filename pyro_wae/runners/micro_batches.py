"""One step over more data than the nets can hold: they run in micro-batches, and the penalty sees all codes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.effect import AutoMessenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from pyro_wae._core.batch_norm import batch_norm_at_rest
from pyro_wae.penalties import PenaltyContext
from pyro_wae.step.condition import Given
from pyro_wae.step.context import penalty_context
from pyro_wae.step.prior import distribution_tensors
from pyro_wae.step.program import Particle, Structure
from pyro_wae.step.records import Codes, Layout

__all__ = ["MicroBatches", "Runs", "check_guide", "of_size", "prior_values"]

Gather = Callable[[Sequence[Any], Mapping[str, Any]], "Runs"]


@dataclass(frozen=True)
class Runs:
    """What the runs of model and guide in one step have given.

    Args:
        structure: What their sites are.
        particles: The runs.
        codes: The codes of each run.
        prior: Prior draws, each of shape (K, n, d).
        costs: The cost of each observed site in each run, of shape (K, n).
        kept: For each run which data have anything observed, of shape (K, n); None if all have.
        given: What the model is conditional on, or None.
        context: What a penalty may know of codes at some or all latent sites.
    """

    structure: Structure
    particles: Sequence[Particle]
    codes: Sequence[Codes]
    prior: Sequence[Tensor]
    costs: Sequence[Mapping[str, Tensor]]
    kept: Sequence[Tensor | None]
    given: Given | None
    context: Callable[[Codes], PenaltyContext]


class MicroBatches:
    """Runs model and guide on a few data at a time, as if on all at once.

    Each run keeps no activations: its part of the backward pass runs it again, with the same random numbers, under the
    same handlers, and with BatchNorm's running statistics left alone. What depends on all data, the penalty before
    all, is in the graph as ever, so that the gradient is that of all data at once.

    Args:
        rows: The most data in a run.

    Source: Chen, Xu, Zhang, Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016, arXiv:1604.06174, for
    runs that are repeated in the backward pass.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._is_warm = False

    def gather(self, gather: Gather, guide: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Runs:
        """Gathers the runs on all data.

        Args:
            gather: Runs model and guide with given arguments and keyword arguments.
            guide: The guide, which must not hold parameters for each datum that it cannot tell from others.
            args: Arguments for all data.
            kwargs: Keyword arguments for all data.

        Raises:
            ValueError: If the arguments do not say what the data are, or the data plate does not follow them.
        """
        batches = list(_split(args, kwargs, self.rows))
        if len(batches) == 1:
            return gather(args, kwargs)
        is_training = torch.is_grad_enabled()
        if is_training and not self._is_warm:
            _warm_up(gather, batches[0])
            self._is_warm = True
        parts = []
        start = 0
        for batch in batches:
            run = functools.partial(_run, gather, batch, start)
            parts.append(_without_activations(run) if is_training else run())
            start += batch.rows
        check_guide(guide, parts[0], "all micro-batches")
        return _join(parts)


@dataclass(frozen=True)
class _Batch:
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    rows: int


def _split(args: Sequence[Any], kwargs: Mapping[str, Any], rows: int) -> Iterator[_Batch]:
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim]
    if not tensors:
        found = ", ".join(type(value).__name__ for value in (*args, *kwargs.values())) or "none"
        raise ValueError(
            f"micro_batch={rows} splits the tensor arguments of model and guide along their first dimension, but of "
            f"the arguments ({found}) none is a tensor with a dimension. Give the data as an argument: svi.step(x)."
        )
    n = len(tensors[0])

    def part(value: Any, start: int) -> Any:
        return value[start : start + rows] if isinstance(value, Tensor) and value.ndim and len(value) == n else value

    for start in range(0, max(n, 1), rows):
        yield _Batch(
            [part(value, start) for value in args],
            {name: part(value, start) for name, value in kwargs.items()},
            min(rows, n - start),
        )


def _run(gather: Gather, batch: _Batch, start: int) -> Runs:
    try:
        runs = gather(batch.args, batch.kwargs)
    except Exception as error:
        error.add_note(
            f"micro_batch: this was the run on the data {start} to {start + batch.rows - 1} alone. A plate takes its "
            "size from them, as in pyro.plate('data', len(x))."
        )
        raise
    _check_plates(runs, batch)
    # The rest of a trace, the decoder's output before all, would fill the memory that is to be saved.
    particles = [
        dataclasses.replace(
            particle,
            model=_latents_alone(particle.model, runs.structure),
            guide=_latents_alone(particle.guide, runs.structure),
        )
        for particle in runs.particles
    ]
    context = functools.partial(penalty_context, particles, runs.structure)
    return dataclasses.replace(runs, particles=particles, context=context)


def _check_plates(runs: Runs, batch: _Batch) -> None:
    sites = [item for run in runs.particles for trace in (run.guide, run.model) for item in trace.nodes.items()]
    for name, site in sites:
        if site["type"] == "sample" and site_is_subsample(site):
            size, drawn = site["fn"].size, site["fn"].subsample_size
            if drawn is not None and drawn < size:
                raise ValueError(
                    f"The plate '{name}' draws {drawn} of {size} by itself, which every micro-batch would do anew. "
                    "Draw the indices outside, give them as an argument, and write, in model and guide (for an "
                    f"autoguide in create_plates): pyro.plate('{name}', {size}, subsample=index)."
                )
    layout = next(iter(runs.structure.latents.values()))
    if layout.data != batch.rows:
        plate = _data_plate(runs)
        raise ValueError(
            f"The data plate '{plate}' has {layout.data} data in a micro-batch of {batch.rows}. The first tensor "
            "argument says how many data there are, and every tensor argument of that length is split. Give the "
            f"data, or their indices, as the first argument, and write pyro.plate('{plate}', len(x)) or "
            f"pyro.plate('{plate}', size, subsample=index)."
        )


def check_guide(guide: Callable[..., Any], runs: Runs, who: str) -> None:
    """Raises ValueError if the guide has parameters for each datum and cannot tell the data of several runs apart.

    Args:
        guide: The guide.
        runs: Its runs on some of the data.
        who: What would share the parameters.
    """
    guide = poutine.unwrap(guide)
    plate = _data_plate(runs)
    if not isinstance(guide, AutoGuide | AutoMessenger) or plate in getattr(guide, "amortized_plates", ()):
        return
    if runs.structure.data_size is None:
        rows = next(iter(runs.structure.latents.values())).data
        raise ValueError(
            f"The guide {type(guide).__name__} has parameters for each datum of the plate '{plate}', and {who} "
            f"would share those of {rows}. Tell it which data it sees: pyro.plate('{plate}', size, "
            "subsample=index), with the indices as an argument."
        )


def _data_plate(runs: Runs) -> str:
    layout = next(iter(runs.structure.latents.values()))
    frames = runs.particles[0].model.nodes[layout.site]["cond_indep_stack"]
    return next(str(frame.name) for frame in frames if frame.dim == layout.data_dim)


def _latents_alone(trace: Any, structure: Structure) -> Any:
    kept = poutine.Trace()
    kept.nodes.update((name, trace.nodes[name]) for name in structure.latents)
    return kept


def _warm_up(gather: Gather, batch: _Batch) -> None:
    """Lets model and guide make what they make at their first run, for which a run may draw random numbers."""
    state = _random_state()
    with poutine.block(), torch.no_grad(), batch_norm_at_rest():
        _run(gather, batch, 0)
    _set_random_state(state)


def _without_activations(run: Callable[[], Runs]) -> Runs:
    before = _random_state()
    handlers, device = list(_PYRO_STACK), torch.get_default_device()
    after: list[dict[str, Any]] = []

    def run_or_repeat() -> Runs:
        if not after:
            runs = run()
            after.append(_random_state())
            return runs
        with _as_then(before, handlers, device), _running_statistics_kept():
            runs = run()
            if not all(map(torch.equal, _generators(after[0]), _generators(_random_state()))):
                raise ValueError(
                    "Model and guide drew other random numbers in the backward pass than before, so that its gradient "
                    "would not be that of the loss: they made something at their first run. Run them once before, as "
                    "by svi.evaluate_loss(x)."
                )
        return runs

    # Without its last operations a run would not end at the random numbers where it ended before.
    with set_checkpoint_early_stop(False):
        runs: Runs = checkpoint(run_or_repeat, use_reentrant=False, preserve_rng_state=False)
    return runs


@contextmanager
def _as_then(random_state: dict[str, Any], handlers: list[Any], device: torch.device) -> Iterator[None]:
    """Brings back what a run depends on besides its arguments; the backward pass may come much later."""
    random_state_now, handlers_now = _random_state(), list(_PYRO_STACK)
    try:
        _set_random_state(random_state)
        _PYRO_STACK[:] = handlers
        # A backward pass on an accelerator has a thread of its own, which knows no default device.
        with nullcontext() if device == torch.get_default_device() else device:
            yield
    finally:
        _PYRO_STACK[:] = handlers_now
        _set_random_state(random_state_now)


def _random_state() -> dict[str, Any]:
    return {**pyro.util.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []}


def _set_random_state(state: dict[str, Any]) -> None:
    pyro.util.set_rng_state({name: value for name, value in state.items() if name != "cuda"})
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def _generators(state: dict[str, Any]) -> list[Tensor]:
    return [state["torch"], *state["cuda"]]


@contextmanager
def _running_statistics_kept() -> Iterator[None]:
    """Keeps BatchNorm's running statistics through a run that saves for its gradient just what the first run saved.

    A layer that does not track them, as in :func:`~pyro_wae._core.batch_norm.batch_norm_at_rest`, saves less.
    """
    resting: dict[_BatchNorm, tuple[float | None, Tensor | None]] = {}

    def rest(layer: nn.Module, inputs: Any) -> None:
        if isinstance(layer, _BatchNorm) and layer.training and layer.track_running_stats:
            resting[layer] = layer.momentum, layer.num_batches_tracked
            layer.momentum, layer.num_batches_tracked = 0.0, None

    def resume(layer: nn.Module, inputs: Any = None, output: Any = None) -> None:
        if isinstance(layer, _BatchNorm) and layer in resting:
            layer.momentum, layer.num_batches_tracked = resting.pop(layer)

    hooks = register_module_forward_pre_hook(rest), register_module_forward_hook(resume)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in list(resting):
            resume(layer)


def _join(parts: Sequence[Runs]) -> Runs:
    first = parts[0]
    for part in parts:
        found, expected = ({site: (c.start, c.stop) for site, c in p.codes[0].columns.items()} for p in (part, first))
        if found != expected or set(part.structure.observed) != set(first.structure.observed):
            raise ValueError(
                f"Micro-batches gave codes of different sites or sizes: {expected} and {found} (site: first and last "
                "column). The model and guide must have one structure within a step."
            )
    structure = _join_structures(parts)
    return Runs(
        structure=structure,
        particles=first.particles,
        codes=[_join_codes(codes) for codes in zip(*(part.codes for part in parts), strict=True)],
        prior=[torch.cat(draws, 1) for draws in zip(*(part.prior for part in parts), strict=True)],
        costs=[
            {site: torch.cat([costs[site] for costs in run_costs], 1) for site in run_costs[0]}
            for run_costs in zip(*(part.costs for part in parts), strict=True)
        ],
        kept=[_join_kept(parts, run) for run in range(len(first.kept))],
        given=_join_given([part.given for part in parts if part.given is not None]),
        context=functools.partial(_joined_context, parts, structure),
    )


def _join_structures(parts: Sequence[Runs]) -> Structure:
    structures = [part.structure for part in parts]
    first = structures[0]
    n = sum(next(iter(structure.latents.values())).data for structure in structures)
    return dataclasses.replace(
        of_size(first, n),
        prior_varies=any(structure.prior_varies for structure in structures) or _priors_differ(parts),
        data_size=None if first.data_size == n else first.data_size,
    )


def of_size(structure: Structure, n: int) -> Structure:
    """The structure of the same sites with n data."""

    def sized(layout: Layout) -> Layout:
        shape = list(layout.shape)
        shape[layout.data_dim] = n
        return dataclasses.replace(layout, shape=tuple(shape))

    return dataclasses.replace(
        structure,
        latents={name: sized(layout) for name, layout in structure.latents.items()},
        observed={name: sized(layout) for name, layout in structure.observed.items()},
    )


def prior_values(runs: Runs) -> list[Tensor]:
    """The tensors of the prior's distributions that can be read without waiting, each without what it only repeats."""
    found = []
    for name in runs.structure.latents:
        for tensor in distribution_tensors(runs.particles[0].model.nodes[name]["fn"]):
            if tensor.device.type == "cpu":
                for dim in range(tensor.ndim if tensor.numel() else 0):
                    first = tensor.narrow(dim, 0, 1)
                    # Not by the size alone, which a code may have in common with the data.
                    tensor = first if torch.equal(tensor, first.expand_as(tensor)) else tensor
                found.append(tensor)
    return found


def _priors_differ(parts: Sequence[Runs]) -> bool:
    """Whether priors that do not vary within any micro-batch do so between them."""
    # On a device that has to be waited for, a tensor counts as varying if it has a row for each datum.
    expected, *others = map(prior_values, parts)
    return any(not torch.equal(value, first) for other in others for value, first in zip(other, expected, strict=True))


def _join_codes(parts: Sequence[Codes]) -> Codes:
    kept = None
    if any(part.kept is not None for part in parts):
        kept = torch.cat(
            [torch.ones_like(part.values, dtype=torch.bool) if part.kept is None else part.kept for part in parts], 1
        )
    return Codes(torch.cat([part.values for part in parts], 1), parts[0].columns, kept)


def _join_kept(parts: Sequence[Runs], run: int) -> Tensor | None:
    if all(part.kept[run] is None for part in parts):
        return None
    masks = []
    for part in parts:
        mask, cost = part.kept[run], next(iter(part.costs[run].values()))
        masks.append(torch.ones_like(cost, dtype=torch.bool) if mask is None else mask)
    return torch.cat(masks, 1)


def _join_given(parts: Sequence[Given]) -> Given | None:
    if not parts:
        return None
    is_masked = any(part.is_masked for part in parts)
    return dataclasses.replace(parts[0], values=torch.cat([part.values for part in parts]), is_masked=is_masked)


def _joined_context(parts: Sequence[Runs], structure: Structure, codes: Codes) -> PenaltyContext:
    sizes = [part.codes[0].values.shape[1] for part in parts]
    masks = [None] * len(parts) if codes.kept is None else codes.kept.split(sizes, 1)
    contexts = [
        part.context(Codes(values, codes.columns, kept))
        for part, values, kept in zip(parts, codes.values.split(sizes, 1), masks, strict=True)
    ]
    densities = [context.prior_log_prob for context in contexts if context.prior_log_prob is not None]
    variances = [context.encoder_variance for context in contexts if context.encoder_variance is not None]

    def log_prob(z: Tensor) -> Tensor:
        return torch.cat([density(rows) for density, rows in zip(densities, z.split(sizes, 1), strict=True)], 1)

    def encoder_variance() -> Tensor:
        return torch.cat([variance() for variance in variances], 1)

    return dataclasses.replace(
        contexts[0],
        data_size=structure.data_size,
        shared_data=codes.kept is not None or structure.prior_varies,
        prior=None if structure.prior_varies else contexts[0].prior,
        prior_log_prob=log_prob if densities else None,
        encoder_variance=encoder_variance,
        kept=codes.kept_rows,
    )
