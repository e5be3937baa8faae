"""The penalty of a loss: one for the joint code, or one for each latent site or group of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from pyro_wae.penalties import MMD, Penalty, as_penalty

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
    for site, one in options.items():
        first = next(other for other, penalty in options.items() if penalty is one)
        if one is not None and first is not site and one.state_dict():
            raise ValueError(
                f"penalty gives {first!r} and {site!r} one {type(one).__name__}, whose bandwidth or discriminator is "
                f"for one of them. Give each its own: WAELoss({{{first!r}: MMD(), {site!r}: MMD()}})."
            )
    return options


def site_label(key: SiteKey) -> str:
    """The name of a group of sites, fit for a logger and a module's name."""
    return key if isinstance(key, str) else "-".join(key)


def each_penalty(option: PenaltyOption) -> Iterator[Penalty]:
    """The penalties, without the sites that are left free."""
    options = option.values() if isinstance(option, dict) else [option]
    yield from (penalty for penalty in options if penalty is not None)


def sites_of(key: SiteKey, latents: Iterable[str]) -> list[str]:
    """The latent sites that a key means; a name that means none stays as it is."""
    sites = []
    for name in (key,) if isinstance(key, str) else key:
        # A star alone is special: a site's name may hold brackets, which a shell's pattern would take for its own.
        pattern = re.compile(".*".join(map(re.escape, name.split("*"))))
        sites += [site for site in latents if pattern.fullmatch(site)] or [name]
    return sites


def check_names(argument: str, options: Iterable[str], sites: list[str], kind: str, example: str) -> None:
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
