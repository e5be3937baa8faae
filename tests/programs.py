"""Pyro programs, each with what a step of WAELoss makes of it, whichever way it is run.

Every guide gives the code x + w b of a datum x, with a parameter b = 1 and the datum's last number w, and every
decoder gives the code back. A cost is therefore the number of elements of a datum that are compared, times (w b)^2,
and its slope in b is twice the cost. Data are whole numbers, which bfloat16 holds exactly; w is 3 for
one of them and 1 for the others, so the cost of a part of the data is not that of all.

As a script it is one rank of a process group, which runs all programs and writes what it found.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, config_enumerate
from pyro.infer.autoguide import AutoDelta, init_to_mean
from pyro.infer.autoguide.effect import AutoNormalMessenger
from pyro.infer.reparam import LocScaleReparam
from torch import nn

from pyro_wae import WAELoss
from pyro_wae.kernels import Gaussian
from pyro_wae.penalties import MMD

N, D, FIRST, SIZE = 8, 3, 5, 40
"""Data, numbers of a datum, and the place of the batch in a data set of SIZE."""
ALL, PART = (7 * 1 + 9) / 8, (5 * 1 + 9) / 6
"""The mean of w^2 over all data, and over those of the mask."""


@dataclass
class Program:
    """A program.

    Args:
        make: Makes model and guide, which take x of shape (n, D), the indices of the data, and a mask of them.
        cost: The mean cost, where a step goes through.
        warns: A part of the one warning that it gives, or "".
        error: Parts of the error's message, in order; those after "validated:" hold where Pyro validates.
        options: Arguments of the loss.
        tolerance: Relative error of the cost: an encoder's noise.
        but: Routes that do not serve it, each with a part of the error's message.
    """

    make: Callable[[], tuple[Any, Any]]
    cost: float = ALL * D
    warns: str = ""
    error: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-5
    but: dict[str, str] = field(default_factory=dict)


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


def all_data(x: torch.Tensor, index: torch.Tensor) -> Any:
    return pyro.plate("data", len(x))


def part_of_the_data(x: torch.Tensor, index: torch.Tensor, *_: Any) -> Any:
    return pyro.plate("data", SIZE, subsample=index)


def pair(prior=normal, code=delta, output=around, plate=all_data, guide_plate=None, seen_alone=False):
    """A model with one latent and one observed site, and its guide."""

    def model(x, index, seen):
        with plate(x, index), poutine.mask(mask=seen) if seen_alone else nullcontext():
            z = pyro.sample("z", prior(x))
            pyro.sample("x", output(z), obs=x)

    def guide(x, index, seen):
        with (guide_plate or plate)(x, index):
            pyro.sample("z", code(encoded(x)))

    return model, guide


def with_guide(model):
    return model, pair()[1]


class AutoEncoder(nn.Module):
    """Nets where the programs have `encoded`: linear ones between x and d numbers, unless others are given."""

    def __init__(self, x: int, d: int, *, encoder=None, prior=None, code=delta):
        super().__init__()
        self.encoder, self.decoder = encoder or nn.Linear(x, d), nn.Linear(d, x)
        self.prior, self.code = prior or (lambda x: normal(x, d)), code

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(x))
            pyro.sample("x", around(self.decoder(z)), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.code(self.encoder(x)))


def two_sites():
    def model(x, index, seen):
        with all_data(x, index):
            a = pyro.sample("z1", normal(x, 1))
            b = pyro.sample("z2", normal(x, 2))
            pyro.sample("x", around(torch.cat([a, b], -1)), obs=x)

    def guide(x, index, seen):
        with all_data(x, index):
            pyro.sample("z2", delta(encoded(x)[..., 1:]))
            pyro.sample("z1", delta(encoded(x)[..., :1]))

    return model, guide


def hierarchy():
    def model(x, index, seen):
        with all_data(x, index):
            above = pyro.sample("above", normal(x))
            z = pyro.sample("z", around(above))
            pyro.sample("x", around(z), obs=x)

    def guide(x, index, seen):
        with all_data(x, index):
            z = pyro.sample("z", delta(encoded(x)))
            pyro.sample("above", delta(2 * z))

    return model, guide


def inner_plate(factor=1):
    def plates(x):
        return pyro.plate("data", len(x), dim=-2), pyro.plate("parts", D * factor, subsample_size=D, dim=-1)

    def model(x, index, seen):
        rows, parts = plates(x)
        with rows, parts:
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1))
            pyro.sample("x", dist.Normal(z, 1), obs=x)

    def guide(x, index, seen):
        rows, parts = plates(x)
        with rows, parts:
            pyro.sample("z", dist.Delta(encoded(x)))

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
            with poutine.scale(scale=observed):
                pyro.sample("x", around(z), obs=x)

    return model, poutine.scale(pair()[1], scale=guide_scale)


def factors(where):
    """A factor of minus b, its slope -1: the loss rises by b."""

    def model(x, index, seen):
        with all_data(x, index):
            z = pyro.sample("z", normal(x))
            pyro.sample("x", around(z), obs=x)
            if where == "model":
                pyro.factor("f", -shift().square().expand(len(x)))

    def guide(x, index, seen):
        with all_data(x, index):
            pyro.sample("z", delta(encoded(x)))
            if where == "guide":
                pyro.factor("f", shift().square().expand(len(x)), has_rsample=False)
        if where == "outside":
            pyro.factor("f", N * shift().square(), has_rsample=False)

    return model, guide


def computed_and_auxiliary():
    def model(x, index, seen):
        with all_data(x, index):
            z = pyro.sample("z", normal(x))
            pyro.deterministic("d", 1e6 * z, event_dim=1)
            pyro.sample("x", around(z), obs=x)

    def guide(x, index, seen):
        with all_data(x, index):
            u = pyro.sample("u", dist.Normal(x.new_zeros(()), 1), infer={"is_auxiliary": True})
            pyro.sample("z", delta(encoded(x) + 0 * u[..., None]))

    return model, guide


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

    if kind is AutoDelta:
        return model, AutoDelta(model, init_loc_fn=init_to_mean, create_plates=part_of_the_data)
    return model, kind(model, init_loc_fn=init_to_mean, init_scale=1e-5)


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
    def model(x, index, seen):
        z = pyro.sample("z", normal(x).expand([len(x)]))
        pyro.sample("x", around(z), obs=x)

    return model, lambda x, index, seen: pyro.sample("z", delta(encoded(x)))


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


def enumerated(in_model):
    def model(x, index, seen):
        with all_data(x, index):
            if in_model:
                pyro.sample("k", dist.Bernoulli(x.new_tensor(0.5)), infer={"enumerate": "parallel"})
            z = pyro.sample("z", normal(x) if in_model else dist.Bernoulli(x.new_full((D,), 0.5)).to_event(1))
            pyro.sample("x", around(z), obs=x)

    guide = pair(code=lambda loc: dist.Bernoulli(logits=loc).to_event(1))[1]
    return with_guide(model) if in_model else (model, config_enumerate(guide))


def one_code_for_all():
    return pair()[0], lambda x, index, seen: pyro.sample("z", delta(encoded(x).mean(0)))


def broadcast():
    def model(x, index, seen):
        with all_data(x, index):
            z = pyro.sample("z", normal(x))
            pyro.sample("x", dist.Normal(z[..., 0], 1), obs=x[:, :1])

    return with_guide(model)


def undeclared_dimension():
    def model(x, index, seen):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(x.new_zeros(D), 1)), 1), obs=x)

    def guide(x, index, seen):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Delta(encoded(x)))

    return model, guide


def guide_observes():
    def guide(x, index, seen):
        with all_data(x, index):
            pyro.sample("label", dist.Bernoulli(logits=encoded(x)[..., 0]), obs=seen.float())
            pyro.sample("z", delta(encoded(x)))

    return pair()[0], guide


def unfit(site):
    return f"Latent site '{site}' is global", f"{site} = pyro.param('{site}', ...)"


PROGRAMS = {
    # One latent, one observed site
    "Delta guide": Program(pair),
    "Normal guide": Program(lambda: pair(code=lambda loc: dist.Normal(loc, 1e-4).to_event(1)), tolerance=1e-2),
    "Uniform prior": Program(lambda: pair(prior=lambda x: dist.Uniform(x.new_full((D,), -5), 5).to_event(1))),
    "mixture prior": Program(
        lambda: pair(
            prior=lambda x: dist.MixtureSameFamily(
                dist.Categorical(x.new_ones(2)), dist.Normal(x.new_zeros(2, D), 1).to_event(1)
            )
        )
    ),
    "learnt prior": Program(lambda: pair(prior=lambda x: around(pyro.param("loc", lambda: x.new_zeros(D))))),
    "point prior": Program(lambda: pair(prior=lambda x: delta(x.new_zeros(D)))),
    "point prior of each datum": Program(
        lambda: pair(prior=delta), warns="The prior of latent site 'z' differs between data"
    ),
    "conditional prior": Program(lambda: pair(prior=around), warns="The prior of latent site 'z' differs between data"),
    "Delta decoder": Program(lambda: pair(output=lambda z: dist.Delta(z, event_dim=1))),
    "subsampled data": Program(lambda: pair(plate=part_of_the_data)),
    "plate without a size": Program(
        lambda: pair(prior=lambda x: normal(x).expand([len(x)]), plate=lambda x, index: pyro.plate("data"))
    ),
    "masked data": Program(lambda: pair(seen_alone=True), cost=PART * D),
    # Other sites and plates
    "two sites": Program(two_sites),
    "hierarchy": Program(hierarchy),
    "inner plate": Program(inner_plate, options={"data_plate": "data"}),
    "subsampled inner plate": Program(
        lambda: inner_plate(4),
        cost=4 * ALL * D,
        options={"data_plate": "data"},
        but={"micro-batches": "plate 'parts' draws 3 of 12 by itself"},
    ),
    "sequential plate": Program(sequential_plate),
    "ragged sequence": Program(ragged_sequence, cost=((5 + 9) * D + 2) / N),
    "elements missing": Program(elements_missing, cost=2 * ALL),
    "imputed data": Program(imputed, cost=PART * D),
    "scaled cost": Program(lambda: scaled(observed=0.5), cost=ALL * D / 2),
    "factor in the model": Program(
        lambda: factors("model"), cost=ALL * D + 1, warns="pyro.factor 'f' is a term of the loss"
    ),
    "factor in the guide": Program(
        lambda: factors("guide"), cost=ALL * D + 1, warns="pyro.factor 'f' is a term of the loss"
    ),
    "factor outside the plate": Program(
        lambda: factors("outside"),
        cost=ALL * D + 1,
        warns="pyro.factor 'f' is a term of the loss",
        but={"micro-batches": "micro_batch would count it", "ranks": "process_group would count it"},
    ),
    "computed and auxiliary sites": Program(computed_and_auxiliary),
    "reparametrised": Program(reparametrised),
    "conditioned": Program(lambda: handled(poutine.condition)),
    "do": Program(lambda: handled(poutine.do)),
    "AutoDelta": Program(lambda: autoguide(AutoDelta)),
    "messenger guide": Program(lambda: autoguide(AutoNormalMessenger), tolerance=1e-2),
    # What is refused
    "global latent": Program(global_latent, error=unfit("w")),
    "global latent alone": Program(
        lambda: global_latent(False), error=unfit("w"), but={"vectorised particles": "expanded size"}
    ),
    "no plate": Program(
        no_plate,
        error=("'z' of batch shape", "is in no plate", "with pyro.plate('data', ", "pyro.sample('z'"),
        but={"vectorised particles": "Shape mismatch inside plate"},
    ),
    "plates of their own": Program(
        own_plates, error=("Latent site 'z'", "outside the data plate 'data'", "with pyro.plate('data', ")
    ),
    "data outside": Program(
        data_outside, error=("Observed site 'x'", "outside the data plate 'data'", "pyro.sample('x'")
    ),
    "data one by one": Program(
        data_one_by_one, error=("only inside the sequential plate 'data'", "pyro.plate('data', n)")
    ),
    "unknown plate": Program(
        pair,
        error=("'rows' is no vectorised plate", "'data' (dim=-1", "data_plate='data'"),
        options={"data_plate": "rows"},
    ),
    "several plates": Program(
        inner_plate, error=("Several plates", "'data' (dim=-2", "'parts' (dim=-1, size 3)", "WAELoss(data_plate='")
    ),
    "nothing shared": Program(nothing_shared, error=("share no latent site", "z = pyro.sample('z', ...)")),
    "nothing observed": Program(nothing_observed, error=("no observed site", "pyro.sample('x', ..., obs=x)")),
    "no gradient": Program(
        lambda: pair(code=lambda loc: dist.VonMises(loc, 1.0).to_event(1)),
        error=("'z' cannot be reparameterised in the guide", "dist.Normal(loc, scale)", "dist.Delta(loc)"),
    ),
    "discrete": Program(
        lambda: pair(code=lambda loc: dist.OneHotCategorical(logits=loc)),
        error=("'z' is discrete in the guide (OneHotCategorical)", "dist.OneHotCategoricalStraightThrough"),
    ),
    "enumerated in the guide": Program(
        lambda: enumerated(False),
        error=("'z' is discrete in the guide", "does not enumerate", "RelaxedBernoulliStraightThrough"),
    ),
    "enumerated in the model": Program(
        lambda: enumerated(True), error=("'k' of the model is to be enumerated", "dist.MixtureSameFamily")
    ),
    "one code for all": Program(
        one_code_for_all, error=("'z'", "share one code", "same plates", "validated:", "disagree at site 'z'")
    ),
    "broadcast": Program(
        broadcast,
        error=("'x' has data of shape (", "(Normal) is of shape", "Give the decoder's output the shape of the data"),
    ),
    "dimension without a plate": Program(
        undeclared_dimension,
        error=("At site 'z', batch dimension -1 has size 3", ".to_event(1)", "pyro.plate(..., 3, dim=-1)"),
    ),
    "guide observes": Program(
        guide_observes, error=("The guide observes site 'label' (Bernoulli)", "pyro.factor('label', -distribution")
    ),
    "scale in the guide": Program(
        lambda: scaled(guide_scale=2.0),
        error=("'z' has a poutine.scale in the guide", "around both, or around the model"),
    ),
    "scale for each datum": Program(
        lambda: scaled(each=True), error=("'z' has a poutine.scale of shape (", "poutine.scale(scale=0.5)")
    ),
    "no mean": Program(
        lambda: pair(output=lambda z: dist.Cauchy(z, 1).to_event(1)),
        error=(
            "At observed site 'x': Cauchy has no finite mean",
            "cost=NegativeLogLikelihood()",
            "decode=lambda fn: ...",
        ),
    ),
    "NaN from the cost": Program(
        pair,
        error=("The cost of observed site 'x' is NaN", "model's output"),
        options={"cost": lambda x, g: (x - g).square().sum(1) * torch.nan},
    ),
    "infinite cost": Program(
        pair,
        error=("The cost of observed site 'x' is infinity", "model's output"),
        options={"cost": lambda x, g: (x - g).square().sum(1) / 0},
    ),
}


def run(
    program: Program, *, dtype=torch.float32, autocast=False, route="svi", rows=slice(None), **options
) -> dict[str, Any]:
    """What a step finds: the loss, cost, the slope in b, texts of warnings; or the error's message."""
    found: dict[str, Any] = {"cost": None, "slope": None, "error": None}
    model, guide = program.make()
    args = [value[rows] for value in data(dtype)]
    loss = WAELoss(MMD(Gaussian(1.0)), **{"penalty_weight": 0.0, **program.options, **options})
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
                if route == "svi":
                    SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), loss=loss).loss_and_grads(model, guide, *args)
                else:
                    value = loss(model, guide)(*args)
            if route == "module":
                value.backward()
            b = dict(pyro.get_param_store().named_parameters())["b"]
            found["cost"], found["slope"] = loss.terms.cost.item(), b.grad.item()
            found["penalty"] = loss.terms.penalty.item()
        except (ValueError, RuntimeError) as error:  # torch itself raises RuntimeError
            found["error"] = str(error)
    found["warnings"] = [str(warning.message) for warning in warned]
    return found


def check(name: str, found: dict[str, Any], *, route: str = "", tolerance: float = 0.0, validated: bool = True) -> None:
    """Asserts that a step has found what the table says."""
    program = PROGRAMS[name]
    error = program.error
    if "validated:" in error:
        here = error.index("validated:")
        error = error[here + 1 :] if validated else error[:here]
    if route in program.but:
        error = (program.but[route],)
    if error:
        assert found["error"] is not None, found
        assert re.search("(?s)" + ".*".join(map(re.escape, error)), found["error"]), found["error"]
        return
    assert found["error"] is None, found["error"]
    tolerance = max(tolerance, program.tolerance)
    assert abs(found["cost"] / program.cost - 1) <= tolerance, found
    assert abs(found["slope"] / (2 * program.cost) - 1) <= tolerance, found
    assert abs(found["penalty"]) < 10
    texts = [text for text in found["warnings"] if not text.startswith("Found vars in model but not guide")]
    assert [program.warns in text for text in texts] == [True] * bool(program.warns), texts


def main() -> None:
    rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(store, 2), rank=rank, world_size=2)
    found = {}
    for name, program in PROGRAMS.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(rank)
        found[name] = run(program, rows=slice(0, 4) if rank == 0 else slice(4, N), process_group="world")
    with open(out, "w", encoding="utf-8") as file:
        json.dump(found, file)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
