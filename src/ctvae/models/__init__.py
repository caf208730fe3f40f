"""The networks: one small file per method, and the velocity networks of the flow prior."""

from __future__ import annotations

from ctvae.models.autoencoder import Autoencoder
from ctvae.networks import Conv3D, Model, Size3, Slice2D, Stack2D


def build(cfg: Model, shape: Size3) -> Autoencoder:
    """The autoencoder that `cfg` describes, for groups of `shape` D H W.

    It has `encode`, `decode`, `latent_shape` and `spatial` (docs/decisions/0001-architecture.md).
    """
    if isinstance(cfg, Slice2D):
        from ctvae.models.slice2d import Slice2DVAE

        return Slice2DVAE(cfg, shape)
    if isinstance(cfg, Stack2D):
        from ctvae.models.stack2d import Stack2DVAE

        return Stack2DVAE(cfg, shape)
    if isinstance(cfg, Conv3D):
        from ctvae.models.conv3d import Conv3DVAE

        return Conv3DVAE(cfg, shape)
    from ctvae.models.wavelet3d import Wavelet3DVAE

    return Wavelet3DVAE(cfg, shape)
