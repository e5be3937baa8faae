"""Every prior that can be sampled serves, and what reaches the penalty has its law."""

from __future__ import annotations

import inspect
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from programs import AutoEncoder, around, delta, normal, sites
from pyro.distributions import transforms
from pyro.infer import SVI
from pyro.optim import Adam, ClippedAdam
from references import Seen, program
from torch import nn

from pyro_wae import WAELoss
from pyro_wae.kernels import Gaussian
from pyro_wae.penalties import MMD

N = 400
SEED = 11
# Each test makes some dozens of comparisons at fixed seeds: a true null fails one at this level in 10,000.
LEVEL = 1e-4


def same_law(draws, expected):
    """Whether Kolmogorov and Smirnov find two samples (m, d) alike, in each coordinate and in their sum."""
    draws = torch.cat([draws, draws.sum(1, keepdim=True)], 1).detach()
    expected = torch.cat([expected, expected.sum(1, keepdim=True)], 1).detach()
    tests = [
        scipy.stats.ks_2samp(a.numpy(), b.numpy(), method="asymp") for a, b in zip(draws.T, expected.T, strict=True)
    ]
    return min(test.pvalue for test in tests) > LEVEL


def spline_flow():
    flow = [transforms.spline(3), transforms.affine_coupling(3)]
    for transform in flow:
        transform.requires_grad_(False)
    return dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1).to_event(1), flow)


def mixture():
    components = dist.Normal(torch.tensor([[-3.0, 0.0], [3.0, 1.0]]), 0.5).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), components)


def empirical():
    points = torch.arange(10.0)[:, None] * torch.tensor([1.0, -2.0])
    # Pyro's Empirical cannot be expanded by a plate: its samples and weights bring the batch.
    return dist.Empirical(points.expand(N, 10, 2), torch.zeros(N, 10))


def one_datum_of_empirical():
    points = torch.arange(10.0)[:, None] * torch.tensor([1.0, -2.0])
    return dist.Empirical(points, torch.zeros(10))


PRIORS = {
    "Normal": lambda: dist.Normal(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 3.0])).to_event(1),
    "Uniform": lambda: dist.Uniform(-torch.ones(2), 2 * torch.ones(2)).to_event(1),
    "Laplace": lambda: dist.Laplace(torch.zeros(2), 1.5).to_event(1),
    "StudentT": lambda: dist.StudentT(3.0, torch.zeros(2), 1.0).to_event(1),
    "MixtureSameFamily": mixture,
    "flow": spline_flow,
    "Dirichlet": lambda: dist.Dirichlet(torch.tensor([0.5, 1.0, 3.0])),
    "VonMises": lambda: dist.VonMises(torch.zeros(2), 4.0).to_event(1),
    "ProjectedNormal": lambda: dist.ProjectedNormal(torch.tensor([1.0, 0.0, 0.5])),
    "LowRankMultivariateNormal": lambda: dist.LowRankMultivariateNormal(
        torch.ones(3), torch.tensor([[1.0], [2.0], [0.0]]), torch.tensor([0.1, 0.5, 1.0])
    ),
    "Empirical": empirical,
}


def nets(prior):
    """Linear nets around a prior, with a random encoder."""
    d = prior.event_shape[0]
    return AutoEncoder(4, d, prior=lambda x: prior, code=lambda loc: dist.Normal(loc, 0.1).to_event(1))


def finite_gradients(module):
    return all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_takes_a_step_and_its_draws_have_its_law(name):
    prior = PRIORS[name]()
    net, seen, x = nets(prior), Seen(), torch.randn(N, 4)
    # VonMises, Dirichlet and the like are no Normal: the guide's support differs and no density is asked for.
    loss = WAELoss(seen, prior_draws=5)(net.model, net.guide)
    loss(x).backward()
    assert finite_gradients(net)
    draws = seen.prior
    assert draws.shape == (5 * N, prior.event_shape[0])
    assert not draws.requires_grad
    alone = one_datum_of_empirical() if name == "Empirical" else prior
    expected = alone.sample((5 * N,))
    assert same_law(draws, expected)
    # The test sees a shift by a third of a standard deviation, and draws taken twice over.
    assert not same_law(draws + expected.std(0) / 3, expected)
    assert len(torch.unique(draws, dim=0)) == (10 if name == "Empirical" else 5 * N)
    before = [p.clone() for p in net.parameters()]
    SVI(net.model, net.guide, Adam({"lr": 1e-2}), loss=WAELoss()).step(x)
    for old, new in zip(before, net.parameters(), strict=True):
        assert new.isfinite().all()
        assert not torch.equal(old, new)


@pytest.mark.parametrize("prior", [dist.Categorical(torch.ones(3)), dist.Poisson(2.0)], ids=["labels", "counts"])
def test_draws_of_whole_numbers_are_compared_with_codes_that_are_not(prior):
    seen, x = Seen(), torch.randn(N, 1)
    WAELoss(seen)(*program(lambda x: dist.Delta(x[:, 0]), lambda x: prior, lambda z: around(z[:, None])))(x)
    assert seen.prior.dtype == seen.codes.dtype == x.dtype
    assert torch.equal(seen.prior, seen.prior.round())
    assert len(seen.prior.unique()) >= 3


@pytest.mark.parametrize("penalty", [None, {"z": Seen(), "k": Seen()}, {"z": Seen(), "k": None}])
def test_sites_of_two_precisions_are_compared_in_the_higher(penalty):
    joint, x = Seen(), torch.randn(N, 2, dtype=torch.float32)
    programs = sites(
        {
            "k": (
                lambda x: dist.Normal(torch.zeros((), dtype=torch.float64), 1),
                lambda x: dist.Delta(x[:, 0].double()),
            ),
            "z": (lambda x, k: normal(x, 2), delta),
        },
        lambda k, z: around(z),
    )
    WAELoss(penalty or joint)(*programs)(x)
    for seen in (joint,) if penalty is None else filter(None, penalty.values()):
        assert seen.prior.dtype == seen.codes.dtype == torch.float64
    if penalty is None:
        torch.testing.assert_close(joint.codes[0], torch.cat([x[:, :1], x], 1).double(), rtol=0, atol=0)


# Priors that depend on something


@pytest.mark.parametrize("vectorize", [False, True])
def test_a_hierarchical_prior_is_drawn_from_the_top(vectorize):
    seen, x = Seen(), torch.randn(N, 2) - 5
    programs = sites(
        {
            "z1": (lambda x: dist.Exponential(torch.ones(1)).to_event(1), lambda x: delta(x[:, :1])),
            "z2": (
                lambda x, z1: dist.Normal(3 * z1, 0.5).to_event(1),
                lambda x: dist.Normal(x[:, 1:], 0.1).to_event(1),
            ),
        }
    )
    WAELoss(seen, prior_draws=3, num_particles=2, vectorize_particles=vectorize).loss(*programs, x)
    draws = seen.prior
    assert draws.shape == (6 * N, 2)
    assert len(torch.unique(draws, dim=0)) == 6 * N  # afresh for each particle
    z1 = torch.distributions.Exponential(1.0).sample((6 * N, 1))
    assert same_law(draws, torch.cat([z1, 3 * z1 + 0.5 * torch.randn(6 * N, 1)], 1))
    # Ancestral: z2 - 3 z1 is Normal(0, 0.5) and independent of z1; with the codes' z1 of about -5 it would not be.
    rest = draws[:, 1] - 3 * draws[:, 0]
    assert scipy.stats.kstest(rest.numpy(), "norm", (0, 0.5)).pvalue > LEVEL
    assert scipy.stats.spearmanr(rest, draws[:, 0]).pvalue > LEVEL


@pytest.mark.parametrize("kind", ["root", "with particles", "after another site"])
def test_a_prior_that_depends_on_the_data_is_drawn_for_the_same_data_and_pairs_of_one_datum_are_left_out(kind):
    """The pair of a datum's code with its own prior draw is no pair of independent draws."""
    seen, x, particles = Seen(), 10 * torch.randn(N, 1), 2 if kind == "with particles" else 1
    latents = {"z": (lambda x, *_: dist.Normal(2 * x, 0.5).to_event(1), delta)}
    if kind == "after another site":
        latents = {"noise": (lambda x: dist.Normal(0.0, 1), lambda x: dist.Delta(x[:, 0]))} | latents
    WAELoss(seen, prior_draws=2, num_particles=particles).loss(*sites(latents, lambda *z: around(z[-1])), x)
    rest = (seen.prior[:, -1:] - 2 * x.repeat(2 * particles, 1)).flatten()
    assert scipy.stats.kstest(rest.numpy(), "norm", (0, 0.5)).pvalue > LEVEL
    assert seen.context.shared_data


class Flow(nn.Module):
    """A conditional flow: its transform holds the data in a closure."""

    def __init__(self):
        super().__init__()
        self.flow = transforms.conditional_planar(2, 1, [4])
        self.flow.requires_grad_(False)

    def __call__(self, x):
        base = dist.Normal(torch.zeros(2), 1).to_event(1)
        return dist.ConditionalTransformedDistribution(base, [self.flow]).condition(x)


LARGE_AS_A_BATCH = {
    "Normal": lambda: dist.Normal(torch.arange(4.0), torch.arange(1.0, 5.0)).to_event(1),
    "MultivariateNormal": lambda: dist.MultivariateNormal(torch.arange(4.0), 2 * torch.eye(4) + 1),
    "LowRankMultivariateNormal": lambda: dist.LowRankMultivariateNormal(
        torch.arange(4.0), torch.arange(16.0).reshape(4, 4), torch.ones(4)
    ),
    "StudentT": lambda: dist.StudentT(5.0, torch.arange(4.0), 1).to_event(1),
    "mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.arange(1.0, 5.0)), dist.Normal(torch.arange(16.0).reshape(4, 4), 1).to_event(1)
    ),
    "MixtureOfDiagNormals": lambda: dist.MixtureOfDiagNormals(torch.randn(2, 4), torch.rand(2, 4) + 1, torch.zeros(2)),
    "MixtureOfDiagNormals, as many": lambda: dist.MixtureOfDiagNormals(
        torch.randn(4, 4), torch.rand(4, 4) + 1, torch.arange(4.0)
    ),
    "MixtureOfDiagNormalsSharedCovariance": lambda: dist.MixtureOfDiagNormalsSharedCovariance(
        torch.randn(2, 4), torch.rand(4) + 1, torch.zeros(2)
    ),
}


@pytest.mark.parametrize("kind", LARGE_AS_A_BATCH)
@pytest.mark.parametrize("rows", [4, 5])
def test_a_batch_as_large_as_a_code_has_a_prior_of_its_own_all_the_same(kind, rows):
    seen = Seen()
    model, guide = program(prior=lambda x: LARGE_AS_A_BATCH[kind]())
    WAELoss(seen, penalty_weight=1.0).loss(model, guide, torch.randn(rows, 4))
    assert not seen.context.shared_data


DROPOUT = nn.Dropout(0.5)
AUTOREGRESSIVE = transforms.conditional_affine_autoregressive(2, context_dim=2)
AUTOREGRESSIVE.requires_grad_(False)
# The prior of a second latent, of the first and of the data; True where it differs between data with one first.
SECOND = {
    "of the data alone": (lambda u, x: dist.Normal(x, 1).to_event(1), True),
    "of both": (lambda u, x: dist.Normal(u, x.exp()).to_event(1), True),
    "a conditional flow": (
        lambda u, x: dist.ConditionalTransformedDistribution(dist.Normal(u, 1).to_event(1), [AUTOREGRESSIVE]).condition(
            x
        ),
        True,
    ),
    "of the first alone": (lambda u, x: dist.Normal(u.tanh(), 1).to_event(1), False),
    "of neither": (lambda u, x: dist.Normal(x.new_zeros(2), 1).to_event(1), False),
    "with a random net": (lambda u, x: dist.Normal(DROPOUT(x), 1).to_event(1), False),
    "of codes that must differ": (
        lambda u, x: dist.Normal(u @ torch.linalg.cholesky(torch.cov(u.mT)), 1).to_event(1),
        False,
    ),
}


@pytest.mark.parametrize("kind", SECOND)
@pytest.mark.parametrize("is_root", [True, False])
def test_a_prior_that_differs_between_data_is_said_once(kind, is_root):
    """Of a latent at the root, and of one after another; what is not known, because it draws more, is not said."""
    second, differs = SECOND[kind]
    if is_root and kind not in ("of the data alone", "a conditional flow", "of neither"):
        return
    latents = {"z": (lambda x, u=0.0: second(x.new_zeros(2) + u, x), delta)}
    if not is_root:
        latents = {"u": (lambda x: normal(x, 2), delta)} | latents
    model, guide = sites(latents, lambda *values: around(values[-1]))
    loss, x = WAELoss(), torch.randn(8, 2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            loss.differentiable_loss(model, guide, x)
    found = [str(warning.message) for warning in said if "differs between data" in str(warning.message)]
    assert len(found) == differs, found
    assert all("latent site 'z'" in text and "WAELoss(condition='y')" in text for text in found)


CONDITIONAL = {
    "argument": (lambda xs, ys: xs, ["xs"], "condition='xs'"),
    "one of two arguments": (lambda xs, ys, c: xs + c, ["xs", "c"], "site ('xs', 'c'): WAELoss(condition='xs')"),
    "key of an argument": (lambda ys, batch: batch["label"], ["batch"], "condition='label'"),
    "site": (lambda ys: pyro.sample("w", around(torch.zeros(8, 2)), obs=torch.randn(8, 2)), [], "condition='w'"),
}


@pytest.mark.parametrize("kind", CONDITIONAL)
def test_the_hint_on_a_conditional_prior_names_what_it_may_depend_on(kind):
    prior, given, named = CONDITIONAL[kind]

    def model(ys, xs=None, c=None, batch=None):
        given = {"ys": ys, "xs": xs, "c": c, "batch": batch}
        with pyro.plate("data", 8):
            loc = prior(**{name: given[name] for name in inspect.signature(prior).parameters})
            z = pyro.sample("z", dist.Normal(loc, 1).to_event(1))
            pyro.sample("y", around(z), obs=ys)

    def guide(ys, **_):
        with pyro.plate("data", 8):
            pyro.sample("z", delta(ys))

    batch = {"label": torch.randn(8, 2), "names": ["a"] * 8, "size": torch.tensor(3.0)}
    options = {name: batch if name == "batch" else torch.randn(8, 2) for name in given}
    with pytest.warns(UserWarning, match="differs between data") as found:
        WAELoss().loss_and_grads(model, guide, torch.randn(8, 2), **options)
    (text,) = (str(warning.message) for warning in found if "differs" in str(warning.message))
    assert named in text
    line = eval(text.rpartition(": ")[2].removesuffix("."))
    assert math.isfinite(line.loss_and_grads(model, guide, torch.randn(8, 2), **options))


def moved(transform):
    base = dist.Normal(torch.zeros(2), 1).to_event(1).expand([N])
    return dist.TransformedDistribution(base, [transform])


def factors():
    return torch.rand(N, 2, 2).tril() + torch.eye(2)


@pytest.mark.parametrize(
    ("prior", "varies"),
    [
        *((prior, False) for prior in PRIORS.values()),
        (lambda: dist.Normal(torch.zeros(N, 2), torch.ones(N, 1)).to_event(1), False),
        (lambda: dist.Normal(torch.randn(N, 2), 1).to_event(1), True),
        (lambda: dist.Normal(0.0, torch.rand(N, 1) + 1).expand([N, 2]).to_event(1), True),
        (lambda: dist.MixtureSameFamily(dist.Categorical(torch.rand(N, 2)), mixture().component_distribution), True),
        (lambda: Flow()(torch.randn(N, 1)), True),
        (lambda: moved(transforms.AffineTransform(torch.randn(N, 2), 1).inv), True),
        (lambda: moved(transforms.AffineTransform(torch.randn(2), 1).inv), False),
        (
            lambda: moved(transforms.LowerCholeskyAffine(torch.zeros(2), torch.rand(N, 2, 2).tril() + torch.eye(2))),
            True,
        ),
        (lambda: dist.RelaxedOneHotCategorical(torch.rand(N, 1) + 0.5, torch.ones(N, 2)), True),
        (lambda: dist.RelaxedOneHotCategorical(torch.tensor(0.5), torch.ones(N, 2)), False),
    ],
)
@pytest.mark.filterwarnings("ignore:The prior of latent site")
def test_a_root_prior_shares_data_with_the_codes_only_if_it_may_depend_on_them(prior, varies):
    fixed = prior()
    net, penalty, x = nets(fixed), Seen(), torch.randn(N, 4)
    loss = WAELoss(penalty)(net.model, net.guide)
    for _ in range(2):  # a flow caches its last draw, which must not count
        loss(x)
    assert [context.shared_data for *_, context in penalty.calls] == [varies] * 2


@pytest.mark.parametrize("varies", [True, False])
def test_a_hidden_markov_prior_shares_data_only_if_its_steps_differ_between_data(varies):
    def prior(x):
        rates = torch.linspace(0.1, 0.9, len(x))[:, None, None, None] if varies else torch.tensor(0.5)
        normals = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
        noise = normals.expand([len(x), 3])
        steps = (rates * torch.eye(2)).expand(len(x), 3, 2, 2)
        return dist.GaussianHMM(normals.expand([len(x)]), steps, noise, torch.eye(2), normals)

    seen = Seen()
    model, guide = program(lambda x: dist.Delta(x, event_dim=2), prior, lambda z: dist.Normal(z, 1).to_event(2))
    WAELoss(seen, penalty_weight=1.0).loss(model, guide, torch.randn(5, 3, 2))
    assert seen.context.shared_data == varies


def test_a_learnable_location_gets_its_gradient_from_the_penalty():
    model, guide = program(prior=lambda x: around(pyro.param("loc", torch.zeros(2))))
    x, draws = torch.randn(N, 2) + 4, []

    def pull(codes, prior):
        draws.append(prior)
        return (codes.mean(0) - prior.mean(0)).square().sum()

    WAELoss(pull, penalty_weight=1.0).loss_and_grads(model, guide, x)
    assert draws[0].requires_grad
    # d/d loc of |mean(codes) - mean(loc + noise)|^2.
    expected = -2 * (x.mean(0) - draws[0].mean(0)).detach()
    torch.testing.assert_close(pyro.param("loc").grad, expected)
    pyro.param("loc").grad = None
    svi = SVI(
        model, guide, ClippedAdam({"lr": 0.8, "lrd": 0.92}), loss=WAELoss(MMD(Gaussian(3.0)), penalty_weight=100.0)
    )
    for _ in range(40):
        svi.step(x[:64])
    torch.testing.assert_close(pyro.param("loc"), x[:64].mean(0), atol=0.5, rtol=0)


@pytest.mark.parametrize("vectorize", [False, True])
def test_a_learnable_mixture_weight_warns_that_its_gradient_is_lost(vectorize):
    logits = nn.Parameter(torch.zeros(2))

    def learnt(x):
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), mixture().component_distribution)

    net, x = nets(mixture()), torch.randn(32, 4)
    fixed, net.prior = net.prior, learnt
    drawn = MMD(closed_form=False)
    loss = WAELoss(drawn, num_particles=2, vectorize_particles=vectorize)(net.model, net.guide)
    with pytest.warns(UserWarning, match=r"prior at site 'z' \(MixtureSameFamily\) has learnable parameters"):
        value = loss(x)
    value.backward()
    assert logits.grad is None
    with torch.no_grad(), warnings.catch_warnings(action="error"):
        loss(x)
    with warnings.catch_warnings(action="error"):
        WAELoss(MMD())(net.model, net.guide)(x).backward()  # whose closed form gives them their gradient
    assert logits.grad.abs().max() > 0
    net.prior = fixed
    with warnings.catch_warnings(action="error"):
        loss(x)


def test_a_learnable_weight_deep_in_a_hierarchy_warns():
    logits = nn.Parameter(torch.zeros(2))

    def learnt(x, z1):
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), mixture().component_distribution).mask(True)

    programs = sites({"z1": (lambda x: normal(x, 2), delta), "z2": (learnt, delta)}, lambda a, b: around(a + b))
    with pytest.warns(UserWarning, match="prior at site 'z2'"):
        WAELoss().differentiable_loss(*programs, torch.randn(32, 2))


def test_a_latent_that_the_guide_leaves_to_the_model_is_no_code_but_is_drawn_afresh():
    seen = Seen()
    noise = {"noise": (lambda x: dist.Normal(0.0, 3.0), None)}
    programs = sites(noise | {"z": (lambda x, noise: around(noise[..., None]), delta)}, lambda noise, z: around(z))
    with pytest.warns(UserWarning, match="noise"):
        WAELoss(seen, prior_draws=3).loss(*programs, torch.randn(N, 1))
    # The sum of two Normals: variance 10.
    assert scipy.stats.kstest(seen.prior.flatten().numpy(), "norm", (0, 10**0.5)).pvalue > LEVEL
