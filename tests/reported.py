"""Models whose codes are known, for a report."""

import pyro.distributions as dist
import torch
from programs import delta
from references import program

FAST = {"test_codes": 300, "permutations": 99}


def data(n, d=3, seed=1):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def pair(encode, noise=0.0):
    """A standard normal prior, and a guide that gives codes ``encode(x)``."""
    return program(lambda x: dist.Normal(encode(x), noise).to_event(1) if noise else delta(encode(x)))
