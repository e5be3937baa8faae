"""Every error names the site or argument, what was found, and the line to write instead."""

from __future__ import annotations

import math
import re
import warnings
from types import MappingProxyType

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import around, delta, normal, sites
from pyro import poutine
from pyro.infer import SVI
from references import program

from pyro_wae import WAELoss
from pyro_wae.costs import Cost, NegativeLogLikelihood, Site, SquaredError
from pyro_wae.penalties import MMD, JensenShannon, KernelStein, Penalty

N = 6


# A silent wrong answer would follow without these errors: they hold without Pyro's validation too.
@pytest.fixture(params=[True, False], ids=["validated", "unvalidated"])
def validation(request):
    with pyro.validation_enabled(request.param), warnings.catch_warnings():
        # Pyro warns of what is about to be refused.
        warnings.filterwarnings("ignore", message=r"(Found|z\nIf you want to enumerate)")
        yield request.param


def gap(codes, prior):
    return (codes.mean() - prior.mean()) ** 2


def raises(error, *parts):
    """The error's message holds all parts, in this order, whatever stands between."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(part) for part in parts))


class Point(dist.TorchDistribution):
    """A mean that can be drawn, and nothing else."""

    arg_constraints = MappingProxyType({})
    mean = None

    def __init__(self, mean):
        self.mean = mean
        super().__init__(mean.shape[:-1], mean.shape[-1:], validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return type(self)(self.mean.expand(*batch_shape, -1))

    def sample(self, sample_shape=()):
        return self.mean


class RealPoint(Point):
    support = dist.constraints.real_vector


class Density(RealPoint):
    """A density from which nothing can be drawn."""

    def sample(self, sample_shape=()):
        raise NotImplementedError

    def log_prob(self, value):
        return around(self.mean).log_prob(value)


plain_model, plain_guide = program(around)


def x_of(n=N):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(0))


def step(model=plain_model, guide=plain_guide, x=None, penalty=gap, **options):
    return WAELoss(penalty, **options).loss_and_grads(model, guide, x_of() if x is None else x)


# Latent and observed sites


@pytest.mark.parametrize(
    ("data_plate", "found"), [(None, "Latent site 'z' is global"), ("nodes", "Observed site 'y' of batch shape (6,)")]
)
def test_edges_of_a_graph_in_a_plate_beside_that_of_the_nodes(data_plate, found):
    pairs = torch.randint(12, (6, 2), generator=torch.Generator().manual_seed(0))

    def model(x):
        with pyro.plate("nodes", len(x)):
            z = pyro.sample("z", normal(x, 2))
        with pyro.plate("edges", len(pairs)):
            pyro.sample("y", dist.Bernoulli(logits=z[pairs].prod(1).sum(1)), obs=x.new_ones(len(pairs)))

    _, guide = program(plate=lambda x: pyro.plate("nodes", len(x)))
    with raises(
        ValueError, found, "edges of a graph", "pyro.sample('pairs', dist.Bernoulli(logits=logits).to_event(1)"
    ):
        WAELoss(data_plate=data_plate).loss(model, guide, torch.randn(12, 2))


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (
            lambda x: pyro.deterministic("z", x, event_dim=1),
            ("'z' is computed in the guide by pyro.deterministic", "pyro.sample('z', dist.Delta(value).to_event(1))"),
        ),
        (lambda x: pyro.sample("z", around(x), obs=x), ("The guide observes site 'z'", "sample the site without obs=")),
    ],
)
def test_a_latent_that_the_guide_does_not_sample(validation, line, parts):
    def guide(x):
        with pyro.plate("data", len(x)):
            line(x)

    with raises(ValueError, *parts):
        step(guide=guide)


def test_a_model_that_changes_between_runs(validation):
    class Changing:
        def __init__(self, when):
            self.runs, self.when = 0, when

        def name(self):
            return "z" if self.runs < self.when else "other"

        def model(self, x):
            name = self.name()
            self.runs += 1
            with pyro.plate("data", len(x)):
                a = pyro.sample("a", dist.Normal(0.0, 1))
                z = pyro.sample(name, dist.Normal(a[..., None].expand(N, 2), 1).to_event(1))
                pyro.sample("x", around(z), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("a", dist.Normal(x[:, 0], 1))
                pyro.sample(self.name(), around(x))

    changing = Changing(1)
    with raises(ValueError, "ran again for prior samples", "did not sample site 'z'", "same sites in every run"):
        step(changing.model, changing.guide)
    changing = Changing(2)
    with raises(ValueError, "Runs of one step", "'z': (1, 3)", "'other': (1, 3)", "write the choice into the site"):
        step(changing.model, changing.guide, num_particles=2)


# Costs and penalties


@pytest.mark.parametrize("family", [Point, RealPoint, Density])
def test_the_squared_error_needs_the_mean_of_a_distribution_alone(family):
    x, g = x_of(), torch.zeros(N, 2)
    assert torch.equal(SquaredError()(family(g), x), x.square().sum(1))
    step(*program(output=family))


@pytest.mark.parametrize("value", [7.0, torch.nan, torch.inf])
def test_a_masked_likelihood_need_not_be_drawn(value):
    kept = torch.arange(N) > 2
    x, g = x_of().where(kept[:, None], value), torch.zeros(N, 2, requires_grad=True)
    site = Site("x", Density(g), x, (N,), -1, mask=kept[:, None])
    costs = NegativeLogLikelihood().per_datum(site)
    (slope,) = torch.autograd.grad(costs.sum(), g)
    torch.testing.assert_close(costs[0], (x.square().sum(1) / 2 + math.log(2 * math.pi)).where(kept, 0.0))
    torch.testing.assert_close(slope, -x.where(kept[:, None], 0.0))


def test_a_likelihood_without_a_density():
    with raises(ValueError, "observed site 'x'", "RealPoint has no log_prob", "Write cost=SquaredError()"):
        step(*program(output=RealPoint), cost=NegativeLogLikelihood())


@pytest.mark.parametrize("penalty", [None, gap])
def test_fewer_than_two_data(validation, penalty):
    with raises(ValueError, "at least 2 data and 2 prior samples, found 1 and 1", "drop_last=True"):
        step(x=x_of(1), penalty=penalty)
    with raises(ValueError, "at least 2 data", "found 1 and 4"):
        step(x=x_of(1), penalty=penalty, prior_draws=4)
    with raises(ValueError, "at least 2 data", "found 1 and"):
        step(x=x_of(1), penalty=penalty, num_particles=3, vectorize_particles=True)


@pytest.mark.parametrize("penalty", [None, gap, KernelStein()])
@pytest.mark.parametrize("left", [0, 1])
def test_fewer_than_two_unmasked_data(validation, left, penalty):
    model = poutine.mask(plain_model, mask=torch.arange(N) < left)
    with raises(ValueError, "at least 2 data", f"mask at latent sites ['z'] leaves {left} of 6 data", "Write if mask"):
        step(model, plain_guide, penalty=penalty)


def test_codes_and_prior_on_two_devices(validation):
    model, guide = program(
        lambda x: dist.Delta(x.to("meta"), event_dim=1, validate_args=False), output=lambda z: around(torch.zeros(N, 2))
    )
    with raises(ValueError, "on one device, found meta and cpu", "dist.Normal(x.new_zeros(d), 1)"):
        step(model, guide)


@pytest.mark.usefixtures("single_precision")
def test_sites_on_two_devices(validation):
    programs = sites(
        {
            "a": (lambda x: dist.Normal(0.0, 1), lambda x: dist.Delta(x[:, 0])),
            "b": (lambda x, a: dist.Normal(0.0, 1), lambda x: dist.Delta(x[:, 1].to("meta"), validate_args=False)),
        },
        lambda a, b: dist.Normal(a, 1),
        observed=lambda x: x[:, 0],
    )
    with raises(
        ValueError, "'b' has values on meta, site 'a' on cpu", "Write pyro.sample('b', ...) with parameters on cpu"
    ):
        step(*programs)


def test_a_code_of_a_distribution_that_names_no_support():
    with raises(ValueError, "'z' cannot be reparameterised in the guide (Point has no rsample)", "dist.Delta(loc)"):
        step(*program(Point))


@pytest.mark.parametrize("further", [{}, {"u": (lambda x, z: around(z), delta)}])
def test_a_prior_that_cannot_be_drawn(further):
    latents = {"z": (lambda x: Density(torch.zeros(2)), delta), **further}
    programs = sites(latents, lambda z, u=0: around(z + u))
    with raises(ValueError, "prior at site 'z' (Density) cannot be drawn", "Write its sample", "KernelStein(Rational"):
        step(*programs)


@pytest.mark.parametrize("further", [{}, {"u": (lambda x, z: around(z), delta)}], ids=["root", "hierarchy"])
@pytest.mark.parametrize(
    "prior",
    [
        lambda one: dist.Normal(0 * one, one),
        lambda one: dist.Uniform(-one, one),
        lambda one: dist.Laplace(0 * one, one),
        lambda one: dist.LogNormal(0 * one, one),
        lambda one: dist.Normal(0 * one, one).mask(True),
        lambda one: dist.MixtureSameFamily(dist.Categorical(torch.ones(2, 2)), dist.Normal(one.expand(2, 2), 1)),
    ],
    ids=["Normal", "Uniform", "Laplace", "LogNormal", "masked", "mixture"],
)
def test_a_prior_of_whole_numbers(prior, further):
    latents = {"z": (lambda x: prior(torch.tensor([1, 1])).to_event(1), delta), **further}
    programs = sites(latents, lambda z, u=0: around(z + u))
    with raises(ValueError, "prior at site 'z' (", "has parameters of torch.int64", "torch.tensor([0, 0]).float()"):
        step(*programs)
    step(*sites({**latents, "z": (lambda x: prior(torch.ones(2)).to_event(1), delta)}, lambda z, u=0: around(z + u)))


@pytest.mark.parametrize("further", [{}, {"u": (lambda x, z: around(z), delta)}], ids=["root", "hierarchy"])
def test_an_error_of_a_prior_of_the_users_own_is_raised_as_it_is(further):
    class Broken(Density):
        def sample(self, sample_shape=()):
            raise TypeError("the user's own")

    programs = sites({"z": (lambda x: Broken(torch.tensor([0, 0])), delta), **further}, lambda z, u=0: around(z + u))
    with raises(TypeError, "the user's own"):
        step(*programs)


@pytest.mark.usefixtures("single_precision")
@pytest.mark.parametrize(
    ("x", "output", "parts"),
    [
        (x_of(), torch.zeros(N, 3), ("data of shape (6, 2)", "(Normal) is of shape (6, 3)", "the shape of the data")),
        (x_of(5), torch.zeros(N, 2), ("data of shape (5, 2)", "(Normal) is of shape (6, 2)", "the shape of the data")),
        (x_of()[:, :1], torch.zeros(N, 3), ("data of shape (6, 1)", "(Normal) is of shape (6, 3)")),
        (x_of()[:, :1], torch.zeros(N), ("data of shape (6, 1)", "(Normal) is of shape (6, 6)")),
        (x_of(), torch.zeros(N, 1), ("data of shape (6, 2)", "(Normal) is of shape (6, 1)")),
        (x_of().tolist(), torch.zeros(N, 2), ("are list", "torch.as_tensor(x)")),
        (x_of().numpy(), torch.zeros(N, 2), ("are ndarray", "torch.as_tensor(x)")),
        (
            x_of().cfloat(),
            torch.zeros(N, 2),
            ("a tensor (torch.complex64, ", "real numbers", "view_as_real(x)"),
        ),
    ],
)
def test_data_that_do_not_fit_the_decoder(validation, x, output, parts):
    model, guide = program(
        lambda x: around(torch.zeros(N, 2)),
        lambda x: normal(torch.zeros(2), 2),
        lambda z: around(output),
        plate=lambda x: pyro.plate("data", N),
    )
    with raises((TypeError, ValueError), "bserved site 'x'", *parts):
        step(model, guide, x)


@pytest.mark.parametrize("count", [dist.Geometric, lambda p: dist.Binomial(3, p), dist.Poisson])
def test_a_count_has_no_one_hot_relaxation(validation, count):
    programs = program(lambda x: count(x.sigmoid()).to_event(1), lambda x: count(torch.full((2,), 0.5)).to_event(1))
    with raises(ValueError, "does not enumerate. Write a Delta on a continuous code, dist.Delta(loc)."):
        step(*programs)


@pytest.mark.parametrize(
    ("prior", "code", "parts"),
    [
        (dist.Categorical(torch.ones(2)), lambda x: x.argmax(-1), ("torch.int64", "OneHotCategoricalStraightThrough")),
        (dist.Bernoulli(0.5), lambda x: x[:, 0] > 0, ("torch.bool", "RelaxedBernoulliStraightThrough")),
        (dist.Poisson(3.0), lambda x: x[:, 0].round().int(), ("torch.int32", "Write a Delta on a continuous code")),
    ],
)
def test_a_code_of_integers(validation, prior, code, parts):
    latents = {"k": (lambda x, *_: prior, lambda x: dist.Delta(code(x))), "z": (lambda x, *_: normal(x, 2), delta)}
    for names in ("k", "kz", "zk"):
        programs = sites({name: latents[name] for name in names}, lambda *_: around(torch.zeros(N, 2)))
        with raises(ValueError, "'k' has codes of", parts[0], "have no gradient", parts[1], "condition='k'"):
            step(*programs)


# Arguments


def test_a_code_of_complex_numbers_is_given_as_real_ones(validation):
    def of(z, d):
        return program(lambda x: dist.Delta(z(x)).to_event(1), lambda x: normal(x, d), lambda z: around(z[:, :2].real))

    with raises(ValueError, "site 'z' has codes of torch.complex", "dist.Delta(torch.view_as_real(z).flatten(-2))"):
        step(*of(lambda x: x + 1j, 2))
    step(*of(lambda x: torch.view_as_real(x + 1j).flatten(-2), 4))


@pytest.mark.parametrize(("base", "name"), [(Cost, "forward"), (Penalty, "estimate")])
def test_a_subclass_that_computes_nothing_is_told_what_to_define(base, name):
    own = type("Own", (base,), {})()
    with raises(NotImplementedError, "Own is no ", f"Define {name}("):
        step(**{"cost" if base is Cost else "penalty": own})


@pytest.mark.parametrize("kind", [MMD, JensenShannon, lambda: JensenShannon(optimizer=None)])
def test_a_penalty_of_labels_is_taken_in_a_first_batch_that_has_them(kind):
    """The site is latent only in batches without labels; a penalty of data that are always observed is said once."""

    def model(x, y=None):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(x, 2))
            y = pyro.sample("y", normal(x, 2), obs=y)
            pyro.sample("x", dist.Normal(z + y, 1).to_event(1), obs=x)

    def guide(x, y=None):
        with pyro.plate("data", len(x)):
            if y is None:
                pyro.sample("y", delta(x))
            pyro.sample("z", delta(x))

    x = x_of()
    loss = WAELoss({"z": kind(), "y": kind()}, penalty_weight=1.0)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=loss)
    with pytest.warns(UserWarning, match="penalty names 'y', which is observed in this batch"):
        svi.step(x, x)
    assert set(loss.terms.penalties) == {"z"}
    for _ in range(2):
        svi.step(x)
        assert set(loss.terms.penalties) == {"z", "y"}
        svi.step(x, x)
        assert set(loss.terms.penalties) == {"z"}


@pytest.mark.parametrize("labelled_first", [True, False])
def test_a_cost_of_labels_is_taken_in_batches_with_and_without_them(labelled_first):
    def model(x, y=None):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", normal(x, 2), obs=y)
            pyro.sample("x", dist.Normal(pyro.sample("z", normal(x, 2)) + y, 1).to_event(1), obs=x)

    def guide(x, y=None):
        with pyro.plate("data", len(x)):
            if y is None:
                pyro.sample("y", delta(x))
            pyro.sample("z", delta(x))

    x, loss = x_of(), WAELoss(cost={"x": SquaredError(), "y": SquaredError()}, penalty_weight=1.0)
    if labelled_first:
        loss.loss(model, guide, x, x)
        loss.loss(model, guide, x)
    else:
        with pytest.warns(UserWarning, match="cost names 'y', which is latent in this batch"):
            loss.loss(model, guide, x)
    assert set(loss.terms.costs) == {"x"}
    loss.loss(model, guide, x, x)
    assert set(loss.terms.costs) == {"x", "y"}
    loss.loss(model, guide, x)


@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")
@pytest.mark.parametrize("how", ["None", "not sampled"])
def test_a_cost_of_a_modality_is_taken_in_batches_that_lack_it(how):
    def model(x, y=None):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(x, 2))
            if y is not None or how == "None":
                pyro.sample("y", dist.Normal(z, 1).to_event(1), obs=y)
            pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x)

    def guide(x, y=None):
        with pyro.plate("data", len(x)):
            pyro.sample("z", delta(x))

    x, loss = x_of(), WAELoss(cost={"x": SquaredError(), "y": SquaredError()}, penalty_weight=1.0)
    for y in (x, None, x):
        loss.loss(model, guide, x, y)
        assert set(loss.terms.costs) == ({"x"} if y is None else {"x", "y"})


def test_an_observed_delta_with_a_density_is_a_term_of_the_loss():
    """Pyro's losses add its log_density, which a squared error does not read."""

    def model(x, density):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(x, 2))
            pyro.sample("f", dist.Delta(0 * x[:, 0], density * z[:, 0]), obs=0 * x[:, 0])
            pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x)

    guide = program(lambda x: delta(x))[1]
    x = x_of()
    with raises(ValueError, "Observed site 'f' is a Delta with a log_density", "Write pyro.factor('f', log_density)"):
        WAELoss().loss(model, guide, x, 1.0)
    WAELoss().loss(model, guide, x, 0.0)
    loss = WAELoss(cost={"x": SquaredError(), "f": NegativeLogLikelihood()}, penalty_weight=0.0)
    loss.loss(model, guide, x, 1.0)
    assert loss.terms.costs["f"].item() == pytest.approx(-x[:, 0].mean().item(), abs=1e-6)


@pytest.mark.parametrize("left_out", [True, False])
def test_an_entry_of_a_site_that_a_mask_leaves_out_is_no_error(left_out):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(x, 2))
            with poutine.mask(mask=not left_out):
                pyro.sample("a", normal(x, 2))
                pyro.sample("y", dist.Normal(z, 1).to_event(1), obs=x)
            pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", delta(x))
            pyro.sample("a", delta(x))

    costs = {"x": SquaredError(), "y": SquaredError()}
    loss = WAELoss({"z": MMD(), "a": MMD()}, cost=costs, penalty_weight=1.0)
    loss.loss(model, guide, x_of())
    assert set(loss.terms.costs) == ({"x"} if left_out else {"x", "y"})
    assert set(loss.terms.penalties) == ({"z"} if left_out else {"z", "a"})
    with raises(ValueError, "cost names 'w', which is no observed site"):
        WAELoss(cost={**costs, "w": SquaredError()}).loss(model, guide, x_of())


def test_a_cost_with_parameters_to_be_learned_warns():
    class Features(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(2, 3)

        def forward(self, x, g):
            return (self.net(x) - self.net(g)).square().sum(1)

    with pytest.warns(UserWarning, match="The cost Features has parameters, which are trained along with the model"):
        WAELoss(cost=Features())
    WAELoss(cost=Features().requires_grad_(False))


def test_the_arguments_after_the_penalty_are_keywords():
    with pytest.raises(TypeError, match="positional"):
        WAELoss(MMD(), SquaredError())
