"""Which penalty compares which latent sites: one for the joint code, or one for each site or group of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from pyro_wae.penalties import MMD, Chain, Penalty, PenaltyContext, as_penalty
from pyro_wae.penalties.condition_columns import beside
from pyro_wae.step.condition import Given
from pyro_wae.step.program import Structure
from pyro_wae.step.records import Codes

__all__ = [
    "PenaltyLike",
    "PenaltyOption",
    "SiteKey",
    "as_option",
    "check_names",
    "compare",
    "compared",
    "each_penalty",
    "prepare",
    "site_label",
]

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


def compared(option: PenaltyOption, codes: Codes, prior: Tensor | None) -> tuple[Codes, Tensor | None]:
    """The codes and prior draws of the sites that have a penalty."""
    if not isinstance(option, dict) or None not in option.values():
        return codes, prior
    sites = [site for key, penalty in option.items() if penalty is not None for site in _sites(key, codes.columns)]
    return codes.site(*sites), None if prior is None else codes.cut(prior, sites)


def prepare(option: PenaltyOption, codes: Codes, structure: Structure, given: Given | None = None) -> None:
    """Lets penalties make what depends on the size of a code.

    Raises:
        ValueError: If a dict names a site that is no latent, or misses one.
    """
    if not isinstance(option, dict):
        _prepare(option, codes, given)
        return
    groups = {key: _sites(key, structure.latents) for key in option}
    names = {name: None for group in groups.values() for name in group}
    check_names("penalty", names, list(structure.latents), "latent", "MMD()")
    for key, penalty in option.items():
        if penalty is not None:
            _prepare(penalty, codes.site(*groups[key]), given)


def compare(
    option: PenaltyOption,
    codes: Codes,
    prior: Tensor | None,
    context_of: Callable[[Codes], PenaltyContext],
    structure: Structure,
    given: Given | None = None,
) -> dict[str, Tensor]:
    """The scaled penalty of each latent site or group, or under the name "" that of the joint code.

    Args:
        option: The penalties.
        codes: All codes of the step.
        prior: Prior draws of the same layout, shape (J, n, d), or None where no penalty needs them.
        context_of: What is known of the codes at some or all latent sites.
        structure: What the sites are.
        given: What codes and prior draws are conditional on, or None.

    Raises:
        ValueError: If one penalty compares sites that have different scales.
    """

    def value(entry: int, penalty: Penalty, own: Codes, draws: Tensor | None) -> Tensor:
        context = context_of(own)
        rows, draws = own.masked(draws)
        if given is not None:
            context = given.extend(context, entry, penalty, own, draws)
        return _joint_scale(structure, own.columns) * penalty(rows, draws, context)

    if not isinstance(option, dict):
        return {"": value(0, option, codes, prior)}
    values = {}
    for entry, (key, penalty) in enumerate(option.items()):
        if penalty is not None:
            sites = _sites(key, structure.latents)
            own = codes.site(*sites)
            draws = None if prior is None else codes.cut(prior, sites)
            values[site_label(key)] = value(entry, penalty, own, draws)
    return values


def check_names(argument: str, options: Mapping[str, object], sites: list[str], kind: str, example: str) -> None:
    """Raises ValueError unless the options name just the sites there are."""
    unknown, missing = [s for s in options if s not in sites], [s for s in sites if s not in options]
    if unknown:
        raise ValueError(
            f"{argument} names '{unknown[0]}', which is no {kind} site; these are {sites}. "
            f"Write {argument}={{'{sites[0]}': {example}, ...}}."
        )
    if missing:
        raise ValueError(
            f"{argument} has no entry for the {kind} site '{missing[0]}'. Write {argument}={{..., '{missing[0]}': "
            f"{example}}}" + (", or None to leave it free." if kind == "latent" else ".")
        )


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


def _prepare(penalty: Penalty, codes: Codes, given: Given | None) -> None:
    for part in penalty.modules():
        if isinstance(part, Chain):
            part.prepare(codes.values, codes.columns)
    penalty.prepare(beside(codes.values, given.values if given else None))


def _joint_scale(structure: Structure, sites: Iterable[str]) -> float | Tensor:
    scales = {site: structure.scale[site] for site in sites}
    if len(scales) > 1:
        numbers = {site: scale.item() if isinstance(scale, Tensor) else scale for site, scale in scales.items()}
        if len(set(numbers.values())) > 1:
            found = ", ".join(f"'{site}': {number:g}" for site, number in numbers.items())
            raise ValueError(
                f"The latent sites have different scales ({found}), and one penalty compares their joint code. Give "
                "them one poutine.scale, or a penalty each: WAELoss({'z1': MMD(), 'z2': MMD()})."
            )
    return next(iter(scales.values()))
