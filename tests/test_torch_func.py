"""Gradients by torch.func: of penalties and of a bound module, and what a transform may not change."""

from __future__ import annotations

import copy
import io

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import around, normal
from references import rows
from torch import nn

from pyro_wae import WAELoss
from pyro_wae.penalties import (
    MMD,
    CramerWold,
    EnergyDistance,
    JensenShannon,
    KernelStein,
    MaxSlicedWasserstein,
    PenaltyContext,
    SlicedWasserstein,
)

N, D, X = 16, 3, 5


def data():
    return torch.randn(N, X, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


class Unregistered(nn.Module):
    """Methods of one module without pyro.module, as torch.func needs them."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(X, D).double(), nn.Linear(D, X).double()

    def model(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", around(self.decoder(pyro.sample("z", normal(x, D)))), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", around(self.encoder(x)))


def test_a_functional_call_leaves_the_parameters_as_they_were():
    net = Unregistered()
    wae, before = WAELoss(penalty_weight=1.0)(net.model, net.guide), dict(net.named_parameters())
    given = {name: 2 * value.detach() for name, value in wae.named_parameters()}
    torch.func.grad(lambda given: torch.func.functional_call(wae, given, (data(),)))(given)
    assert all(value is before[name] for name, value in net.named_parameters())


@pytest.mark.parametrize(
    "penalty",
    [MMD, SlicedWasserstein, CramerWold, KernelStein, lambda: MMD(standardize=True)],
    ids=["mmd", "sliced", "cramer-wold", "stein", "standardised"],
)
def test_a_first_step_under_torch_func_keeps_lengths_that_can_be_saved(penalty):
    net, x = Unregistered(), data()
    wae = WAELoss(penalty(), penalty_weight=1.0)(net.model, net.guide)
    given = {name: value.detach() for name, value in wae.named_parameters()}
    pyro.set_rng_seed(0)
    found = torch.func.grad(lambda given: torch.func.functional_call(wae, given, (x,)))(given)
    torch.save(wae.state_dict(), io.BytesIO())
    copy.deepcopy(wae)
    pyro.set_rng_seed(0)
    wae(x).backward()
    for name, value in wae.named_parameters():
        torch.testing.assert_close(found[name], value.grad)


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ({}, "Constraint moves the weight"),
        ({"penalty": JensenShannon(), "penalty_weight": 1.0}, "JensenShannon trains its discriminator"),
        ({"penalty": MaxSlicedWasserstein(), "penalty_weight": 1.0}, "MaxSlicedWasserstein looks for a direction"),
    ],
    ids=["constraint", "adversary", "direction"],
)
def test_what_a_step_changes_is_refused_under_torch_func(option, name):
    net = Unregistered()
    wae = WAELoss(**option)(net.model, net.guide)
    with pytest.raises(ValueError, match=rf"{name} in every step.* Write WAELoss\("):
        torch.func.grad(lambda x: wae(x))(data())


@pytest.mark.parametrize("closed_form", [False, True])
@pytest.mark.parametrize("n", [20, 100])
@pytest.mark.parametrize("penalty", [MMD, EnergyDistance, lambda: CramerWold(0.5)], ids=["mmd", "energy", "cw"])
def test_torch_func_gives_the_gradients_of_autograd(penalty, n, closed_form, monkeypatch):
    monkeypatch.setattr("pyro_wae.penalties.mmd.MOST_ROWS", 30)
    prior = dist.Normal(torch.zeros(3).double(), 1.0).to_event(1)
    penalty, context = penalty(), PenaltyContext(prior=(lambda: prior) if closed_form else None)
    codes, draws = rows(n, 3), prior.sample((n,))
    leaf = codes.clone().requires_grad_()
    (by_codes,) = torch.autograd.grad(penalty(leaf, draws, context), leaf)
    torch.testing.assert_close(torch.func.grad(lambda q: penalty(q, draws, context))(codes), by_codes)
