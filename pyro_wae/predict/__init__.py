"""What a trained model and guide give: codes, reconstructions, new data and the way between two data.

Every function takes model and guide as ``SVI`` does, and what they are called with. Results are dicts by site name,
as those of ``pyro.infer.Predictive``. Nothing has a graph, no log_prob is computed, and BatchNorm's statistics stay as
they are. Modules run in the mode they are in: call ``.eval()`` on them first, if that is what you want.
"""

from pyro_wae.predict.encoding import code_rows, encode, interpolate
from pyro_wae.predict.generating import decode, reconstruct, sample

__all__ = ["code_rows", "decode", "encode", "interpolate", "reconstruct", "sample"]
