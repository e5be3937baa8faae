"""Samples, reconstructions and interpolations of the observed sites that hold images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_wae._core import checks
from pyro_wae._core.random_state import isolated_seed
from pyro_wae.diagnostics.gathering import Gathered
from pyro_wae.predict import sample
from pyro_wae.predict.runs import output_nodes, run_model, site_output
from pyro_wae.step.prior import ReplaySubsamples
from pyro_wae.step.program import Program, Run

SAMPLES, INPUTS, PATHS, STEPS = 30, 10, 3, 10

SMALLEST_SIDE = 8
"""Height and width from which the data of a site are taken for images, if neither is more than twice the other."""

Shapes = tuple[int, ...] | Mapping[str, tuple[int, ...]] | None


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Images of one observed site, with values in [0, 1], shape (n, h, w) or (n, channels, h, w).

    Args:
        samples: Samples of the model.
        inputs: Data, missing pixels (NaN) 0.
        outputs: Their reconstructions.
        paths: Latent interpolations between two data, one after the other; a conditional decoder has the condition of
            the first.
        steps: Number of images in each.
    """

    samples: Tensor
    inputs: Tensor
    outputs: Tensor
    paths: Tensor
    steps: int


def collect_pictures(
    model: Program,
    guide: Program,
    gathered: Gathered,
    kwargs: Mapping[str, Any],
    *,
    shape: Shapes,
    data_plate: str | None,
    seed: int,
) -> dict[str, Pictures]:
    """Makes the pictures of each observed site whose data are images and whose distribution has a mean.

    Raises:
        ValueError: If ``shape`` names no observed site, or does not fit its data.
    """
    args, run = gathered.first
    shapes = _by_site(shape, list(run.observed))
    found: dict[str, Pictures] = {}
    for name, site in run.observed.items():
        inputs = site.value_rows()[0]
        inputs = inputs if inputs.is_floating_point() else inputs.float()  # truth values cannot be subtracted
        known = inputs[inputs.isfinite()]
        size = shapes[name] if name in shapes else _image_shape(tuple(inputs.shape[1:]))
        if size is None or not len(known):
            continue
        if len(size) not in (2, 3) or inputs[0].numel() != math.prod(size):
            raise ValueError(
                f"shape={size} does not fit the data of site '{name}', of shape {tuple(inputs.shape[1:])} each. "
                "Write shape=(height, width) or shape=(channels, height, width)."
            )
        try:
            output = site_output(name, site.distribution, False)
            outputs = site.rows(output.expand(site.value.shape), site.event_dim)
        except ValueError:
            continue  # a Categorical, say
        options = {"return_sites": [name], "data_plate": data_plate, **kwargs}
        with isolated_seed(seed, inputs.device):
            samples = sample(model, *args, num_samples=SAMPLES, **options)[name].movedim(site.value_dim, 0)
            paths = _paths(model, run, name, args, kwargs)
        low, high = known.min(), known.max()
        if low >= -0.05 and high <= 1.05:
            low, high = low.new_zeros(()), high.new_ones(())
        span = (high - low).where(high > low, 1.0)
        data = inputs[:INPUTS].where(~inputs[:INPUTS].isnan(), low)
        images = [
            ((x.reshape(len(x), *size) - low) / span).clamp(0, 1)
            for x in (samples, data, outputs[0, :INPUTS].detach(), paths)
        ]
        found[name] = Pictures(samples=images[0], inputs=images[1], outputs=images[2], paths=images[3], steps=STEPS)
    return found


def _paths(model: Program, run: Run, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Decoded points on straight lines between the codes of data 0 and 1, 2 and 3, and so on.

    A line has the condition of its start: for each point the model runs on all data, each on its way to the next.
    """
    site, points = run.observed[name], []
    starts = [2 * i % site.data for i in range(PATHS)]
    for step in range(STEPS):
        t = step / (STEPS - 1)
        codes = {key: own.value.lerp(own.value.roll(-1, own.value_dim), t) for key, own in run.latents.items()}
        with ReplaySubsamples(run.model):
            trace = run_model(poutine.condition(model, data=codes), args, kwargs)
        output = site_output(name, output_nodes(trace, codes=codes)[name]["fn"], False)
        points.append(output.movedim(site.value_dim, 0)[starts])
    return torch.stack(points, 1).flatten(0, 1)


def check_shape(shape: Any) -> None:
    """Raises TypeError or ValueError unless it is a shape, a dict of shapes, or None."""
    for size in shape.values() if isinstance(shape, Mapping) else [shape] * (shape is not None):
        is_shape = isinstance(size, Sequence) and not isinstance(size, str | bytes)
        checks.accepted("shape", size, is_shape, "an image's shape, or a dict of them by site", write="shape=(28, 28)")
        for side in size:
            checks.whole("Each number of shape", side, write="shape=(28, 28)")


def _by_site(shape: Shapes, names: list[str]) -> dict[str, tuple[int, ...]]:
    if shape is None:
        return {}
    if not isinstance(shape, Mapping):
        if len(names) > 1:
            raise ValueError(f"There are several observed sites, {names}: write shape={{'{names[0]}': {shape}}}.")
        return {names[0]: tuple(shape)}
    unknown = [name for name in shape if name not in names]
    if unknown:
        raise ValueError(f"shape names '{unknown[0]}', which is no observed site; these are {names}.")
    return {name: tuple(size) for name, size in shape.items()}


def _image_shape(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] not in (1, 3)):
        return None
    height, width = shape[-2:]
    return shape if min(height, width) >= SMALLEST_SIDE and max(height, width) <= 2 * min(height, width) else None
