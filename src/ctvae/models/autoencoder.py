"""What every method's network offers.

Shapes:  B batch   D H W voxels   latents [B Z d h w] where they are spatial, [B N Z] where they are vectors
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Autoencoder(nn.Module, ABC):
    """A variational autoencoder of volumes in -1..1; loss and training stand elsewhere."""

    spatial: bool
    latent_shape: tuple[int, ...]  # what one volume becomes

    @abstractmethod
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B 1 D H W] -> mean and log variance [B *latent_shape]."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """[B *latent_shape] -> [B 1 D H W]."""
