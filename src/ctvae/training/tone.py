"""Before a decoder is sharpened: the curve that brings the frequency of its HU to that of scans (`models/tone.py`).

Shapes:  B batch   D H W voxels   Z latent channels   d h w latent voxels
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ctvae.device import generator
from ctvae.models.tone import RANGE, counts
from ctvae.models.wavelet3d import Wavelet3DVAE
from ctvae.ranks import ALONE, Ranks
from ctvae.training.autoencoder import noisy_latents
from ctvae.training.groups import TrainingGroups

PATCHES = 64
AIR = -0.95
RIM = 2  # voxels about what is not air that count as well: there lie the values between body and air


@torch.no_grad()
def fit_tone(network: Wavelet3DVAE, groups: TrainingGroups, noise: float, seed: int, ranks: Ranks = ALONE) -> None:
    """Fits the decoder's curve to reconstructions of patches of training groups; one that is fitted, or none, is left as it is.

    `noise` is that of the latents, as in the sharpening that follows. Every process comes to the same curve.
    """
    tone = network.decoder.tone
    if tone is None or tone.offset.any():
        return
    alone = TrainingGroups(groups.dataset, groups.groups, groups.data, groups.shape)

    def fitted() -> list[float]:
        decoded, real = torch.zeros(RANGE, dtype=torch.long), torch.zeros(RANGE, dtype=torch.long)
        for step in range(PATCHES):
            x = alone.batch(1, seed, step).to(tone.offset.device)  # [1 1 D H W]
            y = network.decode(noisy_latents(network, x, noise, generator(seed, step, stream=47))).float()
            near = F.max_pool3d((torch.maximum(x, y) > AIR).float(), 2 * RIM + 1, stride=1, padding=RIM) > 0
            decoded, real = decoded + counts(y[near]).cpu(), real + counts(x[near]).cpu()
        tone.fit(decoded, real)
        return tone.offset.tolist()  # type: ignore[no-any-return]

    tone.offset.copy_(torch.tensor(ranks.told(fitted)))
