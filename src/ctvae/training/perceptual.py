"""MONAI's pretrained perceptual losses as a term of their own, for those who can download the networks.

Without one the discriminator's features are the perceptual loss. Networks of 3D scans (MedicalNet, Chen et al. 2019) see whole
patches; those of pictures (RadImageNet, Mei et al. 2022; ImageNet, Zhang et al. 2018) see some of the slices along each axis.

Shapes:  B batch   D H W voxels
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from ctvae.errors import ConfigError

OF_SCANS = "medicalnet_"
FROM_ZERO = ("radimagenet_resnet50", "resnet50")  # take 0..1, the others -1..1 or any scale
SLICES = 0.2  # share of them along each axis, MAISI's (Guo et al. 2024)


class PerceptualTerm(nn.Module):
    """How far volumes in -1..1 are apart in a pretrained network's features."""

    def __init__(self, name: str, loss: nn.Module):
        super().__init__()
        self.name, self.loss = name, loss.eval().requires_grad_(False)

    def forward(self, y: Tensor, x: Tensor, random: torch.Generator) -> Tensor:  # [B 1 D H W] each
        if self.name in FROM_ZERO:
            x, y = (x + 1) / 2, (y + 1) / 2
        seed = int(torch.randint(2**31, (), generator=random))
        with torch.random.fork_rng(devices=()):  # MONAI chooses slices by the global generator
            torch.manual_seed(seed)
            return self.loss(y, x).float()


def perceptual_term(name: str) -> PerceptualTerm | None:
    """None for `none`. Raises ConfigError, in one line, where the network cannot be had."""
    if name == "none":
        return None
    from monai.losses import PerceptualLoss

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of channel-wise losses, which are for more than one channel
            loss = PerceptualLoss(3, name, is_fake_3d=not name.startswith(OF_SCANS), fake_3d_ratio=SLICES)
    except Exception as error:  # whatever hub, network, disk and missing libraries raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"perceptual {name}: its network cannot be loaded here ({reason[:120]}); it is downloaded once, and networks of "
            "pictures need torchvision or lpips. Leave it out: the discriminator's features need neither"
        ) from error
    return PerceptualTerm(name, loss)
