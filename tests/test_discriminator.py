"""Who trains a discriminator: its own optimiser or that of the loss, and what its state holds."""

from __future__ import annotations

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from adversaries import adam, loss_by_hand, net, plane, same_state, sgd, shared, state, value_by_hand
from programs import AutoEncoder, around, delta, normal
from pyro.infer import SVI
from references import rows
from torch import nn

from pyro_wae import WAELoss
from pyro_wae.penalties import MMD, Chain, JensenShannon, Penalty

N, M, D = 20, 30, 2


@pytest.fixture
def auto():
    """An auto-encoder of four numbers."""
    return AutoEncoder(4, D).double()


@pytest.fixture
def x():
    return rows(N, 4)


# The discriminator's own optimiser


def test_it_takes_its_steps_for_two_losses_before_one_backward_pass(auto, x):
    """The gradient of each loss is that of the discriminator as it was in it."""
    discriminator, gradients = plane(), []
    for at_once in (True, False):
        loss = WAELoss(JensenShannon(copy.deepcopy(discriminator), optimizer=sgd), penalty_weight=1.0)
        wae = loss(auto.model, auto.guide)
        pyro.set_rng_seed(0)
        auto.zero_grad()
        if at_once:
            (wae(x[:10]) + wae(x[10:])).backward()
        else:
            wae(x[:10]).backward()
            wae(x[10:]).backward()
        gradients.append(auto.encoder.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_one_discriminator_compares_all_steps_of_a_chain():
    def model(x):
        z = x.new_zeros(2)
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(3)):
                z = pyro.sample(f"z_{t}", around(0.5 * z))
                pyro.sample(f"x_{t}", around(z), obs=x[:, t])

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            for t in range(3):
                pyro.sample(f"z_{t}", delta(encoder(x[:, t])))

    encoder = nn.Linear(2, 2).double()
    loss = WAELoss(Chain(JensenShannon(net(4))), penalty_weight=1.0)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=loss)
    assert math.isfinite(svi.step(rows(N, 6).reshape(N, 3, 2)))


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize(("steps", "weight", "every"), [(1, 0.0, 1), (4, 0.0, 1), (4, 0.5, 1), (2, 0.5, 3)])
def test_its_own_optimiser_takes_its_steps_before_the_value_is_read(make, steps, weight, every):
    """The slope penalty in one of so many steps with as many times its weight; it also goes on from a loaded state."""
    discriminator, q, p = plane(), rows(N, D).requires_grad_(), rows(M, D)
    other, twin, fixed = copy.deepcopy(discriminator), copy.deepcopy(discriminator), q.detach()
    optimiser = make(other.parameters())
    for step in range(2 * steps):
        optimiser.zero_grad()
        loss = loss_by_hand(other, fixed, p)
        if step % every == 0:
            loss = loss + every * weight * other.weight.square().sum()  # the slope is w everywhere
        loss.backward()
        optimiser.step()
    w, logits = other.weight.detach()[0], other(fixed).detach()
    options = {"optimizer": make, "steps": steps, "gradient_penalty": weight, "gradient_penalty_every": every}
    penalty, resumed = shared(discriminator, **options), shared(twin, **options)
    penalty(q, p)
    resumed.load_state_dict(penalty.state_dict())
    for each in (penalty, resumed):
        q.grad = None
        value = each(q, p)
        torch.testing.assert_close(each.discriminator.weight, other.weight)
        torch.testing.assert_close(each.discriminator.bias, other.bias)
        assert value.item() == pytest.approx(value_by_hand(logits, other(p)), abs=1e-12)
        value.backward()
        assert all(parameter.grad is None for parameter in each.discriminator.parameters())
        torch.testing.assert_close(q.grad, -torch.sigmoid(-logits) * w / (2 * N))


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
    known = nn.Flatten(0)  # the code is its logit
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


# Inside a loss


def test_a_callable_gives_the_discriminator_its_own_rate_by_the_name_of_its_parameters(auto, x):
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


def test_torch_optimisers_train_both_players_through_the_module(auto, x):
    discriminator = net()
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


def test_an_optimiser_made_before_the_first_batch_trains_the_lazily_built_discriminator(auto, x):
    penalty = shared()
    loss_fn = WAELoss(penalty)(auto.model, auto.guide)
    optimiser = torch.optim.SGD(loss_fn.parameters(), lr=1e-3)
    loss_fn(x).backward()
    before = state(penalty.discriminator)
    optimiser.step()
    assert all(not torch.equal(value, before[name]) for name, value in penalty.discriminator.state_dict().items())


def test_with_an_optimiser_of_its_own_svis_does_not_move_it(auto, x):
    discriminator = net()
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
def test_evaluation_never_trains_the_discriminator(options, auto, x):
    penalty = shared(net(), **options)
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


@pytest.mark.parametrize("options", [{}, {"optimizer": None}], ids=["own", "shared"])
def test_a_discriminator_that_is_made_in_inference_mode_can_be_trained(options):
    penalty, codes = JensenShannon(**options), rows(N, D).requires_grad_()
    with torch.inference_mode():
        penalty(rows(N, D), rows(M, D))
    before = state(penalty.discriminator)
    penalty(codes, rows(M, D)).backward()
    assert codes.grad.any()
    slopes = [parameter.grad for parameter in penalty.discriminator.parameters()]
    assert all(slope is not None for slope in slopes) if options else not same_state(penalty.discriminator, before)


def test_a_penalty_weight_of_0_trains_no_discriminator(auto, x):
    discriminator = net()
    before = state(discriminator)
    loss = WAELoss(shared(discriminator), penalty_weight=0.0)
    SVI(auto.model, auto.guide, pyro.optim.SGD({"lr": 1.0}), loss=loss).step(x)
    assert same_state(discriminator, before)


def test_discriminators_of_two_losses_have_names_of_their_own_in_the_store(auto, x):
    for name in ("wae_penalty", "wae_penalty_2"):
        discriminator = net()
        loss = WAELoss(shared(discriminator))
        SVI(auto.model, auto.guide, pyro.optim.Adam({"lr": 1e-3}), loss=loss).step(x)
        assert pyro.get_param_store()[f"{name}$$$discriminator.0.weight"] is discriminator[0].weight


def test_a_store_that_was_loaded_does_not_restore_a_discriminator_and_says_so(auto, x, tmp_path):
    def step():
        SVI(auto.model, auto.guide, pyro.optim.Adam({"lr": 1e-3}), loss=WAELoss(shared(net()))).step(x)

    step()
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    with pytest.warns(UserWarning, match=r"a loaded 'wae_penalty'.*load_checkpoint\(path, svi=svi\)"):
        step()


class Shifted(Penalty):
    """A penalty with a parameter that the loss's optimiser is to train."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(D, dtype=torch.float64))

    def estimate(self, codes, prior, context):
        return (codes.mean((0, 1)) - self.shift).square().sum()


def test_beside_a_discriminator_with_its_own_optimiser_each_loss_trains_its_other_parameters(auto, x, recwarn):
    for name in ("wae_penalty", "wae_penalty_2"):
        penalty = Shifted()
        loss = WAELoss(JensenShannon(net()) + penalty)
        SVI(auto.model, auto.guide, pyro.optim.Adam({"lr": 1e-3}), loss=loss).step(x)
        assert penalty.shift.all()
        names = [key for key in pyro.get_param_store() if key.startswith(f"{name}$$$")]
        assert len(names) == 1
        assert names[0].endswith(".shift")
    assert not [str(warning.message) for warning in recwarn if "was not registered" in str(warning.message)]


def test_each_site_has_a_discriminator_of_its_own_size():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", normal(x, 3))
            pyro.sample("b", dist.Normal(x.new_zeros(()), 1))
            pyro.sample("x", around(x), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", delta(x[:, :3]))
            pyro.sample("b", dist.Delta(x[:, 3]))

    penalties = {"a": shared(), "b": MMD() + 0.5 * shared()}
    SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=WAELoss(penalties)).step(rows(N, 4))
    names = set(pyro.get_param_store().keys())
    assert pyro.param("wae_penalty_a$$$discriminator.0.weight").shape == (256, 3)
    assert any(name.startswith("wae_penalty_b$$$") for name in names)


# Precision, state


@pytest.mark.parametrize(
    ("given", "dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_the_default_discriminator_takes_size_and_precision_from_the_codes(given, dtype):
    penalty, q = shared(), rows(N, 3).to(given).requires_grad_()
    value = penalty(q, rows(M, 3).to(dtype))
    value.backward()
    assert value.dtype == dtype
    sizes = [tuple(p.shape) for p in penalty.parameters() if p.ndim == 2]
    assert sizes == [(256, 3), (256, 256), (256, 256), (1, 256)]
    assert all(parameter.dtype == dtype and parameter.grad.isfinite().all() for parameter in penalty.parameters())
    assert q.grad.dtype == given


def test_a_state_loads_into_a_discriminator_that_is_built_and_into_one_that_is_not():
    penalty, q, p = shared(), rows(N, 3), rows(M, 3)
    expected = penalty(q, p)
    built = shared()
    built(q, p)
    for other in (built, shared().double()):
        other.load_state_dict(penalty.state_dict())
        assert other(q, p) == expected


def test_its_own_optimiser_goes_on_in_another_precision_with_what_it_keeps():
    """Against a training in float64 throughout; a new Adam would take a step of its whole rate, 1e-2."""
    q, p, found = rows(N, D).float(), rows(M, D).float(), []
    for first in (torch.float32, torch.float64):
        pyro.set_rng_seed(1)
        penalty = JensenShannon(plane(), optimizer=adam).to(first)
        for dtype in [first] * 3 + [torch.float64] * 3:
            penalty.to(dtype)(q.to(dtype), p.to(dtype))
        found.append(state(penalty.discriminator))
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


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
