"""What a step of WAELoss makes of each program of programs.py, whichever way it is run.

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

import programs
import pyro
import pyro.distributions as dist
import torch
from programs import ALL, FIRST, PART, SIZE, D, N, around, data, delta, normal, pair, part_of_the_data
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.infer.autoguide.effect import AutoNormalMessenger

from pyro_wae import WAELoss
from pyro_wae.kernels import Gaussian
from pyro_wae.penalties import MMD


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
    "two sites": Program(programs.two_sites),
    "two sites, one of float32": Program(lambda: programs.two_sites(lambda x: x.float())),
    "sites of two precisions": Program(
        lambda: programs.two_sites(lambda x: x.float() if x.dtype == torch.float64 else x.double())
    ),
    "hierarchy": Program(programs.hierarchy),
    "inner plate": Program(programs.inner_plate, options={"data_plate": "data"}),
    "subsampled inner plate": Program(
        lambda: programs.inner_plate(4),
        cost=4 * ALL * D,
        options={"data_plate": "data"},
        but={"micro-batches": "plate 'parts' draws 3 of 12 by itself"},
    ),
    "sequential plate": Program(programs.sequential_plate),
    "ragged sequence": Program(programs.ragged_sequence, cost=((5 + 9) * D + 2) / N),
    "elements missing": Program(programs.elements_missing, cost=2 * ALL),
    "imputed data": Program(programs.imputed, cost=PART * D),
    "scaled cost": Program(lambda: programs.scaled(observed=0.5), cost=ALL * D / 2),
    "cost scaled by datum": Program(
        lambda: programs.scaled(observed=lambda index: index + 1.0 - FIRST), cost=(sum(range(1, 9)) + 4 * 8) / N * D
    ),
    "factor in the model": Program(
        lambda: programs.factors("model"), cost=ALL * D + 1, warns="pyro.factor 'f' is a term of the loss"
    ),
    "factor in the guide": Program(
        lambda: programs.factors("guide"), cost=ALL * D + 1, warns="pyro.factor 'f' is a term of the loss"
    ),
    "factor outside the plate": Program(
        lambda: programs.factors("outside"),
        cost=ALL * D + 1,
        warns="pyro.factor 'f' is a term of the loss",
        but={"micro-batches": "micro_batch would count it", "ranks": "process_group would count it"},
    ),
    "computed and auxiliary sites": Program(programs.computed_and_auxiliary),
    "reparametrised": Program(programs.reparametrised),
    "conditioned": Program(lambda: programs.handled(poutine.condition)),
    "do": Program(lambda: programs.handled(poutine.do)),
    "AutoDelta": Program(lambda: programs.autoguide(AutoDelta)),
    "AutoNormal": Program(lambda: programs.autoguide(AutoNormal), tolerance=1e-2),
    "messenger guide": Program(lambda: programs.autoguide(AutoNormalMessenger), tolerance=1e-2),
    # What is refused
    "global latent": Program(programs.global_latent, error=unfit("w")),
    "global latent alone": Program(
        lambda: programs.global_latent(False), error=unfit("w"), but={"vectorised particles": "expanded size"}
    ),
    "no plate": Program(
        programs.no_plate,
        error=("'z' of batch shape", "is in no plate", "with pyro.plate('data', ", "pyro.sample('z'"),
        but={"vectorised particles": "Shape mismatch inside plate"},
    ),
    "plates of their own": Program(
        programs.own_plates, error=("Latent site 'z'", "outside the data plate 'data'", "with pyro.plate('data', ")
    ),
    "data outside": Program(
        programs.data_outside, error=("Observed site 'x'", "outside the data plate 'data'", "pyro.sample('x'")
    ),
    "data one by one": Program(
        programs.data_one_by_one, error=("only inside the sequential plate 'data'", "pyro.plate('data', n)")
    ),
    "unknown plate": Program(
        pair,
        error=("'rows' is no vectorised plate", "'data' (dim=-1", "data_plate='data'"),
        options={"data_plate": "rows"},
    ),
    "several plates": Program(
        programs.inner_plate,
        error=(
            "Several plates",
            "'data' (dim=-2",
            "'parts' (dim=-1, size 3)",
            "data: data_plate='",
            "WAELoss(data_plate='",
        ),
    ),
    "several subsampled plates": Program(
        lambda: programs.inner_plate(4, data=lambda x, index: pyro.plate("data", SIZE, subsample=index, dim=-2)),
        error=("Several plates", "WAELoss(data_plate="),
    ),
    "inner plate of the model alone": Program(
        lambda: programs.inner_plate(of_guide=False),
        error=("'z'", "(8, 1) in the guide and (8, 3) in the model", "validated:", "disagree at site 'z'"),
        options={"data_plate": "data"},
    ),
    "data in another dimension": Program(programs.dimension_of_the_guide, error=("'z'",)),
    "batch in the event": Program(
        programs.batch_in_the_event,
        error=("'z' is global", "of shape (", "is the data, write .to_event(1) inside pyro.plate('data', "),
    ),
    "nothing shared": Program(programs.nothing_shared, error=("share no latent site", "z = pyro.sample('z', ...)")),
    "nothing observed": Program(programs.nothing_observed, error=("no observed site", "pyro.sample('x', ..., obs=x)")),
    "no gradient": Program(
        lambda: pair(code=lambda loc: dist.VonMises(loc, 1.0).to_event(1)),
        error=("'z' cannot be reparameterised in the guide", "dist.Normal(loc, scale)", "dist.Delta(loc)"),
    ),
    "discrete": Program(
        lambda: pair(code=lambda loc: dist.OneHotCategorical(logits=loc)),
        error=("'z' is discrete in the guide (OneHotCategorical)", "dist.OneHotCategoricalStraightThrough"),
    ),
    "enumerated in the guide": Program(
        lambda: programs.enumerated(False),
        error=("'z' is discrete in the guide", "does not enumerate", "RelaxedBernoulliStraightThrough"),
    ),
    "enumerated in the model": Program(
        lambda: programs.enumerated(True), error=("'k' of the model is to be enumerated", "dist.MixtureSameFamily")
    ),
    "enumerated one by one": Program(
        lambda: programs.enumerated(True, "sequential"),
        # Pyro's own error where it validates.
        error=("'k' of the model is to be enumerated", "dist.MixtureSameFamily", "validated:", "'k'"),
    ),
    **{
        f"mask of another batch at {site}": Program(
            lambda site=site: programs.mask_of_another_batch(site),
            error=(f"The mask at site '{site}' has shape (9,)", "poutine.mask(mask=...)"),
        )
        for site in ("z", "x")
    },
    "one code for all": Program(
        programs.one_code_for_all, error=("'z'", "share one code", "same plates", "validated:", "disagree at site 'z'")
    ),
    "broadcast": Program(
        programs.broadcast,
        error=("'x' has data of shape (", "(Normal) is of shape", "Give the decoder's output the shape of the data"),
    ),
    "dimension without a plate": Program(
        programs.undeclared_dimension,
        error=("At site 'z', batch dimension -1 has size 3", ".to_event(1)", "pyro.plate(..., 3, dim=-1)"),
    ),
    "guide observes": Program(
        programs.guide_observes,
        error=("The guide observes site 'label' (Bernoulli)", "pyro.factor('label', -distribution"),
    ),
    "scale in the guide": Program(
        lambda: programs.scaled(guide_scale=2.0),
        error=("'z' has a poutine.scale in the guide", "around both, or around the model"),
    ),
    "scale for each datum": Program(
        lambda: programs.scaled(each=True), error=("'z' has a poutine.scale of shape (", "poutine.scale(scale=0.5)")
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
