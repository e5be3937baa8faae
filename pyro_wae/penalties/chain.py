"""Penalties on the steps of a sequence."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyro_wae._core import checks
from pyro_wae.penalties.base import Penalty, as_penalty
from pyro_wae.penalties.context import PenaltyContext, laid_out
from pyro_wae.penalties.mmd import MMD


class Chain(Penalty):
    r"""A penalty on runs of consecutive steps, for codes that are sequences with a Markov prior.

    The codes of the steps t - 1 and t are compared with their prior samples, for every t, and the values averaged,

    .. math:: \sum_t n_t\, D(Q(z_{t-1}, z_t), P(z_{t-1}, z_t)) \,/\, \sum_t n_t

    with the number n_t of data that reach step t. The law of a Markov chain is that of its pairs: if both sides are
    Markov chains, the value is 0 only where the whole sequences have one law. Each comparison is in 2 d dimensions,
    where the joint code of T steps has T d: pairs detect more in long chains with short memory, the joint code in short
    or slowly mixing ones. One penalty serves all pairs: a kernel's length is taken once, from the spread of the prior
    samples within a pair, in the mean over pairs. (:class:`~pyro_wae.penalties.CramerWold` takes it from the first
    pair: give it a gamma.)

    Steps are the latent sites in the model's order, as a loop in ``pyro.markov`` makes them; their number may change
    from batch to batch. Or, with ``step_size``, the cuts of a site that holds a whole sequence. Of ragged sequences, a
    datum that ends before step t is left out of that comparison. The first one is of all data, with 0 where a
    sequence is shorter, as in every masked code. A step that only one datum of a batch reaches cannot be compared.

    Args:
        penalty: What compares each run: a penalty or a function f(codes, prior). Default:
            :class:`~pyro_wae.penalties.MMD`.
        order: Number of consecutive steps in a run: 1 compares each step alone, 2 pairs, as many as there are steps the
            joint code. Take 1 + k where a step of the prior depends on the k before it.
        step_size: Number of coordinates of a code in a step. None: each latent site is a step.
        runs: How many runs to compare in a call, drawn at random. None: all, in a time that grows with their number.

    Raises:
        TypeError: If the penalty cannot be called, or a count is not an integer.
        ValueError: If a count is below 1; when called, if the code has no steps of one size, or no step
            is reached by two data.

    Example:
        >>> import torch
        >>> from pyro_wae.penalties import MMD, Chain
        >>> codes = torch.zeros(10, 6, 2, requires_grad=True)  # 6 steps of 2 numbers
        >>> Chain(MMD(), step_size=2)(codes.flatten(1), torch.randn(20, 12)).backward()

        Of latent sites z_1, z_2, ... in Pyro, beside one that is no step:

        >>> from pyro_wae import WAELoss
        >>> loss = WAELoss({"z_*": Chain(MMD()), "style": MMD()})
    """

    accepts_condition = False

    def __init__(
        self,
        penalty: Penalty | Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        order: int = 2,
        step_size: int | None = None,
        runs: int | None = None,
    ) -> None:
        super().__init__()
        self.penalty = MMD() if penalty is None else as_penalty(penalty)
        self.order = checks.whole("Chain's order", order, write="order=2")
        if step_size is not None:
            step_size = checks.whole("Chain's step_size", step_size, write="step_size=8")
        self.step_size = step_size
        if runs is not None:
            runs = checks.whole("Chain's runs", runs, write="runs=10")
        self.runs = runs
        self.needs_prior_draws = self.penalty.needs_prior_draws

    def prepare_sites(self, codes: Tensor, sites: Mapping[str, slice] | None) -> None:
        if sites is not None or self.step_size is not None:
            size = self._size(codes.shape[-1], sites)
            # Fewer steps than a run has are filled up: this is the size of every run.
            self.penalty.prepare(codes.new_zeros(1, 2, self.order * size))

    def estimate(self, codes: Tensor, prior: Tensor, context: PenaltyContext) -> Tensor:
        runs = list(self._runs(codes, prior, context))
        if not runs:
            raise ValueError(
                f"No step is reached by 2 data of this batch of {codes.shape[1]}, and {self!r} has nothing to "
                "compare. Look at the mask, or use a larger batch."
            )
        if self.needs_prior_draws:
            # Lengths that are still unset are taken from all runs together, each about its own mean, which takes a
            # degree of freedom.
            rows = torch.cat([draws.detach() - draws.detach().mean(0) for _, draws, _ in runs])
            self.penalty.fit(rows * math.sqrt((len(rows) - 1) / (len(rows) - len(runs))))
        total, count = sum(codes.shape[1] for codes, _, _ in runs), len(runs)
        if self.runs is not None:
            runs = [runs[index] for index in torch.randperm(count, device="cpu")[: self.runs].tolist()]
        values = [run[0].shape[1] * self.penalty.estimate(*run) for run in runs]
        return torch.stack(values).sum() * (count / len(runs) / total)  # the mean over choices of runs is that of all

    def _size(self, width: int, sites: Mapping[str, slice] | None) -> int:
        if self.step_size is not None:
            if width % self.step_size:
                raise ValueError(
                    f"A code of {width} numbers is not made of steps of {self.step_size}. Write step_size=d for "
                    "sequences of d numbers a step, laid out step after step: codes (n, T * d)."
                )
            return self.step_size
        if sites is None:
            raise ValueError(
                f"{self!r} needs to know the steps of a code, and here are only its {width} numbers. Train through "
                "WAELoss, where each latent site is a step, or write Chain(MMD(), step_size=d) for codes (n, T * d)."
            )
        sizes = {site: columns.stop - columns.start for site, columns in sites.items()}
        first = next(iter(sizes))
        for site, size in sizes.items():
            if size != sizes[first]:
                raise ValueError(
                    f"Chain takes each latent site for a step, and steps have one size: site '{first}' has "
                    f"{sizes[first]} numbers and site '{site}' {size}. Say which sites are the steps: "
                    f"WAELoss({{'{site.rstrip('0123456789')}*': Chain(MMD()), ...}})."
                )
        return sizes[first]

    def _runs(
        self, codes: Tensor, prior: Tensor, context: PenaltyContext
    ) -> Iterator[tuple[Tensor, Tensor, PenaltyContext]]:
        """Codes, prior samples and context of each run of steps."""
        size = self._size(codes.shape[-1], context.sites)
        shape = codes.shape
        kept = None if context.kept is None else context.kept()
        kept = None if kept is None else laid_out("kept", kept, shape)
        if kept is not None and self.needs_prior_draws and len(prior) % shape[1]:
            raise ValueError(
                f"With PenaltyContext's kept, prior samples come in multiples of the {shape[1]} data, whose masks they "
                f"share, found {len(prior)}. Draw the prior once or several times for each datum."
            )
        # Of fewer steps than a run has, the rest is 0 on both sides, as in every masked code.
        short = (0, max(0, self.order * size - codes.shape[-1]))
        codes, prior = pad(codes, short), pad(prior, short)
        # Read at once: on an accelerator every step by itself would be waited for.
        reached = None if kept is None else pad(kept, short).unflatten(-1, (-1, size)).any(3).any(0).cpu()
        for start in range(codes.shape[-1] // size - self.order + 1):
            stop = start + self.order
            columns = slice(start * size, stop * size)
            if reached is None:
                yield codes[..., columns], prior[..., columns], _part_of(context, shape, columns, None)
                continue
            # The first run is of all data, or those that are shorter than a run would never be seen.
            here = reached[:, :stop].any(1) if start == 0 else reached[:, stop - 1]
            rows = here.nonzero().squeeze(1).to(codes.device)
            if len(rows) >= 2:
                draws = prior[:, columns]
                if self.needs_prior_draws:
                    draws = draws.unflatten(0, (-1, codes.shape[1]))[:, rows].flatten(0, 1)
                yield codes[:, rows][..., columns], draws, _part_of(context, shape, columns, rows)


def _part_of(context: PenaltyContext, shape: torch.Size, columns: slice, rows: Tensor | None) -> PenaltyContext:
    """What is known of some columns and data of codes of a shape."""
    part = PenaltyContext(data_size=context.data_size, shared_data=context.shared_data)
    whole = context.encoder_variance
    if whole is None:
        return part

    def variance() -> Tensor:
        known = laid_out("encoder_variance", whole(), shape)
        known = pad(known, (0, max(0, columns.stop - known.shape[-1])), value=1.0)[..., columns]
        return known if rows is None else known[:, rows]

    return dataclasses.replace(part, encoder_variance=variance)
