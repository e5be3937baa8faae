"""What a scale weighs: a datum's cost, the whole loss, and a subsampled plate inside a datum."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import around, delta, normal
from pyro import poutine
from references import Seen, nested, program

from pyro_wae import WAELoss
from pyro_wae.costs import NegativeLogLikelihood


@pytest.mark.parametrize("scale", [1e-3, 7.0, torch.tensor(0.02)], ids=str)
@pytest.mark.parametrize("weight", ["Constraint", "number"])
def test_a_scale_of_everything_leaves_the_balance_of_cost_and_penalty(scale, weight):
    values = []
    for factor_ in (None, scale):
        pyro.set_rng_seed(2)
        model, guide = program(lambda x: delta(x + 1))
        if factor_ is not None:
            model, guide = poutine.scale(model, scale=factor_), poutine.scale(guide, scale=factor_)
        loss = WAELoss(**({} if weight == "Constraint" else {"penalty_weight": 3.0}))
        values.append([loss.loss_and_grads(model, guide, torch.linspace(-1, 1, 12).reshape(6, 2)) for _ in range(3)])
    # At the first step the weight starts from the cost, at later ones it has been raised.
    assert values[1] == pytest.approx([value * float(scale) for value in values[0]], rel=1e-5)


AROUND = {
    "a plate without a size": lambda x, scale: (pyro.plate("data"),),
    "a plate made before": lambda x, scale: (BEFORE,),
    "a scale inside of the plate": lambda x, scale: (pyro.plate("data", 6), poutine.scale(scale=scale)),
}
BEFORE = pyro.plate("data", 6)


@pytest.mark.parametrize("weights", [5.0, torch.linspace(0.5, 3, 6)], ids=["a number", "each datum"])
@pytest.mark.parametrize("place", [*AROUND, "a plate with a size"])
def test_a_scale_of_everything_is_found_where_one_site_has_a_scale_of_its_own(place, weights):
    def made(scale, of_model):
        def run(x):
            plates = AROUND.get(place, lambda x, scale: (pyro.plate("data", 6),))(x, scale)
            with nested(*plates):
                z = pyro.sample("z", normal(x, 2).expand([6]) if of_model else delta(x + 1))
                if of_model:
                    pyro.sample("x", around(z), obs=x)
                    with poutine.scale(scale=weights):
                        pyro.sample("y", around(2 * z), obs=x)

        return run if "inside" in place else poutine.scale(run, scale=scale)

    values = []
    for scale in (1.0, 1e-3, torch.tensor(1e-3)):
        loss = WAELoss(Seen(lambda codes: codes.square().mean()))
        value = loss.loss(made(scale, True), made(scale, False), torch.linspace(-1, 1, 12).reshape(6, 2))
        values.append((value / float(scale), float(loss.terms.weight)))
    assert values[1] == pytest.approx(values[0], rel=1e-5)
    assert values[2] == pytest.approx(values[0], rel=1e-5)


@pytest.mark.parametrize("observed", ["none", "one of two"])
@pytest.mark.parametrize("scale", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_a_scale_that_a_site_lacks_is_no_scale_of_everything(scale, observed):
    def both(of_model):
        def run(x):
            with pyro.plate("data"):
                with poutine.scale(scale=scale):
                    z = pyro.sample("z", normal(x, 2).expand([6]) if of_model else delta(x + 1))
                    if of_model and observed == "one of two":
                        pyro.sample("y", around(2 * z), obs=x)
                if of_model:
                    pyro.sample("x", around(z), obs=x)

        return run

    loss = WAELoss(Seen(lambda codes: codes.square().mean()))
    loss.loss(both(True), both(False), torch.linspace(-1, 1, 12).reshape(6, 2))
    assert float(loss.terms.weight) == pytest.approx(0.1 * float(loss.terms.cost), rel=1e-5)


INSIDE = {"latent": (0.5, 1.0, 1.0), "one observed site": (1.0, 0.1, 1.0), "all, by other factors": (4.0, 0.1, 2.0)}


@pytest.mark.parametrize("options", [{}, {"micro_batch": 4}, {"num_particles": 2}], ids=str)
@pytest.mark.parametrize("inside", INSIDE)
def test_a_scale_around_a_program_that_scales_its_sites_leaves_the_balance(inside, options):
    latent, first, second = INSIDE[inside]

    def model(x):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=latent):
                z = pyro.sample("z", normal(x, 2))
            with poutine.scale(scale=first):
                pyro.sample("x", around(z), obs=x)
            with poutine.scale(scale=second):
                pyro.sample("y", around(2 * z), obs=x)

    guide = program(lambda x: delta(x + 1))[1]
    x = torch.linspace(-1, 1, 12).reshape(6, 2)
    values, starts = [], []
    for factor, own in ((1.0, {}), (1e-3, options), (torch.tensor(7.0), options)):
        pyro.set_rng_seed(2)
        # Draws differ between the ways to run a step, and this penalty reads none.
        loss = WAELoss(Seen(lambda codes: codes.square().mean()), **own)
        values.append(loss.loss(poutine.scale(model, scale=factor), guide, x) / float(factor))
        starts.append(float(loss.terms.weight))
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)
    assert starts == pytest.approx([0.1 * (first * 2 + second * (x + 2).square().sum(1).mean().item())] * 3, rel=1e-5)


@pytest.mark.parametrize("sizes", [(12, 3), (100, 10)])
@pytest.mark.parametrize("kind", ["vectorised", "sequential", "nested", "likelihood", "function"])
def test_a_subsampled_plate_inside_a_datum_stands_for_the_whole(kind, sizes):
    """Each element costs (b + 1)^2 with b its place, squared error; in nats, half of that and a constant."""
    full, part = sizes
    x = torch.zeros(6, full)

    def model(x):
        rows = pyro.plate("data", 6, dim=-1)
        inner = pyro.plate("inner", full, subsample=torch.arange(part), dim=None if kind == "sequential" else -2)
        with rows:
            z = pyro.sample("z", normal(x, 1))
        if kind == "sequential":
            for i in inner:
                with rows:
                    pyro.sample(f"x{i}", dist.Normal(z[..., 0] * 0 + i + 1, 1), obs=x[:, i])
            return
        with rows, inner as index:
            place = index.float()[:, None] + 1
            if kind == "nested":
                with pyro.plate("deep", 10, subsample_size=5, dim=-3):
                    pyro.sample("x", dist.Normal(z[..., 0] * 0 + place, 1), obs=x.T[index].expand(5, part, 6))
            else:
                pyro.sample("x", dist.Normal(z[..., 0] * 0 + place, 1), obs=x.T[index])

    def guide(x):
        with pyro.plate("data", 6, dim=-1):
            pyro.sample("z", delta(x[:, :1] + 1))

    costs = {"likelihood": NegativeLogLikelihood(), "function": lambda x, g: (x - g).square().flatten(1).sum(1)}
    loss = WAELoss(cost=costs.get(kind), data_plate="data", penalty_weight=0.0)
    found = loss.loss(model, guide, x)
    squares = (torch.arange(part) + 1.0).square().sum().item() * full / part
    expected = {
        "nested": 10 * squares,
        "likelihood": 0.5 * squares + full * 0.5 * torch.tensor(2 * torch.pi).log().item(),
    }.get(kind, squares)
    assert found == pytest.approx(expected, rel=1e-5)
