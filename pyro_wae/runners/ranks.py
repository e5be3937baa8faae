"""Several processes: the codes, prior samples and costs of all ranks, compared as one batch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_wae._core.programs import trial_run
from pyro_wae.distributed import (
    GroupLike,
    are_equal,
    average_gradients,
    check_same,
    exchange,
    explained,
    group_of,
    mark,
    small_device,
)
from pyro_wae.step.observe import Observer, Runner
from pyro_wae.step.parts import check_guide, check_once, prior_values
from pyro_wae.step.records import Step


class _Report(NamedTuple):
    """What the ranks tell each other of a step before they exchange tensors."""

    stage: int
    data: int = 0
    random: int = 0
    structure: int = 0
    data_size: int = 0
    prior: int = 0
    prior_varies: int = 0
    masks_codes: int = 0
    masks_costs: int = 0
    masks_condition: int = 0


FAILED, STARTS, STEPS = 0, 1, 2
"""The stages at which ranks may be: a run failed, a first training step begins, or a step has run its nets."""


class Ranks(Runner):
    """The processes whose batches a loss takes for one.

    Args:
        group: A process group, or "world" for the default one, which is looked up at the first step.
        runner: How each rank runs its own data.
    """

    def __init__(self, group: GroupLike, runner: Runner) -> None:
        self.group = group
        self.runner = runner
        self._seed = 0
        self._has_one_start = self._has_one_state = self._has_agreed = False

    def observe(self, observer: Observer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Step:
        """Runs model and guide on this rank's data, and joins the steps of all ranks.

        Every rank computes the same loss from it. A gradient therefore reaches a rank's own rows as it would in one
        process, and it is multiplied by the number of ranks: the mean over ranks of the parameters' gradients is that
        of one process with all rows.

        Raises:
            ValueError: If the ranks have one random state, or their steps do not go together.
            RuntimeError: If another rank fails, has ended, or does not answer within the group's time-out.
        """
        group = group_of(self.group)
        # Before the run, after which ranks with different numbers of data have different random states anyway.
        random = int(torch.randint(2**62, (), device="cpu"))
        with self._telling_of_failure():
            step = self.runner.observe(observer, args, kwargs)
            if distributed.get_world_size(group) > 1:
                check_guide(observer.guide, step, "all ranks")
                check_once(step, "process_group")
            text, report = _describe(step), _report(step, random)
        reports = self._exchange(report)
        self._check(reports, text)
        self._seed = reports[0].random
        sizes = [report.data for report in reports]
        whole = self.rows(_tree_of(step, reports), sizes)
        changes = {"kept": None, "seen": None, **whole}
        if step.condition is not None:
            changes["condition"] = whole["condition"][0]
            changes["condition_is_masked"] = any(report.masks_condition for report in reports)
        fields = {field.name: getattr(step, field.name) for field in dataclasses.fields(step)} | changes
        fields |= {"data_size": _data_size(reports), "prior_varies": _prior_varies(reports)}
        return _StepOfRanks(**fields, ranks=self, own=step, sizes=sizes)

    @contextmanager
    def training(self, observer: Observer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
        """Averages the gradients of the parameters of Pyro's store that are read meanwhile.

        Raises:
            ValueError: If the ranks have other parameters.
            RuntimeError: If another rank fails, has ended, or does not answer within the group's time-out.
        """
        self._start(observer, args, kwargs)
        with poutine.trace(param_only=True) as seen:
            yield
        average_gradients(_parameters(seen.trace).values(), process_group=self.group)

    def _start(self, observer: Observer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Before the first step, gives the parameters of Pyro's store that a run reads the values of the first rank."""
        if self._has_one_start:
            return
        group_of(self.group)  # which is missing, if it is, before the run
        with trial_run():
            with self._telling_of_failure(), poutine.trace(param_only=True) as seen:
                self.runner.observe(observer, args, kwargs)
            self._exchange(_Report(STARTS))
        self._copy_of_first(_parameters(seen.trace))
        self._has_one_start = True

    def _share(self, found: Callable[[], Iterable[tuple[str, nn.Module]]]) -> None:
        """At the first step, gives modules, such as a discriminator, the parameters and buffers of the first rank.

        Raises:
            ValueError: If the modules are not alike on all ranks; the message names the option of the loss.
        """
        if self._has_one_state:
            return
        modules = list(found())
        self._check_options(modules)
        tensors = {
            f"{name}.{key}": value
            for name, module in modules
            for key, value in (*module.named_parameters(), *module.named_buffers())
        }
        made = {name: value for name, value in tensors.items() if not nn.parameter.is_lazy(value)}
        self._copy_of_first(made)
        # What a function makes when it first sees codes is there at the next step.
        self._has_one_state = len(made) == len(tensors)

    @contextmanager
    def comparing(self, step: Step, modules: Callable[[], Iterable[tuple[str, nn.Module]]]) -> Iterator[None]:
        """Lets all ranks draw the same numbers, as a penalty's random directions, and then go on with their own.

        Raises:
            ValueError: At the first step, if the modules are not alike on all ranks.
        """
        self._share(modules)
        device = step.codes.device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.default_generator.manual_seed(self._seed)
            for own in devices:
                torch.cuda.default_generators[own.index].manual_seed(self._seed)
            yield

    def agree(self, loss: Tensor) -> None:
        self._has_agreed = self._has_agreed or are_equal(loss, group_of(self.group))

    def rows(self, tree: Any, sizes: Sequence[int]) -> Any:
        """Sets the rows of all ranks behind one another.

        Args:
            tree: A tree of tensors with the data along their second dimension.
            sizes: The number of data of each rank.

        Returns:
            A tree of the same form. A gradient reaches the own rows, times the number of ranks.
        """
        tensors, spec = tree_flatten(tree)
        group = group_of(self.group)
        rank = distributed.get_rank(group)
        rows = [tensor.movedim(1, 0) for tensor in tensors]
        # As bytes, all of them go in one message, whatever their types, and arrive as they were.
        packed = [_copy(row.detach().flatten(1)).view(torch.uint8).to(rows[0].device) for row in rows]
        sent = torch.cat(packed, 1)
        sent = torch.cat([sent, sent.new_zeros(max(sizes) - len(sent), sent.shape[1])])
        received = sent.new_empty(len(sizes), *sent.shape)
        with explained(group):
            distributed.all_gather(list(received.unbind()), sent, group=group)
        everyone = torch.cat([received[other, :size] for other, size in enumerate(sizes)])
        first, last = sum(sizes[:rank]), sum(sizes[: rank + 1])
        joined = []
        for row, part in zip(rows, everyone.split([part.shape[1] for part in packed], 1), strict=True):
            whole = _copy(part).view(row.dtype).reshape(-1, *row.shape[1:]).to(row.device)
            if row.requires_grad:
                whole = torch.cat([whole[:first], _times(row, len(sizes)), whole[last:]])
            joined.append(whole.movedim(0, 1))
        return tree_unflatten(joined, spec)

    def _check(self, reports: Sequence[_Report], text: str) -> None:
        first: dict[int, int] = {}
        for rank, report in enumerate(reports):
            before = first.setdefault(report.random, rank)
            if before != rank:
                raise ValueError(
                    f"Ranks {before} and {rank} have the same random state: their prior samples are the same "
                    "and count as one. Give each rank a seed of its own, after the nets are made: "
                    "pyro.set_rng_seed(seed + torch.distributed.get_rank())."
                )
        if any(report.structure != reports[0].structure for report in reports):
            texts: list[Any] = [None] * len(reports)
            distributed.all_gather_object(texts, text, group=group_of(self.group))
            rank = next(rank for rank, other in enumerate(texts) if other != texts[0])
            raise ValueError(
                f"The ranks compare their codes together, and their steps differ. Rank 0: {texts[0]}. Rank {rank}: "
                f"{texts[rank]}. Sequences are padded to one length on all ranks, and every rank takes every step."
            )
        sizes = [report.data_size for report in reports]
        if len(set(sizes)) > 1:
            found = ", ".join(str(size) if size else "that of its batch" for size in sizes)
            raise ValueError(
                f"The data plate has a size that differs between ranks: {found}. It is the size of the whole data set, "
                "the parts of all ranks together: pyro.plate('data', size, subsample=index)."
            )

    def _check_options(self, modules: Sequence[tuple[str, nn.Module]]) -> None:
        """Raises ValueError unless the options of the loss are the same on all ranks."""
        group = group_of(self.group)
        here = {name: re.sub(r" at 0x[0-9a-fA-F]+", "", repr(module)) for name, module in modules}
        marks = exchange([mark(repr(here))], group)
        if all(other == marks[0] for other in marks):
            return
        options: list[Any] = [None] * len(marks)
        distributed.all_gather_object(options, here, group=group)
        rank, name = next(
            (rank, name)
            for rank, other in enumerate(options)
            for name in {**options[0], **other}
            if options[0].get(name) != other.get(name)
        )
        raise ValueError(
            f"The option {OPTIONS.get(name, name)!r} of WAELoss differs between ranks: {options[0].get(name)} on rank "
            f"0, {options[rank].get(name)} on rank {rank}. Make the loss with the same arguments on all ranks."
        )

    @contextmanager
    def _telling_of_failure(self) -> Iterator[None]:
        """Lets the other ranks, which wait for this one, know at once that it will not come."""
        try:
            yield
        except Exception:
            # Should that fail as well, the first error is the one to see.
            with suppress(RuntimeError, ValueError):
                self._exchange(_Report(FAILED))
            raise

    def _exchange(self, report: _Report) -> list[_Report]:
        reports = [_Report(*numbers) for numbers in exchange(report, group_of(self.group))]
        failed = [rank for rank, other in enumerate(reports) if other.stage == FAILED]
        if failed and report.stage != FAILED:
            raise RuntimeError(
                f"Model and guide failed on rank {', '.join(map(str, failed))}, whose own error says why; the other "
                "ranks cannot go on without it."
            )
        if not failed and len({other.stage for other in reports}) > 1:
            starting = next(rank for rank, other in enumerate(reports) if other.stage == STARTS)
            stepping = next(rank for rank, other in enumerate(reports) if other.stage == STEPS)
            raise ValueError(
                f"Rank {starting} takes its first training step (loss_and_grads) while rank {stepping} evaluates or "
                "takes another kind of step. Every rank takes the same steps in the same order: let all ranks "
                "evaluate, or none."
            )
        return reports

    def _copy_of_first(self, tensors: dict[str, Tensor]) -> None:
        group = group_of(self.group)
        names = [f"{name} {value.dtype} {tuple(value.shape)}" for name, value in tensors.items()]
        check_same("parameters or buffers", names, group)
        with torch.no_grad(), explained(group):
            for value in tensors.values():
                copy = value.detach().to(small_device(group)).contiguous()
                distributed.broadcast(copy, distributed.get_global_rank(group, 0), group=group)
                value.detach().copy_(copy)


OPTIONS = {"weight": "penalty_weight"}
"""Names of modules of a loss that are not those of its arguments."""


@dataclass(frozen=True, kw_only=True)
class _StepOfRanks(Step):
    """The step of all ranks; its runs are those of this rank.

    Args:
        ranks: Where the others are.
        own: The step of this rank.
        sizes: Number of data of each rank.
    """

    ranks: Ranks
    own: Step
    sizes: Sequence[int]

    def prior_log_prob(self, z: Tensor) -> Tensor:
        if self.prior_varies:
            raise ValueError(
                "The prior may depend on the datum, as that of several latent sites or of one beside other random "
                "choices, and its log density is known only for the data of this rank. Leave process_group out, which "
                "lets each rank compare its own codes, or take a penalty that needs draws alone, such as MMD()."
            )
        # The own density takes so many rows at a time, which may be any, since the prior is one for all data.
        size = len(self.codes) * self.own.data
        rows = z.flatten(0, 1)
        padded = torch.cat([rows, rows[:1].expand(-len(rows) % size, -1)])
        found = self.own.part(list(self.columns)).prior_log_prob(padded.unflatten(0, (-1, self.own.data)))
        return found.flatten()[: len(rows)].reshape(z.shape[:2])

    def variances(self) -> Tensor:
        return self._of_all(self.own.part(list(self.columns)).variances())

    def divergences(self) -> Tensor:
        return self._of_all(self.own.part(list(self.columns)).divergences())

    def _of_all(self, own: Tensor) -> Tensor:
        (whole,) = self.ranks.rows([own], list(self.sizes))
        return whole


def _copy(rows: Tensor) -> Tensor:
    # `contiguous` leaves the strides and the place of a single row or column as they are, which no other type may have.
    return rows.clone(memory_format=torch.contiguous_format)


def _times(rows: Tensor, factor: int) -> Tensor:
    """The same rows with a gradient multiplied by the factor."""
    rows = rows.view_as(rows)
    rows.register_hook(lambda gradient: factor * gradient)
    return rows


def _describe(step: Step) -> str:
    sizes = {site: columns.stop - columns.start for site, columns in step.columns.items()}
    condition, draws = step.condition, 0 if step.prior is None else len(step.prior)
    dtypes = [str(value.dtype) for value in (step.codes, *([] if step.prior is None else [step.prior]))]
    dtypes += [str(value.dtype) for value in step.costs.values()]
    return (
        f"latent sites with numbers in a code {sizes}, sites with a cost {list(step.costs)}, {' '.join(dtypes)}, "
        f"{len(step.codes)} particles, {draws} prior samples of each datum"
        + ("" if condition is None else f", a condition of shape {tuple(condition.shape[1:])} and {condition.dtype}")
        + (", with gradients" if torch.is_grad_enabled() else ", without gradients")
    )


def _report(step: Step, random: int) -> _Report:
    return _Report(
        STEPS,
        data=step.data,
        random=random,
        structure=mark(_describe(step)),
        data_size=step.data_size or 0,
        prior=0 if step.prior_varies and step.data > 1 else _mark_of_prior(step),
        prior_varies=step.prior_varies,
        masks_codes=step.kept is not None,
        masks_costs=step.seen is not None,
        masks_condition=step.condition_is_masked,
    )


def _mark_of_prior(step: Step) -> int:
    # Parameters are the same on all ranks, and may be many.
    fixed = [value for value in prior_values(step) if not value.requires_grad]
    return mark(b"".join(_copy(value.flatten()).view(torch.uint8).numpy().tobytes() for value in fixed))


def _prior_varies(reports: Sequence[_Report]) -> bool:
    """Whether a prior depends on its datum, within a rank or between them."""
    # Of a single datum nobody can tell, and it counts as one whose prior does.
    several = [report for report in reports if report.data > 1] or reports
    return any(report.prior_varies for report in several) or any(r.prior != reports[0].prior for r in reports)


def _data_size(reports: Sequence[_Report]) -> int | None:
    size = reports[0].data_size
    return None if size in (0, sum(report.data for report in reports)) else size


def _tree_of(step: Step, reports: Sequence[_Report]) -> dict[str, Any]:
    """The tensors of this rank that have a row for each datum, those that any rank has."""
    tree: dict[str, Any] = {"codes": step.codes, "costs": dict(step.costs)}
    if step.prior is not None:
        tree["prior"] = step.prior
    if any(report.masks_codes for report in reports):
        tree["kept"] = torch.ones_like(step.codes, dtype=torch.bool) if step.kept is None else step.kept
    if any(report.masks_costs for report in reports):
        like = next(iter(step.costs.values()))
        tree["seen"] = torch.ones_like(like, dtype=torch.bool) if step.seen is None else step.seen
    if step.condition is not None:
        tree["condition"] = step.condition[None]
    return tree


def _parameters(trace: Any) -> dict[str, Tensor]:
    """The parameters, as an optimiser sees them, in one order on all ranks."""
    sites = {name: site["value"] for name, site in sorted(trace.nodes.items()) if site["type"] == "param"}
    return {name: value.unconstrained() for name, value in sites.items()}
