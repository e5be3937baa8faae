"""The divergence of each datum's posterior from the prior, against formulas and Pyro's own losses."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import AutoEncoder, around, delta, normal, sites
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.effect import AutoNormalMessenger
from references import every_particles, nested, program
from torch import nn

from pyro_wae import WAELoss
from pyro_wae.costs import NegativeLogLikelihood
from pyro_wae.kernels import Gaussian
from pyro_wae.penalties import MMD, LogVarianceL1, PosteriorKL

N, D = 9, 3


def free(x, g):
    """A cost of 0."""
    return 0 * g.flatten(1).sum(1)


def net_of(encoder=dist.Normal, prior=None):
    """Linear nets; the scales of the encoder are parameters."""
    net = AutoEncoder(D, D, prior=prior, code=lambda loc: encoder(loc, net.scale).to_event(1))
    net.scale = nn.Parameter(torch.tensor([0.5, 1.0, 2.0]))
    return net.double()


def data():
    return torch.randn(N, D, dtype=torch.float64)


def of_normals(loc, scale):
    """KL(N(loc, scale^2) || N(0, 1)) of each datum."""
    return ((scale**2 + loc**2 - 1) / 2 - scale.log()).sum(-1)


@every_particles
def test_value_and_gradient_are_those_of_the_formula(options):
    net, x = net_of(), data()
    loss = WAELoss(PosteriorKL(), cost=free, penalty_weight=2.0, **options)
    loss(net.model, net.guide)(x).backward()
    found = [parameter.grad for parameter in (net.encoder.weight, net.scale)]
    expected = of_normals(net.encoder(x), net.scale).mean()
    assert loss.terms.penalty.item() == pytest.approx(expected.item(), rel=1e-10)
    torch.testing.assert_close(found, list(torch.autograd.grad(2 * expected, [net.encoder.weight, net.scale])))


@pytest.mark.parametrize(
    ("encoder", "elbo"),
    [(dist.Normal, TraceMeanField_ELBO), (lambda loc, scale: dist.StudentT(5.0, loc, scale), Trace_ELBO)],
    ids=["closed form", "at the code"],
)
def test_with_the_likelihood_as_its_cost_it_is_pyros_elbo(encoder, elbo):
    net, x = net_of(encoder), data()
    loss = WAELoss(PosteriorKL(), penalty_weight=1.0, cost=NegativeLogLikelihood())
    pyro.set_rng_seed(3)
    found = loss.loss(net.model, net.guide, x)
    pyro.set_rng_seed(3)
    assert found == pytest.approx(elbo().loss(net.model, net.guide, x) / N, rel=1e-10)


@pytest.mark.parametrize("penalty", [PosteriorKL(), MMD() + LogVarianceL1()], ids=["divergence", "guard"])
def test_a_code_that_an_autoguide_computes_from_noise_is_not_called_deterministic(penalty):
    model, x = net_of().model, data()
    guide = AutoNormal(model)
    with pytest.raises(ValueError, match=r"computes the code of site 'z' \(Delta\) from 'z_unconstrained'"):
        WAELoss(penalty, penalty_weight=1.0).loss(model, guide, x)


def test_the_divergence_of_an_autoguide_that_samples_the_site_itself_is_that_of_pyros_elbo():
    model, x = net_of().model, data()
    guide = AutoNormalMessenger(model)
    guide(x)
    loss = WAELoss(PosteriorKL(), penalty_weight=1.0, cost=NegativeLogLikelihood())
    pyro.set_rng_seed(3)
    found = loss.loss(model, guide, x)
    pyro.set_rng_seed(3)
    assert found == pytest.approx(TraceMeanField_ELBO().loss(model, guide, x) / N, rel=1e-6)


def test_beside_mmd_it_is_the_sum_and_the_nets_run_once():
    net, x, runs = net_of(), data(), []
    net.encoder.register_forward_hook(lambda *_: runs.append(1))
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
    net, x, treated = net_of(), data(), torch.arange(N) % 2 == 0
    first, between = nn.Linear(D + 1, 4).double(), MMD(Gaussian(1.0))

    def hidden(z):
        return first(torch.cat([z, treated[:, None]], 1)).tanh()

    def output(z):
        h = hidden(z)
        pyro.factor("transfer", -10 * between(h[treated], h[~treated]).expand(len(z)))
        return around(h[:, :D])

    programs = program(lambda x: delta(net.encoder(x)), output=output)
    loss = WAELoss(MMD(Gaussian(1.0)), penalty_weight=0.0, cost=NegativeLogLikelihood())
    loss(*programs)(x).backward()
    found = [net.encoder.weight.grad, first.weight.grad]

    def mean(a, b, leave_out=0):
        return ((-torch.cdist(a, b).square() / 2).exp().sum() - leave_out) / (len(a) * (len(b) - (leave_out > 0)))

    h = hidden(net.encoder(x))
    a, b = h[treated], h[~treated]
    gap = 10 * (mean(a, a, len(a)) + mean(b, b, len(b)) - 2 * mean(a, b))
    expected = ((x - h[:, :D]).square() + math.log(2 * math.pi)).sum(1).mean() / 2 + gap
    assert loss.terms.costs["transfer"].item() == pytest.approx(gap.item(), rel=1e-9)
    torch.testing.assert_close(found, list(torch.autograd.grad(expected, [net.encoder.weight, first.weight])))


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_masked_data_count_for_nothing(micro_batch):
    x, kept, net = data(), torch.arange(N) % 3 > 0, net_of()

    def masked(program):
        return lambda x, kept: poutine.mask(program, mask=kept)(x)

    loss = WAELoss(PosteriorKL(), cost=free, penalty_weight=1.0, micro_batch=micro_batch)
    loss.loss(masked(net.model), masked(net.guide), x, kept)
    expected = of_normals(net.encoder(x), net.scale)[kept].mean()
    assert loss.terms.penalty.item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("micro_batch", [None, 1])
@pytest.mark.parametrize("bottom_up", [False, True])
def test_of_a_hierarchy_it_is_that_of_the_joint_code(bottom_up, micro_batch):
    """Joint Normals: exact KL by torch's own formula; 2000 particles of two equal data, five standard errors."""

    # z1 and z2: each second one is the first plus a draw of its own.
    first, second = (0, 1) if bottom_up else (1, 0)
    model, _ = sites(
        {"z2": (lambda x: normal(x, 1), None), "z1": (lambda x, z2: around(z2), None)}, lambda z2, z1: around(z1)
    )

    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample(("z1", "z2")[first], dist.Normal(x, 0.5).to_event(1))
            pyro.sample(("z1", "z2")[second], dist.Normal(z, 0.5).to_event(1))

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
    programs = program(
        lambda x: dist.Normal(x.new_ones(()), 2.0),
        lambda x: dist.Normal(x.new_zeros(()), 1),
        lambda z: dist.Normal(z, 1),
        plate=lambda x: nested(pyro.plate("data", N, dim=-1), pyro.plate("inner", 4, subsample_size=2, dim=-2)),
    )
    loss = WAELoss(PosteriorKL(), cost=free, penalty_weight=1.0, data_plate="data")
    loss.loss(*programs, torch.randn(2, N, dtype=torch.float64))
    expected = 4 * of_normals(torch.ones(1), torch.full((1,), 2.0))
    assert loss.terms.penalty.item() == pytest.approx(expected.item(), rel=1e-6)


class Implicit(dist.Normal):
    def log_prob(self, value):
        raise NotImplementedError


def test_what_has_no_density_is_named():
    net = net_of(lambda loc, scale: dist.StudentT(5.0, loc, scale), lambda x: Implicit(x.new_zeros(D), 1).to_event(1))
    with pytest.raises(ValueError, match=r"densities of guide and prior at site 'z'.*has no log_prob\. Take MMD\(\)"):
        WAELoss(PosteriorKL()).loss(net.model, net.guide, data())
    with pytest.raises(ValueError, match=r"known only inside WAELoss.*WAELoss\(MMD\(\) \+ 0\.1 \* PosteriorKL\(\)\)"):
        PosteriorKL()(data())


class Folded(dist.Normal):
    """The absolute value of a Normal around 0."""

    def rsample(self, sample_shape=()):
        return super().rsample(sample_shape).abs()

    def log_prob(self, value):
        return super().log_prob(value) + math.log(2)


class Lifted(dist.Normal):
    """Draws as a Normal, with a log density that is larger by one."""

    def log_prob(self, value):
        return super().log_prob(value) + 1.0


def test_a_density_of_ones_own_is_read():
    loss = WAELoss(PosteriorKL(), penalty_weight=1.0)
    loss.loss(*program(lambda x: Lifted(torch.zeros_like(x), 1.0).to_event(1)), torch.randn(20, 2))
    assert loss.terms.penalty.item() == pytest.approx(2.0, rel=1e-5)


def test_a_law_of_ones_own_is_not_that_of_the_family_it_is_derived_from():
    programs = program(lambda x: Folded(torch.zeros_like(x), 1.0).to_event(1))
    loss = WAELoss(PosteriorKL(), penalty_weight=1.0)
    loss.loss(*programs, torch.randn(20, 2))
    assert loss.terms.penalty.item() == pytest.approx(2 * math.log(2), rel=1e-5)
