"""What becomes of each kind of Pyro site, row by row of the table in docs/plates.md."""

from __future__ import annotations

import itertools
import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import around, delta, normal
from pyro import poutine
from pyro.infer import reparam
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, AutoStructured
from references import Seen
from torch import nn

from pyro_wae import WAELoss
from pyro_wae.costs import NegativeLogLikelihood, Site
from pyro_wae.kernels import Gaussian
from pyro_wae.penalties import MMD, CramerWold, EnergyDistance, JensenShannon, SlicedWasserstein
from pyro_wae.predict import reconstruct

PAGE = (Path(__file__).parents[1] / "docs" / "plates.md").read_text(encoding="utf-8")
TABLE = re.findall(
    r"^\| (.+?) \| (.+?) \|$", PAGE.partition("## What becomes of each site")[2].partition("\n## ")[0], re.M
)
ROWS = dict(TABLE[1:])

N, D = 6, 2
X = torch.linspace(-1, 1, N * D).reshape(N, D)
F = torch.linspace(1, 2, N)
SEEN = torch.arange(N) % 3 != 1
pytestmark = pytest.mark.filterwarnings(
    "ignore:Found vars in model but not guide", "ignore:pyro.factor 'f' is a term of the loss"
)


def program(model_line=lambda z: None, guide_line=lambda: None, *, site="x"):
    """A latent z, a line more in the plate, and an observed site; codes of x + 1."""

    def model(x):
        with pyro.plate("data", N):
            z = pyro.sample("z", normal(x, D))
            more = model_line(z)
            pyro.sample(site, around(z if more is None else z + more), obs=x)

    def guide(x):
        with pyro.plate("data", N):
            guide_line()
            pyro.sample("z", delta(x + 1))

    return model, guide


def latent(name, infer=None):
    return lambda *_: 0 * pyro.sample(name, normal(X, D), infer=infer or {})


def code_of(name, value):
    return lambda: pyro.sample(name, delta(value))


def factor(*_, scale=1.0):
    pyro.factor("f", scale * F, has_rsample=False)


def masked(line, mask=SEEN):
    def under(*args):
        with poutine.mask(mask=mask):
            return line(*args)

    return under


def imputed():
    def model(x):
        with pyro.plate("data", N):
            pyro.sample("x", around(pyro.sample("z", normal(x, D))), obs=x, obs_mask=SEEN)

    return model, program()[1]


def dependent():
    def model(x):
        with pyro.plate("data", N):
            above = pyro.sample("above", around(torch.full((D,), 500.0)))
            z = pyro.sample("z", dist.Normal(above, 1e-3).to_event(1))
            pyro.sample("x", around(z), obs=x)

    return model, program(guide_line=code_of("above", X))[1]


def outside(in_model):
    def model(x):
        factor_here(in_model)
        program()[0](x)

    def guide(x):
        factor_here(not in_model)
        program()[1](x)

    def factor_here(is_here):
        if is_here:
            pyro.factor("f", torch.tensor(-12.0), has_rsample=False)

    return model, guide


def inner_factor(z):
    with pyro.plate("inner", 3, dim=-2):
        pyro.factor("f", F.expand(3, N))


def handled(handler, *args, guide=None, **kwargs):
    """A model of two latents and two observed sites under a handler."""

    def model(x):
        with pyro.plate("data", N):
            z = pyro.sample("z", normal(x, D))
            w = pyro.sample("w", normal(x, D))
            pyro.sample("x", around(z + 0 * w), obs=x)
            pyro.sample("y", around(w), obs=x)

    return handler(model, *args, **kwargs), guide or program(guide_line=code_of("w", X + 2))[1]


def prior_on_a_parameter():
    def model(x):
        weight = pyro.sample("weight", normal(x, D))
        program(lambda z: 0 * weight)[0](x)

    def guide(x):
        pyro.sample("weight", delta(torch.zeros(D)))
        program()[1](x)

    return model, guide


def observed_in_the_guide():
    pyro.sample("label", dist.Bernoulli(logits=X[:, 0]), obs=torch.ones(N))


def split():
    def model(x):
        with pyro.plate("data", N):
            with poutine.reparam(config={"z": reparam.SplitReparam([1, 1], -1)}):
                z = pyro.sample("z", normal(x, D))
            pyro.sample("x", around(z), obs=x)

    def guide(x):
        with pyro.plate("data", N):
            for i in range(D):
                pyro.sample(f"z_split_{i}", delta(x[:, i : i + 1]))

    return model, guide


def unit(z):
    pyro.sample("f", dist.Unit(F), obs=torch.empty(N, 0))


def learnt():
    return program(lambda z: pyro.param("shift", torch.zeros(D)))


SHIFTED = {"z": X + 1}
# For each row the program, the codes of each site, and the cost of each observed site; or a part of the error.
CASES = {
    "latent site of model and guide": (program(), SHIFTED, {"x": D}),
    "latent site of the model that the guide does not sample": (program(latent("u")), SHIFTED, {"x": D}),
    "latent site that depends on another": (dependent(), {"above": X, "z": X + 1}, {"x": D}),
    "observed site": (program(site="y"), SHIFTED, {"y": D}),
    "observed site at its own value, `dist.Delta(y)` with `obs=y`": (
        program(lambda z: 0 * pyro.sample("y", delta(X), obs=X)),
        SHIFTED,
        {"x": D, "y": 0},
    ),
    "observed site of a part of the data, `obs_mask=...`": (imputed(), SHIFTED, {"x": D}),
    "`pyro.factor` in the model, in the data plate": (program(factor), SHIFTED, {"x": D, "f": -1.5}),
    "`pyro.factor` in the guide, in the data plate": (program(guide_line=factor), SHIFTED, {"x": D, "f": 1.5}),
    "`pyro.factor` in an inner plate": (program(inner_factor), SHIFTED, {"x": D, "f": -4.5}),
    "`pyro.factor` outside the data plate": (outside(True), SHIFTED, {"x": D, "f": 12 / N}),
    "`pyro.factor` under a mask": (program(masked(factor)), SHIFTED, {"x": D, "f": -F[SEEN].sum().item() / N}),
    "`pyro.factor` under `poutine.scale`": (
        program(lambda z: poutine.scale(factor, scale=0.5)()),
        SHIFTED,
        {"x": D, "f": -0.75},
    ),
    "observed `dist.Unit`": (program(unit), SHIFTED, {"x": D, "f": -1.5}),
    "`pyro.deterministic` in model or guide": (
        program(
            lambda z: pyro.deterministic("d", 1e6 * z, event_dim=1) * 0, lambda: pyro.deterministic("e", X, event_dim=1)
        ),
        SHIFTED,
        {"x": D},
    ),
    '`infer={"is_auxiliary": True}` at a latent site of the guide': (
        program(guide_line=latent("u", {"is_auxiliary": True})),
        SHIFTED,
        {"x": D},
    ),
    '`infer={"is_auxiliary": True}` at a latent site of the model': (
        program(latent("w", {"is_auxiliary": True}), code_of("w", X + 2)),
        {"z": X + 1, "w": X + 2},
        {"x": D},
    ),
    '`infer={"is_auxiliary": True}` at an observed site of the model': (
        program(lambda z: pyro.sample("u", around(z + 1), obs=X, infer={"is_auxiliary": True}) * 0),
        SHIFTED,
        {"x": D, "u": 4 * D},
    ),
    '`infer={"enumerate": ...}` in the guide': (
        program(
            lambda z: pyro.sample("k", dist.Bernoulli(0.5))[:, None] * 0,
            lambda: pyro.sample("k", dist.Bernoulli(F / 4), infer={"enumerate": "parallel"}),
        ),
        "'k' is discrete in the guide",
    ),
    '`infer={"enumerate": ...}` in the model': (
        program(lambda z: pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})[..., None] * 0),
        "'k' of the model is to be enumerated",
    ),
    "other keys of `infer`": (
        handled(
            poutine.infer_config,
            config_fn=lambda site: {"baseline": {"nn_baseline": None}, "num_samples": 4, "mine": 3},
        ),
        {"z": X + 1, "w": X + 2},
        {"x": D, "y": 4 * D},
    ),
    "`poutine.infer_config`": (
        handled(poutine.infer_config, config_fn=lambda site: {"_deterministic": True} if site["name"] == "y" else {}),
        {"z": X + 1, "w": X + 2},
        {"x": D},
    ),
    "`poutine.mask(mask=False)` at a latent site": (
        program(masked(latent("w"), False), code_of("w", X + 2)),
        SHIFTED,
        {"x": D},
    ),
    "`poutine.mask(mask=False)` at an observed site": (
        program(masked(lambda z: pyro.sample("y", around(z), obs=X) * 0, False)),
        SHIFTED,
        {"x": D},
    ),
    "`poutine.mask(mask=False)` at a factor": (program(masked(factor, False)), SHIFTED, {"x": D}),
    "`poutine.condition` of a latent site": (
        handled(poutine.condition, data={"w": X + 3}, guide=program()[1]),
        SHIFTED,
        {"x": D, "y": 9 * D, "w": (X + 3).square().sum(1).mean().item()},
    ),
    "`poutine.uncondition` of an observed site": (
        program(lambda z: poutine.uncondition(lambda: pyro.sample("y", around(z), obs=X))() * 0),
        SHIFTED,
        {"x": D},
    ),
    "`poutine.do`": (handled(poutine.do, data={"w": X + 3}, guide=program()[1]), SHIFTED, {"x": D, "y": 9 * D}),
    "`poutine.equalize`": (
        lambda: handled(poutine.equalize, sites=["z", "w"], guide=program()[1]),
        SHIFTED,
        {"x": D, "y": D},
    ),
    "`poutine.equalize(..., keep_dist=True)`": (
        lambda: handled(poutine.equalize, sites=["z", "w"], keep_dist=True, guide=program()[1]),
        SHIFTED,
        {"x": D, "y": D, "w": (X + 1).square().sum(1).mean().item()},
    ),
    "`poutine.block` of a latent site": (
        program(lambda z: poutine.block(latent("w"))()),
        SHIFTED,
        {"x": D},
    ),
    "`poutine.block` of an observed site": (
        handled(poutine.block, hide=["y"]),
        {"z": X + 1, "w": X + 2},
        {"x": D},
    ),
    "`pyro.param`": (learnt(), SHIFTED, {"x": D}),
    "parameter with a prior, outside the data plate": (prior_on_a_parameter(), "Latent site 'weight' is global"),
    **{
        f"`{kind}Reparam`": (
            make,
            "'z' is observed at the point of its own Delta.*" + f"{kind}Reparam.*leave 'z' out of",
        )
        for kind, make in {
            "Split": split,
            "Conjugate": lambda: with_a_density("Conjugate"),
            "NeuTra": lambda: with_a_density("NeuTra"),
            "Structured": lambda: with_a_density("Structured"),
        }.items()
    },
    "observed site of the guide": (program(guide_line=observed_in_the_guide), "The guide observes site 'label'"),
    "observed site of the guide that is masked out": (
        program(guide_line=masked(observed_in_the_guide, False)),
        SHIFTED,
        {"x": D},
    ),
}


def test_every_row_is_tested_and_every_tested_kind_is_a_row():
    assert sorted(ROWS) == sorted([*CASES, *(f"`{name}`" for name in REPARAMETRISATIONS)])


@pytest.mark.filterwarnings("ignore:Found non-auxiliary vars in guide", "ignore:Found vars in model", "ignore:k\n")
@pytest.mark.parametrize("kind", CASES)
def test_a_site_becomes_what_the_table_says(kind):
    if "equalize" in kind and not hasattr(poutine, "equalize"):
        pytest.skip("poutine.equalize is younger than Pyro 1.9.1")
    make, expected, *costs = CASES[kind]
    model, guide = make() if callable(make) else make  # an autoguide is made for a test alone
    capture = Seen()
    loss = WAELoss(capture, penalty_weight=0.0)
    if isinstance(expected, str):
        assert ROWS[kind].startswith("an error")
        with pytest.raises((ValueError, NotImplementedError), match=expected), pyro.validation_enabled(False):
            loss.loss_and_grads(model, guide, X)
        return
    value = loss.loss_and_grads(model, guide, X)
    assert list(capture.context.sites) == list(expected)
    for site, columns in capture.context.sites.items():
        torch.testing.assert_close(capture.codes[0, :, columns], expected[site])
    found = {name: cost.item() for name, cost in loss.terms.costs.items()}
    assert found == pytest.approx(costs[0], rel=1e-5)
    assert value == pytest.approx(sum(costs[0].values()), rel=1e-5)
    if kind == "latent site that depends on another":
        torch.testing.assert_close(capture.prior[:, :D], capture.prior[:, D:], atol=0.01, rtol=0)
        assert (capture.prior > 400).all()


# A reparametrised latent, with the prior of a datum for each


def on_simplex(x):
    return dist.RelaxedOneHotCategorical(torch.tensor(0.5), logits=x.new_zeros(D))


def stable(x, skew=0.0):
    return dist.Stable(1.5, x.new_zeros(D) + skew).to_event(1)


REPARAMETRISATIONS = {
    "LocScaleReparam": (
        lambda x: dist.Normal(x.new_ones(D), 2).to_event(1),
        lambda: {"z": reparam.LocScaleReparam(0.0)},
    ),
    "TransformReparam": (
        lambda x: dist.LogNormal(x.new_zeros(D), 1).to_event(1),
        lambda: {"z": reparam.TransformReparam()},
    ),
    "ProjectedNormalReparam": (
        lambda x: dist.ProjectedNormal(x.new_zeros(D)),
        lambda: {"z": reparam.ProjectedNormalReparam()},
    ),
    "GumbelSoftmaxReparam": (on_simplex, lambda: {"z": reparam.GumbelSoftmaxReparam()}),
    "DiscreteCosineReparam": (lambda x: normal(x, D), lambda: {"z": reparam.DiscreteCosineReparam()}),
    "HaarReparam": (lambda x: normal(x, D), lambda: {"z": reparam.HaarReparam()}),
    "LatentStableReparam": (stable, lambda: {"z": reparam.LatentStableReparam()}),
    "SymmetricStableReparam": (stable, lambda: {"z": reparam.SymmetricStableReparam()}),
    "StableReparam": (lambda x: stable(x, 0.3), lambda: {"z": reparam.StableReparam()}),
    "LinearHMMReparam": (
        lambda x: dist.LinearHMM(
            dist.Normal(x.new_zeros(1), 1).to_event(1),
            0.5 * torch.eye(1),
            dist.Stable(1.5, x.new_zeros(1)).to_event(1),
            torch.eye(1),
            dist.StudentT(4.0, x.new_zeros(1), 1).to_event(1),
            duration=D,
        ),
        lambda: {
            "z": reparam.LinearHMMReparam(trans=reparam.SymmetricStableReparam(), obs=reparam.StudentTReparam()),
        },
    ),
    "StudentTReparam": (
        lambda x: dist.StudentT(4.0, x.new_zeros(D)).to_event(1),
        lambda: {"z": reparam.StudentTReparam()},
    ),
    "AutoReparam": (lambda x: dist.Normal(x.new_ones(D), 2).to_event(1), reparam.AutoReparam),
    "MinimalReparam": (stable, reparam.MinimalReparam),
}


def reparametrised(name, x=X):
    """Model, guide, and what Pyro alone draws for the sites of the model, which is what the guide gives."""
    prior, config = REPARAMETRISATIONS[name]

    def model(x):
        with pyro.plate("data", len(x)):
            with poutine.reparam(config=config()):
                z = pyro.sample("z", prior(x))
            pyro.sample("x", around(z.reshape(x.shape)), obs=x)

    drawn = poutine.trace(model).get_trace(x).nodes

    def guide(x):
        with pyro.plate("data", len(x)):
            for site in re.findall(r"`(\w+)`", ROWS[f"`{name}`"]):
                pyro.sample(site, dist.Delta(drawn[site]["value"], event_dim=drawn[site]["fn"].event_dim))

    return model, guide, drawn


@pytest.mark.parametrize("name", REPARAMETRISATIONS)
def test_the_code_of_a_reparametrised_latent_is_what_it_is_computed_from(name):
    model, guide, drawn = reparametrised(name)
    names = re.findall(r"`(\w+)`", ROWS[f"`{name}`"])
    capture = Seen()
    loss = WAELoss(capture, cost={"x": NegativeLogLikelihood()}, penalty_weight=0.0)
    loss.loss(model, guide, X)
    assert sorted(capture.context.sites) == sorted(names)
    for site, columns in capture.context.sites.items():
        torch.testing.assert_close(capture.codes[0, :, columns], drawn[site]["value"].reshape(N, -1))
    assert capture.prior.shape == capture.codes[0].shape
    z = drawn["z"]["value"].reshape(X.shape)
    expected = -torch.distributions.Normal(z, 1).log_prob(X).sum(1).mean()
    assert loss.terms.cost.item() == pytest.approx(expected.item(), rel=1e-4)
    assert set(reconstruct(model, guide, X)) == {"x"}
    torch.testing.assert_close(reconstruct(model, guide, X)["x"], z)


@pytest.mark.parametrize("name", REPARAMETRISATIONS)
def test_the_prior_of_a_reparametrised_latent_is_that_of_the_program_without(name):
    """What the prior draws compute, beside draws of the distribution itself: Kolmogorov and Smirnov at 0.001."""
    stats = pytest.importorskip("scipy.stats")
    x = torch.zeros(20_000, D)
    model, guide, drawn = reparametrised(name, x)
    capture = Seen()
    WAELoss(capture, cost=NegativeLogLikelihood(), penalty_weight=0.0).loss(model, guide, x)
    values = {
        site: capture.prior[:, here].reshape(drawn[site]["value"].shape) for site, here in capture.context.sites.items()
    }
    computed = poutine.trace(poutine.condition(model, data=values)).get_trace(x).nodes["z"]["value"]
    with pyro.plate("data", len(x)):
        itself = REPARAMETRISATIONS[name][0](x).expand([len(x)])()
    for mine, other in zip(computed.reshape(x.shape).T, itself.reshape(x.shape).T, strict=True):
        assert stats.ks_2samp(mine.detach().numpy(), other.numpy()).pvalue > 1e-3


def with_a_density(kind):
    """Model and guide where a reparametrisation gives a computed value a density."""

    def plain(x):
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Beta(torch.full((N,), 0.5), 1.5) if kind == "Conjugate" else normal(x, D))
            pyro.sample("x", dist.Normal(z, 1) if kind == "Conjugate" else around(z), obs=x[:, 0] if z.ndim < 2 else x)

    if kind == "Conjugate":
        return poutine.reparam(plain, config={"z": reparam.ConjugateReparam(dist.Beta(F, F))}), lambda x: None
    trained = AutoMultivariateNormal(plain) if kind == "NeuTra" else AutoStructured(plain, conditionals="normal")
    trained(X)
    model = {"NeuTra": reparam.NeuTraReparam, "Structured": reparam.StructuredReparam}[kind](trained).reparam(plain)
    return model, AutoNormal(model)


# Other programs of a kind that went wrong without a word


@pytest.mark.parametrize("scale", [1e-3, 7.0, torch.tensor(0.02)], ids=str)
@pytest.mark.parametrize("weight", ["Constraint", "number"])
def test_a_scale_of_everything_leaves_the_balance_of_cost_and_penalty(scale, weight):
    values = []
    for factor_ in (None, scale):
        pyro.set_rng_seed(2)
        model, guide = program()
        if factor_ is not None:
            model, guide = poutine.scale(model, scale=factor_), poutine.scale(guide, scale=factor_)
        loss = WAELoss(**({} if weight == "Constraint" else {"penalty_weight": 3.0}))
        values.append([loss.loss_and_grads(model, guide, X) for _ in range(3)])
    # At the first step the weight starts from the cost, at later ones it has been raised.
    assert values[1] == pytest.approx([value * float(scale) for value in values[0]], rel=1e-5)


@pytest.mark.parametrize("sizes", [(12, 3), (100, 10)])
@pytest.mark.parametrize("kind", ["vectorised", "sequential", "nested", "likelihood", "function"])
def test_a_subsampled_plate_inside_a_datum_stands_for_the_whole(kind, sizes):
    """Each element costs (b + 1)^2 with b its place, squared error; in nats, half of that and a constant."""
    full, part = sizes
    x = torch.zeros(N, full)

    def cost_of(index):
        return (index.float() + 1).square()

    def model(x):
        rows = pyro.plate("data", N, dim=-1)
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
                    pyro.sample("x", dist.Normal(z[..., 0] * 0 + place, 1), obs=x.T[index].expand(5, part, N))
            else:
                pyro.sample("x", dist.Normal(z[..., 0] * 0 + place, 1), obs=x.T[index])

    def guide(x):
        with pyro.plate("data", N, dim=-1):
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


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("part", ["codes", "prior", "cost", "penalty", "condition", "factor"])
def test_what_is_not_finite_stops_before_any_gradient_and_is_named(part, bad):
    weight = nn.Parameter(torch.ones(()))

    def model(x, y):
        with pyro.plate("data", N):
            pyro.sample("z", around(torch.full((D,), bad if part == "prior" else 0.0)))
            if part == "factor":
                pyro.factor("f", bad * F)
            pyro.sample("x", around(torch.zeros(N, D)), obs=x * bad if part == "cost" else x)

    def guide(x, y):
        with pyro.plate("data", N):
            pyro.sample("z", delta((x + 3) * weight * (bad if part == "codes" else 1)))

    parts = {
        "codes": "codes of latent site 'z' hold",
        "prior": "prior draws of latent site 'z' hold",
        "cost": "cost of observed site 'x' is",
        "penalty": "The penalty is",
        "condition": "The condition 'y' holds",
        "factor": "cost of observed site 'f' is",
    }
    lengths = MMD(Gaussian(1.0), condition_kernel=Gaussian(1.0))
    penalty = (lambda codes, prior: codes.sum() * bad) if part == "penalty" else lengths
    y = torch.linspace(0, 1, N) * (bad if part == "condition" else 1)
    options = {"condition": "y"} if part == "condition" else {}
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=parts[part]) as raised:
        WAELoss(penalty, penalty_weight=1.0, **options).loss_and_grads(model, guide, X, y)
    assert ("NaN" in str(raised.value)) or ("infinity" in str(raised.value))
    assert weight.grad is None


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
@pytest.mark.parametrize("part", ["codes", "prior draws", "condition"])
def test_what_a_penalty_takes_from_its_first_draws_is_not_what_is_named(part, name, bad):
    """A kernel without a length, a unit of the condition or a discriminator comes before the loss is looked at."""
    weight = nn.Parameter(torch.ones(()))

    def model(x, y):
        with pyro.plate("data", N):
            first = torch.arange(N) == 0
            pyro.sample("z", around(torch.zeros(N, D).masked_fill((part == "prior draws") & first[:, None], bad)))
            pyro.sample("w", normal(x, D))
            pyro.sample("x", around(torch.zeros(N, D)), obs=x)

    def guide(x, y):
        with pyro.plate("data", N):
            pyro.sample("z", delta((x * bad if part == "codes" else x) * weight))
            pyro.sample("w", delta(x * weight))

    y = torch.linspace(0, 1, N).masked_fill((part == "condition") & (torch.arange(N) == 2), bad)
    loss = WAELoss(PENALTIES[name](), condition="y")
    site = "The condition 'y' holds" if part == "condition" else f"The {part} of latent site 'z' hold"
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=f"{site} (NaN|infinity)"):
        loss.loss_and_grads(model, guide, X, y)
    assert weight.grad is None


@pytest.mark.parametrize("sign_in", ["model", "guide", "both"])
def test_a_factor_trains_what_it_depends_on_as_trace_elbo_does(sign_in):
    """Slope of Trace_ELBO in a parameter that only factors read, divided by the number of data."""
    x = X

    def make():
        def line(name, sign, has_rsample=None):
            return lambda *_: pyro.factor(
                name, sign * (pyro.param("w", torch.tensor(2.0)) * F), has_rsample=has_rsample
            )

        nothing = lambda *_: None  # noqa: E731
        in_model, in_guide = sign_in in ("model", "both"), sign_in in ("guide", "both")
        return program(line("f", 1.0) if in_model else nothing, line("g", 0.3, True) if in_guide else nothing)

    slopes = []
    for loss in (pyro.infer.Trace_ELBO(), WAELoss(cost=NegativeLogLikelihood(), penalty_weight=0.0)):
        pyro.clear_param_store()
        model, guide = make()
        loss.loss_and_grads(model, guide, x)
        slopes.append(pyro.param("w").grad.item())
    assert slopes[1] == pytest.approx(slopes[0] / N, rel=1e-5)
    assert abs(slopes[1]) > 0.1


def test_a_factor_of_the_guide_may_have_the_name_of_what_the_model_observes():
    model, guide = program(guide_line=lambda: pyro.factor("x", F, has_rsample=True))
    loss = WAELoss(Seen(), penalty_weight=0.0)
    with pytest.warns(UserWarning, match="pyro.factor 'x_factor' is a term"):
        loss.loss_and_grads(model, guide, X)
    assert {name: cost.item() for name, cost in loss.terms.costs.items()} == pytest.approx({"x": D, "x_factor": 1.5})


@pytest.mark.parametrize("where", ["in", "outside"])
def test_a_factor_beside_masked_data_is_the_term_of_trace_elbo(where):
    """The sum over the data, and its slope in what only the factor reads, are those of -log p and of the factor."""
    slope = nn.Parameter(torch.tensor(2.0))

    def model(x):
        with pyro.plate("data", N):
            z = pyro.sample("z", normal(x, D))
            if where == "in":
                pyro.factor("f", slope * F)
            with poutine.mask(mask=SEEN):
                pyro.sample("x", around(z), obs=x)
        if where == "outside":
            pyro.factor("f", slope * 7)

    guide = program()[1]
    run = poutine.trace(poutine.replay(model, trace=poutine.trace(guide).get_trace(X))).get_trace(X)
    run.compute_log_prob(lambda name, site: site["is_observed"])
    expected = -(run.nodes["x"]["log_prob_sum"] + run.nodes["f"]["log_prob_sum"]).item()
    loss = WAELoss(Seen(), cost=NegativeLogLikelihood(), penalty_weight=0.0, reduction="sum")
    assert loss.loss_and_grads(model, guide, X) == pytest.approx(expected, rel=1e-6)
    assert slope.grad.item() == pytest.approx(-(F.sum().item() if where == "in" else 7), rel=1e-6)


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

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", around(decoder(pyro.sample("z", normal(x, D)))), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", delta(x + shift))

    message = r"finite, and its gradient at the codes of latent site 'z' is not.*cost=(lambda .*\(\))\."
    with pytest.raises(ValueError, match=message) as raised:
        WAELoss(**{"penalty": MMD(Gaussian(1.0)), "penalty_weight": 1.0, **own, **options}).loss_and_grads(
            model, guide, X
        )
    assert shift.grad is None
    if part == "cost":  # the line that the message says to write
        cost = eval(re.search(message, str(raised.value))[1])
        WAELoss(MMD(Gaussian(1.0)), cost=cost, penalty_weight=1.0, **options).loss_and_grads(model, guide, X)
        assert shift.grad.isfinite()


# The rows of a site


@st.composite
def sites(draw):
    """A site with its data plate at any dimension, inner plates around it, and particles or none."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    event = draw(st.lists(st.integers(1, 3), max_size=2))
    dims = draw(st.permutations(range(-len(shape), 0)))
    particle = dims[1] if len(dims) > 1 and draw(st.booleans()) else None
    fn = dist.Normal(torch.zeros(*shape, *event), 1).to_event(len(event))
    return Site("z", fn, torch.randn(fn.shape()), tuple(shape), dims[0], particle)


@settings(max_examples=60, deadline=None)
@given(sites())
def test_rows_are_the_values_of_each_datum_and_back(site):
    rows = site.value_rows()
    batch, event = site.shape, site.distribution.event_shape
    particles = 1 if site.particle_dim is None else batch[site.particle_dim]
    assert rows.shape[:2] == (particles, batch[site.data_dim])
    for place in itertools.product(*map(range, batch)):
        inner = [i for dim, i in enumerate(place, -len(place)) if dim not in (site.data_dim, site.particle_dim)]
        particle = 0 if site.particle_dim is None else place[site.particle_dim]
        torch.testing.assert_close(rows[(particle, place[site.data_dim], *inner)], site.value[place])
    flat = rows.flatten(2) if rows.ndim > 2 else rows[..., None]
    torch.testing.assert_close(site.unrows(flat, event), site.value, rtol=0, atol=0)
