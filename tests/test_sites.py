"""What becomes of each kind of Pyro site, row by row of the table in docs/plates.md."""

from __future__ import annotations

import re
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import around, delta, normal, pair, sites
from pyro import poutine
from pyro.infer import reparam
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, AutoStructured
from references import Seen
from torch import nn

from pyro_wae import WAELoss
from pyro_wae.costs import NegativeLogLikelihood, SquaredError
from pyro_wae.predict import reconstruct

PAGE = (Path(__file__).parents[1] / "docs" / "plates.md").read_text(encoding="utf-8")
TABLE = re.findall(
    r"^\| (.+?) \| (.+?) \|$", PAGE.partition("## What becomes of each site")[2].partition("\n## ")[0], re.M
)
ROWS = dict(TABLE[1:])

N, D = 6, 2
X = torch.linspace(-1, 1, N * D).reshape(N, D)
X[:, -1] = 1  # encoded as X + 1
F = torch.linspace(1, 2, N)
SEEN = torch.arange(N) % 3 != 1
pytestmark = pytest.mark.filterwarnings(
    "ignore:Found vars in model but not guide", "ignore:pyro.factor 'f' is a term of the loss"
)


def program(line=lambda x, z: None, guide_line=lambda x, seen: None):
    """A latent z, a line more in the plate, and an observed site; codes of x + 1."""
    return pair(lambda x: normal(x, D), line=line, guide_line=guide_line)


def latent(name, infer=None):
    return lambda *_: 0 * pyro.sample(name, normal(X, D), infer=infer or {})


def code_of(name, value):
    return lambda *_: pyro.sample(name, delta(value))


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
    return sites(
        {
            "above": (lambda x: around(torch.full((D,), 500.0)), delta),
            "z": (lambda x, above: dist.Normal(above, 1e-3).to_event(1), lambda x: delta(x + 1)),
        },
        lambda above, z: around(z),
    )


def outside():
    def model(x):
        pyro.factor("f", torch.tensor(-12.0), has_rsample=False)
        program()[0](x)

    return model, program()[1]


def inner_factor(*_):
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
        program(lambda x, z: 0 * weight)[0](x)

    def guide(x):
        pyro.sample("weight", delta(torch.zeros(D)))
        program()[1](x)

    return model, guide


def observed_in_the_guide(*_):
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


def unit(wrapped=lambda fn: fn):
    def line(*_):
        fn = wrapped(dist.Unit(F))
        pyro.sample("f", fn, obs=fn.sample())

    return line


def becomes(programs, codes=None, **costs):
    """Model and guide, the code of each latent site, and the cost of each observed one beside x."""
    return programs, {"z": X + 1} if codes is None else codes, {"x": D} | costs


BOTH = {"z": X + 1, "w": X + 2}
# For each row the program with what becomes of it, or with a part of the error.
CASES = {
    "latent site of model and guide": becomes(program()),
    "latent site of the model that the guide does not sample": becomes(program(latent("u"))),
    "latent site that depends on another": becomes(dependent(), {"above": X, "z": X + 1}),
    "observed site": becomes(program()),
    "observed site at its own value, `dist.Delta(y)` with `obs=y`": becomes(
        program(lambda x, z: 0 * pyro.sample("y", delta(X), obs=X)), y=0
    ),
    "observed site of a part of the data, `obs_mask=...`": becomes(imputed()),
    "`pyro.factor` in the model, in the data plate": becomes(program(factor), f=-1.5),
    "`pyro.factor` in the guide, in the data plate": becomes(program(guide_line=factor), f=1.5),
    "`pyro.factor` in an inner plate": becomes(program(inner_factor), f=-4.5),
    "`pyro.factor` outside the data plate": becomes(outside(), f=12 / N),
    "`pyro.factor` under a mask": becomes(program(masked(factor)), f=-F[SEEN].sum().item() / N),
    "`pyro.factor` under `poutine.scale`": becomes(program(poutine.scale(factor, scale=0.5)), f=-0.75),
    "observed `dist.Unit`": becomes(program(unit()), f=-1.5),
    "observed `dist.Unit(...).mask(mask)`": becomes(
        program(unit(lambda fn: fn.mask(SEEN))), f=-F[SEEN].sum().item() / N
    ),
    "`pyro.deterministic` in model or guide": becomes(
        program(
            lambda x, z: 0 * pyro.deterministic("d", 1e6 * z, event_dim=1),
            lambda x, seen: pyro.deterministic("e", X, event_dim=1),
        )
    ),
    '`infer={"is_auxiliary": True}` at a latent site of the guide': becomes(
        program(guide_line=lambda *_: pyro.sample("u", dist.Bernoulli(F / 4), infer={"is_auxiliary": True}))
    ),
    '`infer={"is_auxiliary": True}` at a latent site of the model': becomes(
        program(latent("w", {"is_auxiliary": True}), code_of("w", X + 2)), BOTH
    ),
    '`infer={"is_auxiliary": True}` at an observed site of the model': becomes(
        program(lambda x, z: 0 * pyro.sample("u", around(z + 1), obs=X, infer={"is_auxiliary": True})), u=4 * D
    ),
    '`infer={"enumerate": ...}` in the guide': (
        program(
            lambda x, z: 0 * pyro.sample("k", dist.Bernoulli(0.5))[:, None],
            lambda x, seen: pyro.sample("k", dist.Bernoulli(F / 4), infer={"enumerate": "parallel"}),
        ),
        "'k' is discrete in the guide",
    ),
    '`infer={"enumerate": ...}` in the model': (
        program(lambda x, z: 0 * pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})[..., None]),
        "'k' of the model is to be enumerated",
    ),
    "auxiliary or imputed site of the guide, learnable and without `rsample`": (
        program(guide_line=lambda *_: pyro.sample("u", dist.Bernoulli(logits=pyro.param("p", F)))),
        "'u' of the guide is no code",
    ),
    "other keys of `infer`": becomes(
        handled(
            poutine.infer_config,
            config_fn=lambda site: {"baseline": {"nn_baseline": None}, "num_samples": 4, "mine": 3},
        ),
        BOTH,
        y=4 * D,
    ),
    "`poutine.infer_config`": becomes(
        handled(poutine.infer_config, config_fn=lambda site: {"_deterministic": True} if site["name"] == "y" else {}),
        BOTH,
    ),
    "`poutine.mask(mask=False)` at a latent site": becomes(program(masked(latent("w"), False), code_of("w", X + 2))),
    "`poutine.mask(mask=False)` at an observed site": becomes(
        program(masked(lambda x, z: 0 * pyro.sample("y", around(z), obs=X), False))
    ),
    "`poutine.mask(mask=False)` at a factor": becomes(program(masked(factor, False))),
    "`poutine.condition` of a latent site": becomes(
        handled(poutine.condition, data={"w": X + 3}, guide=program()[1]),
        y=9 * D,
        w=(X + 3).square().sum(1).mean().item(),
    ),
    "`poutine.uncondition` of an observed site": becomes(
        program(lambda x, z: 0 * poutine.uncondition(lambda: pyro.sample("y", around(z), obs=X))())
    ),
    "`poutine.do`": becomes(handled(poutine.do, data={"w": X + 3}, guide=program()[1]), y=9 * D),
    "`poutine.equalize`": becomes(lambda: handled(poutine.equalize, sites=["z", "w"], guide=program()[1]), y=D),
    "`poutine.equalize(..., keep_dist=True)`": becomes(
        lambda: handled(poutine.equalize, sites=["z", "w"], keep_dist=True, guide=program()[1]),
        y=D,
        w=(X + 1).square().sum(1).mean().item(),
    ),
    "`poutine.block` of a latent site": becomes(program(poutine.block(latent("w")))),
    "`poutine.block` of an observed site": becomes(handled(poutine.block, hide=["y"]), BOTH),
    "`pyro.param`": becomes(program(lambda x, z: pyro.param("shift", torch.zeros(D)))),
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
    "observed site of the guide that is masked out": becomes(program(guide_line=masked(observed_in_the_guide, False))),
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


def stable(x, skew=0.0):
    return dist.Stable(1.5, x.new_zeros(D) + skew).to_event(1)


def at_z(kind, *args):
    return lambda: {"z": kind(*args)}


REPARAMETRISATIONS = {
    "LocScaleReparam": (lambda x: dist.Normal(x.new_ones(D), 2).to_event(1), at_z(reparam.LocScaleReparam, 0.0)),
    "TransformReparam": (lambda x: dist.LogNormal(x.new_zeros(D), 1).to_event(1), at_z(reparam.TransformReparam)),
    "ProjectedNormalReparam": (lambda x: dist.ProjectedNormal(x.new_zeros(D)), at_z(reparam.ProjectedNormalReparam)),
    "GumbelSoftmaxReparam": (
        lambda x: dist.RelaxedOneHotCategorical(torch.tensor(0.5), logits=x.new_zeros(D)),
        at_z(reparam.GumbelSoftmaxReparam),
    ),
    "DiscreteCosineReparam": (lambda x: normal(x, D), at_z(reparam.DiscreteCosineReparam)),
    "HaarReparam": (lambda x: normal(x, D), at_z(reparam.HaarReparam)),
    "LatentStableReparam": (stable, at_z(reparam.LatentStableReparam)),
    "SymmetricStableReparam": (stable, at_z(reparam.SymmetricStableReparam)),
    "StableReparam": (lambda x: stable(x, 0.3), at_z(reparam.StableReparam)),
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
    "StudentTReparam": (lambda x: dist.StudentT(4.0, x.new_zeros(D)).to_event(1), at_z(reparam.StudentTReparam)),
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


def test_a_factor_of_the_guide_may_have_the_name_of_what_the_model_observes():
    model, guide = program(guide_line=lambda *_: pyro.factor("x", F, has_rsample=True))
    loss = WAELoss(Seen(), penalty_weight=0.0)
    with pytest.warns(UserWarning, match="pyro.factor 'x_factor' is a term"):
        loss.loss_and_grads(model, guide, X)
    assert {name: cost.item() for name, cost in loss.terms.costs.items()} == pytest.approx({"x": D, "x_factor": 1.5})


@pytest.mark.parametrize("order", ["yz", "zxy", "yzx"])
def test_a_site_given_its_own_value_stays_one_beside_a_latent_whose_name_begins_with_its(order):
    """Only what a reparametrisation has computed comes right after the site that it is computed from."""

    def model(x):
        with pyro.plate("data", N):
            for site in order:
                if site == "y":
                    pyro.sample("y", delta(x), obs=x)
                elif site == "z":
                    z = pyro.sample("y_code", normal(x, D))
                else:
                    pyro.sample("x", around(z), obs=x)
            if "x" not in order:
                pyro.sample("x", around(z), obs=x)

    _, guide = sites({"y_code": (None, lambda x: delta(x + 1))})
    capture = Seen()
    loss = WAELoss(capture, cost={"x": SquaredError(), "y": SquaredError()}, penalty_weight=0.0)
    loss.loss(model, guide, X)
    assert {name: cost.item() for name, cost in loss.terms.costs.items()} == pytest.approx({"x": D, "y": 0})
    conditional = WAELoss(capture, condition="y", penalty_weight=0.0)
    conditional.loss(model, guide, X)
    assert list(conditional.terms.costs) == ["x"]


@pytest.mark.filterwarnings("ignore:Found non-auxiliary vars in guide")
@pytest.mark.parametrize(
    ("wrapped", "expected"),
    [
        (lambda fn: fn.mask(SEEN), F[SEEN].sum() / N),
        (lambda fn: fn.mask(SEEN).mask(F > 1.3), F[SEEN & (F > 1.3)].sum() / N),
        (lambda fn: dist.Unit(F.new_ones(())).mask(SEEN).expand([N]), SEEN.double().mean()),
        (lambda fn: dist.Unit(F[:, None].expand(N, 3)).mask(SEEN[:, None]).to_event(1), 3 * F[SEEN].sum() / N),
        (lambda fn: fn.mask(False), None),
        (lambda fn: dist.Unit(F / SEEN).mask(SEEN), F[SEEN].sum() / N),
    ],
)
def test_a_unit_in_a_wrapper_is_a_factor_in_model_and_guide(wrapped, expected):
    for sign, programs in ((-1, program(unit(wrapped))), (1, program(guide_line=unit(wrapped)))):
        loss = WAELoss(Seen(), penalty_weight=0.0)
        loss.loss_and_grads(*programs, X)
        found = {name: cost.item() for name, cost in loss.terms.costs.items()}
        assert found == pytest.approx({"x": D} if expected is None else {"x": D, "f": sign * expected.item()})
    assert list(reconstruct(*program(unit(wrapped)), X)) == ["x"]


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


def test_sites_named_as_the_parts_of_an_obs_mask_are_sites_like_any_other():
    def model(x):
        with pyro.plate("data", N):
            z = pyro.sample("z", normal(x, D))
            u = pyro.sample("y_unobserved", normal(x, D))
            pyro.sample("y_observed", around(u), obs=x)
            pyro.sample("y", around(z), obs=x)

    loss = WAELoss(capture := Seen(), penalty_weight=1.0, cost={"y_observed": SquaredError(), "y": SquaredError()})
    loss.loss(model, program(guide_line=code_of("y_unobserved", X + 2))[1], X)
    assert capture.codes.shape[-1] == 2 * D
    assert {site: cost.item() for site, cost in loss.terms.costs.items()} == pytest.approx(
        {"y_observed": 4.0 * D, "y": D}
    )
