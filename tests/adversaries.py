"""Discriminators, the adversary's value by hand, and what a module's state was."""

import copy
import math

import torch
from torch import nn
from torch.nn.functional import softplus

from pyro_wae.penalties import JensenShannon


def plane(d=2):
    """A discriminator T(z) = w.z + b."""
    return nn.Linear(d, 1).double()


def net(d=2):
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


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-2)
