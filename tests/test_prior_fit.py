"""A prior that is fitted to the codes of a trained model."""

from __future__ import annotations

import copy
import math
import re
import warnings
from contextlib import suppress

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import AutoEncoder, around, delta, normal
from pyro.distributions import transforms
from references import program
from torch import nn

from pyro_wae import priors
from pyro_wae.predict import sample
from pyro_wae.priors import MixturePrior, VampPrior

D = 2


model, guide = program(lambda x: delta(2 * x + 1), lambda x: normal(x, D))


def two_clusters():
    centres = torch.tensor([[-3.0, 0.0], [3.0, 1.0]])
    return dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.3, 0.7])), dist.Normal(centres, torch.tensor(0.5)).to_event(1)
    )


def data_of(codes):
    return (codes - 1) / 2


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.slow
def test_a_mixture_comes_as_near_to_the_codes_as_their_own_law(full):
    # 4000 fresh codes: the mean difference of two log densities this near has a standard error below 0.01, and 2000
    # codes for some twenty parameters cost 20 / (2 * 2000) = 0.005.
    law = two_clusters()
    prior = MixturePrior(4, D, full_covariance=full)
    fitted = priors.fit(model, guide, data_of(law.sample((2000,))), prior=prior, steps=400)
    assert fitted is prior
    assert not fitted.standardized
    fresh = law.sample((4000,))
    with torch.no_grad():
        assert (law.log_prob(fresh) - fitted().log_prob(fresh)).mean() < 0.03


@pytest.mark.slow
def test_a_flow_of_pyro_is_fitted_through_its_transforms():
    # A Normal as good as any has the entropy of the codes' covariance; a flow bends into the ring they lie on.
    angle = 2 * math.pi * torch.rand(3000)
    codes = torch.stack([3 * angle.cos(), 3 * angle.sin()], 1) + 0.2 * torch.randn(3000, D)
    couplings = [transforms.affine_coupling(D, [32, 32]) for _ in range(4)]
    parts = [part for one in couplings for part in (one, transforms.Permute(torch.tensor([1, 0])))]
    flow = dist.TransformedDistribution(dist.Normal(torch.zeros(D), 1.0).to_event(1), parts)
    priors.fit(model, guide, data_of(codes[:2000]), prior=flow, steps=300, learning_rate=0.01)
    normal = dist.MultivariateNormal(torch.zeros(D), torch.cov(codes.T))
    flow.clear_cache()
    with torch.no_grad():
        assert (flow.log_prob(codes[2000:]) - normal.log_prob(codes[2000:])).mean() > 0.3


class LazyNormal(nn.Module):
    """A module whose call gives a distribution, as those of zuko."""

    def __init__(self):
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D))

    def forward(self):
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(1)


@pytest.mark.parametrize("kind", ["module", "distribution"])
def test_a_normal_finds_the_mean_and_the_scale_of_the_codes(kind):
    codes = torch.tensor([2.0, -1.0]) + torch.tensor([0.5, 3.0]) * torch.randn(2000, D)
    if kind == "module":
        prior = LazyNormal()
        priors.fit(model, guide, data_of(codes), prior=prior, steps=300, learning_rate=0.05)
        found = prior().mean
        torch.testing.assert_close(prior().stddev.detach(), codes.std(0), rtol=0.05, atol=0)
    else:
        loc = torch.zeros(D, requires_grad=True)
        prior = dist.Normal(loc, torch.ones(D)).to_event(1)
        priors.fit(model, guide, data_of(codes), prior=prior, steps=300, learning_rate=0.05)
        found = loc
    torch.testing.assert_close(found.detach(), codes.mean(0), rtol=0.05, atol=0.05)


def test_codes_in_double_precision_meet_a_flow_in_single_precision():
    x = torch.randn(200, D, dtype=torch.float64)
    flow = dist.TransformedDistribution(dist.Normal(torch.zeros(D), 1.0).to_event(1), [transforms.affine_coupling(D)])
    assert priors.fit(model, guide, x, prior=flow, steps=2).sample().dtype == torch.float32
    assert sample(model, x, prior=flow)["x"].dtype == torch.float64


def test_model_and_guide_stay_as_they_are():
    net = AutoEncoder(D, D)
    before = [parameter.clone() for parameter in net.parameters()]
    priors.fit(net.model, net.guide, torch.randn(200, D), prior=MixturePrior(3, D), steps=5)
    assert all(torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_it_is_fitted_where_gradients_are_off(without_gradients):
    prior = LazyNormal()
    with without_gradients():
        priors.fit(model, guide, torch.randn(200, D), prior=prior, steps=200, learning_rate=0.05)
    assert (prior().stddev.detach() - 2).abs().max() < 0.5  # codes are 2 x + 1


def test_a_prior_without_parameters_is_named():
    prior = dist.Normal(torch.zeros(D), 1.0).to_event(1)
    with pytest.raises(ValueError, match=r"no parameter to be learnt.*MixturePrior"):
        priors.fit(model, guide, torch.randn(50, D), prior=prior)


def test_a_fit_leaves_no_gradient_in_the_encoder_of_its_prior():
    encoder, x = nn.Linear(3, 2), torch.randn(20, 3)
    programs = program(lambda x: delta(encoder(x)), lambda x: normal(x, 2), lambda z: normal(z, 3))
    prior = priors.fit(*programs, x, prior=VampPrior(encoder, x[:5]), steps=2)
    assert encoder.weight.grad is None
    assert prior.logits.abs().max() > 0


def test_a_fit_that_is_refused_leaves_the_prior_as_it_was():
    prior = MixturePrior(30, 2)
    with pytest.raises(ValueError, match="n >= 30"):
        priors.fit(*program(lambda x: delta(x)), torch.randn(20, 2), prior=prior)
    assert prior.standardized


@pytest.mark.parametrize("full", [False, True])
def test_codes_that_repeat_are_fitted_by_components_of_the_least_scale(full):
    """Of 4000 draws a quarter belongs to each of 4 codes, with a standard error of 0.007; the bound is 5 of them."""
    codes = torch.tensor([[5.0, -3.0], [4.0, -2.9], [6.0, -3.2], [4.5, -3.1]])
    prior = MixturePrior(10, D, full_covariance=full)
    priors.fit(model, guide, data_of(codes.repeat(30, 1)), prior=prior, steps=300, learning_rate=0.1)
    least = 1e-3 * codes.std(0, correction=0)
    torch.testing.assert_close(prior.log_scales.exp().detach(), least.expand(10, D), rtol=1e-3, atol=0)
    with torch.no_grad():
        units = ((prior().sample((4000,))[:, None] - codes) / least).abs().amax(2)
    nearest, index = units.min(1)
    assert nearest.max() < 6
    assert (torch.bincount(index, minlength=4) / 4000 - 0.25).abs().max() < 0.035


@pytest.mark.parametrize("value", [0.0, 5.1])
def test_codes_that_coincide_are_fitted(value):
    prior = priors.fit(model, guide, data_of(torch.full((50, D), value)), prior=MixturePrior(3, D), steps=50)
    assert (prior().sample((100,)) - value).abs().max() < 0.01


def test_a_prior_of_pseudo_inputs_takes_the_mean_and_the_scale_of_the_codes():
    """2000 draws have a standard error of 0.07 of the mean and of 0.05 of the standard deviation; the bound is 5."""
    codes = 5 + 3 * torch.randn(1000, D)
    prior = VampPrior(lambda u: u, codes[:5])
    fitted = priors.fit(model, guide, data_of(codes), prior=prior, steps=300, learning_rate=0.05)
    assert not fitted.standardized
    draws = fitted().sample((2000,))
    torch.testing.assert_close(draws.mean(0), codes.mean(0), rtol=0, atol=0.35)
    torch.testing.assert_close(draws.std(0), codes.std(0), rtol=0, atol=0.25)


@pytest.mark.parametrize(
    "make",
    [LazyNormal, lambda: MixturePrior(5, D), lambda: VampPrior(nn.Linear(D, D), torch.randn(5, D))],
    ids=["module", "mixture", "pseudo-inputs"],
)
def test_a_fit_that_diverges_leaves_the_prior_as_it_was(make):
    prior = make()
    before = copy.deepcopy(prior.state_dict())
    with pytest.raises(ValueError, match=r"prior has parameters that are not finite.*learning_rate=1e\+29\)"):
        priors.fit(model, guide, torch.randn(200, D), prior=prior, steps=20, learning_rate=1e30)
    assert all(torch.equal(value, before[name]) for name, value in prior.state_dict().items())
    assert all(parameter.grad is None for parameter in prior.parameters())
    assert getattr(prior, "standardized", True)


# Draws outside of the support of a site


class Rows:
    """A prior that draws the rows of a table, from the first to the last."""

    def __init__(self, rows):
        self.rows = rows

    def sample(self, shape):
        return self.rows[: shape[0]]


def of_sizes(prior, line=lambda size: size):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", around(line(pyro.sample("size", prior(x)))), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("size", dist.LogNormal(x, 0.3).to_event(1))

    return model, guide


def said(call):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with suppress(ValueError):
            call()
    return [str(warning.message) for warning in found]


def log_normal(x):
    return dist.LogNormal(torch.zeros_like(x), 1.0).to_event(1)


def test_draws_of_a_prior_outside_the_support_of_a_site_are_counted_in_one_warning():
    rows = torch.rand(10, D) + 0.1
    rows[[1, 4, 7], 0], rows[4, 1] = -1.0, -2.0
    model, _ = of_sizes(log_normal)
    (text,) = said(lambda: sample(model, torch.zeros(10, D), prior=Rows(rows)))
    assert text.startswith("3 of 10 draws of prior lie outside the support of latent site 'size' (LogNormal)")
    assert said(lambda: sample(model, torch.zeros(5, D), prior=Rows(rows), num_samples=10)) == [text]
    assert said(lambda: sample(model, torch.zeros(10, D), prior=Rows(rows.abs()), return_sites=("size", "x"))) == []
    # A decoder that takes their logarithm fails by an error of its own, after the warning.
    model, _ = of_sizes(log_normal, lambda size: dist.Normal(size.log(), 1.0).sample())
    assert said(lambda: sample(model, torch.zeros(10, D), prior=Rows(rows))) == [text]


def test_the_prior_that_the_warning_names_draws_inside_the_support():
    class Positive(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixture = MixturePrior(100, D)

        def forward(self):
            positive = torch.distributions.biject_to(dist.LogNormal(0.0, 1.0).support)
            return dist.TransformedDistribution(self.mixture(), [positive])

    programs, x = of_sizes(log_normal), torch.randn(60, D)
    mixture = priors.fit(*programs, x, prior=MixturePrior(2, D), steps=20)
    (text,) = said(lambda: sample(programs[0], x, prior=mixture, num_samples=300))
    named = text.partition("returns ")[2].partition(", with")[0]
    assert named == (
        "dist.TransformedDistribution(self.mixture(), [torch.distributions.biject_to(dist.LogNormal(...).support)])"
    )
    fitted = priors.fit(*programs, x, prior=Positive(), steps=20)
    draws = {}
    names = ("size",)
    assert said(lambda: draws.update(sample(programs[0], x, prior=fitted, num_samples=300, return_sites=names))) == []
    assert (draws["size"] > 0).all()


class Unknown(dist.Normal):
    @property
    def support(self):
        raise NotImplementedError


QUIET = {
    "no support": (lambda x: Unknown(x, 1.0).to_event(1), torch.randn(10, D)),
    "masked": (lambda x: dist.LogNormal(x, 1.0).mask(x > 1).to_event(1), torch.randn(10, D)),
    "simplex": (lambda x: dist.Dirichlet(x.new_ones(1000)), (5 * torch.randn(10, 1000)).softmax(-1)),
    "sphere": (lambda x: dist.ProjectedNormal(x.new_zeros(1000)), nn.functional.normalize(torch.randn(10, 1000))),
    "rounded at an edge": (lambda x: dist.Uniform(0.0, 0.1 + 0 * x).to_event(1), torch.full((10, D), 0.1000001)),
    "of the datum": (
        lambda x: dist.Uniform(0.0, torch.arange(1.0, 11)[:, None].expand(10, D)).to_event(1),
        torch.arange(1.0, 11)[:, None] - torch.rand(10, D),
    ),
}


@pytest.mark.parametrize("name", QUIET)
def test_draws_of_a_prior_inside_the_support_up_to_rounding_give_no_warning(name):
    site, rows = QUIET[name]
    model, _ = of_sizes(site, lambda size: size[..., :D])
    assert said(lambda: sample(model, torch.zeros(10, D), prior=Rows(rows))) == []


def test_the_support_is_that_given_the_sites_before():
    def model(x):
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.LogNormal(x.new_zeros(()), 1.0))
            part = pyro.sample("part", dist.Uniform(0.0, top))
            pyro.sample("x", dist.Normal(part, 1), obs=x)

    top = 100 * torch.rand(8) + 1
    parts = top * torch.linspace(0.1, 1.5, 8)  # two of them above 1
    inside, outside = (Rows(torch.stack([top, part], 1)) for part in (parts.minimum(top), parts))
    assert said(lambda: sample(model, torch.zeros(8), prior=inside)) == []
    (text,) = said(lambda: sample(model, torch.zeros(8), prior=outside))
    assert re.match(f"{int((parts > top).sum())} of 8 draws of prior lie .* latent site 'part'", text)
