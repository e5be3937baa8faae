"""Training by Lightning: a Trainer with two processes, a log of the loss's terms, and checkpoints.

    python tutorials/scale/lightning_trainer.py

Lightning starts the second process itself. Log and checkpoints are written to results/scale/lightning/, and nothing
leaves the machine.
"""

from typing import Any

import pyro
import torch
from digit_wae import DigitWAE, digits, parse_args
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_wae import WAELoss
from pyro_wae.penalties import MMD

try:
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger
except ImportError as error:
    raise ImportError('This example trains by Lightning: pip install "pyro-wae[scale]"') from error


class LightningWAE(lightning.LightningModule):
    """The auto-encoder of digits with its loss."""

    def __init__(self, learning_rate: float, seed: int) -> None:
        super().__init__()
        net = DigitWAE()
        self.wae = WAELoss(MMD(), penalty_weight=100.0, process_group="world")(net.model, net.guide)
        self.learning_rate = learning_rate
        self.seed = seed

    def on_fit_start(self) -> None:
        """Lets the processes, which were made with one seed, draw different prior codes."""
        pyro.set_rng_seed(self.seed + self.global_rank)

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """The loss of a step, whose parts go to the log."""
        (x,) = batch
        loss = self.wae(x)
        terms = self.wae.terms
        self.log_dict({"cost": terms.cost, "penalty": terms.penalty}, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        """One optimiser for encoder and decoder."""
        return torch.optim.Adam(self.wae.parameters(), lr=self.learning_rate)


def main() -> None:
    """Trains, and says what was reached and where it is."""
    args = parse_args("lightning")
    lightning.seed_everything(args.seed, workers=True, verbose=False)
    module = LightningWAE(args.learning_rate, args.seed)
    logger = CSVLogger(args.out, name="log")
    checkpoints = ModelCheckpoint(args.out / "checkpoints", monitor="cost", save_last=True)
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        devices=2,
        strategy="ddp",
        default_root_dir=args.out,
        logger=logger,
        callbacks=[checkpoints],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    images = TensorDataset(digits(args.digits))
    loader = DataLoader(images, batch_size=args.batch_size // 2, shuffle=True, drop_last=True)
    trainer.fit(module, loader)
    if trainer.is_global_zero:
        reached = ", ".join(f"{name} {value:.2f}" for name, value in trainer.callback_metrics.items())
        print(f"{reached}; log and checkpoints are in {args.out}/", flush=True)


if __name__ == "__main__":
    main()
