"""Training in several processes, each of which keeps only its share of every parameter (FSDP2, ``fully_shard``).

    torchrun --nproc_per_node 2 tutorials/scale/fsdp.py

The nets and the whole loss are sharded, one after the other: a net's parameters are together only while it runs.
"""

import os

import pyro
import torch
import torch.distributed.checkpoint as dcp
from digit_wae import DigitWAE, device_of, digits, parse_args
from torch import distributed
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from pyro_wae import WAELoss
from pyro_wae.penalties import MMD


def main() -> None:
    """Trains; the first process prints cost and penalty."""
    args = parse_args("fsdp")
    device = device_of(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    mesh = init_device_mesh(device.type, (ranks,))

    pyro.set_rng_seed(args.seed)  # the same parameters on all ranks: fully_shard broadcasts none
    net = DigitWAE().to(device)
    wae = WAELoss(MMD(), penalty_weight=100.0, process_group="world")(net.model, net.guide)
    for module in (net.encoder, net.decoder, wae):
        fully_shard(module, mesh=mesh)
    optimizer = torch.optim.Adam(wae.parameters(), lr=args.learning_rate)
    pyro.set_rng_seed(args.seed + rank)  # and from here on different prior samples

    images = TensorDataset(digits(args.digits))
    sampler = DistributedSampler(images, seed=args.seed)
    loader = DataLoader(images, batch_size=args.batch_size // ranks, sampler=sampler, drop_last=True)

    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        for (x,) in loader:
            optimizer.zero_grad()
            wae(x.to(device)).backward()
            optimizer.step()
        if rank == 0:
            print(f"epoch {epoch + 1}: cost {wae.terms.cost:.2f}, penalty {wae.terms.penalty:+.4f}", flush=True)
    model, optim = get_state_dict(wae, optimizer)
    dcp.save({"wae": model, "optimizer": optim}, checkpoint_id=args.out / "checkpoint")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
