"""One step over more data than the nets can hold: they run in micro-batches, and the penalty sees all codes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from pyro_wae._core.batch_norm import batch_norm_at_rest
from pyro_wae._core.buffers import Buffers
from pyro_wae._core.private import HANDLERS, is_compiled
from pyro_wae._core.programs import add_note, owners, part_of, tensors_of, trial_run
from pyro_wae._core.random_state import random_state, restored_random_state, same_generators, set_random_state
from pyro_wae.step.observe import Observer, Runner
from pyro_wae.step.parts import check_guide, join, priors_differ
from pyro_wae.step.program import Run
from pyro_wae.step.records import Step


class MicroBatches(Runner):
    """Runs model and guide on a few data at a time, as if on all at once.

    Each run keeps no activations: its part of the backward pass runs it again, with the same random numbers and
    buffers, under the same handlers, and leaves buffers such as BatchNorm's running statistics as they are. What
    depends on all data, the penalty before all, is in the graph as ever. The gradient is therefore that of all data at
    once.

    Args:
        rows: The most data in a run.

    Source: Chen, Xu, Zhang, Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016, arXiv:1604.06174, for
    runs that are repeated in the backward pass.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._is_warm = False

    def observe(self, observer: Observer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Step:
        """Observes all data.

        Raises:
            ValueError: If the arguments do not say what the data are, or the data plate does not follow them.
        """
        try:
            batches = list(_split(args, kwargs, self.rows))
        except Exception as error:
            add_note(error, args, kwargs)
            raise
        if len(batches) == 1:
            return observer.observe(args, kwargs)
        if torch.is_grad_enabled():
            nets = [net for program in (observer.model, observer.guide) for net in owners(program)]
            modules = list(dict.fromkeys(module for net in nets for module in net.modules()))
            if not self._is_warm:
                _warm_up(observer, batches[0], modules)
                self._is_warm = True
            parts = [_without_activations(observer, batch, modules) for batch in batches]
        else:
            parts = [_run(observer, batch) for batch in batches]
        check_guide(observer.guide, parts[0], "all micro-batches")
        step = join(parts, 1)
        if not step.prior_varies and priors_differ(parts):
            step = dataclasses.replace(step, prior_varies=True)
        return step


@dataclass(frozen=True)
class _Batch:
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    start: int
    rows: int


def _split(args: Sequence[Any], kwargs: Mapping[str, Any], rows: int) -> Iterator[_Batch]:
    first = next((tensor for value in (*args, *kwargs.values()) for tensor in tensors_of(value)), None)
    if first is None:
        found = ", ".join(type(value).__name__ for value in (*args, *kwargs.values())) or "none"
        raise ValueError(
            f"micro_batch={rows} splits the tensor arguments of model and guide along their first dimension, and those "
            f"in dicts, but of the arguments ({found}) none is a tensor with a dimension. Give the data as an "
            "argument: svi.step(x)."
        )
    n = len(first)
    for start in range(0, max(n, 1), rows):
        part = slice(start, start + rows)
        yield _Batch([part_of(value, part, n) for value in args], part_of(kwargs, part, n), start, min(rows, n - start))


def _run(observer: Observer, batch: _Batch) -> Step:
    try:
        step = observer.observe(batch.args, batch.kwargs)
    except Exception as error:
        error.add_note(
            f"micro_batch: this was the run on the data {batch.start} to {batch.start + batch.rows - 1} alone. A plate "
            "takes its size from them, as in pyro.plate('data', len(x))."
        )
        split = [
            x for value in (*batch.args, *batch.kwargs.values()) for x in tensors_of(value) if len(x) == batch.rows
        ]
        if len(split) > 1 and not split[0].is_floating_point():
            error.add_note(
                "micro_batch: every tensor argument as long as the first is split with it, also a table to be indexed. "
                "Keep that one in a list, which stays whole: svi.step(index, [x_all])."
            )
        raise
    _check_plates(step, batch)
    return dataclasses.replace(step, runs=[[_latents_alone(run) for run in step.runs[0]]])


def _latents_alone(run: Run) -> Run:
    """A run with traces of its latent sites alone: the rest, the decoder's output before all, fills memory."""
    alone, traces = copy.copy(run), []
    for trace in (run.model, run.guide):
        kept = poutine.Trace()
        kept.nodes.update((name, node) for name, node in trace.nodes.items() if name in run.latents)
        traces.append(kept)
    alone.model, alone.guide = traces
    alone.observed, alone.factors = {}, []
    return alone


def _check_plates(step: Step, batch: _Batch) -> None:
    nodes = [item for run in step.runs[0] for trace in (run.guide, run.model) for item in trace.nodes.items()]
    for name, node in nodes:
        if node["type"] == "sample" and site_is_subsample(node):
            size, drawn = node["fn"].size, node["fn"].subsample_size
            if drawn is not None and drawn < size:
                raise ValueError(
                    f"The plate '{name}' draws {drawn} of {size} by itself, which every micro-batch would do anew. "
                    "Draw the indices outside, give them as an argument, and write, in model and guide (for an "
                    f"autoguide in create_plates): pyro.plate('{name}', {size}, subsample=index)."
                )
    if step.data != batch.rows:
        plate = step.first.plate
        raise ValueError(
            f"The data plate '{plate}' has {step.data} data in a micro-batch of {batch.rows}. The first tensor "
            "argument says how many data there are, and every tensor argument of that length is split. Give the "
            f"data, or their indices, as the first argument, and write pyro.plate('{plate}', len(x)) or "
            f"pyro.plate('{plate}', size, subsample=index)."
        )


def _warm_up(observer: Observer, batch: _Batch, modules: Sequence[nn.Module]) -> None:
    """Lets model and guide make what they make at their first run, for which a run may draw random numbers."""
    with Buffers(modules).put_back(), trial_run():
        _run(observer, batch)


def _without_activations(observer: Observer, batch: _Batch, modules: Sequence[nn.Module]) -> Step:
    before, buffers = random_state(), Buffers(modules)
    handlers, device = list(HANDLERS), _default_device()
    first: list[tuple[dict[str, Any], list[Tensor]]] = []

    def run_or_repeat() -> Step:
        if not first:
            step = _run(observer, batch)
            buffers.keep_changed()
            first.append((random_state(), _outcome(step)))
            return step
        with _as_then(before, handlers, device), buffers.put_back(), _statistics_at_rest(modules):
            step = _run(observer, batch)
            state, outcome = first[0]
            if not same_generators(state, random_state()):
                raise ValueError(
                    "Model and guide drew other random numbers in the backward pass than before, and its gradient "
                    "would not be that of the loss: they made something at their first run. Run them once before, as "
                    "by svi.evaluate_loss(x)."
                )
            if not all(map(_is_alike, _outcome(step), outcome)):
                raise ValueError(
                    "With micro_batch model and guide run again in the backward pass, and their codes, prior samples "
                    "or costs were not those of before: the gradient would not be that of the loss. Draw with torch's "
                    "global generator, change neither data nor parameters between loss and backward(), and give what "
                    "changes from step to step as an argument. Write svi.step(x, temperature)."
                )
        return step

    # Without its last operations a run would not end at the random numbers where it ended before.
    with set_checkpoint_early_stop(False):
        step: Step = checkpoint(run_or_repeat, use_reentrant=False, preserve_rng_state=False)
    return step


def _outcome(step: Step) -> list[Tensor]:
    """What both runs have in common."""
    return [rows.detach() for rows in (step.codes, step.prior, *step.costs.values()) if rows is not None]


def _is_alike(again: Tensor, first: Tensor) -> bool:
    """Whether a run gave the same numbers, up to rounding: some kernels of an accelerator do not repeat themselves."""
    size = first.abs().nan_to_num(0, 0, 0).amax().item() if first.numel() else 0.0
    return again.shape == first.shape and torch.allclose(again, first, rtol=0.0, atol=0.01 * size, equal_nan=True)


def _statistics_at_rest(modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
    # Of nets that `owners` does not find. Hooks would make compiled ones run other code.
    return nullcontext() if any(map(is_compiled, modules)) else batch_norm_at_rest(saves_alike=True)


@contextmanager
def _as_then(state: dict[str, Any], handlers: list[Any], device: torch.device) -> Iterator[None]:
    """Brings back what a run depends on besides its arguments; the backward pass may come much later."""
    handlers_now = list(HANDLERS)
    with restored_random_state():
        try:
            set_random_state(state)
            HANDLERS[:] = handlers
            # A backward pass on an accelerator has a thread of its own, which knows no default device.
            with nullcontext() if device == _default_device() else device:
                yield
        finally:
            HANDLERS[:] = handlers_now


def _default_device() -> torch.device:
    # torch.get_default_device() of torch 2.6 does not know `with torch.device(...)`.
    return torch.empty(0).device
