"""Training in several processes, whose gradients DistributedDataParallel averages.

    torchrun --nproc_per_node 2 tutorials/scale/ddp.py

Every process reads its own part of the digits. process_group="world" lets the penalty see the codes of all of them.
"""

import os

import pyro
import torch
from digit_wae import DigitWAE, device_of, digits, parse_args
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from pyro_wae import WAELoss
from pyro_wae.checkpoint import load_checkpoint, save_checkpoint
from pyro_wae.penalties import MMD


def main() -> None:
    """Trains; the first process prints cost and penalty."""
    args = parse_args("ddp")
    device = device_of(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()

    pyro.set_rng_seed(args.seed + rank)  # other prior samples on each rank; DDP broadcasts the parameters of rank 0
    net = DigitWAE().to(device)
    wae = WAELoss(MMD(), penalty_weight=100.0, process_group="world")(net.model, net.guide)
    replica = DistributedDataParallel(wae, device_ids=[device] if device.type == "cuda" else None)
    optimizer = torch.optim.Adam(replica.parameters(), lr=args.learning_rate)

    images = TensorDataset(digits(args.digits))
    sampler = DistributedSampler(images, seed=args.seed)
    loader = DataLoader(images, batch_size=args.batch_size // ranks, sampler=sampler, drop_last=True)

    parts = {"wae": wae, "optimizer": optimizer}
    path = args.out / f"rank{rank}.pt"  # its own for each rank, whose random states differ
    first = load_checkpoint(path, **parts)["epoch"] if path.exists() and not args.smoke else 0
    for epoch in range(first, args.epochs):
        sampler.set_epoch(epoch)
        for (x,) in loader:
            optimizer.zero_grad()
            replica(x.to(device)).backward()
            optimizer.step()
        save_checkpoint(path, **parts, extra={"epoch": epoch + 1})
        if rank == 0:
            print(f"epoch {epoch + 1}: cost {wae.terms.cost:.2f}, penalty {wae.terms.penalty:+.4f}", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
