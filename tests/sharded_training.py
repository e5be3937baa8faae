"""Compares, in each of several processes, a loss whose parameters are sharded with the same loss of whole parameters.

    torchrun --nproc_per_node 2 tests/sharded_training.py CASE...

Prints for each case the largest difference of a parameter after three steps.
"""

import sys

import pyro
import pyro.distributions as dist
import torch
from adversaries import adam
from adversaries import net as discriminator
from programs import AutoEncoder
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pyro_wae import WAELoss
from pyro_wae.penalties import MMD, JensenShannon, SlicedWasserstein

X, D = 6, 3


class Net(AutoEncoder):
    def __init__(self):
        encoder = nn.Sequential(nn.Linear(X, 8), nn.Tanh(), nn.Linear(8, D))
        super().__init__(X, D, encoder=encoder, decoder=nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, X)))


class Hierarchical(Net):
    """Prior draws run a net of the model's a second time."""

    def __init__(self):
        super().__init__()
        self.between = nn.Linear(1, D - 1)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x.new_zeros(1), 1).to_event(1))
            z2 = pyro.sample("z2", dist.Normal(self.between(z1), 1).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(torch.cat([z1, z2], -1)), 1).to_event(1), obs=x)

    def guide(self, x):
        z = self.encoder(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z1", dist.Delta(z[:, :1]).to_event(1))
            pyro.sample("z2", dist.Delta(z[:, 1:]).to_event(1))


CASES = {
    "MMD": (Net, lambda: WAELoss(MMD(), penalty_weight=10.0)),
    "constraint": (Net, lambda: WAELoss(SlicedWasserstein(10))),
    "hierarchy": (Hierarchical, lambda: WAELoss(MMD(), penalty_weight=10.0)),
    "adversary": (Net, lambda: WAELoss(JensenShannon(discriminator(D), optimizer=adam), penalty_weight=10.0)),
    "adversary of the caller": (
        Net,
        lambda: WAELoss(JensenShannon(discriminator(D), optimizer=None), penalty_weight=10.0),
    ),
    "micro_batch": (Net, lambda: WAELoss(MMD(), penalty_weight=10.0, micro_batch=8)),
}


def train(name, x, shards):
    make_net, make_loss = CASES[name]
    pyro.set_rng_seed(0)
    net, loss = make_net().double(), make_loss()
    wae = loss(net.model, net.guide).double()
    if shards:
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        own = {parameter for parameter in wae.parameters() if not parameter.requires_grad}
        for module in (*net.children(), wae):
            fully_shard(module, mesh=mesh, ignored_params=own)
        assert all(hasattr(value, "full_tensor") for value in net.parameters())
    optimizer = torch.optim.Adam([parameter for parameter in wae.parameters() if parameter.requires_grad], lr=1e-2)
    for step in range(3):
        pyro.set_rng_seed(10 * step + distributed.get_rank())
        optimizer.zero_grad()
        wae(x[step]).backward()
        if not shards:
            for parameter in wae.parameters():
                if parameter.requires_grad:
                    distributed.all_reduce(parameter.grad)
                    parameter.grad /= distributed.get_world_size()
        optimizer.step()
    values = [parameter.detach() for parameter in wae.parameters()]
    return [value.full_tensor() if hasattr(value, "full_tensor") else value for value in values]


def main(names):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    generator = torch.Generator().manual_seed(distributed.get_rank())
    x = torch.randn(3, 20, X, generator=generator, dtype=torch.float64)
    for name in names:
        whole, sharded = train(name, x, shards=False), train(name, x, shards=True)
        difference = max((a - b).abs().max().item() for a, b in zip(whole, sharded, strict=True))
        if distributed.get_rank() == 0:
            print(f"{name}: {difference:.3g}", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:] or list(CASES))
