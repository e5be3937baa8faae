"""The adversary of WAE-GAN: its value, both players' gradients, and who trains whom."""

from __future__ import annotations

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.stats
import torch
from programs import AutoEncoder
from pyro.infer import SVI
from references import rows
from torch import nn
from torch.nn.functional import softplus

from pyro_wae import WAELoss
from pyro_wae.penalties import MMD, JensenShannon, PenaltyContext

N, M, D = 20, 30, 2


def plane(d=D):
    """A discriminator T(z) = w.z + b."""
    return nn.Linear(d, 1).double()


def net(d=D):
    return nn.Sequential(nn.Linear(d, 16), nn.Tanh(), nn.Linear(16, 1)).double()


def value_by_hand(logits_q, logits_p):
    """log 2 - (E softplus(-T(p)) + E softplus(T(q))) / 2, one code at a time."""
    q = sum(math.log1p(math.exp(t)) for t in logits_q.flatten().tolist()) / logits_q.numel()
    p = sum(math.log1p(math.exp(-t)) for t in logits_p.flatten().tolist()) / logits_p.numel()
    return math.log(2) - (q + p) / 2


def loss_by_hand(discriminator, q, p):
    return softplus(-discriminator(p)).mean() + softplus(discriminator(q)).mean()


def shared(discriminator=None, **options):
    """The bare adversary, trained by whoever trains the rest."""
    return JensenShannon(discriminator, **{"gradient_penalty": 0.0, "optimizer": None} | options)


def state(module):
    return copy.deepcopy(module.state_dict())


def same_state(module, before):
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.5)


# The value


def divergence(q, p):
    """The Jensen-Shannon divergence of two laws on a line, in nats, by quadrature."""

    def integrand(z):
        a, b = q.pdf(z), p.pdf(z)
        middle = (a + b) / 2
        return sum(f * math.log(f / middle) / 2 for f in (a, b) if f > 0)

    return scipy.integrate.quad(integrand, -12, 12, limit=200, epsabs=1e-12)[0]


PAIRS = [((1.0, 0.7), (0.0, 1.0)), ((2.5, 1.0), (0.0, 1.0)), ((0.0, 0.4), (0.0, 1.0))]


class LogRatio(nn.Module):
    """The optimal logit, log p(z) - log q(z)."""

    def __init__(self, q, p):
        super().__init__()
        self.q, self.p = dist.Normal(*q), dist.Normal(*p)

    def forward(self, z):
        return self.p.log_prob(z) - self.q.log_prob(z)


@pytest.mark.parametrize(("q", "p"), PAIRS)
def test_the_optimal_discriminator_shows_the_divergence(q, p):
    """200,000 draws of each: standard error below 0.002 nats; seed 0."""
    codes, prior = (dist.Normal(*law).sample((200_000, 1)).double() for law in (q, p))
    expected = divergence(scipy.stats.norm(*q), scipy.stats.norm(*p))
    with torch.no_grad():
        assert shared(LogRatio(q, p))(codes, prior).item() == pytest.approx(expected, abs=0.005)
        # Any other discriminator shows less.
        assert shared(LogRatio(q, (p[0] + 1.0, p[1])))(codes, prior).item() < expected - 0.01


class Quadratic(nn.Module):
    """The logits that the log-ratio of two Normals can have."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1).double()

    def forward(self, z):
        return self.linear(torch.cat([z, z.square()], 1))


def perceptron():
    return nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)).double()


def trained(discriminator, q, p, *, calls=150, rate=0.1):
    """Trained by its own optimiser, at a rate that falls to 0, on batches of 1000."""
    made = []

    def optimizer(parameters):
        made.append(torch.optim.Adam(parameters, lr=rate))
        return made[0]

    penalty = JensenShannon(discriminator, optimizer=optimizer, steps=2, gradient_penalty=0.0)
    for call in range(calls):
        penalty(q.sample((1000, 1)).double(), p.sample((1000, 1)).double())
        made[0].param_groups[0]["lr"] = rate * (1 - call / calls)
    return penalty


@pytest.mark.parametrize(
    ("discriminator", "options"),
    [(Quadratic, {}), pytest.param(perceptron, {"calls": 400, "rate": 1e-2}, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(("q", "p"), PAIRS[:2])
def test_a_trained_discriminator_reaches_the_divergence_to_2_percent(q, p, discriminator, options):
    """Evaluated on 400,000 fresh draws of each; seed 0."""
    laws = dist.Normal(*q), dist.Normal(*p)
    penalty = trained(discriminator(), *laws, **options)
    with torch.no_grad():
        value = penalty(*(law.sample((400_000, 1)).double() for law in laws)).item()
    assert value == pytest.approx(divergence(scipy.stats.norm(*q), scipy.stats.norm(*p)), rel=0.02)


def test_equal_laws_have_no_divergence_and_a_constant_discriminator_shows_none():
    constant = plane()
    nn.init.zeros_(constant.weight)
    nn.init.zeros_(constant.bias)
    assert shared(constant)(rows(N, D) + 5, rows(M, D)).item() == pytest.approx(0, abs=1e-12)
    laws = dist.Normal(0.0, 1.0), dist.Normal(0.0, 1.0)
    penalty = trained(Quadratic(), *laws)
    with torch.no_grad():
        assert abs(penalty(*(law.sample((50_000, 1)).double() for law in laws)).item()) < 0.005


@pytest.mark.parametrize("squeeze", [False, True])
@pytest.mark.parametrize("options", [{}, {"saturating": True}, {"gradient_penalty": 2.0}], ids=str)
def test_the_value_is_the_formula_whatever_is_trained(squeeze, options):
    discriminator, q, p = plane(), rows(N, D), rows(M, D)
    model = nn.Sequential(discriminator, nn.Flatten(0)) if squeeze else discriminator
    expected = value_by_hand(discriminator(q), discriminator(p))
    penalty = shared(model, **options)
    assert penalty(q.requires_grad_(), p).item() == pytest.approx(expected, abs=1e-12)
    with torch.no_grad():
        assert penalty(q, p).item() == pytest.approx(expected, abs=1e-12)


def test_particles_are_codes_among_codes():
    discriminator, q, p = plane(), rows(3, N, D), rows(M, D)
    expected = value_by_hand(discriminator(q), discriminator(p))
    assert shared(discriminator)(q, p).item() == pytest.approx(expected, abs=1e-12)


def test_a_large_logit_overflows_nothing():
    discriminator = plane()
    discriminator.weight.data.fill_(1e6)
    q = rows(N, D).requires_grad_()
    penalty = shared(discriminator)
    penalty(q, rows(M, D)).backward()
    assert q.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in discriminator.parameters())


# The two players


@pytest.mark.parametrize("options", [{}, {"gradient_penalty": 3.0}], ids=str)
@pytest.mark.parametrize("saturating", [False, True])
def test_codes_get_the_gradient_of_the_formula_alone(saturating, options):
    """Of E softplus(-T(q)) / 2 with T = w.q + b: -sigmoid(-T(q_i)) w / (2 n).

    Of the value itself, -E softplus(T(q)) / 2: -sigmoid(T(q_i)) w / (2 n).
    """
    discriminator, q, p = plane(), rows(N, D).requires_grad_(), rows(M, D)
    shared(discriminator, saturating=saturating, **options)(q, p).backward()
    w, logits = discriminator.weight.detach()[0], discriminator(q.detach()).detach()
    torch.testing.assert_close(q.grad, -torch.sigmoid(logits if saturating else -logits) * w / (2 * N))


@pytest.mark.parametrize("saturating", [False, True])
def test_a_prior_that_learns_gets_the_gradient_of_the_other_side(saturating):
    discriminator, q, p = plane(), rows(N, D), rows(M, D).requires_grad_()
    shared(discriminator, saturating=saturating)(q, p).backward()
    w, logits = discriminator.weight.detach()[0], discriminator(p.detach()).detach()
    share = torch.sigmoid(-logits) if saturating else torch.sigmoid(logits)
    torch.testing.assert_close(p.grad, share * w / (2 * M))


@pytest.mark.parametrize("saturating", [False, True])
def test_the_discriminator_gets_the_gradient_of_its_own_loss_alone(saturating):
    """Of E softplus(-T(p)) + E softplus(T(q)): -mean sigmoid(-T(p)) p + mean sigmoid(T(q)) q for the weight."""
    discriminator, q, p = plane(), rows(N, D).requires_grad_(), rows(M, D)
    shared(discriminator, saturating=saturating)(q, p).backward()
    with torch.no_grad():
        to_p, to_q = -torch.sigmoid(-discriminator(p)), torch.sigmoid(discriminator(q))
        weight, bias = (to_p * p).mean(0) + (to_q * q).mean(0), to_p.mean(0) + to_q.mean(0)
    torch.testing.assert_close(discriminator.weight.grad[0], weight)
    torch.testing.assert_close(discriminator.bias.grad, bias)


def test_a_deep_discriminator_gets_the_gradient_of_its_loss_on_fixed_codes():
    discriminator, encoder, x, p = net(), nn.Linear(D, D).double(), rows(N, D), rows(M, D)
    shared(discriminator)(encoder(x), p).backward()
    other = copy.deepcopy(discriminator)
    other.zero_grad()
    loss_by_hand(other, encoder(x).detach(), p).backward()
    for actual, expected in zip(discriminator.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)


def test_the_gradient_penalty_is_half_the_mean_squared_slope_on_both_sides():
    """For T = a |z|^2 the slope is 2 a z, and the penalty gamma / 2 (4 a^2) (E|q|^2 + E|p|^2)."""

    class Bowl(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

        def forward(self, z):
            return self.a * z.square().sum(1)

    q, p, slopes = rows(N, D).requires_grad_(), rows(M, D), []
    for weight in (0.0, 0.7):
        discriminator = Bowl()
        shared(discriminator, gradient_penalty=weight)(q, p).backward()
        slopes.append(discriminator.a.grad)
    squares = (q.detach().square().sum(1).mean() + p.square().sum(1).mean()).item()
    assert (slopes[1] - slopes[0]).item() == pytest.approx(0.7 / 2 * 8 * 0.3 * squares)


def test_frozen_parameters_and_codes_without_graph_are_left_alone():
    discriminator = plane().requires_grad_(False)
    q = rows(N, D).requires_grad_()
    shared(discriminator)(q, rows(M, D)).backward()
    assert discriminator.weight.grad is None
    assert q.grad.abs().max() > 0
    q = rows(N, D)
    discriminator = plane()
    shared(discriminator, gradient_penalty=1.0)(q, rows(M, D)).backward()
    assert discriminator.weight.grad is not None
    assert not q.requires_grad


# The discriminator's own optimiser


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("options", [{}, {"gradient_penalty": 0.5, "gradient_penalty_every": 1}], ids=str)
def test_its_own_optimiser_takes_its_steps_before_the_value_is_read(steps, options):
    discriminator, q, p = plane(), rows(N, D).requires_grad_(), rows(M, D)
    other, fixed = copy.deepcopy(discriminator), q.detach()
    optimiser = sgd(other.parameters())
    for _ in range(steps):
        optimiser.zero_grad()
        loss = loss_by_hand(other, fixed, p)
        if options:
            loss = loss + 0.5 * other.weight.square().sum()  # the slope is w everywhere
        loss.backward()
        optimiser.step()
    value = shared(discriminator, optimizer=sgd, steps=steps, **options)(q, p)
    torch.testing.assert_close(discriminator.weight, other.weight)
    torch.testing.assert_close(discriminator.bias, other.bias)
    assert value.item() == pytest.approx(value_by_hand(other(fixed), other(p)), abs=1e-12)
    value.backward()
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    w, logits = other.weight.detach()[0], other(fixed).detach()
    torch.testing.assert_close(q.grad, -torch.sigmoid(-logits) * w / (2 * N))


def test_the_slope_penalty_is_taken_in_one_of_so_many_steps_with_as_many_times_its_weight():
    discriminator, q, p = plane(), rows(N, D), rows(M, D)
    other, twin = copy.deepcopy(discriminator), copy.deepcopy(discriminator)
    optimiser = sgd(other.parameters())
    for step in range(4):
        optimiser.zero_grad()
        loss = loss_by_hand(other, q, p)
        if step in (0, 3):
            loss = loss + 3 * 0.5 * other.weight.square().sum()  # the slope is w everywhere
        loss.backward()
        optimiser.step()
    penalty = shared(discriminator, optimizer=sgd, steps=2, gradient_penalty=0.5, gradient_penalty_every=3)
    penalty(q, p)
    resumed = shared(twin, optimizer=sgd, steps=2, gradient_penalty=0.5, gradient_penalty_every=3)
    resumed.load_state_dict(penalty.state_dict())
    for each in (penalty, resumed):
        each(q, p)
        torch.testing.assert_close(each.discriminator.weight, other.weight)


def test_its_own_optimiser_keeps_its_state_between_steps():
    made = []

    def adam(parameters):
        made.append(torch.optim.Adam(parameters, lr=1e-2))
        return made[-1]

    penalty = shared(plane(), optimizer=adam, steps=2)
    for _ in range(3):
        penalty(rows(N, D), rows(M, D))
    (optimiser,) = made
    assert {int(entry["step"]) for entry in optimiser.state.values()} == {6}


def test_by_default_it_has_its_own_optimiser_and_looks_frozen_to_others():
    penalty, q = JensenShannon(net()), rows(N, D).requires_grad_()
    before = state(penalty.discriminator)
    penalty(q, rows(M, D)).backward()
    assert not same_state(penalty.discriminator, before)
    assert not any(parameter.requires_grad for parameter in penalty.parameters())
    assert all(parameter.grad is None for parameter in penalty.parameters())
    assert q.grad.abs().max() > 0


def test_a_discriminator_without_anything_to_learn_is_used_as_it_is():
    q, p = rows(N, 1).requires_grad_(), rows(M, 1)
    known = LogRatio((1.0, 0.7), (0.0, 1.0))
    value = JensenShannon(known)(q, p)
    assert value.item() == pytest.approx(value_by_hand(known(q.detach()), known(p)), abs=1e-6)
    value.backward()
    assert q.grad.abs().max() > 0


def test_a_layer_that_the_user_froze_stays_frozen():
    discriminator = net()
    discriminator[0].requires_grad_(False)
    penalty, before = JensenShannon(discriminator), state(discriminator)
    assert not any(parameter.requires_grad for parameter in penalty.parameters())
    penalty(rows(N, D), rows(M, D))
    assert torch.equal(discriminator[0].weight, before["0.weight"])
    assert not torch.equal(discriminator[2].weight, before["2.weight"])


def test_its_own_optimiser_goes_on_where_a_state_was_saved():
    penalty, batches = JensenShannon(net()), [(rows(N, D), rows(M, D)) for _ in range(4)]
    for batch in batches[:2]:
        penalty(*batch)
    other = JensenShannon(net())
    other.load_state_dict(penalty.state_dict())
    for batch in batches[2:]:
        assert other(*batch) == penalty(*batch)


def test_the_slope_that_is_held_down_is_that_of_the_whole_logit():
    """With T = w.z + log p(z), standard Normal, the slope is w - z."""
    q, p, slopes = rows(N, D).requires_grad_(), rows(M, D), []
    context = PenaltyContext(prior_log_prob=lambda z: -z.square().sum(-1) / 2)
    start = plane()
    for weight in (0.0, 0.7):
        discriminator = copy.deepcopy(start)
        shared(discriminator, prior_log_prob=True, gradient_penalty=weight)(q, p, context).backward()
        slopes.append(discriminator.weight.grad[0])
    w = start.weight.detach()[0]
    expected = 0.7 * ((w - q.detach()).mean(0) + (w - p).mean(0))
    torch.testing.assert_close(slopes[1] - slopes[0], expected)


# Inside a loss


def test_svis_one_optimiser_trains_both_players():
    auto, x, discriminator = AutoEncoder(4, D).double(), rows(N, 4), net()
    before = state(auto), state(discriminator)
    svi = SVI(auto.model, auto.guide, pyro.optim.Adam({"lr": 1e-2}), loss=WAELoss(shared(discriminator)))
    svi.step(x)
    for module, old in zip((auto, discriminator), before, strict=True):
        assert all(not torch.equal(value, old[name]) for name, value in module.state_dict().items())


def test_a_callable_gives_the_discriminator_its_own_rate_by_the_name_of_its_parameters():
    auto, x = AutoEncoder(4, D).double(), rows(N, 4)
    penalty, names = shared(), []

    def rates(name):
        names.append(name)
        return {"lr": 1e-3 if name.startswith("wae_penalty.") else 0.0}

    before = state(auto)
    svi = SVI(auto.model, auto.guide, pyro.optim.SGD(rates), loss=WAELoss(penalty))
    svi.step(x)
    assert same_state(auto, before)
    assert sorted(names) == sorted(
        [f"{part}.{name}" for part in ("encoder", "decoder") for name in ("weight", "bias")]
        + [f"wae_penalty.discriminator.{i}.{name}" for i in (0, 2, 4, 6) for name in ("weight", "bias")]
    )
    assert all(name.startswith("wae_penalty$$$") for name in pyro.get_param_store() if "discriminator" in name)


def test_torch_optimisers_train_both_players_through_the_module():
    auto, x, discriminator = AutoEncoder(4, D).double(), rows(N, 4), net()
    loss_fn = WAELoss(shared(discriminator), penalty_weight=3.0)(auto.model, auto.guide)
    parameters = dict(loss_fn.named_parameters())
    assert {id(p) for p in discriminator.parameters()} <= {id(p) for p in parameters.values()}
    pyro.set_rng_seed(1)
    loss_fn(x).backward()
    pyro.set_rng_seed(1)
    prior, other = torch.randn(N, D, dtype=torch.float64), copy.deepcopy(discriminator)
    other.zero_grad()
    (3 * loss_by_hand(other, auto.encoder(x).detach(), prior)).backward()
    for actual, expected in zip(discriminator.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)
    before = state(discriminator)
    torch.optim.Adam(loss_fn.parameters(), lr=1e-2).step()
    assert not same_state(discriminator, before)


def test_an_optimiser_made_before_the_first_batch_trains_the_lazily_built_discriminator():
    auto, x, penalty = AutoEncoder(4, D).double(), rows(N, 4), shared()
    loss_fn = WAELoss(penalty)(auto.model, auto.guide)
    optimiser = torch.optim.SGD(loss_fn.parameters(), lr=1e-3)
    loss_fn(x).backward()
    before = state(penalty.discriminator)
    optimiser.step()
    assert all(not torch.equal(value, before[name]) for name, value in penalty.discriminator.state_dict().items())


def test_with_an_optimiser_of_its_own_svis_does_not_move_it():
    auto, x, discriminator = AutoEncoder(4, D).double(), rows(N, 4), net()
    before, other = state(auto), copy.deepcopy(discriminator)
    loss = WAELoss(shared(discriminator, optimizer=sgd, steps=3))
    svi = SVI(auto.model, auto.guide, pyro.optim.Adam({"lr": 1e-2}), loss=loss)
    codes = auto.encoder(x).detach()
    pyro.set_rng_seed(1)
    svi.step(x)
    pyro.set_rng_seed(1)
    prior, optimiser = torch.randn(N, D, dtype=torch.float64), sgd(other.parameters())
    for _ in range(3):
        optimiser.zero_grad()
        loss_by_hand(other, codes, prior).backward()
        optimiser.step()
    for actual, expected in zip(discriminator.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(actual, expected)
    assert all(not torch.equal(value, before[name]) for name, value in auto.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"optimizer": sgd, "steps": 2}], ids=["loss's optimiser", "its own"])
def test_evaluation_never_trains_the_discriminator(options):
    auto, x, penalty = AutoEncoder(4, D).double(), rows(N, 4), shared(net(), **options)
    loss = WAELoss(penalty)
    svi = SVI(auto.model, auto.guide, pyro.optim.Adam({"lr": 1e-2}), loss=loss)
    before = state(penalty.discriminator)
    svi.evaluate_loss(x)
    loss.loss(auto.model, auto.guide, x)
    with torch.no_grad():
        loss.differentiable_loss(auto.model, auto.guide, x)
        loss(auto.model, auto.guide)(x)
    with torch.inference_mode():
        penalty(rows(N, D), rows(M, D))
    assert same_state(penalty.discriminator, before)
    assert all(parameter.grad is None for parameter in penalty.parameters())
    svi.step(x)
    assert not same_state(penalty.discriminator, before)


def test_a_penalty_weight_of_0_trains_no_discriminator():
    auto, x, discriminator = AutoEncoder(4, D).double(), rows(N, 4), net()
    before = state(discriminator)
    loss = WAELoss(shared(discriminator), penalty_weight=0.0)
    SVI(auto.model, auto.guide, pyro.optim.SGD({"lr": 1.0}), loss=loss).step(x)
    assert same_state(discriminator, before)


def test_discriminators_of_two_losses_have_names_of_their_own_in_the_store():
    auto, x = AutoEncoder(4, D).double(), rows(N, 4)
    for name in ("wae_penalty", "wae_penalty_2"):
        discriminator = net()
        loss = WAELoss(shared(discriminator))
        SVI(auto.model, auto.guide, pyro.optim.Adam({"lr": 1e-3}), loss=loss).step(x)
        assert pyro.get_param_store()[f"{name}$$$discriminator.0.weight"] is discriminator[0].weight


def test_each_site_has_a_discriminator_of_its_own_size():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(x.new_zeros(3), 1).to_event(1))
            pyro.sample("b", dist.Normal(x.new_zeros(()), 1))
            pyro.sample("x", dist.Normal(x, 1).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Delta(x[:, :3], event_dim=1))
            pyro.sample("b", dist.Delta(x[:, 3]))

    penalties = {"a": shared(), "b": MMD() + 0.5 * shared()}
    SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=WAELoss(penalties)).step(rows(N, 4))
    names = set(pyro.get_param_store().keys())
    assert pyro.param("wae_penalty_a$$$discriminator.0.weight").shape == (256, 3)
    assert any(name.startswith("wae_penalty_b$$$") for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"saturating": True}, {"prior_log_prob": True}], ids=str)
def test_codes_that_are_pulled_by_a_trained_discriminator_come_to_the_prior(options):
    """Free codes from 3 away with a tenth of the spread: after 600 steps mean and spread are near those of N(0, I)."""
    codes = nn.Parameter(0.1 * rows(256, D) + 3)
    context = PenaltyContext(prior_log_prob=lambda z: -z.square().sum(-1) / 2 - math.log(2 * math.pi))
    penalty = shared(net(), gradient_penalty=0.1, **options)
    optimisers = [torch.optim.Adam([codes], lr=3e-2), torch.optim.Adam(penalty.parameters(), lr=3e-2)]
    for _ in range(600):
        for optimiser in optimisers:
            optimiser.zero_grad()
        penalty(codes, rows(256, D), context).backward()
        for optimiser in optimisers:
            optimiser.step()
    assert codes.mean(0).abs().max() < 0.5
    assert (codes.std(0) - 1).abs().max() < 0.5


# The prior's log density in the logit


def log_density(z):
    """Of N((1, -1), diag(1, 4)), for codes (J, n, d)."""
    return dist.Normal(torch.tensor([1.0, -1.0]).double(), torch.tensor([1.0, 2.0]).double()).log_prob(z).sum(-1)


@pytest.mark.parametrize("m", [N, 2 * N, M])
@pytest.mark.parametrize("flat", [False, True])
def test_the_log_density_is_added_code_by_code(m, flat):
    discriminator, q, p = plane(), rows(N, D), rows(m, D)
    module = nn.Sequential(discriminator, nn.Flatten(0)) if flat else discriminator
    penalty = shared(module, prior_log_prob=True)
    value = penalty(q, p, PenaltyContext(prior_log_prob=log_density))
    logits = [
        torch.stack([discriminator(row)[0] + log_density(row[None, None])[0, 0] for row in points]) for points in (q, p)
    ]
    assert value.item() == pytest.approx(value_by_hand(*logits), abs=1e-12)


def test_the_codes_feel_the_log_density_and_the_discriminators_loss_does_not_reach_them():
    discriminator, q, p = plane(), rows(N, D).requires_grad_(), rows(N, D)
    penalty = shared(discriminator, prior_log_prob=True)
    penalty(q, p, PenaltyContext(prior_log_prob=log_density)).backward()
    z = q.detach().requires_grad_()
    weight, bias = discriminator.weight.detach(), discriminator.bias.detach()
    logits = z @ weight[0] + bias + log_density(z[None])[0]
    (expected,) = torch.autograd.grad(softplus(-logits).mean() / 2, z)
    torch.testing.assert_close(q.grad, expected)
    other = copy.deepcopy(discriminator)
    other.zero_grad()
    logits_q, logits_p = (other(v)[:, 0] + log_density(v[None])[0] for v in (q.detach(), p))
    (softplus(-logits_p).mean() + softplus(logits_q).mean()).backward()
    torch.testing.assert_close(discriminator.weight.grad, other.weight.grad)


@pytest.mark.parametrize("options", [{}, {"num_particles": 3}, {"prior_draws": 2}], ids=str)
def test_the_loss_gives_the_models_own_log_density(options):
    auto, x = AutoEncoder(4, D).double(), rows(N, 4)
    discriminator = plane()
    loss = WAELoss(shared(discriminator, prior_log_prob=True), **options)
    pyro.set_rng_seed(1)
    loss.loss(auto.model, auto.guide, x)
    pyro.set_rng_seed(1)
    count = options.get("num_particles", 1) * options.get("prior_draws", 1)
    prior = torch.cat([torch.randn(N, D, dtype=torch.float64) for _ in range(count)])
    normal = dist.Normal(0.0, 1.0)
    logits = [discriminator(z)[:, 0] + normal.log_prob(z).sum(1) for z in (auto.encoder(x).detach(), prior)]
    assert loss.terms.penalty.item() == pytest.approx(value_by_hand(*logits), abs=1e-10)


# Precision, state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_default_discriminator_takes_size_and_precision_from_the_codes(dtype):
    penalty, q = shared(), rows(N, 3).to(dtype).requires_grad_()
    value = penalty(q, rows(M, 3).to(dtype))
    value.backward()
    assert value.dtype == dtype
    sizes = [tuple(p.shape) for p in penalty.parameters() if p.ndim == 2]
    assert sizes == [(256, 3), (256, 256), (256, 256), (1, 256)]
    assert all(parameter.dtype == dtype and parameter.grad.isfinite().all() for parameter in penalty.parameters())
    assert q.grad.dtype == dtype


def test_half_precision_codes_meet_a_float32_discriminator():
    penalty = shared()
    assert penalty(rows(N, 3).bfloat16(), rows(M, 3).float()).dtype == torch.float32
    assert {parameter.dtype for parameter in penalty.parameters()} == {torch.float32}


def test_the_discriminator_stays_what_it_is_after_the_first_codes():
    penalty = shared()
    penalty(rows(N, 3), rows(M, 3))
    before = state(penalty.discriminator)
    penalty(rows(N, 3), rows(M, 3))
    assert same_state(penalty.discriminator, before)


def test_a_state_loads_into_a_discriminator_that_is_built_and_into_one_that_is_not():
    penalty, q, p = shared(), rows(N, 3), rows(M, 3)
    expected = penalty(q, p)
    built = shared()
    built(q, p)
    for other in (built, shared().double()):
        other.load_state_dict(penalty.state_dict())
        assert other(q, p) == expected


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("options", [{}, {"optimizer": sgd, "steps": 2}], ids=["no optimiser", "its own"])
def test_copies_give_the_same_value_and_go_on_by_themselves(copied, options):
    penalty, q, p = shared(net(), **options), rows(N, D), rows(M, D)
    penalty(q, p)
    other = copied(penalty)
    with torch.no_grad():
        assert other(q, p) == penalty(q, p)
    before = state(penalty.discriminator)
    value = other(q, p)
    assert same_state(penalty.discriminator, before)
    assert same_state(other.discriminator, before) == (not options)
    assert penalty(q, p) == value


def test_repr_is_the_call():
    discriminator = nn.Linear(2, 1)
    assert repr(shared(discriminator, saturating=True, gradient_penalty=0.5)) == (
        f"JensenShannon(discriminator={discriminator!r}, prior_log_prob=False, saturating=True, "
        "gradient_penalty=0.5, gradient_penalty_every=None, optimizer=None, steps=None)"
    )


# Errors


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (nn.Linear(D, 2), r"shape \(20, 2\)"),
        (nn.Sequential(nn.Linear(D, 1), nn.Flatten(0), nn.Unflatten(0, (1, -1))), r"shape \(1, 20\)"),
    ],
)
def test_logits_of_another_shape_are_named(module, found):
    with pytest.raises(
        ValueError, match=rf"one logit for each of 20 codes, of shape \(20,\) .*found {found}.*nn\.Linear"
    ):
        shared(module.double())(rows(N, D), rows(M, D))


def test_logits_that_are_no_tensor_are_named():
    class Pair(nn.Linear):
        def forward(self, z):
            return super().forward(z), z

    with pytest.raises(ValueError, match="found tuple"):
        shared(Pair(D, 1).double())(rows(N, D), rows(M, D))


def test_a_log_density_that_is_not_known_is_named():
    with pytest.raises(ValueError, match=r"prior_log_prob=True needs the prior's log density.*Train through WAELoss"):
        shared(plane(), prior_log_prob=True)(rows(N, D), rows(M, D))


def test_a_prior_without_a_log_density_is_named():
    class Sampler(dist.TorchDistribution):
        arg_constraints: dict = {}  # noqa: RUF012
        has_rsample = True

        def __init__(self, batch_shape=()):
            super().__init__(torch.Size(batch_shape), torch.Size((D,)), validate_args=False)

        def expand(self, batch_shape, _instance=None):
            return Sampler(batch_shape)

        def rsample(self, sample_shape=()):
            return torch.randn(*sample_shape, *self.batch_shape, D, dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Sampler())
            pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x, event_dim=1))

    WAELoss(shared(plane())).loss(model, guide, rows(N, D))
    with pytest.raises(ValueError, match=r"prior at site 'z' \(Sampler\) has no log_prob\. Take a penalty"):
        WAELoss(shared(plane(), prior_log_prob=True)).loss(model, guide, rows(N, D))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("where", [0, 1], ids=["codes", "prior"])
def test_an_infinite_number_trains_no_discriminator_though_its_gradient_is_finite(where, bad):
    penalty = JensenShannon(nn.Sequential(nn.Tanh(), plane()))
    penalty(rows(N, D), rows(M, D))
    before, batch = state(penalty), [rows(N, D), rows(M, D)]
    batch[where][2, 0] = bad
    assert penalty(*batch).isnan()
    assert same_state(penalty.discriminator, {k.removeprefix("discriminator."): v for k, v in before.items()})
    assert penalty(rows(N, D), rows(M, D)).isfinite()


def test_a_gradient_that_overflows_trains_no_discriminator():
    class Exponential(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, z):
            return (self.rate * z).exp().sum(1)

    penalty = JensenShannon(Exponential())
    penalty(1000 + rows(N, D), rows(M, D))
    assert penalty.discriminator.rate == 1
    penalty(rows(N, D), rows(M, D))
    assert penalty.discriminator.rate.isfinite()
    assert penalty.discriminator.rate != 1
