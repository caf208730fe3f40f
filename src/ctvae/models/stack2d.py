"""`stack2d`: the VAE of `slice2d` with the slices of a stack as the input channels of its 2D convolutions.

Shapes:  B batch   D H W voxels   S slices per stack   N = D / S stacks per volume   Z latent size

The first convolution mixes all S slices at once, so nothing is shared along the axis: structure is learned anew
at each height. One stack of 64 is the research group's first form (`stack2d-small`, `stack2d-large`), 4 its later one.
"""

from __future__ import annotations

from ctvae.models.slice2d import ImageStackVAE
from ctvae.networks import Size3, Stack2D


class Stack2DVAE(ImageStackVAE):
    """One latent vector per stack of `cfg.slices_per_stack` slices."""

    def __init__(self, cfg: Stack2D, shape: Size3):
        super().__init__(cfg.slices_per_stack, cfg.widths, cfg.latent_size, shape)
