"""How a step reads what Pyro takes: rounded scales, values changed in place, families and plates of one's own."""

from __future__ import annotations

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import around, delta, normal, pair
from pyro import poutine
from pyro.contrib.autoname import scope
from pyro.infer.autoguide.effect import AutoNormalMessenger
from references import Seen, program
from torch import nn
from torch.distributions import constraints

from pyro_wae import WAELoss
from pyro_wae.costs import NegativeLogLikelihood
from pyro_wae.penalties import MMD, PosteriorKL
from pyro_wae.predict import decode, encode

N = 8


# Scales


@pytest.mark.parametrize("kind", ["number", "tensor"])
@pytest.mark.parametrize(
    ("parts", "taken", "scale"), [(784, 64, 1 / 784), (784, 100, 0.01), (28, 5, 0.1), (50, 3, 1e-3)]
)
def test_a_scale_around_everything_is_known_whatever_a_subsample_inside_has_rounded(parts, taken, scale, kind):
    given = scale if kind == "number" else torch.tensor(scale)

    def model(x, two):
        with pyro.plate("data", N, dim=-2), poutine.scale(scale=given):
            z = pyro.sample("z", dist.Normal(0.0, 1))
            with pyro.plate("pixels", parts, subsample_size=taken, dim=-1) as index:
                w = pyro.sample("w", dist.Normal(z, 1)) if two else z
                pyro.sample("x", dist.Normal(w + 1, 1), obs=x[:, index])

    def guide(x, two):
        with pyro.plate("data", N, dim=-2), poutine.scale(scale=given):
            pyro.sample("z", dist.Delta(x.mean(1, keepdim=True)))
            with pyro.plate("pixels", parts, subsample_size=taken, dim=-1) as index:
                if two:
                    pyro.sample("w", dist.Delta(x[:, index]))

    x = torch.randn(N, parts)
    loss = WAELoss(data_plate="data")
    loss.loss(model, guide, x, False)
    # The first weight is in the units of an unscaled cost: a scale around everything leaves it as it is.
    assert (loss.terms.weight / loss.terms.cost).item() == pytest.approx(0.1 / scale, rel=1e-4)
    assert torch.tensor(WAELoss(data_plate="data", penalty_weight=1.0).loss(model, guide, x, True)).isfinite()


# Codes and distributions


@pytest.mark.parametrize("change", [nn.ReLU(inplace=True), lambda z: z.add_(5)], ids=["ReLU", "add_"])
def test_a_decoder_that_changes_the_code_in_place_is_refused_by_name(change):
    programs = program(output=lambda z: around(change(z)))
    with pytest.raises(ValueError, match=r"value of latent site 'z' in place.* Write z = z \+"):
        WAELoss().loss(*programs, torch.randn(N, 2))


class Mine(dist.TorchDistribution):
    """A family of one's own whose event shape is a tuple."""

    arg_constraints: dict = {}  # noqa: RUF012
    support = constraints.real_vector

    def __init__(self, loc):
        self.loc = loc
        super().__init__(loc.shape[:-1], tuple(loc.shape[-1:]), validate_args=False)

    def expand(self, batch, _instance=None):
        return Mine(self.loc.expand(*batch, *self.event_shape))

    def log_prob(self, value):
        return -(value - self.loc).square().sum(-1)

    @property
    def mean(self):
        return self.loc


def shared_covariance(z):
    locs, weights = torch.ones(len(z), 2, 2) + z[:, None], torch.ones(len(z), 2)
    return dist.MixtureOfDiagNormalsSharedCovariance(locs, torch.ones(len(z), 2), weights)


@pytest.mark.parametrize("likelihood", [Mine, shared_covariance])
def test_an_observed_family_whose_event_shape_is_a_tuple_has_its_costs(likelihood):
    x = torch.randn(N, 2)
    model, guide = program(output=likelihood)
    loss = WAELoss(cost=NegativeLogLikelihood(), penalty_weight=0.0)
    expected = -likelihood(x).log_prob(x).mean()
    assert loss.loss(model, guide, x) == pytest.approx(expected.item(), rel=1e-5)
    if likelihood is Mine:
        torch.testing.assert_close(decode(model, x, x)["x"], x)


class GeneCounts(dist.TorchDistribution):
    """A family over a vector with a parameter that is called as that of a Multinomial."""

    arg_constraints: dict = {}  # noqa: RUF012
    support = constraints.independent(constraints.nonnegative_integer, 1)

    def __init__(self, total_count, logits):
        self.total_count, self.genes = total_count, dist.NegativeBinomial(total_count, logits=logits).to_event(1)
        super().__init__(self.genes.batch_shape, self.genes.event_shape, validate_args=False)

    @property
    def mean(self):
        return self.genes.mean


def test_a_total_count_of_ones_own_is_no_total_of_a_datum():
    x = torch.randint(20, (N, 3)).float()
    loss = WAELoss(penalty_weight=0.0)
    value = loss.loss(*program(output=lambda z: GeneCounts(torch.full((N, 3), 2.0), 0 * z)), x)
    assert value == pytest.approx((x - 2).square().sum(1).mean().item())


def test_a_prior_that_is_a_function_is_refused_by_name():
    model = pair(prior=lambda x: lambda: torch.randn(len(x), 2))[0]
    with pytest.raises(ValueError, match=r"Site 'z' is drawn by a function.* Write a subclass of"):
        WAELoss().loss(model, pair()[1], torch.randn(N, 2))


class Gumbels(torch.distributions.Gumbel, dist.torch_distribution.TorchDistributionMixin):
    """A family of torch's, for which a user writes what Pyro needs."""


@pytest.mark.parametrize("place", ["prior", "output"])
def test_a_distribution_of_torch_is_refused_by_name_and_its_line_is_right(place):
    x = torch.randn(N, 3)
    model, guide = pair(**{place: lambda z: torch.distributions.Gumbel(z, 1.0)})
    found = r"Site '[xz]' is drawn from torch.distributions.gumbel.Gumbel, .* Write import pyro.distributions as dist"
    with pytest.raises(ValueError, match=found):
        WAELoss().loss(model, guide, x)
    model, guide = pair(**{place: lambda z: Gumbels(torch.zeros(N, 3), 1.0).to_event(1)})
    assert math.isfinite(WAELoss().loss(model, guide, x))


def test_instance_norm_between_two_latents_counts_one_step():
    norm, x = nn.InstanceNorm1d(2, track_running_stats=True), torch.randn(N, 2, 5) + 5

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, 5), 1).to_event(2))
            w = pyro.sample("w", normal(norm(z).flatten(1), 10))
            pyro.sample("x", dist.Normal(w, 1).to_event(1), obs=x.flatten(1))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x).to_event(2))
            pyro.sample("w", dist.Delta(x.flatten(1)).to_event(1))

    WAELoss().loss(model, guide, x)
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean((0, 2)))


# Masks


@pytest.mark.parametrize("how", ["mask", "obs_mask"])
@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")
def test_a_masked_datum_has_no_cost_of_a_function(how):
    """The datum counts, because another site has no mask; the function's value at x = g is not 0."""
    x, y = torch.randn(N, 2), torch.ones(N)
    seen = torch.arange(N) < 2

    def model(x, y):
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1).to_event(1))
            pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x)
            with poutine.mask(mask=seen if how == "mask" else True):
                options = {"obs_mask": seen} if how == "obs_mask" else {}
                pyro.sample("y", dist.Bernoulli(logits=0 * z[:, 0]), obs=y, **options)

    def guide(x, y):
        with pyro.plate("data", N):
            pyro.sample("z", delta(x))

    entropy = functools.partial(nn.functional.binary_cross_entropy, reduction="none")
    loss = WAELoss(cost={"x": NegativeLogLikelihood(), "y": lambda y, g: entropy(g, y)})
    loss.loss(model, guide, x, y)
    assert loss.terms.as_dict()["cost/y"] == pytest.approx(2 / N * torch.tensor(2.0).log().item(), rel=1e-5)


# Conditions of all data


def conditional(x, y, plate):
    with plate() as index:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1).to_event(1))
        pyro.sample("x", around(z), obs=x[index])


def encoder(x, y, plate):
    with plate() as index:
        pyro.sample("z", delta(x[index]))


def labels_of(model, guide, index, y):
    seen = Seen()
    seen.reads_condition = True
    x = torch.randn(N, 2)
    WAELoss(seen, penalty_weight=1.0, condition="y").loss(
        model, guide, x, y, lambda: pyro.plate("data", N, subsample=index)
    )
    return seen.context.condition[:, 0].tolist()


def test_the_condition_of_all_data_has_the_rows_of_the_subsample_or_is_refused():
    y = torch.arange(N)
    assert labels_of(conditional, encoder, torch.tensor([3, 1, 6]), y) == [3, 1, 6]
    assert labels_of(conditional, encoder, torch.arange(N), y) == list(range(N))
    assert labels_of(*map(scope(prefix="m"), (conditional, encoder)), torch.tensor([3, 1, 6]), y) == [3, 1, 6]
    with pytest.raises(ValueError, match=r"row for each of 8 data, and plate 'data' takes them in another"):
        labels_of(conditional, encoder, torch.arange(N).flip(0), y)


def test_the_condition_of_all_data_in_a_plate_made_elsewhere_is_refused_by_name():
    made = pyro.plate("data", N, subsample=torch.arange(3))
    x, y = torch.randn(N, 2), torch.arange(N)
    with pytest.raises(ValueError, match=r"condition='y' has 8 rows.* plate 'data' was made outside of the model"):
        WAELoss(condition="y").loss(conditional, encoder, x, y, lambda: made)


def test_a_guide_without_a_density_at_its_site_is_an_error_that_names_one_with_it():
    model, x = program()[0], torch.randn(N, 2)
    for kind in (pyro.infer.autoguide.AutoDiagonalNormal, pyro.infer.autoguide.AutoNormal):
        with pytest.raises(ValueError, match=r"write .*AutoNormalMessenger\(model\)"):
            WAELoss(MMD() + PosteriorKL()).loss(model, kind(model), x)
    assert math.isfinite(WAELoss(MMD() + PosteriorKL()).loss(model, AutoNormalMessenger(model), x))


# Choices of the guide beside its codes


def with_choice(site, logits, family=dist.OneHotCategorical, handler=lambda guide: guide):
    """A code around one of three places, which a guide draws beside it: noise, or the value that a label is missing."""

    def model(x):
        with pyro.plate("data", N):
            z = pyro.sample("z", normal(x, 2))
            if site == "y_unobserved":
                label = torch.eye(3)[torch.arange(N) % 3]
                pyro.sample("y", dist.OneHotCategorical(x.new_ones(3)), obs=label, obs_mask=torch.arange(N) < 3)
            pyro.sample("x", around(z), obs=x)

    def guide(x):
        with pyro.plate("data", N):
            k = handler(pyro.sample)(site, family(logits=logits()), infer={"is_auxiliary": site == "k"})
            pyro.sample("z", delta(x + k @ torch.eye(3)[:, :2]))

    return model, guide


@pytest.mark.parametrize("site", ["k", "y_unobserved"])
def test_what_a_guide_draws_beside_its_codes_without_a_gradient_is_refused_where_it_has_parameters(site):
    x, logits = torch.randn(N, 2), nn.Parameter(torch.zeros(N, 3))
    programs = with_choice(site, lambda: logits)
    with pytest.raises(ValueError, match=rf"'{site}' of the guide is no code.*OneHotCategorical.*logits.detach"):
        WAELoss().loss_and_grads(*programs, x)
    loss = WAELoss(penalty_weight=1.0)
    assert list(encode(*programs, x)) == ["z"]
    assert math.isfinite(loss.loss(*programs, x))
    with torch.no_grad():
        assert math.isfinite(loss.differentiable_loss(*programs, x))
    masked = with_choice(site, lambda: logits, handler=lambda draw: poutine.mask(draw, mask=False))
    for quiet in (masked, with_choice(site, lambda: logits.detach()), with_choice(site, lambda: torch.zeros(N, 3))):
        assert math.isfinite(loss.loss_and_grads(*quiet, x))
    loss.loss_and_grads(*with_choice(site, lambda: logits, dist.OneHotCategoricalStraightThrough), x)
    assert logits.grad.any()
