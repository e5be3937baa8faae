"""Which penalty compares which latent sites: one for the joint code, or one for each site or group of them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from pyro_wae.penalties import MMD, Penalty, as_penalty
from pyro_wae.penalties.base import beside
from pyro_wae.step.condition import Condition, with_condition
from pyro_wae.step.observe import check_names
from pyro_wae.step.records import Step

PenaltyLike = Penalty | Callable[[Tensor, Tensor], Tensor]
SiteKey = str | tuple[str, ...]
PenaltyOption = Penalty | dict[SiteKey, Penalty | None]


def as_option(given: PenaltyLike | Mapping[Any, PenaltyLike | None] | None) -> PenaltyOption:
    """Makes penalties of what a user gives.

    Raises:
        TypeError: If an entry is neither a penalty nor a function, or a key neither a name nor a tuple of names.
        ValueError: If a dict leaves every site free, or two keys are the same sites.
    """
    if given is None:
        return MMD()
    if not isinstance(given, Mapping):
        return as_penalty(given)
    _check_keys(given)
    options = {site: None if entry is None else as_penalty(entry) for site, entry in given.items()}
    if options and not list(each_penalty(options)):
        sites = list(options)
        raise ValueError(
            f"penalty leaves every latent site free ({', '.join(map(repr, sites))}). Give one of them a penalty, "
            f"as in WAELoss({{{sites[0]!r}: MMD(), ...}}), or train without: WAELoss(penalty_weight=0.0)."
        )
    return options


def site_label(key: SiteKey) -> str:
    """The name of a group of sites, fit for a logger and a module's name."""
    return key if isinstance(key, str) else "-".join(key)


def each_penalty(option: PenaltyOption) -> Iterator[Penalty]:
    """The penalties, without the sites that are left free."""
    options = option.values() if isinstance(option, dict) else [option]
    yield from (penalty for penalty in options if penalty is not None)


def compared(option: PenaltyOption, step: Step) -> Step:
    """The step with the codes of the sites that have a penalty."""
    if not isinstance(option, dict) or None not in option.values():
        return step
    return step.part([site for key, own in option.items() if own is not None for site in _sites(key, step.columns)])


def prepare(option: PenaltyOption, step: Step, seen: set[str]) -> None:
    """Lets penalties make what depends on the size of a code.

    Args:
        option: The penalties.
        step: The step.
        seen: Sites of earlier steps, to which those of this one are added. What was latent may be observed now, as the
            labels of semi-supervised data.

    Raises:
        ValueError: If a dict names a site that is neither latent nor observed, or misses a latent one.

    Warns:
        UserWarning: If a dict names a site that is observed and has not been latent yet.
    """
    if isinstance(option, dict):
        names = {name: None for key in option for name in _sites(key, step.columns)}
        is_complete = all(name in names for name in step.columns)
        given = [name for name in names if name in step.first.observed and (is_complete or name in seen)]
        check_names("penalty", [name for name in names if name not in given], list(step.columns), "latent", "MMD()")
        for name in given:
            if name not in seen:
                warnings.warn(
                    f"penalty names '{name}', which is observed in this batch: it has codes in a batch where it is "
                    "latent, as labels that are missing. If it is data in all of them, leave it out of penalty.",
                    UserWarning,
                    stacklevel=5,
                )
        seen.update(given)
    seen.update(step.columns)
    for _, _, own, penalty in _parts(option, step):
        codes = own.codes if own.condition is None else beside(own.codes, own.condition)
        penalty.prepare_sites(codes, own.columns)


def compare(option: PenaltyOption, step: Step, condition: Condition | None) -> dict[str, Tensor]:
    """The scaled penalty of each latent site or group, or under the name "" that of the joint code.

    Args:
        option: The penalties.
        step: The step.
        condition: The units of conditions, or None without a condition.

    Raises:
        ValueError: If one penalty compares sites that have different scales.
    """
    values = {}
    for entry, label, own, penalty in _parts(option, step):
        (codes, draws), scale, context = own.rows(), own.joint_scale(), own.context()
        if condition is not None:
            context = with_condition(context, own, condition, entry, penalty, draws)
        values[label] = scale * penalty(codes, draws, context)
    return values


def _parts(option: PenaltyOption, step: Step) -> list[tuple[int, str, Step, Penalty]]:
    """The number and label of each penalty, the step with the codes of its sites, and the penalty."""
    if not isinstance(option, dict):
        return [(0, "", step, option)]
    found = []
    for entry, (key, penalty) in enumerate(option.items()):
        sites = [site for site in _sites(key, step.columns) if site in step.columns]
        if penalty is not None and sites:
            found.append((entry, site_label(key), step.part(sites), penalty))
    return found


def _check_keys(given: Mapping[Any, object]) -> None:
    labels: set[str] = set()
    for key in given:
        names = (key,) if isinstance(key, str) else key
        if not isinstance(names, tuple) or not names or not all(isinstance(name, str) for name in names):
            raise TypeError(
                f"A key of penalty must be a latent site's name or a tuple of names, found {key!r}. "
                "Write penalty={'z1': MMD(), ('z2', 'z3'): MMD()}."
            )
        if site_label(key) in labels:
            raise ValueError(
                f"Two keys of penalty are '{site_label(key)}'. Write one, with the sum of their penalties."
            )
        labels.add(site_label(key))


def _sites(key: SiteKey, latents: Iterable[str]) -> list[str]:
    """The latent sites that a key means; a name that means none stays as it is."""
    sites = []
    for name in (key,) if isinstance(key, str) else key:
        # A star alone is special: a site's name may hold brackets, which a shell's pattern would take for its own.
        pattern = re.compile(".*".join(map(re.escape, name.split("*"))))
        sites += [site for site in latents if pattern.fullmatch(site)] or [name]
    return sites
