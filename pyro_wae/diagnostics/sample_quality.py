"""Samples of a model beside held-out data, for metrics of samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_wae._core import checks
from pyro_wae._core.distributions import family, own_total
from pyro_wae._core.programs import part_of, tensors_of
from pyro_wae._core.random_state import isolated_seed
from pyro_wae._core.rows import working_precision
from pyro_wae.diagnostics.hypothesis_test import as_rows, new_generator
from pyro_wae.predict.runs import output_nodes, run_model, site_output
from pyro_wae.step.program import Program, Sample, mask_of

BLOCK_ROWS = 500


class PrecisionRecall(NamedTuple):
    """The result of :func:`precision_recall`.

    Args:
        precision: The fraction of samples that lie near data.
        recall: The fraction of data that lie near samples.
    """

    precision: float
    recall: float


def sample_quality(
    model: Program,
    x: Any,
    metric: Any,
    *,
    site: str | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 500,
    random: bool = False,
    seed: int = 0,
) -> Any:
    """Compares held-out data with as many samples of the model, by a metric such as the Frechet inception distance.

    The model runs on batches of the data, without its guide: each run yields the data of an observed site and as many
    decoded prior samples. A model that is conditional on an argument therefore samples for the same conditions. Means
    of a Multinomial have the totals of the data. The random state is left as it was.

    Args:
        model: The Pyro model. Modules run in the mode that they are in: call ``.eval()`` first.
        x: Held-out data, the argument of the model; a dict, or a tuple of all arguments. Tensors of the length of the
            first one are split into batches.
        metric: A metric of torchmetrics, such as ``FrechetInceptionDistance`` or ``KernelInceptionDistance`` with any
            feature network, which is reset first; or a function f(data, samples) of all data and samples.
        site: The observed site; None where there is one.
        transform: Applied to data and samples first, such as a reshape of rows to images.
        batch_size: Data in a run of the model.
        random: Whether to draw from the site's distribution instead of taking its mean.
        seed: Seed of the prior samples.

    Returns:
        What ``metric.compute()`` returns, or the function.

    Raises:
        TypeError: If the metric is neither, or an option has the wrong type.
        ValueError: If there are no data, no such site, several sites and no choice among them, an observed site has no
            mean, data are masked, or draws of a Multinomial have other totals than the data.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x)
        >>> x = torch.randn(300, 2, generator=torch.Generator().manual_seed(1))
        >>> found = sample_quality(model, x, precision_recall)
        >>> found.precision > 0.7 and found.recall > 0.7
        True
    """
    size = checks.whole("batch_size", batch_size, write="batch_size=500")
    is_class = isinstance(metric, type)  # whose methods belong to no metric yet
    is_metric = not is_class and all(callable(getattr(metric, name, None)) for name in ("update", "compute"))
    what = "a metric with update(x, real=...) and compute(), or a function f(data, samples)"
    if not is_metric:
        checks.function("metric", metric, what, write="metric=precision_recall")
    if transform is not None:
        checks.function("transform", transform, "a function of data, or None", write="transform=None")
    if site is not None:
        checks.text("site", site, "the name of an observed site", write="site='x'")
    random = checks.flag("random", random)
    _, own_seed = new_generator(seed)
    args = x if isinstance(x, tuple) else (x,)
    first = next((tensor for value in args for tensor in tensors_of(value)), None)
    if first is None or not len(first):
        raise ValueError(
            "There are no data: no argument is a tensor with rows. Write sample_quality(model, x, metric)."
        )
    checks.tensor("x", first, write="sample_quality(model, x.to_dense(), metric)")
    if is_metric:
        metric.reset()
    found = []
    with torch.no_grad(), isolated_seed(own_seed, first.device):
        for start in range(0, len(first), size):
            rows = slice(start, start + size)
            pair = _pair(model, [part_of(value, rows, len(first)) for value in args], site, random)
            data, samples = pair if transform is None else map(transform, pair)
            checks.tensor("What transform returns", samples, write="transform=lambda x: x.flatten(1)")
            if is_metric:
                metric.update(data, real=True)
                metric.update(samples, real=False)
            else:
                found.append((data, samples))
    return metric.compute() if is_metric else metric(*map(torch.cat, zip(*found, strict=True)))


def precision_recall(data: Tensor, samples: Tensor, *, neighbours: int = 3) -> PrecisionRecall:
    """Precision and recall of samples, by neighbourhoods of features.

    The manifold of a set of rows is the union of balls around each of them, whose radius is the distance to its k-th
    nearest neighbour among the others. Precision is the fraction of samples inside the manifold of the data, recall the
    fraction of data inside the manifold of the samples. For two sets from the same distribution neither is 1: compare
    with two halves of the data.

    Args:
        data: Features of data, shape (n, d).
        samples: Features of samples, shape (m, d).
        neighbours: k.

    Raises:
        TypeError: If data or samples are not tensors, or ``neighbours`` is not an integer.
        ValueError: If they are not rows of finite floats of equal length, or fewer than k + 1.

    Source: Kynkaanniemi, Karras, Laine, Lehtinen, Aila, "Improved Precision and Recall Metric for Assessing Generative
    Models", NeurIPS 2019, arXiv:1904.06991.

    Example:
        >>> data, samples = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([[0.4], [0.5], [0.6], [9.0]])
        >>> precision_recall(data, samples, neighbours=1)
        PrecisionRecall(precision=0.75, recall=0.75)
    """
    rows, drawn = as_rows(data, "data"), as_rows(samples, "samples")
    most = min(len(rows), len(drawn)) - 1
    k = checks.whole("neighbours", neighbours, most=most, write=f"neighbours={min(3, most)}")
    if rows.shape[1] != drawn.shape[1]:
        raise ValueError(
            f"data and samples must have rows of one length, found shapes {tuple(rows.shape)} and "
            f"{tuple(drawn.shape)}. Take the features of both by one network."
        )
    dtype = torch.promote_types(rows.dtype, drawn.dtype)
    rows, drawn = rows.to(dtype), drawn.to(dtype)
    return PrecisionRecall(precision=_covered(drawn, rows, k), recall=_covered(rows, drawn, k))


def _pair(model: Program, args: Sequence[Any], site: str | None, random: bool) -> tuple[Tensor, Tensor]:
    """Data of an observed site, and the samples of one run."""
    nodes = output_nodes(run_model(model, args, {}))
    if site is None and len(nodes) == 1:
        (site,) = nodes
    name = str(checks.choice("site", site, nodes))
    mask = mask_of(Sample(nodes[name]))
    if mask is not None and not bool(mask.all()):
        raise ValueError(
            f"Some data of site '{name}' are masked, and a metric takes whole data. Leave them out of the arguments: "
            "write sample_quality(model, x[mask], metric)."
        )
    data, fn = nodes[name]["value"], nodes[name]["fn"]
    samples = site_output(name, fn, random)
    ratio = own_total(fn, samples, data)
    if ratio is None:
        return data, samples
    if random and bool(((ratio - 1).abs() > 1e-4).any()):
        raise ValueError(
            f"The totals of the data of site '{name}' differ from the total_count of its {family(fn)}, which all draws "
            "have. Write random=False, which compares means with the totals of the data."
        )
    return data, samples * ratio


def _covered(points: Tensor, manifold: Tensor, k: int) -> float:
    """The fraction of points inside one of the balls of a manifold, in blocks of balls."""
    # A distance by a product of matrices loses the digits by which rows far from 0 differ.
    centre = manifold.mean(0, dtype=working_precision(manifold).dtype)
    points, manifold = (working_precision(rows) - centre for rows in (points, manifold))
    # Each pair of different rows is measured once: rounding could put one of two equal rows inside and one outside.
    rows, places = torch.cat([points, manifold]).unique(dim=0, return_inverse=True)
    of_points, of_manifold = places.split([len(points), len(manifold)])
    inside = torch.zeros_like(of_points, dtype=torch.bool)
    for centres in of_manifold.unique().split(BLOCK_ROWS):
        distances = torch.cdist(rows[centres], rows).scatter_(1, centres[:, None], 0.0)
        # The smallest distance is that of a row to itself.
        radius = distances.index_select(1, of_manifold).topk(k + 1, dim=1, largest=False).values[:, -1:]
        inside |= (distances.index_select(1, of_points) <= radius).any(0)
    return inside.double().mean().item()
