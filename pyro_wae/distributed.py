"""Several processes: the codes, prior draws and costs of all ranks, compared as one batch."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_wae._core.batch_norm import batch_norm_at_rest
from pyro_wae.penalties import PenaltyContext
from pyro_wae.runners.micro_batches import Runs, check_guide, of_size, prior_values
from pyro_wae.step.condition import Given
from pyro_wae.step.context import penalty_context
from pyro_wae.step.records import Codes

__all__ = ["GroupLike", "Ranks", "average_gradients", "check_group"]

GroupLike = distributed.ProcessGroup | Literal["world"]


class _Report(NamedTuple):
    """What the ranks tell each other of a step before they exchange tensors."""

    ran: int
    data: int = 0
    random: int = 0
    structure: int = 0
    data_size: int = 0
    prior: int = 0
    prior_varies: int = 0
    masks_codes: int = 0
    masks_costs: int = 0
    masks_condition: int = 0


class Ranks:
    """The processes whose batches a loss takes for one.

    Args:
        group: A process group, or "world" for the default one, which is looked up at the first step.
    """

    def __init__(self, group: GroupLike) -> None:
        self.group = group
        self._seed = 0
        self._has_one_start = False
        self._has_one_state = False

    def gather(self, run: Callable[[], Runs], guide: Callable[..., Any]) -> Runs:
        """Runs model and guide on this rank's data, and joins what the runs of all ranks have given.

        Every rank computes the same loss from it. A gradient therefore reaches a rank's own rows as it would in one
        process, and it is multiplied by the number of ranks, so that the mean over ranks of the parameters'
        gradients is that of one process with all rows.

        Args:
            run: Runs model and guide.
            guide: The guide, which must not hold parameters for each datum that it cannot tell from others.

        Raises:
            ValueError: If the ranks have one random state, or their steps do not go together.
            RuntimeError: If another rank fails, has ended, or does not answer within the group's time-out.
        """
        group = _group(self.group)
        # Before the run, after which ranks with different numbers of data have different random states anyway.
        random = _random_number()
        with self._telling_of_failure():
            runs = run()
            if distributed.get_world_size(group) > 1:
                check_guide(guide, runs, "all ranks")
            text, report = _describe(runs), _report(runs, random)
        reports = [_Report(*numbers) for numbers in self._exchange(report)]
        self._check(reports, text)
        self._seed = reports[0].random
        sizes = [report.data for report in reports]
        whole = self._rows(_tree_of(runs, reports), sizes)
        return _joined(runs, whole, reports, functools.partial(self._context, runs, reports))

    def start_as_one(self, run: Callable[[], object]) -> None:
        """Before the first step, gives the parameters of Pyro's store that a run reads the values of the first rank.

        Args:
            run: Runs model and guide.

        Raises:
            ValueError: If the ranks have other parameters.
            RuntimeError: If another rank fails, has ended, or does not answer within the group's time-out.
        """
        if self._has_one_start:
            return
        _group(self.group)  # which is missing, if it is, before the run
        state = pyro.util.get_rng_state()
        with self._telling_of_failure(), batch_norm_at_rest(), torch.no_grad(), poutine.block():
            with poutine.trace(param_only=True) as seen:
                run()
            parameters = _parameters(seen.trace)
        self._exchange(_Report(ran=1))
        pyro.util.set_rng_state(state)
        self._copy_of_first(parameters)
        self._has_one_start = True

    def share(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        """At the first step, gives modules, such as a discriminator, the parameters and buffers of the first rank.

        Raises:
            ValueError: If they are not alike on all ranks.
        """
        if self._has_one_state:
            return
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
    def same_random_numbers(self, like: Tensor) -> Iterator[None]:
        """Lets all ranks draw the same numbers, as a penalty's random directions, and then go on with their own."""
        devices = [like.device] if like.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.default_generator.manual_seed(self._seed)
            for device in devices:
                torch.cuda.default_generators[device.index].manual_seed(self._seed)
            yield

    @contextmanager
    def averaging(self) -> Iterator[None]:
        """Averages the gradients of the parameters of Pyro's store that are read meanwhile."""
        with poutine.trace(param_only=True) as seen:
            yield
        average_gradients(_parameters(seen.trace).values(), process_group=self.group)

    def _check(self, reports: Sequence[_Report], text: str) -> None:
        first: dict[int, int] = {}
        for rank, report in enumerate(reports):
            before = first.setdefault(report.random, rank)
            if before != rank:
                raise ValueError(
                    f"Ranks {before} and {rank} have the same random state, so that their prior draws are the same "
                    "and count as one. Give each rank a seed of its own, after the nets are made: "
                    "pyro.set_rng_seed(seed + torch.distributed.get_rank())."
                )
        if any(report.structure != reports[0].structure for report in reports):
            texts: list[Any] = [None] * len(reports)
            distributed.all_gather_object(texts, text, group=_group(self.group))
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

    def _context(self, runs: Runs, reports: Sequence[_Report], codes: Codes) -> PenaltyContext:
        """What a penalty may know of the codes of all ranks, from what this rank knows of its own."""
        sizes = [report.data for report in reports]
        rank = distributed.get_rank(_group(self.group))
        own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        kept = None if codes.kept is None else codes.kept[:, own]
        varies = _prior_varies(reports)
        context_of = runs.context
        if runs.structure.prior_varies and not varies:  # a single datum, which could not tell
            structure = dataclasses.replace(runs.structure, prior_varies=False)
            context_of = functools.partial(penalty_context, runs.particles, structure)
        context = context_of(Codes(codes.values[:, own], codes.columns, kept))
        log_prob, variance = context.prior_log_prob, context.encoder_variance
        if log_prob is not None:
            particles = len(runs.codes[0].values)
            log_prob = _no_log_prob if varies else functools.partial(_by_parts, log_prob, particles, sizes[rank])
        return dataclasses.replace(
            context,
            data_size=_data_size(reports),
            shared_data=codes.kept is not None or varies,
            prior=None if varies else context.prior,
            prior_log_prob=log_prob,
            encoder_variance=None if variance is None else functools.partial(self._variance, variance, codes, sizes),
            kept=codes.kept_rows,
        )

    def _variance(self, variance: Callable[[], Tensor], codes: Codes, sizes: Sequence[int]) -> Tensor:
        if codes.kept is not None:  # data whose whole code is masked are left out
            left = codes.kept.any(2).any(0).split(list(sizes))
            sizes = torch.stack([part.sum() for part in left]).tolist()
        (whole,) = self._rows([variance()], sizes)
        return whole

    def _rows(self, tree: Any, sizes: Sequence[int]) -> Any:
        """Sets the rows of all ranks behind one another.

        Args:
            tree: A tree of tensors with the data along their second dimension.
            sizes: The number of data of each rank.

        Returns:
            A tree of the same form. A gradient reaches the own rows, times the number of ranks.
        """
        tensors, spec = tree_flatten(tree)
        group = _group(self.group)
        rank = distributed.get_rank(group)
        rows = [tensor.movedim(1, 0) for tensor in tensors]
        # As bytes, all of them go in one message, whatever their types, and arrive as they were.
        packed = [_copy(row.detach().flatten(1)).view(torch.uint8).to(rows[0].device) for row in rows]
        sent = torch.cat(packed, 1)
        sent = torch.cat([sent, sent.new_zeros(max(sizes) - len(sent), sent.shape[1])])
        received = sent.new_empty(len(sizes), *sent.shape)
        with _explained(group):
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

    @contextmanager
    def _telling_of_failure(self) -> Iterator[None]:
        """Lets the other ranks, which wait for this one, know at once that it will not come."""
        try:
            yield
        except Exception:
            # Should that fail as well, the first error is the one to see.
            with suppress(RuntimeError):
                self._exchange(_Report(ran=0))
            raise

    def _exchange(self, report: _Report) -> list[list[int]]:
        reports = _exchange(report, _group(self.group))
        failed = [rank for rank, (ran, *_) in enumerate(reports) if not ran]
        if failed and report.ran:
            raise RuntimeError(
                f"Model and guide failed on rank {', '.join(map(str, failed))}, whose own error says why; the other "
                "ranks cannot go on without it."
            )
        return reports

    def _copy_of_first(self, tensors: dict[str, Tensor]) -> None:
        group = _group(self.group)
        names = [f"{name} {value.dtype} {tuple(value.shape)}" for name, value in tensors.items()]
        _check_same("parameters or buffers", names, group)
        with torch.no_grad(), _explained(group):
            for value in tensors.values():
                copy = value.detach().to(_device(group)).contiguous()
                distributed.broadcast(copy, distributed.get_global_rank(group, 0), group=group)
                value.detach().copy_(copy)


def average_gradients(parameters: Iterable[Tensor], *, process_group: GroupLike = "world") -> None:
    """Replaces each parameter's gradient by its mean over all ranks, as DDP does in the backward pass.

    It is for a loop of one's own without DDP, between ``backward`` and the optimiser's step. An ``SVI`` does not need
    it: ``WAELoss(process_group=...)`` does it in ``loss_and_grads``. A gradient that is missing on some ranks counts as
    0 there, and one that no rank has stays missing.

    Args:
        parameters: The same parameters on all ranks, in the same order.
        process_group: A process group, or "world" for the default one.

    Raises:
        ValueError: If the parameters are not alike on all ranks, or there is no process group.
        RuntimeError: If another rank has ended, or does not answer within the group's time-out.

    Example:
        >>> import torch
        >>> from pyro_wae import WAELoss
        >>> def step(module, optimizer, x):  # module = WAELoss(process_group="world")(model, guide)
        ...     optimizer.zero_grad()
        ...     module(x).backward()
        ...     average_gradients(module.parameters())
        ...     optimizer.step()
    """
    check_group(process_group)
    group = _group(process_group)
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    _check_same("parameters", [f"{p.dtype} {tuple(p.shape)}" for p in learning], group)
    kinds: dict[Any, list[Tensor]] = {}
    for parameter in learning:
        kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for alike in kinds.values():
        has = alike[0].new_tensor([float(parameter.grad is not None) for parameter in alike])
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in alike]
        flat = torch.cat([has, *(gradient.detach().flatten() for gradient in gradients)])
        with _explained(group):
            distributed.all_reduce(flat, group=group)
        counts, *means = (flat / distributed.get_world_size(group)).split([len(alike), *(p.numel() for p in alike)])
        for parameter, count, mean in zip(alike, counts.tolist(), means, strict=True):
            if count:
                parameter.grad = mean.reshape(parameter.shape)


def check_group(group: object) -> None:
    """Raises TypeError unless it is a process group or "world"."""
    if group != "world" and not isinstance(group, distributed.ProcessGroup):
        raise TypeError(
            f"process_group must be 'world', a process group that this rank belongs to, or None, found {group!r}. "
            "Write process_group='world'."
        )


def _group(group: GroupLike) -> distributed.ProcessGroup:
    if group != "world":
        return group
    if not (distributed.is_available() and distributed.is_initialized()):
        raise ValueError(
            "process_group='world' compares the codes of all ranks, and there is no process group. Call "
            "torch.distributed.init_process_group('gloo') first, in a script that is started by torchrun, or leave "
            "process_group out."
        )
    world = distributed.group.WORLD
    assert world is not None  # is_initialized
    return world


def _device(group: distributed.ProcessGroup) -> torch.device:
    """Where small messages are sent from: the CPU if the group has a backend there."""
    if "cpu:" in distributed.get_backend_config(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _exchange(numbers: Sequence[int], group: distributed.ProcessGroup) -> list[list[int]]:
    sent = torch.tensor(numbers, device=_device(group))
    received = sent.new_empty(distributed.get_world_size(group), len(sent))
    with _explained(group):
        distributed.all_gather(list(received.unbind()), sent, group=group)
    return received.tolist()


def _check_same(what: str, names: Sequence[str], group: distributed.ProcessGroup) -> None:
    marks = _exchange([_mark("; ".join(names)), len(names)], group)
    other = next((rank for rank, mark in enumerate(marks) if mark != marks[0]), None)
    if other is not None:
        raise ValueError(
            f"The {what} of rank {other} ({marks[other][1]}) are not those of rank 0 ({marks[0][1]}) in name, type or "
            "shape. Make the same nets on all ranks, and load the same checkpoint on all or on none."
        )


@contextmanager
def _explained(group: distributed.ProcessGroup) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        error.add_note(
            f"pyro_wae: rank {distributed.get_rank(group)} waited for the other ranks of its process group. One has "
            "ended, has fewer steps than this one, or did not answer within the timeout of init_process_group."
        )
        raise


def _random_number() -> int:
    return int(torch.randint(2**62, (), device="cpu"))


def _mark(text: str | bytes) -> int:
    """A number that tells texts apart, the same in every process; never 0."""
    content = text.encode() if isinstance(text, str) else text
    return 1 + int.from_bytes(hashlib.blake2b(content, digest_size=7).digest())


def _describe(runs: Runs) -> str:
    codes = runs.codes[0]
    sizes = {site: columns.stop - columns.start for site, columns in codes.columns.items()}
    given = None if runs.given is None else (runs.given.values.shape[1:], runs.given.values.dtype)
    dtypes = [str(value.dtype) for value in (codes.values, *runs.prior[:1], *runs.costs[0].values())]
    return (
        f"latent sites with numbers in a code {sizes}, observed sites {list(runs.costs[0])}, {' '.join(dtypes)}, "
        f"{len(runs.codes) * len(codes.values)} particles, {len(runs.prior)} prior draws of each"
        + ("" if given is None else f", a condition of shape {tuple(given[0])} and {given[1]}")
        + (", with gradients" if torch.is_grad_enabled() else ", without gradients")
    )


def _report(runs: Runs, random: int) -> _Report:
    structure = runs.structure
    data = runs.codes[0].values.shape[1]
    return _Report(
        ran=1,
        data=data,
        random=random,
        structure=_mark(_describe(runs)),
        data_size=structure.data_size or 0,
        prior=0 if structure.prior_varies and data > 1 else _mark_of_prior(runs),
        prior_varies=structure.prior_varies,
        masks_codes=any(codes.kept is not None for codes in runs.codes),
        masks_costs=any(kept is not None for kept in runs.kept),
        masks_condition=runs.given is not None and runs.given.is_masked,
    )


def _mark_of_prior(runs: Runs) -> int:
    # Parameters are the same on all ranks, and may be many.
    fixed = [value for value in prior_values(runs) if not value.requires_grad]
    return _mark(b"".join(_copy(value.flatten()).view(torch.uint8).numpy().tobytes() for value in fixed))


def _prior_varies(reports: Sequence[_Report]) -> bool:
    """Whether a prior depends on its datum, within a rank or between them."""
    # Of a single datum nobody can tell, and it counts as one whose prior does.
    several = [report for report in reports if report.data > 1] or reports
    return any(report.prior_varies for report in several) or any(r.prior != reports[0].prior for r in reports)


def _data_size(reports: Sequence[_Report]) -> int | None:
    size = reports[0].data_size
    return None if size in (0, sum(report.data for report in reports)) else size


def _tree_of(runs: Runs, reports: Sequence[_Report]) -> dict[str, Any]:
    """The tensors of this rank that have a row for each datum."""
    tree: dict[str, Any] = {
        "codes": [codes.values for codes in runs.codes],
        "prior": list(runs.prior),
        "costs": [dict(costs) for costs in runs.costs],
    }
    if any(report.masks_codes for report in reports):
        tree["kept_codes"] = [
            torch.ones_like(codes.values, dtype=torch.bool) if codes.kept is None else codes.kept
            for codes in runs.codes
        ]
    if any(report.masks_costs for report in reports):
        tree["kept"] = [
            torch.ones_like(next(iter(costs.values())), dtype=torch.bool) if kept is None else kept
            for kept, costs in zip(runs.kept, runs.costs, strict=True)
        ]
    if runs.given is not None:
        tree["given"] = runs.given.values[None]
    return tree


def _joined(
    runs: Runs, whole: dict[str, Any], reports: Sequence[_Report], context: Callable[[Codes], PenaltyContext]
) -> Runs:
    masks = whole.get("kept_codes", [None] * len(runs.codes))
    given: Given | None = None
    if runs.given is not None:
        is_masked = any(report.masks_condition for report in reports)
        given = dataclasses.replace(runs.given, values=whole["given"][0], is_masked=is_masked)
    structure = of_size(runs.structure, sum(report.data for report in reports))
    return dataclasses.replace(
        runs,
        structure=dataclasses.replace(structure, prior_varies=_prior_varies(reports), data_size=_data_size(reports)),
        codes=[
            Codes(values, codes.columns, kept)
            for codes, values, kept in zip(runs.codes, whole["codes"], masks, strict=True)
        ],
        prior=whole["prior"],
        costs=whole["costs"],
        kept=whole.get("kept", [None] * len(runs.kept)),
        given=given,
        context=context,
    )


def _copy(rows: Tensor) -> Tensor:
    # `contiguous` leaves the strides and the place of a single row or column as they are, which no other type may have.
    return rows.clone(memory_format=torch.contiguous_format)


def _times(rows: Tensor, factor: int) -> Tensor:
    """The same rows with a gradient multiplied by the factor."""
    rows = rows.view_as(rows)
    rows.register_hook(lambda gradient: factor * gradient)
    return rows


def _by_parts(log_prob: Callable[[Tensor], Tensor], particles: int, n: int, z: Tensor) -> Tensor:
    """The log density of any number of codes (J, N, d), by a function that takes some of n data at a time."""
    rows = z.flatten(0, 1)
    missing = -len(rows) % (particles * n)
    padded = torch.cat([rows, rows[:1].expand(missing, -1)])
    return log_prob(padded.unflatten(0, (-1, n))).flatten()[: len(rows)].reshape(z.shape[:2])


def _no_log_prob(z: Tensor) -> Tensor:
    raise ValueError(
        "The prior depends on the datum, and its log density is known only for the data of this rank. Leave "
        "process_group out, so that each rank compares its own codes, or take a penalty that needs draws alone, such "
        "as MMD()."
    )


def _parameters(trace: Any) -> dict[str, Tensor]:
    """The parameters, as an optimiser sees them, in one order on all ranks."""
    sites = {name: site["value"] for name, site in sorted(trace.nodes.items()) if site["type"] == "param"}
    return {name: value.unconstrained() for name, value in sites.items()}
