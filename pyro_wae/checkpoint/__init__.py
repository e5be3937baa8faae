"""Checkpoints: all that a training has to remember in one file, written so that it is whole or not there."""

from pyro_wae.checkpoint.file import load_checkpoint, save_checkpoint

__all__ = ["load_checkpoint", "save_checkpoint"]
