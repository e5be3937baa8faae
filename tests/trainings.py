"""A net that is trained and left, and small trainings of it, of which tests/data holds checkpoints of format 1."""

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer import SVI
from torch import nn
from torch.optim import lr_scheduler

from pyro_wae import WAELoss
from pyro_wae.kernels import InverseMultiquadratic
from pyro_wae.optim import Adam
from pyro_wae.penalties import MMD, JensenShannon

D = 4


class Net(nn.Module):
    """An auto-encoder with batch statistics, dropout, a parameter outside all modules and one that comes late."""

    def __init__(self, dtype=torch.float32, width=6):
        super().__init__()
        layers = [nn.Linear(D, width), nn.BatchNorm1d(width), nn.Dropout(0.2), nn.Linear(width, 4)]
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


LOSSES = {
    "svi": WAELoss,
    "torch": WAELoss,
    "svi gan": lambda: WAELoss(JensenShannon(nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.Linear(5, 1)))),
    "torch sum": lambda: WAELoss(0.5 * MMD(InverseMultiquadratic()) + MMD(InverseMultiquadratic.multiscale())),
}


def make_training(route):
    """The parts of a training, and the function that makes a step and returns the loss."""
    net, loss = Net(), LOSSES[route]()
    if route.startswith("svi"):
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
