"""Priors with parameters to learn, and linear nets around them."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms
from torch import nn

from pyro_wae.priors import MixturePrior, NormalMixture, VampPrior


def mixture(logits, locs, tril):
    """A mixture of Normals, diagonal by their scales or full by their Cholesky factors."""
    full = tril.ndim > locs.ndim
    component = dist.MultivariateNormal(locs, scale_tril=tril) if full else dist.Normal(locs, tril).to_event(1)
    return NormalMixture(dist.Categorical(logits=logits), component)


class Nets(nn.Module):
    """Linear nets around any prior of d numbers that a module gives."""

    def __init__(self, prior, d=2):
        super().__init__()
        self.encoder, self.decoder, self.prior = nn.Linear(4, d), nn.Linear(d, 4), prior

    def model(self, x):
        pyro.module("decoder", self.decoder)
        if any(parameter.requires_grad for parameter in self.prior.parameters()):
            pyro.module("prior", self.prior)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", dist.Normal(self.decoder(z), 1).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(self.encoder(x)).to_event(1))


class FlowPrior(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.d, self.coupling = d, transforms.affine_coupling(d, [8])

    def forward(self):
        return dist.TransformedDistribution(dist.Normal(torch.zeros(self.d), 1.0).to_event(1), [self.coupling])


PRIORS = {
    "mixture": lambda: MixturePrior(5, 2),
    "full mixture": lambda: MixturePrior(5, 2, full_covariance=True),
    "free mixture": lambda: MixturePrior(5, 2, standardized=False),
    "vamp": lambda: VampPrior(nn.Linear(4, 2), torch.randn(5, 4)),
    "flow": lambda: FlowPrior(2),
}
every_prior = pytest.mark.parametrize("make", PRIORS.values(), ids=PRIORS.keys())
