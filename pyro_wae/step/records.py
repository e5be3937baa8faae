"""The record of one step: a row for each datum of codes, prior draws, costs and conditions; the parts of the loss."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_wae._core.distributions import innermost
from pyro_wae._core.numerics import joined, total
from pyro_wae._core.sites import Site, side_by_side
from pyro_wae.penalties import PenaltyContext
from pyro_wae.step.divergence import divergence
from pyro_wae.step.prior import prior_log_prob, prior_of_one_code
from pyro_wae.step.program import Run


@dataclass(frozen=True)
class Terms:
    """Cost, penalty and weight of the last loss, as detached scalars on the device; reading a number waits for it.

    Args:
        cost: Mean cost per datum, all observed sites together.
        penalty: The penalty, before its weight; with one penalty for each site, their sum.
        weight: The penalty weight. The loss is ``cost + weight * penalty``.
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
        prior: Prior draws, shape (J, n, d); None where nothing needs them.
        costs: The cost of each observed site, and what a ``pyro.factor`` adds for each datum, shape (K, n).
        factors: Which of the costs are those of factors.
        once: What a factor outside the data plate adds once for all data, a scalar.
        seen: Shape (K, n): which data have anything observed; None if all have.
        condition: Shape (n, c): what the model is conditional on, labels as integers with c = 1, or floats; or None.
        condition_name: The name of the condition.
        condition_is_masked: Whether a mask leaves some of the conditions out.
        data_size: Number of data that the data plate takes a part of; None where it takes all.
        prior_varies: Whether the prior of a datum's code may depend on the datum, as far as can be seen.
        penalties: The scaled penalty of each latent site or group, "" that of the joint code, once it has been taken.
        terms: The parts of the loss, detached, once it has been taken.
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
    penalties: Mapping[str, Tensor] = field(default_factory=dict)
    terms: Terms | None = None
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

    def rows(self) -> tuple[Tensor, Tensor | None]:
        """Codes and prior draws without masked data, other masked elements 0 in both.

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

    def add(
        self, penalties: Mapping[str, Tensor], weight: Callable[[Tensor], float | Tensor], *, per_datum: bool = True
    ) -> Step:
        """The step with its loss: the mean costs, and the penalties times a weight that may start from the cost.

        Codes and prior draws that are not finite make the loss NaN, also where a penalty would not show them. So do
        masked codes where a gradient is taken, because 0 times NaN is NaN.
        """
        means = self._mean_costs()
        cost, penalty = total(means.values()), total(penalties.values())
        # A scale of the whole model is one of the whole loss, and none of the balance between cost and penalty.
        factor = weight(cost.detach() / self.common_scale())
        loss = cost + factor * penalty.to(cost.device)
        if not per_datum:
            loss = loss * self._number_of_data()
        codes, draws = self.rows()
        for rows in (self.codes if self.codes.requires_grad else codes, draws):
            if rows is not None:
                loss = loss.where(rows.detach().isfinite().all().to(loss.device), math.nan)
        costs = {site: value.detach() for site, value in means.items()}
        apart = {site: value.detach() for site, value in penalties.items() if site}
        terms = Terms(cost.detach(), penalty.detach(), factor, costs, apart)
        return dataclasses.replace(self, penalties=penalties, terms=terms, loss=loss)

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

    def common_scale(self) -> float | Tensor:
        """The ``poutine.scale`` that all latent and observed sites have, 1 where they have different ones."""
        scales = [site.scale for run in self.runs[0] for site in (*run.latents.values(), *run.observed.values())]
        if not any(isinstance(scale, Tensor) for scale in scales):
            return scales[0] if scales[0] > 0 and all(scale == scales[0] for scale in scales) else 1.0
        if any(isinstance(scale, Tensor) and scale.numel() != 1 for scale in scales):
            return 1.0
        found = torch.stack([torch.as_tensor(scale, device=self.codes.device).detach() for scale in scales])
        return torch.where((found == found[0]).all() & (found[0] > 0), found[0], 1.0)

    def joint_scale(self) -> float | Tensor:
        """The one ``poutine.scale`` of the latent sites.

        Raises:
            ValueError: If they have different ones.
        """
        scales = {site: self.first.latents[site].scale for site in self.columns}
        if len(scales) > 1:
            numbers = {site: scale.item() if isinstance(scale, Tensor) else scale for site, scale in scales.items()}
            if len(set(numbers.values())) > 1:
                found = ", ".join(f"'{site}': {number:g}" for site, number in numbers.items())
                raise ValueError(
                    f"The latent sites have different scales ({found}), and one penalty compares their joint code. "
                    "Give them one poutine.scale, or a penalty each: WAELoss({'z1': MMD(), 'z2': MMD()})."
                )
        return next(iter(scales.values()))

    def what_is_not_finite(self) -> str:
        """Why the loss is not finite, in a sentence that names the part."""
        if found := self.what_is_not_finite_before():
            return found
        assert self.terms is not None  # the loss has been added up
        for site, value in self.terms.costs.items():
            if found := _not_finite(value):
                return f"The cost of observed site '{site}' is {found}: look at the data and at the model's output."
        for site, value in self.penalties.items():
            if found := _not_finite(value):
                where = f" of latent site '{site}'" if site else ""
                return f"The penalty{where} is {found}, though the codes are finite."
        return (
            f"The loss is not finite, though its parts are: the penalty weight ({float(self.terms.weight):g}) times "
            "the penalty overflows."
        )

    def what_is_not_finite_before(self) -> str | None:
        """What a penalty compares that is not finite, in a sentence; None if all of it is."""
        codes, prior = self.rows()
        for site, columns in self.columns.items():
            if found := _not_finite(codes[..., columns]):
                return f"The codes of latent site '{site}' hold {found}: look at the guide's output or lower the rate."
            if prior is not None and (found := _not_finite(prior[..., columns])):
                return f"The prior draws of latent site '{site}' hold {found}: look at the model's prior."
        if self.condition is not None and (found := _not_finite(self.condition)):
            return f"The condition '{self.condition_name}' holds {found}: look at the data."
        for site, columns in self.columns.items() if self.codes.requires_grad else ():
            if found := _not_finite(self.codes[..., columns]):
                return (
                    f"The masked codes of latent site '{site}' hold {found}, from which the gradient of all parameters "
                    "is NaN. Write into the guide: x = x.nan_to_num()."
                )
        return None

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

    def prior_log_prob(self, z: Tensor) -> Tensor:
        """The log density of the model's prior at codes (J, n, d), given the data of this step: shape (J, n)."""
        particles = len(self.codes) // len(self.runs[0])
        parts = zip(self.runs, z.split([runs[0].data for runs in self.runs], 1), strict=True)
        return joined([prior_log_prob(rows, runs, self.columns, particles) for runs, rows in parts], 1)

    def encoder_variance(self) -> Tensor:
        """The variance that the guide gives each number of a code, shape (K, n', d); 1 where it is masked."""
        return self.of_kept(self.variances())

    def variances(self) -> Tensor:
        """The variance that the guide gives each number of a code, masked or not, shape (K, n, d)."""
        return joined([joined([self._variance_of(run) for run in runs]) for runs in self.runs], 1)

    def divergences(self) -> Tensor:
        """The divergence of the guide from the prior for each datum, masked or not, shape (K, n)."""
        return joined([joined([divergence(run, self.columns) for run in runs]) for runs in self.runs], 1)

    def of_kept(self, variances: Tensor) -> Tensor:
        """The variances (K, n', d) of the data that a mask leaves, 1 for a masked number, at which guards are 0."""
        return variances if self.kept is None else self.left(variances, 1).where(self.left(self.kept, 1), 1.0)

    def _variance_of(self, run: Run) -> Tensor:
        rows = {}
        for name in self.columns:
            site, node = run.latents[name], run.guide.nodes[name]
            variance = _variance(site, node["fn"]).expand(node["value"].shape)
            rows[name] = site.rows(variance, node["fn"].event_dim)
        return side_by_side(rows, {})[0]

    @staticmethod
    def join(parts: Sequence[Step], dim: int) -> Step:
        """Joins steps of other particles of the same data (dim 0), or of other data (dim 1).

        Raises:
            ValueError: If they have other sites, or codes of other sizes.
        """
        first = parts[0]
        for part in parts:
            part._check_like(first, dim)
        changes: dict[str, Any] = {
            name: joined([getattr(part, name) for part in parts], dim)
            for name in ("codes", "prior")
            if getattr(first, name) is not None
        }
        changes["costs"] = {site: joined([part.costs[site] for part in parts], dim) for site in first.costs}
        for name, like in (("kept", "codes"), ("seen", "costs")):
            masks = [getattr(part, name) for part in parts]
            if any(mask is not None for mask in masks):
                wholes = [part.codes if like == "codes" else next(iter(part.costs.values())) for part in parts]
                filled = [
                    torch.ones_like(whole, dtype=torch.bool) if mask is None else mask
                    for mask, whole in zip(masks, wholes, strict=True)
                ]
                changes[name] = joined(filled, dim)
        if dim == 1:
            first.check_once("micro_batch")
            changes["condition_is_masked"] = any(part.condition_is_masked for part in parts)
            changes["prior_varies"] = any(part.prior_varies for part in parts)
            if first.condition is not None:
                changes["condition"] = joined([part.condition for part in parts if part.condition is not None])
            n = sum(part.data for part in parts)
            changes["data_size"] = None if first.data_size == n else first.data_size
            changes["runs"] = [runs for part in parts for runs in part.runs]
        else:
            changes["once"] = {name: sum(part.once[name] for part in parts) / len(parts) for name in first.once}
            changes["runs"] = [[run for part in parts for runs in part.runs for run in runs]]
        return dataclasses.replace(first, **changes)

    def check_once(self, option: str) -> None:
        """Raises ValueError if a factor outside the data plate would be counted in each part of the data."""
        if self.once:
            name = next(iter(self.once))
            raise ValueError(
                f"pyro.factor '{name}' is outside the data plate '{self.first.plate}', and {option} would count it in "
                f"each part of the data. Put it into the plate, or leave {option} out."
            )

    def _check_like(self, first: Step, dim: int) -> None:
        found, expected = ({site: (c.start, c.stop) for site, c in s.columns.items()} for s in (self, first))
        if found != expected or self.costs.keys() != first.costs.keys():
            raise ValueError(
                f"{'Runs' if dim == 0 else 'Micro-batches'} of one step gave codes of different sites or sizes: "
                f"{expected} and {found} (site: first and last column), or costs of different sites: "
                f"{list(first.costs)} and {list(self.costs)}. The model and guide must have one structure within a "
                "step: write the choice into the site's distribution, not around the site."
            )
        if dim == 0 and self.data != first.data:
            raise ValueError(
                f"Runs of one step gave codes of different numbers of data: {first.data} and {self.data}. The model "
                "and guide must have one structure within a step."
            )


def _not_finite(values: Tensor) -> str | None:
    """What is not finite in a tensor, in a word; None where all is."""
    if values.is_meta or not values.is_floating_point() or bool(values.isfinite().all()):
        return None
    return "NaN" if bool(values.isnan().any()) else "infinity"


def _variance(site: Site, guide: Any) -> Tensor:
    inner = innermost(guide)
    if isinstance(inner, dist.Delta):
        raise ValueError(
            f"The guide is deterministic at site '{site.name}' (Delta): there is no variance to guard. Leave the "
            "guard out, or write dist.Normal(loc, scale) in the guide."
        )
    try:
        return guide.variance
    except NotImplementedError as error:
        raise ValueError(
            f"The guide's {type(inner).__name__} at site '{site.name}' has no variance in closed form, which the guard "
            "needs. Write dist.Normal(loc, scale) in the guide."
        ) from error
