"""Training by SVI in several processes, whose gradients Horovod averages.

    horovodrun -np 2 python tutorials/scale/horovod_svi.py

Pyro's HorovodOptimizer does it. Horovod is no dependency of pyro_wae; its own page says how to build it for torch.
"""

import pyro
from digit_wae import DigitWAE, device_of, digits, parse_args
from pyro.infer import SVI
from pyro.optim import Adam, HorovodOptimizer
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from pyro_wae import WAELoss
from pyro_wae.penalties import MMD

try:
    import horovod.torch as hvd
except ImportError as error:
    raise ImportError(
        "This example needs Horovod, built for torch: HOROVOD_WITH_PYTORCH=1 pip install horovod. Without it, "
        "torchrun --nproc_per_node 2 tutorials/scale/ddp.py does the same with torch alone."
    ) from error


def main() -> None:
    """Trains; the first process prints cost and penalty."""
    args = parse_args("horovod")
    hvd.init()
    device = device_of(hvd.local_rank())
    pyro.set_rng_seed(args.seed)  # the same parameters on all ranks
    net = DigitWAE().to(device)

    def model(x: Tensor) -> None:
        pyro.module("decoder", net.decoder)
        net.model(x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", net.encoder)
        net.guide(x)

    hvd.broadcast_parameters(net.state_dict(), root_rank=0)
    optimizer = HorovodOptimizer(Adam({"lr": args.learning_rate}))
    loss = WAELoss(MMD(), penalty_weight=100.0)  # of each process's own codes: Horovod is no process group of torch's
    svi = SVI(model, guide, optimizer, loss=loss)
    pyro.set_rng_seed(args.seed + hvd.rank())  # and from here on different prior samples

    images = TensorDataset(digits(args.digits))
    sampler = DistributedSampler(images, num_replicas=hvd.size(), rank=hvd.rank(), seed=args.seed)
    loader = DataLoader(images, batch_size=args.batch_size // hvd.size(), sampler=sampler, drop_last=True)
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        for (x,) in loader:
            svi.step(x.to(device))
        if hvd.rank() == 0:
            print(f"epoch {epoch + 1}: cost {loss.terms.cost:.2f}, penalty {loss.terms.penalty:+.4f}", flush=True)


if __name__ == "__main__":
    main()
