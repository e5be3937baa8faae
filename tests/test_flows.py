"""Normalizing flows as priors and encoders, in one line each: those of zuko, and Pyro's own."""

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as flows
import pytest
import torch
from programs import AutoEncoder
from torch import nn

from pyro_wae import WAELoss, priors
from pyro_wae.kernels import Gaussian
from pyro_wae.penalties import MMD, PosteriorKL, PriorLikelihood
from pyro_wae.predict import sample

N, D, X = 20, 2, 5
NETS = {"hidden_features": (8, 8)}
SLOW = {"CNF", "NAF", "UNAF"}  # they integrate, or invert by bisection
ZUKO = {
    **{name: {"transforms": 2, **NETS} for name in ("MAF", "NSF", "NICE", "RealNVP", "SOSPF", "BPF", "NCSF", "GF")},
    **{name: {"transforms": 2, "signal": 4, **NETS} for name in ("NAF", "UNAF")},
    "CNF": NETS,
}
every_family = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in ZUKO]
)


@pytest.fixture
def zuko():
    return pytest.importorskip("zuko", reason="pip install zuko")


@pytest.fixture
def to_pyro():
    return pytest.importorskip("pyro.contrib.zuko").ZukoToPyro


def gradients(penalty, net, flow):
    """The gradients of a flow's parameters by the penalty alone, each of which must be there."""
    loss = WAELoss(penalty, penalty_weight=1.0, cost=lambda x, g: 0 * g.sum(1))
    loss(net.model, net.guide)(torch.randn(N, X)).backward()
    found = [parameter.grad for parameter in flow.parameters()]
    assert found
    assert all(gradient is not None and gradient.isfinite().all() and gradient.any() for gradient in found)
    return found


@every_family
def test_zukos_flows_are_priors(zuko, to_pyro, family):
    flow = getattr(zuko.flows, family)(D, **ZUKO[family])
    net = AutoEncoder(X, D, prior=lambda x: to_pyro(flow()))
    gradients(MMD(Gaussian(1.0)), net, flow)
    flow.zero_grad()
    pyro.set_rng_seed(1)
    found = gradients(PriorLikelihood(), net, flow)
    pyro.set_rng_seed(1)
    codes = net.encoder(torch.randn(N, X)).detach()
    torch.testing.assert_close(found, list(torch.autograd.grad(-flow().log_prob(codes).mean(), flow.parameters())))


@pytest.mark.slow
@every_family
def test_zukos_conditional_flows_are_encoders(zuko, to_pyro, family):
    flow = getattr(zuko.flows, family)(D, context=X, **ZUKO[family])
    net = AutoEncoder(X, D, encoder=nn.Identity(), code=lambda x: to_pyro(flow(x)))
    gradients(MMD(Gaussian(1.0)) + 0.1 * PosteriorKL(), net, flow)


@pytest.mark.parametrize(("family", "options"), [("MAF", NETS), ("GMM", {"components": 2})])
def test_zukos_flows_and_mixtures_are_fitted_to_codes_and_sampled(zuko, family, options):
    net, x, prior = AutoEncoder(X, D), 3 + torch.randn(200, X), getattr(zuko.flows, family)(D, **options)
    codes = net.encoder(x).detach()
    before = prior().log_prob(codes).mean()
    assert priors.fit(net.model, net.guide, x, prior=prior, steps=20) is prior
    assert prior().log_prob(codes).mean() > before
    found = sample(net.model, x, num_samples=2000, prior=prior)["x"]
    expected = net.decoder(prior().sample((2000,))).detach()
    # Five standard errors of a difference of means of 2000; the model's own prior, N(0, I), is more than ten away.
    error = (found.var(0) / 1000).sqrt()
    assert ((found.mean(0) - expected.mean(0)).abs() < 5 * error).all()
    assert ((net.decoder.bias - expected.mean(0)).abs() > 10 * error).any()


INVERTIBLE = ("affine_autoregressive", "affine_coupling", "batchnorm", "householder", "matrix_exponential")
INVERTIBLE += ("spline", "spline_autoregressive", "spline_coupling")
ONE_WAY = ("block_autoregressive", "neural_autoregressive", "planar", "polynomial", "radial", "sylvester")


def pyros(name):
    flow = getattr(flows, name)(D)
    base = dist.Normal(torch.zeros(D), 1).to_event(1)
    return flow, AutoEncoder(X, D, prior=lambda x: dist.TransformedDistribution(base, [flow]))


@pytest.mark.parametrize(
    ("name", "penalty"),
    [
        *((name, MMD(Gaussian(1.0))) for name in INVERTIBLE + ONE_WAY),
        *((name, PriorLikelihood()) for name in INVERTIBLE),
    ],
)
def test_pyros_flows_are_priors(name, penalty):
    flow, net = pyros(name)
    gradients(penalty, net, flow)


@pytest.mark.parametrize("name", ONE_WAY)
def test_a_flow_that_cannot_be_inverted_is_named(name):
    _, net = pyros(name)
    with pytest.raises(
        ValueError, match=r"prior at site 'z' \(TransformedDistribution\) has no log_prob.*such as MMD\(\)"
    ):
        WAELoss(PriorLikelihood()).loss_and_grads(net.model, net.guide, torch.randn(N, X))
