"""Pyro programs; program_table.py says what a step of WAELoss makes of each.

Every guide gives the code x + w b of a datum x, with a parameter b = 1 and the datum's last number w, and every
decoder gives the code back. A cost is therefore the number of elements of a datum that are compared, times (w b)^2,
and its slope in b is twice the cost. Data are whole numbers, which bfloat16 holds exactly; w is 3 for
one of them and 1 for the others, so the cost of a part of the data is not that of all.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDelta, init_to_mean
from pyro.infer.autoguide.effect import AutoNormalMessenger
from pyro.infer.reparam import LocScaleReparam
from torch import nn

N, D, FIRST, SIZE = 8, 3, 5, 40
"""Data, numbers of a datum, and the place of the batch in a data set of SIZE."""
ALL, PART = (7 * 1 + 9) / 8, (5 * 1 + 9) / 6
"""The mean of w^2 over all data, and over those of the mask."""


def data(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randint(-3, 4, (N, D), generator=torch.Generator().manual_seed(0)).to(dtype)
    x[:, -1] = torch.where(torch.arange(N) == 3, 3, 1)
    return x, torch.arange(N) + FIRST, torch.arange(N) % 4 != 1


def shift() -> torch.Tensor:
    return pyro.param("b", lambda: torch.tensor(1.0))


def encoded(x: torch.Tensor) -> torch.Tensor:
    return x @ torch.eye(x.shape[-1], dtype=x.dtype) + shift() * x[..., -1:]


def normal(x: torch.Tensor, d: int = D) -> Any:
    return dist.Normal(x.new_zeros(d), 1).to_event(1)


def delta(loc: torch.Tensor) -> Any:
    return dist.Delta(loc).to_event(1)


def around(z: torch.Tensor) -> Any:
    return dist.Normal(z, 1).to_event(1)


def gaussian(numbers: torch.Tensor) -> Any:
    """A Normal from its means and the logarithms of its standard deviations, side by side."""
    loc, scale = numbers.chunk(2, -1)
    return dist.Normal(loc, scale.exp()).to_event(1)


def all_data(x: torch.Tensor, *_: Any) -> Any:
    return pyro.plate("data", len(x))


def part_of_the_data(x: torch.Tensor, index: torch.Tensor, *_: Any) -> Any:
    return pyro.plate("data", SIZE, subsample=index)


def pair(
    prior=normal,
    code=delta,
    output=around,
    plate=all_data,
    guide_plate=None,
    seen_alone=False,
    line=lambda x, z: None,
    guide_line=lambda x, seen: None,
    observed=lambda x: x,
):
    """A model with one latent and one observed site, and its guide.

    Each may have a line more in the data plate; what the model's returns is added to the code that is decoded.
    """

    def model(x, index=None, seen=None):
        with plate(x, index), poutine.mask(mask=seen) if seen_alone else nullcontext():
            z = pyro.sample("z", prior(x))
            more = line(x, z)
            pyro.sample("x", output(z if more is None else z + more), obs=observed(x))

    def guide(x, index=None, seen=None):
        with (guide_plate or plate)(x, index):
            guide_line(x, seen)
            pyro.sample("z", code(encoded(x)))

    return model, guide


def sites(latents, output=lambda *values: around(torch.cat(values, -1)), *, plate=all_data, observed=lambda x: x):
    """A model of several latent sites and an observed one, and its guide; each takes the data and ignores the rest.

    Args:
        latents: For each site its prior, of the data and the values of the sites before it, and its code, of the data.
            The guide samples the codes from the last to the first, and none for a site whose code is None.
        output: The distribution of the observed site, of the values of all latent ones.
        plate: The data plate, of the data.
        observed: What of the data is observed.
    """
    priors, codes = ({name: parts[i] for name, parts in latents.items()} for i in (0, 1))

    def model(x, *args, **kwargs):
        with plate(x):
            values = []
            for name, prior in priors.items():
                values.append(pyro.sample(name, prior(x, *values)))
            pyro.sample("x", output(*values), obs=observed(x))

    def guide(x, *args, **kwargs):
        with plate(x):
            for name, code in reversed(codes.items()):
                if code is not None:
                    pyro.sample(name, code(x))

    return model, guide


def with_guide(model):
    return model, pair()[1]


class AutoEncoder(nn.Module):
    """Nets where the programs have `encoded`: linear ones between x and d numbers, unless others are given."""

    def __init__(self, x: int, d: int, *, encoder=None, decoder=None, prior=None, code=delta):
        super().__init__()
        self.encoder, self.decoder = encoder or nn.Linear(x, d), decoder or nn.Linear(d, x)
        self.prior, self.code = prior or (lambda x: normal(x, d)), code

    def plate(self, x):
        return pyro.plate("data", len(x))

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with self.plate(x):
            z = pyro.sample("z", self.prior(x))
            pyro.sample("x", around(self.decoder(z)), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with self.plate(x):
            pyro.sample("z", self.code(self.encoder(x)))


def two_sites(second=lambda x: x):
    return sites(
        {
            "z1": (lambda x: normal(x, 1), lambda x: delta(encoded(x)[..., :1])),
            "z2": (lambda x, _: normal(second(x), 2), lambda x: delta(second(encoded(x)[..., 1:]))),
        },
        lambda a, b: around(torch.cat([a, b.to(a)], -1)),
    )


def hierarchy():
    return sites(
        {
            "above": (normal, lambda x: delta(2 * encoded(x))),
            "z": (lambda x, above: around(above), lambda x: delta(encoded(x))),
        },
        lambda above, z: around(z),
    )


def inner_plate(factor=1, of_guide=True, data=lambda x, index: pyro.plate("data", len(x), dim=-2)):
    def parts():
        return pyro.plate("parts", D * factor, subsample_size=D, dim=-1)

    def model(x, index, seen):
        with data(x, index), parts():
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1))
            pyro.sample("x", dist.Normal(z, 1), obs=x)

    def guide(x, index, seen):
        with data(x, index), parts() if of_guide else nullcontext():
            pyro.sample("z", dist.Delta(encoded(x) if of_guide else encoded(x)[..., :1]))

    return model, guide


def sequential_plate():
    def model(x, index, seen):
        rows = all_data(x, index)
        for i in pyro.plate("parts", D):
            with rows:
                z = pyro.sample(f"z{i}", dist.Normal(x.new_zeros(()), 1))
                pyro.sample(f"x{i}", dist.Normal(z, 1), obs=x[:, i])

    def guide(x, index, seen):
        rows = all_data(x, index)
        for i in pyro.plate("parts", D):
            with rows:
                pyro.sample(f"z{i}", dist.Delta(encoded(x)[..., i]))

    return model, guide


def ragged_sequence():
    """The data of the mask have D elements, the others one."""

    def model(x, index, seen):
        with all_data(x, index):
            z = x.new_zeros(len(x))
            for t in pyro.markov(range(D)):
                with poutine.mask(mask=seen | (t == 0)):
                    z = pyro.sample(f"z{t}", dist.Normal(0.5 * z, 1))
                    pyro.sample(f"x{t}", dist.Normal(z, 1), obs=x[:, t])

    def guide(x, index, seen):
        with all_data(x, index):
            for t in range(D):
                pyro.sample(f"z{t}", dist.Delta(encoded(x)[..., t]))

    return model, guide


def elements_missing():
    def model(x, index, seen):
        with all_data(x, index):
            z = pyro.sample("z", normal(x))
            kept = torch.stack([seen, ~seen, torch.ones_like(seen)], -1)
            pyro.sample("x", dist.Normal(z, 1).mask(kept).to_event(1), obs=x.where(kept, torch.nan))

    return with_guide(model)


def imputed():
    def model(x, index, seen):
        with all_data(x, index):
            z = pyro.sample("z", normal(x))
            pyro.sample("x", around(z), obs=x, obs_mask=seen)

    def guide(x, index, seen):
        with all_data(x, index):
            z = pyro.sample("z", delta(encoded(x)))
            with poutine.mask(mask=~seen):
                pyro.sample("x_unobserved", delta(z))

    return model, guide


def scaled(observed=1.0, latent=1.0, guide_scale=1.0, each=False):
    def model(x, index, seen):
        with all_data(x, index):
            with poutine.scale(scale=torch.ones(len(x)) if each else latent):
                z = pyro.sample("z", normal(x))
            with poutine.scale(scale=observed(index) if callable(observed) else observed):
                pyro.sample("x", around(z), obs=x)

    return model, poutine.scale(pair()[1], scale=guide_scale)


def factors(where):
    """A factor of minus b, its slope -1: the loss rises by b."""

    def in_the_model(x, z):
        pyro.factor("f", -shift().square().expand(len(x)))

    def in_the_guide(x, seen):
        pyro.factor("f", shift().square().expand(len(x)), has_rsample=False)

    def guide(x, index, seen):
        pair()[1](x, index, seen)
        pyro.factor("f", N * shift().square(), has_rsample=False)

    if where == "outside":
        return pair()[0], guide
    return pair(line=in_the_model) if where == "model" else pair(guide_line=in_the_guide)


def computed_and_auxiliary():
    return pair(
        line=lambda x, z: 0 * pyro.deterministic("d", 1e6 * z, event_dim=1),
        guide_line=lambda x, seen: pyro.sample("u", dist.Normal(x.new_zeros(()), 1), infer={"is_auxiliary": True}),
    )


def reparametrised():
    def model(x, index, seen):
        with all_data(x, index):
            with poutine.reparam(config={"z": LocScaleReparam(0.0)}):
                z = pyro.sample("z", normal(x))
            pyro.sample("x", around(z), obs=x)

    def guide(x, index, seen):
        with all_data(x, index):
            pyro.sample("z_decentered", delta(encoded(x)))

    return model, guide


def handled(handler):
    """A model without data, to which a handler gives them."""

    def generate(x):
        with all_data(x, None):
            z = pyro.sample("z", normal(x))
            extra = pyro.sample("extra", normal(x))
            pyro.sample("x", around(z + extra))

    def model(x, index, seen):
        with poutine.condition(data={"x": x}):
            handler(generate, {"extra": torch.zeros_like(x)})(x)

    return with_guide(model)


def autoguide(kind):
    """A guide with parameters for each datum, codes of 0 before it is trained; x + b is the decoder's own here."""

    def model(x, index, seen):
        with part_of_the_data(x, index):
            z = pyro.sample("z", normal(x))
            pyro.sample("x", around(z + encoded(x)), obs=x)

    options = {} if kind is AutoNormalMessenger else {"create_plates": part_of_the_data}
    if kind is not AutoDelta:
        options["init_scale"] = 1e-5
    return model, kind(model, init_loc_fn=init_to_mean, **options)


# Programs that are refused


def global_latent(in_plate=True):
    def model(x, index, seen):
        w = pyro.sample("w", normal(x))
        with all_data(x, index) if in_plate else nullcontext():
            z = pyro.sample("z", normal(x)) if in_plate else w
            pyro.sample("x", around(z * w if in_plate else w.expand(len(x), D)), obs=x)

    def guide(x, index, seen):
        pyro.sample("w", delta(x.new_ones(D)))
        if in_plate:
            pair()[1](x, index, seen)

    return model, guide


def no_plate():
    return pair(lambda x: normal(x).expand([len(x)]), plate=lambda x, index: nullcontext())


def own_plates():
    def model(x, index, seen):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", normal(x))
        with all_data(x, index):
            pyro.sample("x", around(z), obs=x)

    return model, pair(plate=lambda x, index: pyro.plate("rows", len(x)))[1]


def data_outside():
    def model(x, index, seen):
        with all_data(x, index):
            z = pyro.sample("z", normal(x))
        pyro.sample("x", around(z), obs=x)

    return with_guide(model)


def data_one_by_one():
    def model(x, index, seen):
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"x{i}", around(pyro.sample(f"z{i}", normal(x))), obs=x[i])

    def guide(x, index, seen):
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"z{i}", delta(encoded(x)[i]))

    return model, guide


def nothing_shared():
    return pair()[0], lambda x, index, seen: shift()


def nothing_observed():
    def model(x, index, seen):
        with all_data(x, index):
            pyro.deterministic("d", pyro.sample("z", normal(x)), event_dim=1)

    return with_guide(model)


def enumerated(in_model, how="parallel"):
    if in_model:
        return pair(line=lambda x, z: 0 * pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": how})[..., None])
    model, guide = pair(
        lambda x: dist.Bernoulli(x.new_full((D,), 0.5)).to_event(1), lambda loc: dist.Bernoulli(logits=loc).to_event(1)
    )
    return model, config_enumerate(guide)


def one_code_for_all():
    return pair()[0], lambda x, index, seen: pyro.sample("z", delta(encoded(x).mean(0)))


def broadcast():
    return pair(output=lambda z: dist.Normal(z[..., 0], 1), observed=lambda x: x[:, :1])


def mask_of_another_batch(site):
    def model(x, index, seen):
        keep = torch.ones(N + 1, dtype=torch.bool)
        with all_data(x, index):
            with poutine.mask(mask=keep if site == "z" else True):
                z = pyro.sample("z", normal(x))
            with poutine.mask(mask=keep if site == "x" else True):
                pyro.sample("x", around(z), obs=x)

    return with_guide(model)


def scalars(**options):
    """A code of one number, or a batch of them, in a data plate of dimension -2."""
    return pair(
        output=lambda z: dist.Normal(z, 1), plate=lambda x, index: pyro.plate("data", len(x), dim=-2), **options
    )


def dimension_of_the_guide():
    """The data are in dimension -2 of the model and in dimension -1 of the guide."""
    return scalars(
        prior=lambda x: dist.Normal(x.new_zeros(()), 1),
        code=lambda loc: dist.Delta(loc[..., 0]),
        guide_plate=all_data,
        observed=lambda x: x[:, :1],
    )


def batch_in_the_event():
    """Distributions of the whole batch, in no plate."""
    return pair(
        lambda x: dist.Normal(torch.zeros_like(x), 1).to_event(2),
        lambda loc: dist.Delta(loc).to_event(2),
        lambda z: dist.Normal(z, 1).to_event(2),
        plate=lambda x, index: nullcontext(),
    )


def undeclared_dimension():
    return scalars(prior=lambda x: dist.Normal(x.new_zeros(D), 1), code=dist.Delta)


def guide_observes():
    return pair(
        guide_line=lambda x, seen: pyro.sample("label", dist.Bernoulli(logits=encoded(x)[..., 0]), obs=seen.float())
    )


class WithoutVariance(dist.Normal):
    @property
    def variance(self):
        raise NotImplementedError


class WithoutDensity(dist.Normal):
    def log_prob(self, value):
        raise NotImplementedError


class WithoutDraws(dist.Normal):
    def rsample(self, sample_shape=()):
        raise NotImplementedError
