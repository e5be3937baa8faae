"""What to write in place of a program that a WAE does not take: its sites are in no plate, or have no gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pyro_wae._core.checks import variable
from pyro_wae._core.distributions import family, is_discrete
from pyro_wae._core.private import PARTICLE_PLATE

Node = Mapping[str, Any]
Plates = Mapping[str, Mapping[str, Any]]
"""For each site the frames of the vectorised plates around it, by their names."""


def not_the_data_plate(requested: str, latents: Sequence[Node], observed: Sequence[Node], plates: Plates) -> str:
    """Of a plate that the user has named, and that does not hold all of the sites."""
    known = _known(plates)
    if requested in known:
        return _site_outside(latents, observed, plates, requested)
    return (
        f"data_plate='{requested}' is no vectorised plate around the latent and observed sites; there is "
        f"{listing(known)}. " + (f"Write data_plate='{next(iter(known))}'." if known else "")
    )


def no_data_plate(latents: Sequence[Node], observed: Sequence[Node], plates: Plates) -> str:
    """Of sites that no plate holds all of."""
    # Of two plates that hold as many sites, the one around observed sites is more likely the data's.
    around = [*plates.values(), *(plates[node["name"]] for node in observed)]
    widest = max(_known(plates), key=lambda name: sum(name in frames for frames in around), default=None)
    return _site_outside(latents, observed, plates, widest)


def listing(frames: Mapping[str, Any]) -> str:
    """Plates, each with its dimension and size."""
    if not frames:
        return "none"
    return ", ".join(f"'{f.name}' (dim={f.dim}, size {f.size})" for f in frames.values())


def nothing_shared(of_model: Sequence[str], of_guide: Sequence[str]) -> str:
    """Of latent sites of model and guide that have no name in common."""
    return (
        f"Model and guide share no latent site, and so there are no codes: those of the model are {of_model}, "
        f"those of the guide {of_guide}. Sample one under the same name in both, inside the data plate: "
        "z = pyro.sample('z', ...)."
    )


def nothing_observed() -> str:
    """Of a model that has no site with a cost."""
    return (
        "The model has no observed site, and so nothing is reconstructed. Write pyro.sample('x', ..., obs=x); "
        "pyro.factor and pyro.deterministic are not reconstructions."
    )


def not_reparameterised(name: str, fn: Any) -> str:
    """Of a latent site whose distribution in the guide has no gradient."""
    if is_discrete(fn):
        return (
            f"Latent site '{name}' is discrete in the guide ({family(fn)}): no gradient of the penalty reaches "
            f"the encoder, and WAELoss does not enumerate. Write {_relaxation(fn)}."
        )
    return (
        f"Latent site '{name}' cannot be reparameterised in the guide ({family(fn)} has no rsample): no "
        "gradient of the penalty reaches the encoder. Write dist.Normal(loc, scale), or dist.Delta(loc) for a "
        "deterministic encoder."
    )


def untrained_beside_codes(name: str, fn: Any) -> str:
    """Of a site of the guide that is no code, whose learnable parameters have no gradient."""
    return (
        f"Site '{name}' of the guide is no code, cannot be reparameterised ({family(fn)} has no rsample) and has "
        "learnable parameters: no gradient of the loss reaches them. Write "
        f"{_relaxed(fn) or 'a family with rsample, such as dist.Normal(loc, scale)'}, or detached parameters, such as "
        "logits.detach(), if another term or loss trains them."
    )


def code_of_integers(name: str, dtype: Any, prior: Any) -> str:
    """Of a latent site whose values in the guide are whole numbers, truth values or complex."""
    if dtype.is_complex:
        return (
            f"Latent site '{name}' has codes of {dtype} in the guide, and penalties compare real numbers. Give the "
            "real and the imaginary parts as one code: dist.Delta(torch.view_as_real(z).flatten(-2)).to_event(1)."
        )
    return (
        f"Latent site '{name}' has codes of {dtype} in the guide: integers, such as those of argmax, have no gradient, "
        f"and the encoder would not be trained. Write {_relaxation(prior)}. If the data have the value, observe it in "
        f"the model and leave it out of the guide: WAELoss(condition='{name}')."
    )


def not_drawn(name: str, fn: Any) -> str:
    """Of a site of the model whose distribution has no samples."""
    return (
        f"The prior at site '{name}' ({family(fn)}) cannot be drawn, and codes are compared with prior samples. Write "
        "its sample method, or take a penalty that reads its log_prob alone: "
        "WAELoss(KernelStein(RationalQuadratic(0.5, bandwidth=1.0)))."
    )


def prior_of_integers(name: str, fn: Any, dtype: Any) -> str:
    """Of a site of the model whose distribution is made of whole numbers."""
    return (
        f"The prior at site '{name}' ({family(fn)}) has parameters of {dtype}, from which it cannot be drawn. Write "
        "them as floats: x.new_zeros(d), or torch.tensor([0, 0]).float()."
    )


def observed_by_guide(name: str, fn: Any) -> str:
    """Of a site that the guide observes."""
    return (
        f"The guide observes site '{name}' ({family(fn)}), whose density is a term of Pyro's ELBO and would be left "
        f"out here: what it depends on would not be trained. Write in the guide pyro.factor('{name}', "
        "-distribution.log_prob(value), has_rsample=True), which adds the negative log likelihood to the loss (with a "
        "plus sign, what Trace_ELBO adds), or sample the site without obs=."
    )


def computed_by_guide(name: str, fn: Any) -> str:
    """Of a latent site that the guide computes by ``pyro.deterministic``."""
    event = f".to_event({fn.event_dim})" if fn.event_dim else ""
    return (
        f"Latent site '{name}' is computed in the guide by pyro.deterministic, and a code is the value of a "
        f"pyro.sample. Write in the guide pyro.sample('{name}', dist.Delta(value){event})."
    )


def point_with_a_density(name: str) -> str:
    """Of a site that was computed by a reparametrisation whose density would be lost."""
    return (
        f"Site '{name}' is observed at the point of its own Delta, whose log_density is a term of Pyro's ELBO "
        "and would be left out here. ConjugateReparam, NeuTraReparam, SplitReparam and StructuredReparam make "
        f"such a site: leave '{name}' out of the config of poutine.reparam, or write the density as a term of "
        f"the loss: pyro.factor('{name}_density', log_density)."
    )


def density_without_a_cost(name: str) -> str:
    """Of observed data whose Delta has a density, which a cost of the mean does not read."""
    return (
        f"Observed site '{name}' is a Delta with a log_density, a term of Pyro's ELBO that its cost leaves out. Write "
        f"pyro.factor('{name}', log_density), or cost={{..., '{name}': NegativeLogLikelihood()}}."
    )


def masked_by_guide(name: str) -> str:
    """Of a latent site whose mask in the guide leaves out what the model keeps."""
    return (
        f"Latent site '{name}' has a mask in the guide that leaves out what the model keeps: the codes that "
        "remain would be compared with prior samples of all data. Write poutine.mask(mask=...) with a mask "
        f"that is computed from the data, around site '{name}' in model and guide."
    )


def event_of_another_shape(name: str, event: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """Of a latent site that is of one shape in the guide and of another in the model."""
    return (
        f"Latent site '{name}' has values of shape {event} in the guide and {expected} in the model, "
        "and codes are compared with prior samples number by number. Give both distributions one event shape: "
        f"write the model's as dist.Normal(x.new_zeros({event}), 1).to_event({len(event)})."
    )


def all_data_one_event(name: str, shape: tuple[int, ...], count: int, event_dim: int) -> str:
    """Of an observed site whose event is the whole batch."""
    write = f"Write .to_event({event_dim - 1}), which leaves the first dimension to the data plate."
    if event_dim == 1:
        write = "Write obs=x.unsqueeze(-1), or for labels obs=torch.nn.functional.one_hot(x, classes)."
    return (
        f"Observed site '{name}' has one event of shape {shape}, which contains the whole batch: each of the {count} "
        f"data would be compared with all of them. {write}"
    )


def mask_of_another_shape(name: str, found: tuple[int, ...], batch: tuple[int, ...]) -> str:
    """Of a mask that does not fit its site."""
    return (
        f"The mask at site '{name}' has shape {found}, which does not fit its batch shape {batch}. "
        "Write poutine.mask(mask=...) with one truth value for each datum of this batch."
    )


def changed_in_place(name: str) -> str:
    """Of a latent site whose value a model overwrites."""
    return (
        f"The model changes the value of latent site '{name}' in place, and with it the codes that are compared with "
        "the prior. Write z = z + ..., and nn.ReLU() in place of nn.ReLU(inplace=True) as a decoder's first layer."
    )


def not_of_pyro(name: str, fn: Any) -> str:
    """Of a site that is drawn by a function, or from a distribution that is not of Pyro."""
    if not hasattr(fn, "batch_shape"):
        return (
            f"Site '{name}' is drawn by a function, whose batch shape and event shape are not known. Write a subclass "
            "of dist.TorchDistribution with batch_shape, event_shape and sample."
        )
    kind = type(fn)
    return (
        f"Site '{name}' is drawn from {kind.__module__}.{kind.__name__}, which lacks the event_dim and the call of "
        f"Pyro's distributions. Write import pyro.distributions as dist and dist.{kind.__name__}(...), or, for a "
        f"family that Pyro does not have, class Own({kind.__name__}, dist.torch_distribution.TorchDistributionMixin)."
    )


def _relaxation(fn: Any) -> str:
    return ", or ".join(filter(None, [_relaxed(fn), "a Delta on a continuous code, dist.Delta(loc)"]))


def _relaxed(fn: Any) -> str | None:
    """The relaxations of a discrete family; counts have none."""
    return {
        "Bernoulli": "dist.RelaxedBernoulliStraightThrough(temperature, logits=...)",
        "Categorical": "dist.OneHotCategoricalStraightThrough or dist.RelaxedOneHotCategorical",
    }.get(family(fn).removeprefix("OneHot"))


def _known(plates: Plates) -> dict[str, Any]:
    return {name: frame for frames in plates.values() for name, frame in frames.items()}


def _site_outside(latents: Sequence[Node], observed: Sequence[Node], plates: Plates, data_plate: str | None) -> str:
    """Of the first site that is not in the data plate."""
    size = None if data_plate is None else _known(plates)[data_plate].size
    around_data = {name for node in observed for name in plates[node["name"]]}
    kinds = [*(("Latent", node) for node in latents), *(("Observed", node) for node in observed)]
    kind, node = next((kind, node) for kind, node in kinds if data_plate not in plates[node["name"]])
    own = plates[node["name"]]
    # A plate as large as the data's is rather the data under another name.
    has_own_plate = any(frame.size != size for frame in own.values())
    may_be_global = kind == "Latent" and bool(own) and not around_data & own.keys()
    has_own_plate = has_own_plate and (may_be_global or kind == "Observed")
    return _outside(node, kind, data_plate, size, has_own_plate=has_own_plate, may_be_global=may_be_global)


def _outside(
    node: Node, kind: str, data_plate: str | None, size: int | None, *, has_own_plate: bool, may_be_global: bool
) -> str:
    name = node["name"]
    batch = _batch_shape(node)
    where = f"outside the data plate '{data_plate}'" if data_plate else "in no plate"
    statement = f"pyro.sample('{name}', ...)"
    sequential = [frame.name for frame in node["cond_indep_stack"] if frame.dim is None]
    if sequential and data_plate is None:
        return (
            f"{kind} site '{name}' is only inside the sequential plate '{sequential[0]}', and the data plate must be "
            f"vectorised. Write, for all data at once: with pyro.plate('{sequential[0]}', n): {statement}."
        )
    if kind == "Latent" and (math.prod(batch) == 1 or has_own_plate):
        values = "one value" if math.prod(batch) == 1 else f"one set of values, of batch shape {batch},"
        # A name with a dot is that of a module's attribute, to which no line of the model assigns a pyro.param.
        line, place = f"{variable(name)} = pyro.param('{name}', ...)", "in the model"
        if all(part.isidentifier() for part in name.split(".")) and "." in name:
            line, place = f"self.{name} = nn.Parameter(...)", "of the module, in place of PyroSample"
        elif "$$$" in name:  # a net's, which poutine.lift or pyro.random_module has made a site
            net = name.partition("$$$")[0]
            line, place = f"pyro.module('{net}', {variable(net)})", "in the model, in place of poutine.lift"
        return (
            f"Latent site '{name}' is global ({where}): it has {values} for all data, and a WAE compares the codes "
            f"of data. Make it a parameter {place}, {line}, and leave it out of the guide."
            + (f" {_PAIRS}" if has_own_plate else "")
            + _swallowed(node, data_plate)
        )
    plate = f"'{data_plate}', {size}" if data_plate else f"'data', {batch[-1] if batch else 'n'}"
    return (
        f"{kind} site '{name}' of batch shape {batch} is {where}. It is ambiguous which of its dimensions is the data. "
        f"Write, in model and guide: with pyro.plate({plate}): {statement}."
        + (f" If all data share it: {variable(name)} = pyro.param('{name}', ...)." if may_be_global else "")
        + (f" {_PAIRS}" if kind == "Observed" and has_own_plate else "")
    )


def _swallowed(node: Node, data_plate: str | None) -> str:
    """What to write if the batch is in the event of a site, and there is no plate."""
    event = tuple(node["fn"].event_shape)
    if data_plate is not None or len(event) < 2:
        return ""
    return (
        f" If the first dimension of its event, of shape {event}, is the data, write .to_event({len(event) - 1}) "
        f"inside pyro.plate('data', {event[0]})."
    )


_PAIRS = (
    "If what is observed are pairs of data, such as edges of a graph, let each datum observe a row of its own pairs in "
    "its plate: pyro.sample('pairs', dist.Bernoulli(logits=logits).to_event(1), obs=pairs), with logits (n, k)."
)
"""What to write for observations of two data each."""


def _batch_shape(node: Node) -> tuple[int, ...]:
    """The batch shape without the dimension of vectorised particles and what stands left of it."""
    value = node["value"]
    batch = tuple(value.shape[: value.ndim - getattr(node["fn"], "event_dim", 0)])
    particle = [frame.dim for frame in node["cond_indep_stack"] if frame.name == PARTICLE_PLATE]
    return batch[max(0, len(batch) + particle[0] + 1) :] if particle else batch
