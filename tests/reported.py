"""Models whose codes are known, for a report."""

import pyro
import pyro.distributions as dist
import torch

FAST = {"test_codes": 300, "permutations": 99}


def data(n, d=3, seed=1):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def pair(encode, noise=0.0):
    """A standard normal prior, and a guide that gives codes ``encode(x)``."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1).to_event(1))
            pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            code = encode(x)
            fn = dist.Normal(code, noise) if noise else dist.Delta(code)
            pyro.sample("z", fn.to_event(1))

    return model, guide
