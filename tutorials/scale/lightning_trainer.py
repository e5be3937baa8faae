"""Training by Lightning: a Trainer with two processes, a log of the loss's terms, and checkpoints.

    python tutorials/scale/lightning_trainer.py

Lightning starts the second process itself. Log and checkpoints are written to results/scale/lightning/, and nothing
leaves the machine.
"""

import lightning
import torch
from digit_wae import DigitWAE, digits, parse_args
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from pyro_wae import WAELoss
from pyro_wae.lightning import WAE
from pyro_wae.penalties import MMD


def main() -> None:
    """Trains, and says what was reached and where it is."""
    args = parse_args("lightning")
    lightning.seed_everything(args.seed, workers=True, verbose=False)
    loss = WAELoss(MMD(), penalty_weight=100.0, process_group="world")
    module = WAE(DigitWAE(), loss=loss, learning_rate=args.learning_rate)
    logger = CSVLogger(args.out, name="log")
    checkpoints = ModelCheckpoint(args.out / "checkpoints", monitor="val_cost", save_last=True)
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
    images = digits(args.digits)
    held_out = images[: len(images) // 5]
    loader = DataLoader(images[len(held_out) :], batch_size=args.batch_size // 2, shuffle=True, drop_last=True)
    trainer.fit(module, loader, DataLoader(held_out, batch_size=args.batch_size))
    if trainer.is_global_zero:
        reached = ", ".join(f"{name} {value:.2f}" for name, value in trainer.callback_metrics.items())
        print(f"{reached}; log and checkpoints are in {args.out}/", flush=True)


if __name__ == "__main__":
    main()
