"""Checkpoints: the whole state of a training in one file, from which it resumes exactly."""

from pyro_wae.checkpoint.file import load_checkpoint, save_checkpoint

__all__ = ["load_checkpoint", "save_checkpoint"]
