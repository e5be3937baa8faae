"""Trainings that are left and go on: by SVI, by a torch optimiser, and those that tests/data holds of format 1."""

import random

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer import SVI
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import nn
from torch.optim import lr_scheduler

from pyro_wae import WAELoss
from pyro_wae.kernels import Gaussian, InverseMultiquadratic
from pyro_wae.optim import SGD, Adam
from pyro_wae.penalties import MMD, JensenShannon, MaxSlicedWasserstein, Penalty, PosteriorKL, SlicedWasserstein
from pyro_wae.weights import Constraint, LinearSchedule, Weight

D = 4


class Net(nn.Module):
    """An auto-encoder with batch statistics, dropout, a parameter outside all modules and one that comes late."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        layers = [nn.Linear(D, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 4)]
        self.encoder = nn.Sequential(*layers).to(dtype)
        self.decoder = nn.Linear(2, D).to(dtype)

    def model(self, x, step=0, y=None):
        pyro.module("decoder", self.decoder)
        scale = pyro.param("scale", x.new_ones(()), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1).to_event(1))
            mean = self.decoder(z) * scale
            if step % 3 == 2:
                mean = mean + pyro.param("at times", x.new_zeros(D), constraint=constraints.interval(-1.0, 2.0))
            pyro.sample("x", dist.Normal(mean, 1).to_event(1), obs=x)

    def guide(self, x, step=0, y=None):
        pyro.module("encoder", self.encoder)
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def batch(step, dtype=None):
    """Data that depend on all three random states."""
    x = torch.randn(8 + random.randrange(3), D, dtype=dtype) + np.random.randn()  # noqa: NPY002
    return x, step, x[:, :1].clone()


class ByPyro:
    def __init__(self, loss=None, optim=None, dtype=torch.float32):
        self.net = Net(dtype)
        self.loss = loss or WAELoss()
        self.svi = SVI(self.net.model, self.net.guide, optim or Adam({"lr": 1e-2}), loss=self.loss)
        self.parts = {"svi": self.svi}
        self.dtype = dtype

    def step(self, step):
        value = self.svi.step(*batch(step, self.dtype))
        if hasattr(self.svi.optim, "step") and getattr(self.svi.optim, "scheduler", True) is not None:
            self.svi.optim.step()
        return value

    def values(self):
        modules = [("net", self.net), *self.loss.named_children()]
        states = {f"{name}.{key}": value for name, module in modules for key, value in module.state_dict().items()}
        return states | dict(pyro.get_param_store().items())


class ByTorch(ByPyro):
    def __init__(self, loss=None, dtype=torch.float32):
        self.net = Net(dtype)
        self.loss = loss or WAELoss()
        self.wae = self.loss(self.net.model, self.net.guide)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-2)
        self.scheduler = lr_scheduler.StepLR(self.optimizer, 3, gamma=0.5)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=4)
        self.order = torch.Generator().manual_seed(3)
        self.parts = {
            "wae": self.wae,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "order": self.order,
        }
        self.dtype = dtype

    def step(self, step):
        x, step, y = batch(step, self.dtype)
        x = x[torch.randperm(len(x), generator=self.order)]
        self.optimizer.zero_grad()
        loss = self.wae(x, step, y)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        return loss.item()


def seed(number):
    pyro.set_rng_seed(number)


def run(training, first, last):
    return [training.step(step) for step in range(first, last)]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name].nan_to_num(-7.0), value.nan_to_num(-7.0)), name
            assert found[name].dtype == value.dtype, name
        else:
            assert repr(found[name]) == repr(value), name


def discriminator():
    return nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.Linear(5, 1))


class MeanGap(Penalty):
    """A penalty of one's own, without options."""

    def estimate(self, codes, prior, context):
        return (codes.mean((0, 1)) - prior.mean(0)).square().sum()


class Three(Weight):
    """A weight of one's own, likewise."""

    def forward(self, cost=None):
        return 3.0


LOSSES = {
    "mmd": WAELoss,
    "standardised": lambda: WAELoss(
        MMD(Gaussian(), standardize=True, closed_form=False), penalty_weight=LinearSchedule(0, 9, steps=9)
    ),
    "gan": lambda: WAELoss(JensenShannon(discriminator())),
    "gan of the caller": lambda: WAELoss(JensenShannon(discriminator(), optimizer=None)),
    "constraint": lambda: WAELoss(SlicedWasserstein(5), penalty_weight=Constraint(100, pool=4)),
    "max-sliced": lambda: WAELoss(0.5 * MaxSlicedWasserstein() + MMD(InverseMultiquadratic())),
    "without options": lambda: WAELoss(MMD() + 0.01 * PosteriorKL() + MeanGap(), penalty_weight=Three()),
    "by site": lambda: WAELoss({"z": MMD()}),
    "condition": lambda: WAELoss(condition="y"),
    "sliced condition": lambda: WAELoss(SlicedWasserstein(5), condition="y"),
    "particles": lambda: WAELoss(num_particles=2, vectorize_particles=True, prior_draws=2),
}


OPTIMS = {
    "pyro": lambda: pyro.optim.Adam({"lr": 1e-2}, {"clip_norm": 0.5}),
    "pyro clipped": lambda: pyro.optim.ClippedAdam({"lr": 1e-2, "lrd": 0.9}),
    "pyro by name": lambda: pyro.optim.Adam(lambda name: {"lr": 0.1 if name.startswith("encoder.") else 1e-2}),
    "pyro scheduler": lambda: PyroLRScheduler(
        lr_scheduler.ExponentialLR, {"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-2}, "gamma": 0.9}
    ),
    "pyro milestones": lambda: PyroLRScheduler(
        lr_scheduler.MultiStepLR,
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-2}, "milestones": [5, 9], "gamma": 0.5},
    ),
    "shared": lambda: Adam({"lr": 1e-2}, {"clip_value": 0.1}),
    "shared momentum": lambda: SGD({"lr": 1e-3, "momentum": 0.9}),
    "shared scheduler": lambda: Adam({"lr": 1e-2}, scheduler=lambda o: lr_scheduler.CosineAnnealingLR(o, 10)),
}


def make_former_training(route):
    """The parts of a training that wrote a file of format 1, and its step, which returns the loss."""
    net, loss = Net(), WAELoss(MMD(InverseMultiquadratic.multiscale()))
    if route == "svi":
        optim = Adam({"lr": 1e-2}, scheduler=lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9))
        svi = SVI(net.model, net.guide, optim, loss=loss)

        def svi_step(x):
            value = svi.step(x)
            svi.optim.step()
            return value

        return {"svi": svi}, svi_step
    wae = loss(net.model, net.guide)
    optimizer = torch.optim.Adam(wae.parameters(), lr=1e-2)
    scheduler = lr_scheduler.StepLR(optimizer, 3, gamma=0.5)

    def step(x):
        optimizer.zero_grad()
        value = wae(x)
        value.backward()
        optimizer.step()
        scheduler.step()
        return value.item()

    return {"wae": wae, "optimizer": optimizer, "scheduler": scheduler}, step


def optimised(schedule=None):
    """A net with its optimiser, and a scheduler if that is given."""
    net = nn.Linear(3, 2)
    parts = {"net": net, "optimizer": torch.optim.Adam(net.parameters())}
    return parts if schedule is None else {**parts, "scheduler": schedule(parts["optimizer"])}


def state_of(parts):
    return repr([part.state_dict() for part in parts.values() if hasattr(part, "state_dict")])
