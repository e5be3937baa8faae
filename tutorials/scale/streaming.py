"""Training on more data than fit into memory, which worker processes read from the disk chunk by chunk.

    python tutorials/scale/streaming.py

The digits are written to one large file, and stand for data that are read from many. N, the number of all data, is
known to the plate, while each step is given only its batch.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from digit_wae import PIXELS, DigitWAE, digits, parse_args
from pyro.infer import SVI
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pyro_wae import WAELoss
from pyro_wae.optim import Adam
from pyro_wae.penalties import MMD

CHUNK = 500
"""Digits that a worker reads at once, and shuffles among themselves."""


class StreamedDigits(IterableDataset[Tensor]):
    """The rows of a file, a few in memory at a time, in an order that is another in each epoch."""

    def __init__(self, path: Path, size: int, seed: int = 0) -> None:
        self.path = path
        self.size = size
        self.seed = seed
        self.epoch = 0

    def __iter__(self) -> Iterator[Tensor]:
        rows = np.memmap(self.path, dtype=np.uint8, mode="r", shape=(self.size, PIXELS))
        order = torch.Generator().manual_seed(self.seed + self.epoch)
        starts = (torch.randperm(-(-self.size // CHUNK), generator=order) * CHUNK).tolist()
        # Each worker runs this method, and would yield all of the data if it did not take its own part.
        worker = get_worker_info()
        for start in starts if worker is None else starts[worker.id :: worker.num_workers]:
            chunk = torch.from_numpy(rows[start : start + CHUNK].copy()).float() / 255
            yield from chunk[torch.randperm(len(chunk), generator=order)]


class StreamedWAE(DigitWAE):
    """Its plate holds all data, of which an argument is the batch."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def model(self, x: Tensor) -> None:
        """The prior of the codes and the decoder."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", self.size, subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.zdim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """The encoder: one code for each digit, without noise."""
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", self.size, subsample=x):
            pyro.sample("z", dist.Delta(self.encoder(x)).to_event(1))


def main() -> None:
    """Trains, and says what was reached."""
    args = parse_args("streaming")
    pyro.set_rng_seed(args.seed)
    images, path = digits(args.digits), args.out / "digits.bin"
    (images * 255).round().byte().numpy().tofile(path)

    stream = StreamedDigits(path, len(images), args.seed)
    # Each worker makes its own batches, and drop_last leaves out each worker's last smaller one.
    loader = DataLoader(stream, batch_size=args.batch_size, num_workers=2, drop_last=True)
    net = StreamedWAE(len(images))
    loss = WAELoss(MMD(), penalty_weight=100.0)
    svi = SVI(net.model, net.guide, Adam({"lr": args.learning_rate}), loss=loss)
    for epoch in range(args.epochs):
        stream.epoch = epoch  # the workers are started anew in each epoch, with a copy of the stream
        steps = 0
        for x in loader:
            svi.step(x)
            steps += 1
        print(f"epoch {epoch + 1}: {steps} steps, cost {loss.terms.cost:.2f}, penalty {loss.terms.penalty:+.4f}")


if __name__ == "__main__":
    main()
