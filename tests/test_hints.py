"""What a WAELoss says once about its use: it has a state, which belongs to one training of one model."""

import copy
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import AutoEncoder, around
from pyro import poutine
from pyro.infer import SVI
from torch import nn

from pyro_wae import WAELoss
from pyro_wae.costs import NegativeLogLikelihood
from pyro_wae.penalties import MMD, JensenShannon, SlicedWasserstein
from pyro_wae.priors import NormalMixture

X = torch.linspace(-1, 1, 48).reshape(16, 3)

ONCE = {
    "loss": lambda loss, net: loss.loss(net.model, net.guide, X),
    "SVI": lambda loss, net: SVI(net.model, net.guide, pyro.optim.Adam({}), loss=loss).evaluate_loss(X),
    "module": lambda loss, net: loss(net.model, net.guide)(X),
    "scaled": lambda loss, net: loss.loss(poutine.scale(net.model, 0.1), poutine.scale(net.guide, 0.1), X),
}


def train(loss, net, guide=None):
    loss.loss_and_grads(net.model, guide or net.guide, X)


def said(run, *args):
    """The texts of the warnings."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run(*args)
    return [str(warning.message) for warning in found]


@pytest.mark.parametrize("route", ONCE)
def test_a_second_loss_for_evaluation_is_said_once(route):
    trained, net = WAELoss(), AutoEncoder(3, 2)
    train(trained, net)
    train(trained, net)
    second = WAELoss(num_particles=2)
    with torch.no_grad():
        (text,) = said(ONCE[route], second, net)
        assert "has not been trained, and another one has been" in text
        assert "penalty_weight=100" in text
        assert said(ONCE[route], second, net) == []
        for quiet in (trained, WAELoss(penalty_weight=1.0), copy.deepcopy(trained)):
            assert said(ONCE[route], quiet, net) == []


@pytest.mark.parametrize("route", ["loss_and_grads", "differentiable_loss", "scaled", "lambda"])
@pytest.mark.parametrize("options", [{}, {"penalty_weight": 1.0}])
def test_losses_made_anew_in_each_step_are_said(route, options):
    net = AutoEncoder(3, 2)

    def step():
        model, guide = net.model, net.guide
        if route == "scaled":
            model, guide = poutine.scale(model, 0.1), poutine.scale(guide, 0.1)
        elif route == "lambda":
            model, guide = lambda x: net.model(x), lambda x: net.guide(x)
        getattr(WAELoss(**options), route if hasattr(WAELoss, route) else "differentiable_loss")(model, guide, X)

    found = [said(step) for _ in range(7)]
    assert not any(found[:4])
    texts = [text for texts in found for text in texts]
    assert bool(texts) == (not options)
    assert all("created in each step for the same model" in text for text in texts)


def test_losses_for_a_step_without_gradients_each_are_none_made_anew():
    net = AutoEncoder(3, 2)
    with torch.no_grad():
        assert [text for _ in range(7) for text in said(train, WAELoss(), net)] == []


def test_losses_that_train_on_are_not_made_anew_for_each_step():
    net = AutoEncoder(3, 2)
    for _ in range(6):
        loss = WAELoss()
        assert said(train, loss, net) + said(train, loss, net) == []


@pytest.mark.parametrize("penalty", [MMD, JensenShannon, SlicedWasserstein])
def test_a_loss_that_goes_on_with_another_model_is_said_once(penalty):
    loss, net, other = WAELoss(penalty(), penalty_weight=1.0), AutoEncoder(3, 2), AutoEncoder(3, 2)
    assert said(train, loss, net) + said(train, loss, net, other.guide) == []  # a guide may be replaced
    (text,) = said(train, loss, other)
    assert "trained with another model and guide" in text
    assert "Make a WAELoss for each model" in text
    assert said(train, loss, other) == []


class Callables:
    """Model and guide that are objects, and no modules."""

    def __init__(self, net):
        self.net, self.model, self.guide = net, Call(net.model), Call(net.guide)


class Call:
    def __init__(self, function):
        self.function = function

    def __call__(self, x, **_):
        return self.function(x)


def model_of(net, x, beta=1.0):
    return poutine.scale(net.model, beta)(x)


def guide_of(net, x, beta=1.0):
    return poutine.scale(net.guide, beta)(x)


def closures(net, beta=1.0):
    return lambda x: model_of(net, x, beta), lambda x: guide_of(net, x, beta)


WAYS = {
    "partials": lambda net, beta=1.0: (partial(model_of, net, beta=beta), partial(guide_of, net, beta=beta)),
    "closures": closures,
    "closures in a handler": lambda net, beta=1.0: tuple(poutine.scale(f, scale=beta) for f in closures(net)),
    "objects": lambda net, beta=1.0: (net.calls.model, net.calls.guide),
    "objects in a handler": lambda net, beta=1.0: (
        poutine.reparam(net.calls.model, {}),
        poutine.scale(net.calls.guide, 1.0),
    ),
}


def with_calls():
    """A net that keeps the objects which call it."""
    net = AutoEncoder(3, 2)
    object.__setattr__(net, "calls", Callables(net))
    return net


@pytest.mark.parametrize("way", WAYS)
def test_what_a_program_is_made_of_identifies_it_and_not_its_numbers(way):
    def step(loss, net, beta=1.0):
        loss.loss_and_grads(*WAYS[way](net, beta), X)

    loss, net, other = WAELoss(), with_calls(), with_calls()
    assert [text for beta in (0.1, 0.2, 0.3) for text in said(step, loss, net, beta)] == []
    with torch.no_grad():
        assert "another one has been" in said(WAELoss().loss, *WAYS[way](net, 0.4), X)[0]
        assert said(WAELoss().loss, *WAYS[way](other), X) == []
    (text,) = said(step, loss, other)
    assert "trained with another model and guide" in text
    # Losses of models that are gone, whose places in memory the next ones take, are none made anew.
    del loss, net, other
    assert [text for _ in range(7) for text in said(step, WAELoss(), with_calls())] == []


def test_a_program_may_refer_to_what_has_not_been_assigned_yet():
    net = AutoEncoder(3, 2)

    def model(x):
        return net.model(x) if net.training else late

    assert said(WAELoss().loss_and_grads, model, net.guide, X) == []
    assert said(WAELoss()(model, net.guide), X) == []
    if X.isnan().any():
        late = X


LOGITS, LOC = nn.Parameter(torch.tensor([0.3, -0.1, 0.0])), nn.Parameter(3 * torch.eye(3)[:, :2])


def with_choice(where, logits=LOGITS):
    """A model with a choice that the guide does not sample, and the latent that it is the prior of, or is not."""

    def model(x):
        def choice(**observed):
            return pyro.sample("k", dist.Categorical(logits=logits), **observed)

        with pyro.plate("data", len(x)):
            if where == "imputed":
                choice(obs=torch.zeros(len(x)).long(), obs_mask=torch.arange(len(x)) < 5)
            if where == "one site":
                prior = NormalMixture(dist.Categorical(logits=logits), dist.Normal(LOC, 0.3).to_event(1))
            else:
                prior = dist.Normal(LOC[choice()] if where == "before" else LOC[0], 0.3).to_event(1)
            z = pyro.sample("z", prior)
            shift = LOC[choice()].sum(-1, keepdim=True) if where == "after" else 0.0
            pyro.sample("x", around(z.sum(-1, keepdim=True) + shift + 0 * x), obs=x)

    return model


@pytest.mark.parametrize(
    ("model", "is_said"),
    [
        (with_choice("before"), True),
        (with_choice("before", LOGITS.detach()), False),
        (with_choice("one site"), False),
        (with_choice("after"), False),
        (with_choice("imputed"), False),
    ],
    ids=["before", "constant", "one site", "after", "imputed"],
)
def test_learnt_weights_of_a_mixture_in_a_site_of_the_model_alone_are_said_once(model, is_said):
    net, loss = AutoEncoder(3, 2), WAELoss(SlicedWasserstein(), penalty_weight=1.0, cost=NegativeLogLikelihood())
    found = [text for _ in range(2) for text in said(loss.loss_and_grads, model, net.guide, X) if "learnable" in text]
    assert len(found) == is_said
    assert all("prior at site 'k' (Categorical)" in text and "NormalMixture(dist.Cat" in text for text in found)
    LOGITS.grad = None
    WAELoss(SlicedWasserstein(), penalty_weight=1.0).loss_and_grads(with_choice("one site"), net.guide, X)
    assert LOGITS.grad.any()


COSTS_WITHOUT_A_GRADIENT = {
    "detached": lambda x, g: (x - g).detach().square().sum(1),
    "of the data alone": lambda x, g: x.square().sum(1),
    "counted": lambda x, g: (x.sign() != g.sign()).float().sum(1),
    "rounded": lambda x, g: (x - g.detach().round()).abs().sum(1),
}


@pytest.mark.parametrize("name", COSTS_WITHOUT_A_GRADIENT)
def test_a_cost_from_which_the_decoder_does_not_learn_is_said_once(name):
    net, loss = AutoEncoder(3, 2), WAELoss(cost=COSTS_WITHOUT_A_GRADIENT[name], penalty_weight=1.0)
    (text,) = said(train, loss, net)
    assert text.startswith("The cost of observed site 'x' has no gradient")
    assert said(train, loss, net) == []
    assert net.decoder.weight.grad is None or not net.decoder.weight.grad.any()
    line = eval(text.rsplit("rounding: ")[1].rstrip("."))
    for cost in (line, lambda x, g: 0 * g.detach().sum(1), NegativeLogLikelihood()):
        assert said(train, WAELoss(cost=cost, penalty_weight=1.0), net) == []


def test_a_cost_without_a_gradient_is_meant_where_nothing_can_learn_from_it():
    net = AutoEncoder(3, 2)
    net.eval().requires_grad_(False)
    assert said(train, WAELoss(penalty_weight=1.0), net) == []
