"""Small trainings by either route, of which tests/data holds checkpoints of format 1."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from torch import nn
from torch.optim import lr_scheduler

from pyro_wae import WAELoss
from pyro_wae.kernels import InverseMultiquadratic
from pyro_wae.optim import Adam
from pyro_wae.penalties import MMD, JensenShannon


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 4))
        self.decoder = nn.Linear(2, 4)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        scale = pyro.param("scale", x.new_ones(()), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z) * scale, 1).to_event(1), obs=x)

    def guide(self, x):
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
