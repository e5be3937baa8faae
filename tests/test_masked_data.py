"""Costs of masked data: what stands in for them has no influence, in any family and under any scale."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import AffineTransform, BatchNorm, SigmoidTransform, TanhTransform, affine_coupling

from pyro_wae.costs import Cost, FunctionCost, NegativeLogLikelihood, Site, SquaredError

B, D = 4, 2000
pytestmark = pytest.mark.usefixtures("single_precision")


def through(base, *transforms):
    return dist.TransformedDistribution(base, list(transforms))


def mixed(component):
    """A mixture of two components, the last batch dimension of what is given."""
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(B, D, 2)), component)


def two(p):
    return p[..., None] * torch.ones(2)


with torch.random.fork_rng():
    torch.manual_seed(0)
    FLOW = affine_coupling(D, hidden_dims=[4])

# Of a number p of each element, near 1, with a value inside the support.
ROUNDED = {  # of 8000 draws some are rounded to an edge, where no density is finite
    "tanh": (lambda p: through(dist.Normal(8 + p, 1.0), TanhTransform()), 0.0),
    "tanh that remembers": (lambda p: through(dist.Normal(8 + p, 1.0), TanhTransform(cache_size=1)), 0.0),
    "tanh, moved": (lambda p: through(dist.Normal(8 + p, 1.0), TanhTransform(), AffineTransform(0.5, 0.5)), 0.5),
    "tanh of one event": (lambda p: through(dist.Normal(8 + p, 1.0).to_event(1), TanhTransform()), 0.0),
    "mixture of tanh": (lambda p: mixed(through(dist.Normal(8 + two(p), 1.0), TanhTransform())), 0.0),
    "mixture in a wrapper": (
        lambda p: mixed(through(dist.Normal(8 + two(p), 1.0).mask(True), TanhTransform())).mask(True).to_event(1),
        0.0,
    ),
    "Kumaraswamy": (lambda p: dist.Kumaraswamy(p, 0.2 * p), 0.5),
    "Weibull": (lambda p: dist.Weibull(p, 0.02 * p), 0.5),
    "LogNormal": (lambda p: dist.LogNormal(-103.5 + p, p), 0.5),
}
OTHERS = {
    "Normal": (lambda p: dist.Normal(1e6 * p, 1e-3 * p), 1e6),
    "Laplace": (lambda p: dist.Laplace(p, p), 0.0),
    "StudentT": (lambda p: dist.StudentT(p, p, p), 0.0),
    "Cauchy": (lambda p: dist.Cauchy(p, p), 0.0),
    "VonMises": (lambda p: dist.VonMises(p, p), 0.0),
    "AsymmetricLaplace": (lambda p: dist.AsymmetricLaplace(p, p, p), 0.5),
    "Uniform": (lambda p: dist.Uniform(1e8 - p, 1e8 + 8 * p), 1e8),
    "Beta": (lambda p: dist.Beta(0.01 * p, 0.01 * p), 0.5),
    "AffineBeta": (lambda p: dist.AffineBeta(p, p, 2.0, 3.0), 3.0),
    "ContinuousBernoulli": (lambda p: dist.ContinuousBernoulli(p.sigmoid()), 0.5),
    "RelaxedBernoulli": (lambda p: dist.RelaxedBernoulli(torch.tensor(0.1), logits=p), 0.5),
    "sigmoid": (lambda p: through(dist.Normal(20 * p, 1.0), SigmoidTransform()), 0.5),
    "Gamma": (lambda p: dist.Gamma(0.01 * p, p), 0.5),
    "Pareto": (lambda p: dist.Pareto(1e8 * p.detach(), 1e5 * p), 2e8),
    "Exponential": (lambda p: dist.Exponential(p), 0.5),
    "Chi2": (lambda p: dist.Chi2(p), 0.5),
    "HalfNormal": (lambda p: dist.HalfNormal(1e-22 * p.detach()), 0.0),
    "HalfCauchy": (lambda p: dist.HalfCauchy(p), 0.5),
    "InverseGamma": (lambda p: dist.InverseGamma(p, p), 0.5),
    "narrow Weibull": (lambda p: dist.Weibull(0.01 * p, 20 * p), 0.01),
    "ImproperUniform": (lambda p: dist.ImproperUniform(dist.constraints.positive, p.shape, ()), 0.5),
    "Delta": (lambda p: dist.Delta(torch.full_like(p, 0.25)), 0.25),
    "mixture of Normals": (lambda p: mixed(dist.Normal(two(p), 1.0)), 0.0),
    "mixture of Betas": (lambda p: mixed(dist.Beta(two(p), 2.0)), 0.5),
    "masked mixture": (lambda p: dist.MaskedMixture(p > 0, dist.Beta(p, 1.0), dist.Beta(p, p)), 0.5),
    "masked mixture of supports": (lambda p: dist.MaskedMixture(p > 0, dist.Normal(p, 1.0), dist.Beta(p, p)), 0.5),
    "flow": (lambda p: through(dist.Normal(p, 1.0).to_event(1), FLOW), 0.5),
    "flow and tanh": (lambda p: through(dist.Normal(p, 1.0).to_event(1), FLOW, TanhTransform()), 0.5),
    "expanded": (lambda p: dist.Kumaraswamy(p[0, 0], p[0, 0]).expand([B, D]), 0.5),
    "Poisson": (lambda p: dist.Poisson(p), 1.0),
    "Bernoulli": (lambda p: dist.Bernoulli(p.sigmoid()), 1.0),
    "Binomial": (lambda p: dist.Binomial(10, p.sigmoid()), 1.0),
    "Categorical": (lambda p: dist.Categorical(logits=two(p)), 1.0),
    "NegativeBinomial": (lambda p: dist.NegativeBinomial(p, logits=p), 1.0),
    "Dirichlet": (lambda p: dist.Dirichlet(p + 1), 1 / D),
    "MultivariateNormal": (lambda p: dist.MultivariateNormal(p[:, :2], torch.eye(2)).expand([B]), 0.5),
}


WRAPS = {
    "in plates": lambda fn, mask: fn,
    "in an event": lambda fn, mask: dist.MaskedDistribution(fn, mask).to_event(mask.ndim - 1),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize(("family", "inside"), [*ROUNDED.values(), *OTHERS.values()], ids=[*ROUNDED, *OTHERS])
def test_masked_elements_have_no_influence_on_the_likelihood(family, inside, wrap):
    torch.manual_seed(0)
    p = torch.ones(B, D, requires_grad=True)
    plain = family(p)
    mask = torch.rand(plain.batch_shape) < 0.5
    shown = mask.reshape(mask.shape + (1,) * plain.event_dim)
    x = torch.full(plain.shape(), inside)
    fn = wrap(family(p), mask)
    site = Site("x", fn, x.where(shown, torch.nan), tuple(fn.batch_shape), -len(fn.batch_shape), mask=shown)
    costs = NegativeLogLikelihood().per_datum(site)
    expected = -plain.log_prob(x).where(mask, 0.0).reshape(1, B, -1).sum(2)
    torch.testing.assert_close(costs, expected, rtol=1e-4, atol=1e-4)
    if expected.requires_grad:
        found, slope = (torch.autograd.grad(part.sum(), p, retain_graph=True)[0] for part in (costs, expected))
        torch.testing.assert_close(found, slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masked_elements_of_half_precision_have_no_influence(dtype):
    p = torch.ones(B, D, dtype=dtype, requires_grad=True)
    mask = torch.arange(D) < 5
    for fn in (dist.Uniform(p - 1, 2 * p), dist.Normal(p, p), through(dist.Normal(4 * p, p), TanhTransform())):
        site = Site("x", fn, torch.full((B, D), 0.5, dtype=dtype).where(mask, torch.nan), (B, D), -2, mask=mask)
        (slope,) = torch.autograd.grad(NegativeLogLikelihood().per_datum(site).sum(), p)
        assert slope.isfinite().all()
        assert bool((slope[:, 5:] == 0).all())


def test_masked_whole_numbers_of_a_family_of_fractions_have_no_influence():
    p = torch.zeros(B, D, requires_grad=True)
    mask = torch.arange(D) < 5
    site = Site("x", dist.LogNormal(p, 1.0), torch.ones(B, D).long(), (B, D), -2, mask=mask)
    (slope,) = torch.autograd.grad(NegativeLogLikelihood().per_datum(site).sum(), p)
    assert torch.equal(slope, torch.zeros(B, D))  # of (log x - p)^2 / 2 at x = 1, p = 0


def test_the_running_statistics_of_a_flow_count_a_masked_batch_once():
    norm = BatchNorm(D, momentum=0.1).train()
    fn = through(dist.Normal(torch.zeros(B, D), 1.0).to_event(1), norm, TanhTransform())
    x = torch.full((B, D), 0.5)
    NegativeLogLikelihood().per_datum(Site("x", fn, x, (B,), -1, mask=torch.ones(B, 1, dtype=torch.bool)))
    torch.testing.assert_close(norm.moving_mean, torch.full((D,), 0.1 * math.atanh(0.5)))


class Squares(Cost):
    """A cost of one's own that sums all elements of an event."""

    def forward(self, distribution, value):
        return (value - distribution.mean).square().sum(-1)


class FilledSquares(Squares):
    def fill(self, distribution, value, mask):
        return torch.where(mask, value, distribution.mean)


class Likelihood(Cost):
    """A cost of one's own that leaves masked elements to the distribution, and draws random numbers."""

    def forward(self, distribution, value):
        return torch.rand(4) - distribution.log_prob(value.nan_to_num())


def site_of(mask, *, scale=1.0, hidden=7.0, dtype=torch.float32):
    x = torch.where(mask, torch.ones(4, 3), hidden).to(dtype)
    normal = dist.Normal(torch.zeros(4, 3, dtype=dtype), 1.0)
    return Site("x", normal.mask(mask).to_event(1), x, (4,), -1, mask=mask, scale=scale)


@pytest.mark.parametrize("hidden", [7.0, math.nan])
def test_a_cost_of_ones_own_that_counts_masked_elements_is_told_to_fill_them(hidden):
    mask = torch.tensor([True, False, False]).expand(4, 3)
    with pytest.raises(ValueError, match=r"At observed site 'x': Squares counts masked elements. Define fill"):
        Squares().per_datum(site_of(mask, hidden=hidden))
    torch.testing.assert_close(FilledSquares().per_datum(site_of(mask, hidden=hidden)), torch.ones(1, 4))
    for dtype in (torch.float16, torch.float32):
        torch.manual_seed(0)
        found = Likelihood().per_datum(site_of(mask, hidden=hidden, dtype=dtype))
        torch.manual_seed(0)
        expected = torch.rand(1, 4) + 0.5 + math.log(2 * math.pi) / 2
        torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps, atol=0)


def test_a_cost_of_ones_own_needs_nothing_for_data_that_are_masked_as_a_whole():
    mask = torch.tensor([True, False, True, True])[:, None]
    torch.testing.assert_close(Squares().per_datum(site_of(mask)), torch.tensor([[3.0, 0.0, 3.0, 3.0]]))


@pytest.mark.parametrize("cost", [FilledSquares(), SquaredError(), FunctionCost(lambda x, g: (x - g).square().sum(1))])
def test_a_datum_of_which_nothing_is_observed_costs_0_whatever_its_scale(cost):
    mask = torch.tensor([[True, True, False], [False, False, False], [True, True, True], [True, False, False]])
    scale = 3 / mask.sum(1)
    assert scale[1].isinf()
    torch.testing.assert_close(cost.per_datum(site_of(mask, scale=scale)), torch.tensor([[3.0, 0.0, 3.0, 3.0]]))
