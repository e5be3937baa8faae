"""Numbers that are not finite: what is named, and that no gradient follows."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import around, delta, normal, sites
from pyro import poutine
from references import program
from torch import nn

from pyro_wae import WAELoss
from pyro_wae.kernels import Gaussian
from pyro_wae.penalties import MMD, CramerWold, EnergyDistance, JensenShannon, SlicedWasserstein

N, D = 6, 2
X = torch.linspace(-1, 1, N * D).reshape(N, D)
F = torch.linspace(1, 2, N)
SEEN = torch.arange(N) % 3 != 1

# A factor that is a term is the subject of another file.
pytestmark = pytest.mark.filterwarnings("ignore:pyro.factor 'f' is a term of the loss")


@pytest.mark.parametrize("method", ["loss", "differentiable_loss", "loss_and_grads"])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize(
    ("part", "found"),
    [
        ("codes", "codes of latent site 'z' hold _.*guide's output"),
        ("prior", "prior samples of latent site 'z' hold _"),
        ("cost", "cost of observed site 'x' is _.*model's output"),
        ("penalty", "The penalty is _, though the codes are finite"),
        ("penalty of weight 0", "The penalty is _, though the codes are finite"),
        ("penalty of a site", "The penalty of latent site 'z' is _"),
        ("condition", "The condition 'y' holds _"),
        ("factor", "cost of observed site 'f' is _"),
    ],
)
def test_what_is_not_finite_stops_before_any_gradient_and_is_named(part, found, bad, method):
    """On the processor it is looked for whether or not Pyro validates."""
    weight = nn.Parameter(torch.ones(()))

    def model(x, y):
        with pyro.plate("data", N):
            pyro.sample("z", around(torch.full((D,), bad if part == "prior" else 0.0)))
            if part == "factor":
                pyro.factor("f", bad * F)
            pyro.sample("other", around(x), obs=x)
            pyro.sample("x", around(torch.zeros(N, D)), obs=x * bad if part == "cost" else x)

    _, guide = program(lambda x: delta((x + 3) * weight * (bad if part == "codes" else 1)))
    penalty = MMD(Gaussian(1.0), condition_kernel=Gaussian(1.0))
    if part.startswith("penalty"):
        penalty = lambda codes, prior: codes.sum() * 0 + bad  # noqa: E731
    options = {"penalty": {"z": penalty} if part == "penalty of a site" else penalty}
    options["penalty_weight"] = 0.0 if part == "penalty of weight 0" else 1.0
    options |= {"condition": "y"} if part == "condition" else {}
    y = torch.linspace(0, 1, N) * (bad if part == "condition" else 1)
    name = "NaN" if math.isnan(bad) or part == "condition" else "(NaN|infinity)"
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="(?s)" + found.replace("_", name)):
        getattr(WAELoss(**options), method)(model, guide, X, y)
    assert weight.grad is None


@pytest.mark.parametrize("method", ["loss", "differentiable_loss", "loss_and_grads"])
def test_a_loss_that_overflows_is_named(method):
    options = {"penalty": lambda codes, prior: codes.sum() * 0 + 1e30, "penalty_weight": 1e30}
    match = r"The loss is not finite, though its parts are.*\(1e\+30\).*overflows"
    with pytest.raises(ValueError, match=match):
        getattr(WAELoss(**options), method)(*program(), X.float())


@pytest.mark.parametrize("is_validated", [True, False])
def test_of_data_that_hold_nan_the_mask_is_named_that_leaves_them_out(is_validated):
    def code(x):
        return delta(x.nan_to_num() + 1)

    x = X.masked_fill(torch.arange(N * D).reshape(N, D) == 3, torch.nan)
    loss = WAELoss(penalty_weight=0.0)
    found = "cost of observed site 'x' is NaN.* data hold NaN.*" + re.escape(".mask(~x.isnan()).to_event(1)")
    with pyro.validation_enabled(is_validated):
        with pytest.raises(ValueError, match=found):
            loss.loss(*program(code), x)
        # Off by 1 in each element that is there: all of N D but one, as a mean over N data.
        masked = program(code, output=lambda z: dist.Normal(z, 1).mask(~x.isnan()).to_event(1))
        assert loss.loss(*masked, x) == pytest.approx((N * D - 1) / N)


@pytest.mark.parametrize("is_validated", [True, False])
def test_nan_in_one_of_several_particles(is_validated):
    calls = []

    def code(x):
        calls.append(1)
        return dist.Delta(x * (math.nan if len(calls) == 2 else 1), event_dim=1)

    # Pyro's own check of the decoder's arguments comes first.
    found = r"(?s)Normal.*found invalid values.*nan" if is_validated else "codes of latent site 'z' hold NaN"
    with pyro.validation_enabled(is_validated), pytest.raises(ValueError, match=found) as caught:
        WAELoss(num_particles=3).loss_and_grads(*program(code), X)
    assert not is_validated or "codes of latent site 'z' are not finite" in caught.value.__notes__[0]


PENALTIES = {
    "a kernel's length": lambda: MMD(),
    "that of a condition": lambda: MMD(Gaussian(1.0)),
    "a standardized penalty": lambda: MMD(standardize=True),
    "CramerWold": CramerWold,
    "EnergyDistance": EnergyDistance,
    "JensenShannon": JensenShannon,
    "SlicedWasserstein": SlicedWasserstein,
    "two penalties": lambda: {"z": MMD(), "w": None},
}


@pytest.mark.parametrize("bad", [torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("part", ["codes", "prior samples", "condition"])
def test_what_a_penalty_takes_from_its_first_draws_is_not_what_is_named(part, name, bad):
    """A kernel without a length, a unit of the condition or a discriminator comes before the loss is looked at."""
    weight = nn.Parameter(torch.ones(()))

    first = torch.arange(N)[:, None] == 0
    prior = torch.zeros(N, D).masked_fill((part == "prior samples") & first, bad)
    programs = sites(
        {
            "z": (lambda x: around(prior), lambda x: delta((x * bad if part == "codes" else x) * weight)),
            "w": (lambda x, z: normal(x, D), lambda x: delta(x * weight)),
        },
        lambda z, w: around(torch.zeros(N, D)),
    )
    y = torch.linspace(0, 1, N).masked_fill((part == "condition") & (torch.arange(N) == 2), bad)
    loss = WAELoss(PENALTIES[name](), condition="y")
    site = "The condition 'y' holds" if part == "condition" else f"The {part} of latent site 'z' hold"
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=f"{site} (NaN|infinity)"):
        loss.loss_and_grads(*programs, X, y=y)
    assert weight.grad is None


@pytest.mark.parametrize("part", ["datum", "time"])
def test_masked_codes_that_are_none_stop_before_their_gradient(part):
    """0 times NaN is NaN: the encoder's and the decoder's parameters would be none after this step."""
    encoder = nn.Linear(D, D)
    x = X.clone()
    x[1] = torch.nan
    kept = SEEN if part == "datum" else torch.stack([SEEN, SEEN | True], -1)

    def masked_by(fn):
        return fn.to_event(1) if part == "datum" else fn.mask(kept).to_event(1)

    def model(x):
        with pyro.plate("data", N), poutine.mask(mask=kept) if part == "datum" else nullcontext():
            z = pyro.sample("z", masked_by(dist.Normal(torch.zeros(N, D), 1)))
            pyro.sample("x", around(z.nan_to_num()), obs=X)

    def guide(x):
        with pyro.plate("data", N):
            code = encoder(x)
            pyro.sample("z", delta(code if part == "datum" else code.where(kept, torch.nan)))

    loss = WAELoss(penalty_weight=1.0)
    x = x if part == "datum" else X
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=r"masked codes of .* 'z' hold NaN.*nan_to"):
        loss.loss_and_grads(model, guide, x)
    assert encoder.weight.grad is None
    with torch.no_grad(), pyro.validation_enabled(False):
        assert np.isfinite(loss.loss(model, guide, x))
    assert np.isfinite(loss.loss_and_grads(model, guide, x.nan_to_num()) if part == "datum" else 0)


def root(x, g):
    return (x - g).square().flatten(1).sum(1).sqrt()


INFINITE_SLOPES = {
    "cost": ({"cost": root}, lambda z: z),
    "penalty": (
        {"penalty": lambda codes, prior: (codes[:1] - codes[:1].detach()).norm(dim=1).sqrt().mean()},
        lambda z: z + 1,
    ),
    "decoder": ({}, lambda z: 1 + (z - z.detach()).abs().sqrt()),
}


@pytest.mark.parametrize("options", [{}, {"num_particles": 2}, {"micro_batch": 4}], ids=str)
@pytest.mark.parametrize("part", INFINITE_SLOPES)
def test_a_finite_loss_with_an_infinite_slope_stops_before_it_reaches_the_encoder(part, options):
    """An optimiser would make all parameters NaN, and the next step would name the codes."""
    shift = nn.Parameter(torch.zeros(()))
    own, decoder = INFINITE_SLOPES[part]

    programs = program(lambda x: delta(x + shift), output=lambda z: around(decoder(z)))
    message = r"finite, and its gradient at the codes of latent site 'z' is not.*cost=(lambda .*\(\))\."
    with pytest.raises(ValueError, match=message) as raised:
        WAELoss(**{"penalty": MMD(Gaussian(1.0)), "penalty_weight": 1.0, **own, **options}).loss_and_grads(*programs, X)
    assert shift.grad is None
    if part == "cost":  # the line that the message says to write
        cost = eval(re.search(message, str(raised.value))[1])
        WAELoss(MMD(Gaussian(1.0)), cost=cost, penalty_weight=1.0, **options).loss_and_grads(*programs, X)
        assert shift.grad.isfinite()


@pytest.mark.usefixtures("single_precision")  # in which the cost of a huge number is infinite
@pytest.mark.filterwarnings("ignore:The prior of latent site 'z' differs between data")
@pytest.mark.parametrize(
    ("penalty", "condition"),
    [(MMD, None), (lambda: MMD(standardize=True), None), (CramerWold, None), (MMD, "x"), (SlicedWasserstein, "x")],
    ids=["mmd", "standardised", "cramer-wold", "condition", "condition as columns"],
)
def test_a_first_batch_that_fails_leaves_no_length_behind(penalty, condition):
    encoder, decoder = nn.Linear(3, 2), nn.Linear(2, 3)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x[:, :2], 1.0).to_event(1))
            pyro.sample("y", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(encoder(x)).to_event(1))

    def made_by(*batches):
        loss = WAELoss(penalty(), condition=condition, penalty_weight=1.0, prior_draws=2)
        for x in batches:
            with pytest.raises(ValueError, match=r"inf|total variance") if x.abs().max() > 1e9 else nullcontext():
                pyro.set_rng_seed(1)
                loss.loss_and_grads(model, guide, x)
        return loss.terms.as_dict(), {name: part.state_dict() for name, part in loss.named_children()}

    x = torch.randn(20, 3)
    torch.testing.assert_close(made_by(1e30 * x, x), made_by(x), equal_nan=True)
