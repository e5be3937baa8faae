"""The record of one step, a row for each datum: codes and prior samples are compared, costs and penalties added."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pyro_wae._core.private import without_graph
from pyro_wae._core.rows import joined, working_precision
from pyro_wae.penalties import Penalty, PenaltyContext
from pyro_wae.step.condition import Condition
from pyro_wae.step.encoder import divergence, variances
from pyro_wae.step.options import PenaltyOption, check_names, site_label, sites_of
from pyro_wae.step.prior import prior_log_prob, prior_of_one_code
from pyro_wae.step.program import Run


@dataclass(frozen=True)
class Terms:
    """Cost, penalty and weight of the last loss: detached scalar tensors, whose reading waits for the device.

    Args:
        cost: Mean cost per datum, all observed sites together.
        penalty: The penalty, before its weight; with one penalty for each site, their sum.
        weight: The penalty weight: a number, or a tensor of a :class:`~pyro_wae.weights.Constraint`. The loss per datum
            is ``cost + weight * penalty``.
        costs: The same cost by observed site.
        penalties: The same penalty by latent site; empty where one penalty compares the joint code.
    """

    cost: Tensor
    penalty: Tensor
    weight: float | Tensor
    costs: Mapping[str, Tensor] = field(default_factory=dict)
    penalties: Mapping[str, Tensor] = field(default_factory=dict)

    def as_dict(self) -> dict[str, float]:
        """All parts as numbers, for a logger: ``cost``, ``penalty``, ``weight``, ``cost/x``, ``penalty/z`` ..."""
        numbers = {"cost": float(self.cost), "penalty": float(self.penalty), "weight": float(self.weight)}
        numbers |= {f"cost/{site}": float(value) for site, value in self.costs.items()}
        return numbers | {f"penalty/{site}": float(value) for site, value in self.penalties.items()}

    def __repr__(self) -> str:
        return f"Terms({', '.join(f'{name}={value:.6g}' for name, value in self.as_dict().items())})"


@dataclass(frozen=True)
class Step:
    """What the runs of model and guide in one step have shown of n data, K particles of each.

    Args:
        runs: The runs: for each micro-batch one for each particle that is not vectorised.
        codes: Shape (K, n, d).
        columns: The columns of each latent site.
        kept: Shape (K, n, d), False where an element of a code is masked; None where nothing is.
        prior: Prior samples, shape (J, n, d); None where nothing needs them.
        costs: The cost of each observed site, and what a ``pyro.factor`` adds for each datum, shape (K, n).
        factors: Which of the costs are those of factors.
        once: What a factor outside the data plate adds once for all data, a scalar.
        seen: Shape (K, n): which data have anything observed; None if all have.
        condition: Shape (n, c): what the model is conditional on, labels as integers with c = 1, or floats; or None.
        condition_name: The name of the condition.
        condition_is_masked: Whether a mask leaves out the condition of a datum that has a code.
        data_size: Number of data that the data plate takes a part of; None where it takes all.
        prior_varies: Whether the prior of a datum's code may depend on the datum, as far as can be seen.
        common_scale: The ``poutine.scale`` of everything, which is one of the whole loss.
        penalties: The scaled penalty of each latent site or group, "" that of the joint code, once it has been taken.
        terms: The parts of the loss, detached, once it has been taken.
        balanced_cost: The mean cost, detached, in the unit that the penalty weight balances: without the common scale.
        loss: The sum of costs and weighted penalties, once it has been taken.
    """

    runs: Sequence[Sequence[Run]]
    codes: Tensor
    columns: Mapping[str, slice]
    kept: Tensor | None
    prior: Tensor | None
    costs: Mapping[str, Tensor]
    factors: Sequence[str]
    once: Mapping[str, Tensor]
    seen: Tensor | None
    condition: Tensor | None
    condition_name: str | None
    condition_is_masked: bool
    data_size: int | None
    prior_varies: bool
    common_scale: float | Tensor = 1.0
    penalties: Mapping[str, Tensor] = field(default_factory=dict)
    terms: Terms | None = None
    balanced_cost: Tensor | None = None
    loss: Tensor | None = None

    @property
    def data(self) -> int:
        """Number of data."""
        return self.codes.shape[1]

    @property
    def first(self) -> Run:
        """The first run."""
        return self.runs[0][0]

    def part(self, names: Collection[str]) -> Step:
        """The same with the codes of some sites alone, in the order they have here."""
        if list(names) == list(self.columns):
            return self
        columns, start = {}, 0
        for site, here in self.columns.items():
            if site in names:
                columns[site] = slice(start, start + here.stop - here.start)
                start = columns[site].stop
        codes, kept, prior = (
            None if rows is None else joined([rows[..., self.columns[site]] for site in columns], -1)
            for rows in (self.codes, self.kept, self.prior)
        )
        assert codes is not None
        return dataclasses.replace(self, codes=codes, columns=columns, kept=kept, prior=prior)

    def compared(self, option: PenaltyOption) -> Step:
        """The step with the codes of the sites that have a penalty."""
        if not isinstance(option, dict) or None not in option.values():
            return self
        return self.part(
            [site for key, own in option.items() if own is not None for site in sites_of(key, self.columns)]
        )

    def rows(self) -> tuple[Tensor, Tensor | None]:
        """Codes and prior samples without masked data, other masked elements 0 in both.

        Returns:
            The codes, shape (K, n', d), and the draws, shape (J n', d) or None, with n' data left.
        """
        codes, prior, kept = self.codes, self.prior, self.kept_rows()
        if kept is not None:
            codes = self.left(codes, 1).where(kept, 0.0)
            if prior is not None:
                repeats = math.ceil(len(prior) / len(kept))
                prior = self.left(prior, 1).where(kept.repeat(repeats, 1, 1)[: len(prior)], 0.0)
        return codes, None if prior is None else prior.flatten(0, 1)

    def kept_rows(self) -> Tensor | None:
        """Which numbers of the codes are unmasked, shape (K, n', d), of the n' data left; None if all are."""
        return None if self.kept is None else self.left(self.kept, 1)

    def left(self, rows: Tensor, dim: int) -> Tensor:
        """The data that a mask leaves, of a tensor that has all of them along a dimension, 0 or 1."""
        data = self.data_left
        if data is None:
            return rows
        return rows[data] if dim == 0 else rows[:, data]

    @functools.cached_property
    def data_left(self) -> Tensor | None:
        """Shape (n,): False for data whose whole code is masked; None if there are none."""
        if self.kept is None:
            return None
        whole = self.kept.any(2).any(0)
        return None if bool(whole.all()) else whole

    def prepare(self, option: PenaltyOption, seen: set[str]) -> None:
        """Lets penalties make what depends on the size of a code.

        Args:
            option: The penalties.
            seen: Sites of earlier steps, to which those of this one are added. What was latent may be observed now, as
                the labels of semi-supervised data.

        Raises:
            ValueError: If a dict names a site that is neither latent nor observed, or misses a latent one.

        Warns:
            UserWarning: If a dict names a site that is observed and has not been latent yet.
        """
        if isinstance(option, dict):
            names = {name: None for key in option for name in sites_of(key, self.columns)}
            is_complete = all(name in names for name in self.columns)
            given = [name for name in names if name in self.first.observed and (is_complete or name in seen)]
            absent = [*given, *self.first.left_out]
            check_names(
                "penalty", [name for name in names if name not in absent], list(self.columns), "latent", "MMD()"
            )
            for name in given:
                if name not in seen:
                    warnings.warn(
                        f"penalty names '{name}', which is observed in this batch: it has codes in a batch where it is "
                        "latent, as labels that are missing. If it is data in all of them, leave it out of penalty.",
                        UserWarning,
                        stacklevel=5,
                    )
            seen.update(given)
        seen.update(self.columns)
        # What is made in an evaluation under torch.inference_mode() could never be trained.
        with torch.inference_mode(False), torch.no_grad():
            for _, _, own, penalty in self._parts(option):
                penalty.prepare_sites(penalty.beside(own.codes, own.condition), own.columns)

    def compare(self, option: PenaltyOption, condition: Condition | None) -> dict[str, Tensor]:
        """The scaled penalty of each latent site or group, or under the name "" that of the joint code.

        Args:
            option: The penalties.
            condition: The units of conditions, or None without a condition.

        Raises:
            ValueError: If one penalty compares sites that have different scales, or a mask leaves fewer than 2 data.
        """
        values = {}
        for entry, label, own, penalty in self._parts(option):
            (codes, draws), scale, context = own.rows(), own.joint_scale(), own.context()
            if codes.shape[1] < 2 <= own.data:
                raise ValueError(
                    "A penalty compares distributions and needs at least 2 data and 2 prior samples, and the mask at "
                    f"latent sites {list(own.columns)} leaves {codes.shape[1]} of {own.data} data. Write "
                    "if mask.sum() > 1: svi.step(x) to leave out such a batch."
                )
            if condition is not None:
                context = own._with_condition(context, condition, entry, penalty, draws)
            values[label] = scale * penalty(codes, draws, context)
        return values

    def add(
        self, penalties: Mapping[str, Tensor], weight: Callable[[Tensor], float | Tensor], *, per_datum: bool = True
    ) -> Step:
        """The step with its loss: the mean costs, and the penalties times a weight that may start from the cost.

        Codes and prior samples that are not finite make the loss NaN, also where a penalty would not show them. So do
        masked codes where a gradient is taken, because 0 times NaN is NaN.
        """
        means = self._mean_costs()
        cost, penalty = _total(means.values()), _total(penalties.values())
        balanced = cost.detach() / self.common_scale
        factor = weight(balanced)
        loss = cost + factor * penalty.to(cost.device)
        if not per_datum:
            loss = loss * self._number_of_data()
        codes, draws = self.rows()
        for rows in (self.codes if self.codes.requires_grad else codes, draws):
            if rows is not None:
                # 0 times what is not finite is NaN; in few digits a sum of large codes would be infinite too.
                loss = loss + (0.0 * working_precision(rows.detach()).sum()).to(loss)
        costs = {site: without_graph(value) for site, value in means.items()}
        apart = {site: without_graph(value) for site, value in penalties.items() if site}
        terms = Terms(without_graph(cost), without_graph(penalty), factor, costs, apart)
        return dataclasses.replace(self, penalties=penalties, terms=terms, balanced_cost=balanced, loss=loss)

    def _mean_costs(self) -> dict[str, Tensor]:
        if self.seen is None:
            means = {site: costs.mean() for site, costs in self.costs.items()}
        else:
            # A factor counts also for data of which nothing is observed.
            count = self.seen.sum().clamp(min=1)
            means = {
                site: (costs if site in self.factors else costs.where(self.seen, 0.0)).sum() / count
                for site, costs in self.costs.items()
            }
        for name, value in self.once.items():
            means[name] = means.get(name, 0.0) + value / self._number_of_data()
        return means

    def _number_of_data(self) -> float | Tensor:
        """Number of data for which the mean stands: those of the data set, less the share that is masked."""
        whole = self.data_size or self.data
        return whole if self.seen is None else self.seen.sum().clamp(min=1) * (whole / self.seen.numel())

    def joint_scale(self) -> float | Tensor:
        """The one ``poutine.scale`` of the latent sites.

        Raises:
            ValueError: If they have different ones.
        """
        scales = {site: self.first.latents[site].scale for site in self.columns}
        if len(scales) > 1:
            numbers = {site: scale.item() if isinstance(scale, Tensor) else scale for site, scale in scales.items()}
            if not all(math.isclose(number, next(iter(numbers.values())), rel_tol=1e-5) for number in numbers.values()):
                found = ", ".join(f"'{site}': {number:g}" for site, number in numbers.items())
                others = ["..."] if len(numbers) < len(self.first.latents) else []
                each = ", ".join([f"'{site}': MMD()" for site in numbers] + others)
                raise ValueError(
                    f"The latent sites have different scales ({found}), and one penalty compares their joint code. "
                    f"Give them one poutine.scale, or a penalty each: WAELoss({{{each}}})."
                )
        return next(iter(scales.values()))

    def context(self) -> PenaltyContext:
        """What a penalty may know of the codes and the prior beyond their draws."""
        # Under a mask or for a part of the sites, the rows are not draws of the model's joint prior any more.
        is_whole = self.kept is None and list(self.columns) == list(self.first.latents)
        return PenaltyContext(
            data_size=self.data_size,
            shared_data=self.kept is not None or self.prior_varies,
            prior=functools.partial(prior_of_one_code, self.first) if is_whole and not self.prior_varies else None,
            prior_log_prob=self.prior_log_prob if is_whole else None,
            encoder_variance=self.encoder_variance,
            encoder_kl=lambda: self.left(self.divergences(), 1),
            sites=self.columns,
            kept=self.kept_rows,
        )

    def _parts(self, option: PenaltyOption) -> list[tuple[int, str, Step, Penalty]]:
        """The number and label of each penalty, the step with the codes of its sites, and the penalty."""
        if not isinstance(option, dict):
            return [(0, "", self, option)]
        found = []
        for entry, (key, penalty) in enumerate(option.items()):
            sites = [site for site in sites_of(key, self.columns) if site in self.columns]
            if penalty is not None and sites:
                found.append((entry, site_label(key), self.part(sites), penalty))
        return found

    def _with_condition(
        self, context: PenaltyContext, condition: Condition, entry: int, penalty: Penalty, draws: Tensor | None
    ) -> PenaltyContext:
        """Adds the condition to what a penalty learns.

        Args:
            context: What it learns without.
            condition: The units of conditions.
            entry: The penalty's number.
            penalty: The penalty.
            draws: Its prior samples without masked data, shape (m, d), or None.

        Raises:
            ValueError: If a mask drops conditions and no codes.
        """
        assert self.condition is not None
        name = condition.name
        if self.condition_is_masked:
            raise ValueError(
                f"condition='{name}' is masked where the latent sites {list(self.columns)} are not: some codes "
                "have no condition. Put both under the mask: with pyro.plate(...), poutine.mask(mask=...): ..."
            )
        values = self.left(self.condition.to(self.codes.device), 0)
        scale = None
        if draws is not None and values.is_floating_point() and any(map(_reads_columns, penalty.modules())):
            scale = condition.fit(entry, values, draws)
        return dataclasses.replace(context, condition=values, condition_scale=scale, shared_data=True)

    def prior_log_prob(self, z: Tensor) -> Tensor:
        """The log density of the model's prior at codes (J, n, d), given the data of this step: shape (J, n)."""
        particles = len(self.codes) // len(self.runs[0])
        parts = zip(self.runs, z.split([runs[0].data for runs in self.runs], 1), strict=True)
        return joined([prior_log_prob(rows, runs, self.columns, particles) for runs, rows in parts], 1)

    def encoder_variance(self) -> Tensor:
        """The variance that the guide gives each number of a code, shape (K, n', d); 1 where it is masked."""
        variances, kept = self.variances(), self.kept_rows()
        return variances if kept is None else self.left(variances, 1).where(kept, 1.0)  # at 1 guards are 0

    def variances(self) -> Tensor:
        """The variance that the guide gives each number of a code, masked or not, shape (K, n, d)."""
        return joined([joined([variances(run, self.columns) for run in runs]) for runs in self.runs], 1)

    def divergences(self) -> Tensor:
        """The divergence of the guide from the prior for each datum, masked or not, shape (K, n)."""
        return joined([joined([divergence(run, self.columns) for run in runs]) for runs in self.runs], 1)


def _total(scalars: Iterable[Tensor]) -> Tensor:
    """The sum of scalars, on the device of the first."""
    return functools.reduce(lambda left, right: left + right.to(left.device), scalars)


def _reads_columns(part: nn.Module) -> bool:
    return isinstance(part, Penalty) and part.needs_prior_draws and not part.reads_condition
