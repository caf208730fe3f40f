"""Latents of a scan made better for that scan: the encoder's guess, followed by gradient descent through the decoder.

An encoder answers in one pass what fits all scans on average; a few steps for the one at hand find a latent that decodes nearer
to it (semi-amortised inference, Kim et al. 2018). The decoder stays as it is.

Shapes:  B batch   Z latent channels   d h w latent voxels   D H W voxels
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

RATE = 0.03  # of Adam, in standard deviations of each latent channel


@torch.enable_grad()
def refined(decode: Callable[[Tensor], Tensor], z: Tensor, x: Tensor, steps: int) -> Tensor:
    """z [B Z d h w] after `steps` of Adam on the mean square of decode(z) - x, x [B 1 D H W]; the best of them, z among them."""
    spread = z.std(dim=(0, 2, 3, 4), keepdim=True).clamp_min(1e-6)
    moved = (z / spread).requires_grad_()
    optimizer = torch.optim.Adam([moved], lr=RATE)
    best, least = z, torch.inf
    for step in range(steps + 1):
        latent = moved * spread
        error = (decode(latent).float() - x).square().mean()
        if error.item() < least:
            best, least = (latent.detach() if step else z), error.item()
        if step < steps:
            (moved.grad,) = torch.autograd.grad(error, moved)
            optimizer.step()
    return best
