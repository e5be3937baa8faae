"""Figures of images, codes and training curves, in one style.

Every function takes tensors or arrays and returns a ``matplotlib.figure.Figure`` that belongs to no window
and no pyplot state: save it with ``figure.savefig(path)``, or let a notebook show it. Matplotlib is imported
when the first figure is drawn.
"""

from pyro_wae.plotting.codes import codes_and_prior, quantiles
from pyro_wae.plotting.curves import loss_curves
from pyro_wae.plotting.images import as_images as as_images
from pyro_wae.plotting.images import image_grid, reconstructions
from pyro_wae.plotting.images import make_mosaic as make_mosaic
from pyro_wae.plotting.images import show_mosaic as show_mosaic
from pyro_wae.plotting.style import BLUE as BLUE
from pyro_wae.plotting.style import GREY as GREY
from pyro_wae.plotting.style import ORANGE as ORANGE
from pyro_wae.plotting.style import PALETTE as PALETTE
from pyro_wae.plotting.style import STYLE as STYLE
from pyro_wae.plotting.style import WIDTH as WIDTH
from pyro_wae.plotting.style import styled_figure as styled_figure

__all__ = ["codes_and_prior", "image_grid", "loss_curves", "quantiles", "reconstructions"]
