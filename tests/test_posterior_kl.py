"""The divergence of each datum's posterior from the prior, against formulas and Pyro's own losses."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from references import every_particles
from torch import nn

from pyro_wae import WAELoss
from pyro_wae.costs import NegativeLogLikelihood
from pyro_wae.kernels import Gaussian
from pyro_wae.penalties import MMD, PosteriorKL

N, D = 9, 3


def free(x, g):
    """A cost of 0."""
    return 0 * g.flatten(1).sum(1)


class Net(nn.Module):
    def __init__(self, encoder=dist.Normal, prior=None, mask=None):
        super().__init__()
        self.loc, self.scale = nn.Linear(D, D).double(), nn.Parameter(torch.tensor([0.5, 1.0, 2.0]).double())
        self.decoder = nn.Linear(D, D).double()
        self.encoder, self.mask = encoder, mask
        self.prior = prior or (lambda x: dist.Normal(x.new_zeros(D), 1).to_event(1))

    def model(self, x):
        with pyro.plate("data", len(x)), poutine.mask(mask=True if self.mask is None else self.mask):
            z = pyro.sample("z", self.prior(x))
            pyro.sample("x", dist.Normal(self.decoder(z), 1).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)), poutine.mask(mask=True if self.mask is None else self.mask):
            pyro.sample("z", self.encoder(self.loc(x), self.scale).to_event(1))


def data():
    return torch.randn(N, D, dtype=torch.float64)


def of_normals(loc, scale):
    """KL(N(loc, scale^2) || N(0, 1)) of each datum."""
    return ((scale**2 + loc**2 - 1) / 2 - scale.log()).sum(-1)


@every_particles
def test_value_and_gradient_are_those_of_the_formula(options):
    net, x = Net(), data()
    loss = WAELoss(PosteriorKL(), cost=free, penalty_weight=2.0, **options)
    loss(net.model, net.guide)(x).backward()
    found = [parameter.grad for parameter in (net.loc.weight, net.scale)]
    expected = of_normals(net.loc(x), net.scale).mean()
    assert loss.terms.penalty.item() == pytest.approx(expected.item(), rel=1e-10)
    torch.testing.assert_close(found, list(torch.autograd.grad(2 * expected, [net.loc.weight, net.scale])))


@pytest.mark.parametrize(
    ("encoder", "elbo"),
    [(dist.Normal, TraceMeanField_ELBO), (lambda loc, scale: dist.StudentT(5.0, loc, scale), Trace_ELBO)],
    ids=["closed form", "at the code"],
)
def test_with_the_likelihood_as_its_cost_it_is_pyros_elbo(encoder, elbo):
    net, x = Net(encoder), data()
    loss = WAELoss(PosteriorKL(), penalty_weight=1.0, cost=NegativeLogLikelihood())
    pyro.set_rng_seed(3)
    found = loss.loss(net.model, net.guide, x)
    pyro.set_rng_seed(3)
    assert found == pytest.approx(elbo().loss(net.model, net.guide, x) / N, rel=1e-10)


def test_beside_mmd_it_is_the_sum_and_the_nets_run_once():
    net, x, runs = Net(), data(), []
    net.loc.register_forward_hook(lambda *_: runs.append(1))
    values = []
    for penalty in (MMD(Gaussian(1.0)), 0.3 * PosteriorKL(), MMD(Gaussian(1.0)) + 0.3 * PosteriorKL()):
        pyro.set_rng_seed(3)
        loss = WAELoss(penalty, penalty_weight=1.0)
        loss.loss(net.model, net.guide, x)
        values.append(loss.terms.penalty.item())
    assert values[0] + values[1] == pytest.approx(values[2], rel=1e-10)
    assert len(runs) == 3


def test_a_discrepancy_at_a_layer_of_the_decoder_is_a_factor():
    """trVAE: the loss and its gradients against the sum written out, with the MMD of a Gaussian kernel by formula."""
    net, x, treated = Net(), data(), torch.arange(N) % 2 == 0
    first, between = nn.Linear(D + 1, 4).double(), MMD(Gaussian(1.0))

    def hidden(z):
        return first(torch.cat([z, treated[:, None]], 1)).tanh()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(D), 1).to_event(1))
            h = hidden(z)
            pyro.factor("transfer", -10 * between(h[treated], h[~treated]).expand(len(x)))
            pyro.sample("x", dist.Normal(h[:, :D], 1).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(net.loc(x)).to_event(1))

    loss = WAELoss(MMD(Gaussian(1.0)), penalty_weight=0.0, cost=NegativeLogLikelihood())
    loss(model, guide)(x).backward()
    found = [net.loc.weight.grad, first.weight.grad]

    def mean(a, b, leave_out=0):
        return ((-torch.cdist(a, b).square() / 2).exp().sum() - leave_out) / (len(a) * (len(b) - (leave_out > 0)))

    h = hidden(net.loc(x))
    a, b = h[treated], h[~treated]
    gap = 10 * (mean(a, a, len(a)) + mean(b, b, len(b)) - 2 * mean(a, b))
    expected = ((x - h[:, :D]).square() + math.log(2 * math.pi)).sum(1).mean() / 2 + gap
    assert loss.terms.costs["transfer"].item() == pytest.approx(gap.item(), rel=1e-9)
    torch.testing.assert_close(found, list(torch.autograd.grad(expected, [net.loc.weight, first.weight])))


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_masked_data_count_for_nothing(micro_batch):
    x, kept = data(), torch.arange(N) % 3 > 0
    net = Net()

    def masked(program):
        def run(x, mask):
            net.mask = mask
            program(x)

        return run

    loss = WAELoss(PosteriorKL(), cost=free, penalty_weight=1.0, micro_batch=micro_batch)
    loss.loss(masked(net.model), masked(net.guide), x, kept)
    expected = of_normals(net.loc(x), net.scale)[kept].mean()
    assert loss.terms.penalty.item() == pytest.approx(expected.item(), rel=1e-10)


def test_micro_batches_have_the_gradient_of_the_whole():
    net, x, gradients = Net(), data(), []
    for micro_batch in (None, 4):
        net.zero_grad()
        loss = WAELoss(PosteriorKL(), cost=free, penalty_weight=1.0, micro_batch=micro_batch)
        loss(net.model, net.guide)(x).backward()
        gradients.append([net.loc.weight.grad.clone(), net.scale.grad.clone()])
    torch.testing.assert_close(*gradients)


def normal(loc, scale=1.0):
    return dist.Normal(loc, scale).to_event(1)


@pytest.mark.parametrize("micro_batch", [None, 1])
@pytest.mark.parametrize("bottom_up", [False, True])
def test_of_a_hierarchy_it_is_that_of_the_joint_code(bottom_up, micro_batch):
    """Joint Normals: exact KL by torch's own formula; 2000 particles of two equal data, five standard errors."""

    def model(x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", normal(torch.zeros_like(x)))
            z1 = pyro.sample("z1", normal(z2))
            pyro.sample("x", normal(z1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            if bottom_up:
                z1 = pyro.sample("z1", normal(x, 0.5))
                pyro.sample("z2", normal(z1, 0.5))
            else:
                z2 = pyro.sample("z2", normal(x, 0.5))
                pyro.sample("z1", normal(z2, 0.5))

    # z1 and z2: each second one is the first plus a draw of its own.
    first, second = (0, 1) if bottom_up else (1, 0)
    cov = torch.zeros(2, 2)
    cov[first, first], cov[second, second] = 0.25, 0.5
    cov[0, 1] = cov[1, 0] = 0.25
    q = dist.MultivariateNormal(torch.full((2,), 1.5), cov)
    p = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[2.0, 1.0], [1.0, 1.0]]))
    expected = torch.distributions.kl_divergence(q, p).item()
    spread = (q.log_prob(z := q.sample((4000,))) - p.log_prob(z)).std().item()
    particles = {"num_particles": 2000, "vectorize_particles": True, "max_plate_nesting": 1}
    loss = WAELoss(PosteriorKL(), cost=free, penalty_weight=1.0, micro_batch=micro_batch, **particles)
    loss.loss(model, guide, torch.full((2, 1), 1.5))
    assert abs(loss.terms.penalty.item() - expected) < 5 * spread / math.sqrt(4000)


def test_plates_inside_a_datum_are_summed_and_subsampled_ones_stand_for_the_whole():
    x = torch.randn(4, N, dtype=torch.float64)

    def model(x):
        with pyro.plate("data", N, dim=-1), pyro.plate("inner", 4, subsample_size=2, dim=-2) as index:
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1))
            pyro.sample("x", dist.Normal(z, 1), obs=x[index])

    def guide(x):
        with pyro.plate("data", N, dim=-1), pyro.plate("inner", 4, subsample_size=2, dim=-2):
            pyro.sample("z", dist.Normal(x.new_ones(()), 2.0))

    loss = WAELoss(PosteriorKL(), cost=free, penalty_weight=1.0, data_plate="data")
    loss.loss(model, guide, x)
    expected = 4 * of_normals(torch.ones(1), torch.full((1,), 2.0))
    assert loss.terms.penalty.item() == pytest.approx(expected.item(), rel=1e-6)


def delta(loc, scale):
    return dist.Delta(loc)


class Implicit(dist.Normal):
    def log_prob(self, value):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (lambda: Net(delta), r"deterministic at site 'z' \(Delta\).* infinite.*dist\.Normal\(loc, scale\)"),
        (
            lambda: Net(prior=lambda x: dist.Normal(x.new_zeros(D), 1).mask(x > 0).to_event(1)),
            r"site 'z' one distribution.*Write \.mask\(mask\) in both",
        ),
        (
            lambda: Net(
                lambda loc, scale: dist.StudentT(5.0, loc, scale),
                lambda x: Implicit(x.new_zeros(D), 1).to_event(1),
            ),
            r"densities of guide and prior at site 'z'.*has no log_prob\. Take MMD\(\)",
        ),
    ],
    ids=["deterministic", "one mask", "no density"],
)
def test_what_has_no_divergence_is_named(net, message):
    net = net()
    with pytest.raises(ValueError, match=message):
        WAELoss(PosteriorKL()).loss(net.model, net.guide, data())
    with pytest.raises(ValueError, match=r"known only inside WAELoss.*WAELoss\(MMD\(\) \+ 0\.1 \* PosteriorKL\(\)\)"):
        PosteriorKL()(data())
