"""What lies inside a distribution: its wrappers, its tensors, and whether it may differ between data."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.hmm import HiddenMarkovModel
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_wae._core.batch_norm import batch_norm_at_rest
from pyro_wae._core.rows import at_least_float32

REMEDY = "Write cost=NegativeLogLikelihood(), or say what the output is: cost=SquaredError(decode=lambda fn: ...)."
WRAPPERS = (torch.distributions.Independent, dist.MaskedDistribution, ExpandedDistribution)
CHAINS = (HiddenMarkovModel, dist.IndependentHMM, dist.GaussianMRF)


def innermost(distribution: Any) -> Any:
    """What lies inside all wrappers that draw what they hold."""
    while isinstance(distribution, WRAPPERS) and not own_methods(distribution.__class__):
        distribution = distribution.base_dist
    return distribution


def component(distribution: Any) -> Any:
    """What lies inside all wrappers and mixtures."""
    part = innermost(distribution)
    while isinstance(part, torch.distributions.MixtureSameFamily | dist.MaskedMixture):
        part = innermost(part.component0 if isinstance(part, dist.MaskedMixture) else part.component_distribution)
    return part


def has_event(distribution: Any, shape: torch.Size) -> bool:
    """Whether data of a shape are events of a distribution, without an expansion that would compare all pairs."""
    event = distribution.event_shape
    own = shape[len(shape) - len(event) :]
    if isinstance(component(distribution), CHAINS) and event[0] == 1:  # the same in each step, for any number of them
        own, event = own[1:], event[1:]
    return own == event


def family(distribution: Any) -> str:
    """The name of the family inside all wrappers, for messages."""
    return type(innermost(distribution)).__name__


def with_own_total(distribution: Any, mean: Tensor, value: Tensor) -> Tensor:
    """The mean, with the total of each datum where the family has a fixed total (Multinomial)."""
    ratio = own_total(distribution, mean, value)
    return mean if ratio is None else mean * ratio


def own_variance(distribution: Any, value: Tensor) -> Tensor:
    """The variance, with the total of each datum where the family has a fixed total.

    Raises:
        ValueError: If the total of a datum is another than the family's, which is no Multinomial.
    """
    variance, ratio = distribution.variance, own_total(distribution, distribution.mean, value)
    if ratio is None:
        return variance
    if isinstance(innermost(distribution), torch.distributions.Multinomial):
        return variance * ratio
    if bool(((ratio - 1).abs() > 1e-4).any()):
        raise ValueError(
            f"The totals of the data differ from the total_count of {family(distribution)}, and its variance is known "
            "only for that total. Write cost=SquaredError() or cost=NegativeLogLikelihood()."
        )
    return variance


def own_total(distribution: Any, mean: Tensor, value: Tensor) -> Tensor | None:
    """The total of each datum over that of the mean, where the family has a fixed total (Multinomial); else None.

    Documents of different lengths share one ``total_count``, which their log_prob ignores.
    """
    inner = component(distribution)
    if not isinstance(support_of(inner), type(constraints.multinomial(1))):
        return None
    ratio = value.sum(-1, keepdim=True) / mean.sum(-1, keepdim=True)
    return ratio.where(ratio.isfinite(), 1.0)


def _own_methods(family: type) -> frozenset[Any]:
    found = [getattr(family, name, None) for name in ("sample", "rsample", "__call__", "log_prob")]
    modules = [getattr(method, "__module__", None) or "builtins" for method in found]
    libraries = ("torch.", "pyro.", "pyro_wae.", "builtins")
    return frozenset(method for method, module in zip(found, modules, strict=True) if not module.startswith(libraries))


own_methods: Callable[[Any], frozenset[Any]] = functools.cache(_own_methods)
"""The methods for draws and densities that a class does not have from torch, Pyro or this package.

A user's subclass of a family has its law only if there are none.
"""


def support_of(distribution: Any) -> Any:
    """What a value of a distribution may be, an event's dimensions taken off; any number where it does not say."""
    try:
        support = distribution.support
    except (NotImplementedError, AttributeError):
        return constraints.real
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


@torch.no_grad()
@batch_norm_at_rest()
def off_edges(distribution: Any, draw: Tensor) -> Tensor:
    """A draw, with a point inside the support where rounding has put it on an edge, at which no density is finite.

    Whole numbers, vectors such as those of a simplex, and families whose support has no bijection stay as they are.
    """
    inner, draw = innermost(distribution), at_least_float32(draw)
    part = component(inner)
    support = support_of(part)
    transforms = getattr(part, "transforms", ())
    has_edges = bool(transforms) or support is not constraints.real
    counts = any(isinstance(transform, dist.transforms.BatchNorm) for transform in transforms)  # each log_prob
    if not has_edges or counts or support.event_dim or is_discrete(part):
        return draw
    try:
        point = _point_inside(inner, draw)
    except NotImplementedError:
        return draw
    try:
        # Of the draw itself a transform may know where it came from, before it was rounded.
        with torch.autocast(draw.device.type, enabled=False):
            density = widened(inner).log_prob(draw.clone())
    except (NotImplementedError, KeyError):  # KeyError: of Pyro's flows
        return draw
    except ValueError:  # validated as outside of the support
        return point
    return draw.where(density.isfinite().reshape(density.shape + (1,) * inner.event_dim), point)


def _point_inside(distribution: Any, like: Tensor) -> Tensor:
    """A point inside the support, in the shape of a draw, or one that broadcasts with it."""
    inner = innermost(distribution)
    if isinstance(inner, torch.distributions.MixtureSameFamily):
        dim = -1 - len(inner.event_shape)
        return _point_inside(inner.component_distribution, like.unsqueeze(dim)).select(dim, 0)
    if isinstance(inner, torch.distributions.TransformedDistribution):  # also where its support does not say its edges
        transform = torch.distributions.ComposeTransform(list(inner.transforms))
        base = like.new_zeros(transform.inverse_shape(like.shape))
        point: Tensor = transform(_point_inside(inner.base_dist, base))
        return point
    return torch.distributions.biject_to(support_of(inner))(torch.zeros_like(like))


def is_discrete(distribution: Any) -> bool:
    """Whether its values are counts, labels or truth values; False where it does not say."""
    return bool(getattr(support_of(distribution), "is_discrete", False))


def check_no_angles(distribution: Any, mean: Tensor) -> None:
    """Raises ValueError for angles: a density on a line cannot be the same a whole turn farther on."""
    if distribution.has_rsample:
        return  # those of angles have none, and it is quicker to ask
    part = component(distribution)
    if part.has_rsample or support_of(part) is not constraints.real:
        return
    try:
        with torch.no_grad():
            here, turned = distribution.log_prob(mean), distribution.log_prob(mean + 2 * math.pi)
    except NotImplementedError:  # without a density nothing says that it is one of angles
        return
    if bool((here.isfinite() & torch.isclose(here, turned)).all()):
        raise ValueError(
            f"{family(distribution)} is a distribution of angles, which are compared along the circle and not along a "
            "line. Write cost=FunctionCost(lambda x, g: (2 - 2 * (x - g).cos()).reshape(len(x), -1).sum(1), "
            "decode=lambda fn: fn.mean), the squared chord, or cost=NegativeLogLikelihood()."
        )


def mean_of(distribution: Any, *, takes_angles: bool = False) -> Tensor:
    """The mean of a distribution, which a decoder's output is.

    Args:
        distribution: The distribution.
        takes_angles: Whether angles have their mean direction; that of a mixture depends on where the circle is cut.

    Raises:
        ValueError: If there is none, or it is not finite, outside the support, or of angles.
    """
    try:
        mean = distribution.mean
    except (NotImplementedError, AttributeError) as error:
        raise ValueError(f"{family(distribution)} has no mean to compare the data with. {REMEDY}") from error
    if not takes_angles or component(distribution) is not innermost(distribution):
        check_no_angles(distribution, mean)
    if mean.device.type != "cpu" or not is_finite(distribution, mean, "mean"):
        return mean
    support = support_of(distribution)
    # Between whole numbers a mean may lie.
    is_free = support is constraints.real or is_discrete(component(distribution))
    if not is_free and not bool(support.check(mean).all()):
        raise ValueError(f"{family(distribution)} has a mean outside its support for these parameters. {REMEDY}")
    return mean


def is_finite(distribution: Any, moment: Tensor, name: str) -> bool:
    """Whether a moment is finite; parameters that are not are the net's fault, and reported as such."""
    # A sum that is finite has no part that is not, and takes a fraction of the time.
    if math.isfinite(moment.detach().sum().item()) or bool(moment.isfinite().all()):
        return True
    if all(bool(part.isfinite().all()) for part in distribution_tensors(distribution)):
        raise ValueError(f"{family(distribution)} has no finite {name} to compare the data with. {REMEDY}")
    return False


def distribution_of(prior: Any, *, write: str) -> Any:
    """The distribution of one code that a prior stands for: itself, or what the call of a module returns.

    Args:
        prior: A distribution, or a module whose call returns one.
        write: The line to write instead.

    Raises:
        TypeError: If it is neither.
    """
    # A name, because a distribution that can only be called may have no repr.
    found = type(prior).__name__
    problem = (
        f"prior must be a module whose call returns a distribution, or a distribution, found {found}. Write {write}."
    )
    if isinstance(prior, nn.Module):
        try:
            inspect.signature(prior.forward).bind()
        except TypeError as error:
            raise TypeError(problem) from error
    found = prior() if isinstance(prior, nn.Module) else prior
    if not hasattr(found, "sample"):
        raise TypeError(problem)
    if hasattr(found, "clear_cache"):
        found.clear_cache()  # of transforms, made with the parameters of the step before
    return found


def drawn(prior: Any, count: int) -> Tensor:
    """Independent draws of a distribution of one code; one that can only be called, as ``ZukoToPyro``, is called."""
    with torch.no_grad():
        try:
            return prior.sample((count,))
        except NotImplementedError:
            return prior((count,))


def distribution_tensors(value: Any, depth: int = 5) -> Iterator[Tensor]:
    """The tensors of a distribution, those of its modules included."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from value.parameters()
    if depth and isinstance(value, list | tuple):
        for item in value:
            yield from distribution_tensors(item, depth - 1)
    if depth and isinstance(value, torch.distributions.Distribution | torch.distributions.Transform):
        for name, item in vars(value).items():
            # A transform keeps its last draw, which is no parameter.
            if not name.startswith("_cache"):
                yield from distribution_tensors(item, depth - 1)


def is_learnable(distribution: Any) -> bool:
    """Whether a distribution has learnable parameters, where gradients are computed."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in distribution_tensors(distribution))


def widened(value: Any) -> Any:
    """A distribution, or a part of one, with tensors of half precision cast up to float32."""
    if isinstance(value, Tensor):
        return at_least_float32(value)
    if not isinstance(value, torch.distributions.Distribution):
        return value
    parts = vars(value)
    wide = {name: widened(part) for name, part in parts.items()}
    if all(wide[name] is part for name, part in parts.items()):
        return value
    changed = copy.copy(value)
    vars(changed).update(wide)
    return changed


def leaves(value: Tensor) -> dict[Tensor, None]:
    """The parameters that a tensor depends on, in the order of a walk through its graph."""
    if value.grad_fn is None:
        return {value: None} if value.requires_grad else {}
    found: dict[Tensor, None] = {}
    seen: set[Any] = {value.grad_fn}
    nodes = [value.grad_fn]
    while nodes:
        node: Any = nodes.pop()
        if hasattr(node, "variable"):
            found[node.variable] = None
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                nodes.append(parent)
    return found
