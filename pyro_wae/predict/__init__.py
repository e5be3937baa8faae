"""Codes, reconstructions, samples and latent interpolations of a trained model.

Every function takes model and guide as ``SVI`` does, and the arguments with which they are called. Results are dicts by
site name, like those of ``pyro.infer.Predictive``. No gradient is recorded, no log_prob is computed, and the running
statistics of BatchNorm do not change. Modules run in the mode they are in: call ``.eval()`` on a trained network first.
"""

from pyro_wae.predict.encoding import code_rows, encode, interpolate
from pyro_wae.predict.generating import decode, reconstruct, sample

__all__ = ["code_rows", "decode", "encode", "interpolate", "reconstruct", "sample"]
