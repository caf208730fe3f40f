"""The training groups' latents, and the one place where latents are shifted, scaled and split into coarse and detail.

Shapes:  N groups x encodings   B batch   Z latent channels   d h w latent voxels   K conditions
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ctvae import haar
from ctvae.checkpoint import load, save
from ctvae.device import batch_indices, generator
from ctvae.haar import Step3


@dataclass(frozen=True)
class LatentSet:
    """Posterior moments of every training group, several augmented encodings each, and what the prior may be told."""

    means: Tensor  # [N Z d h w] or [N n Z], float16
    logvars: Tensor  # like means
    conditions: Tensor  # [N K] in their own units
    groups: list[str]  # N group ids

    def __len__(self) -> int:
        return len(self.means)

    def posterior_sample(self, indices: list[int], random: torch.Generator) -> Tensor:
        """Fresh samples of the encodings `indices`, float32."""
        mean, logvar = self.means[indices].float(), self.logvars[indices].float()
        return mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=random)

    def batch(self, batch: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Latents [B ...] and conditions [B K] of step `step`."""
        indices = batch_indices(len(self), batch, seed, step)
        return self.posterior_sample(indices, generator(seed, step, stream=2)), self.conditions[indices]

    def save(self, path: Path) -> None:
        tensors = {"means": self.means, "logvars": self.logvars, "conditions": self.conditions}
        save(path, tensors, {"groups": self.groups})

    @classmethod
    def load(cls, path: Path) -> LatentSet:
        tensors, meta = load(path)
        return cls(tensors["means"], tensors["logvars"], tensors["conditions"], meta["groups"])


class LatentCode:
    """Latents to what the flow sees, and back. The one place where latents are shifted, scaled and split.

    Statistics are over the whole training set, per channel (per number for vectors), posterior variance included.
    Spatial latents are split by one Haar step. A `joint` code stacks all bands, at their natural sizes: the step is scaled
    to be orthonormal, so that the flow sees the latents themselves, folded. Without `joint`, the low band and the detail
    bands come apart, each channel at unit variance.
    """

    def __init__(self, tensors: dict[str, Tensor], steps: Step3 | None):
        self.tensors, self.steps = tensors, steps

    @property
    def joint(self) -> bool:
        return "detail_scale" not in self.tensors

    @classmethod
    def fit(cls, latents: LatentSet, joint: bool = True) -> LatentCode:
        means, variances = latents.means.float(), latents.logvars.float().exp()
        spatial = means.ndim == 5
        axes = (0, 2, 3, 4) if spatial else (0,)
        shift = means.mean(axes)
        scale = (means.var(axes, correction=0) + variances.mean(axes)).sqrt().clamp_min(1e-6)
        code = cls({"shift": shift, "scale": scale}, pyramid_steps(means.shape[2:]) if spatial else None)
        if code.steps is not None and not joint:
            coarse, detail = code._split(code._standard(means))
            bands = haar.bands(code.steps)
            noise = variances.mean(axes) / scale.square() / bands  # [Z], of a mean of `bands` posterior samples
            code.tensors |= {
                "coarse_scale": (coarse.var(axes, correction=0) + noise).sqrt().clamp_min(1e-3),
                "detail_scale": (detail.var(axes, correction=0) + noise.repeat(bands - 1)).sqrt().clamp_min(1e-3),
            }
        return code

    def encode(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Latents -> (coarse [B Z ...], detail [B 7Z ...]); joint: (all bands [B 8Z ...], None); vectors: (flat [B n], None)."""
        x = self._standard(z)
        if self.steps is None:
            return x.flatten(1), None
        if self.joint:
            return haar.forward(x, self.steps) * self._orthonormal, None
        coarse, detail = self._split(x)
        return coarse / _wide(self.tensors["coarse_scale"]), detail / _wide(self.tensors["detail_scale"])

    def decode(self, coarse: Tensor, detail: Tensor | None) -> Tensor:
        """The inverse of `encode`."""
        if self.steps is None:
            x = coarse.unflatten(1, self.tensors["shift"].shape)
            return x * self.tensors["scale"] + self.tensors["shift"]
        if self.joint:
            x = haar.inverse(coarse / self._orthonormal, self.steps)
        else:
            assert detail is not None
            scaled = (coarse * _wide(self.tensors["coarse_scale"]), detail * _wide(self.tensors["detail_scale"]))
            x = haar.inverse(torch.cat(scaled, dim=1), self.steps)
        return x * _wide(self.tensors["scale"]) + _wide(self.tensors["shift"])

    @property
    def _orthonormal(self) -> float:
        """Means and half-differences to the orthonormal transform: sqrt(2) for each axis that is halved."""
        assert self.steps is not None
        return haar.bands(self.steps) ** 0.5

    def _standard(self, z: Tensor) -> Tensor:
        shift, scale = self.tensors["shift"], self.tensors["scale"]
        return (z - shift) / scale if self.steps is None else (z - _wide(shift)) / _wide(scale)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert self.steps is not None
        return haar.forward(x, self.steps).tensor_split([x.shape[1]], dim=1)  # type: ignore[return-value]


def pyramid_steps(sizes: torch.Size | tuple[int, ...]) -> Step3:
    """A Haar step of 2 along every axis that is even and long enough to halve."""
    d, h, w = (2 if size % 2 == 0 and size >= 4 else 1 for size in sizes)
    return d, h, w


def _wide(per_channel: Tensor) -> Tensor:
    return per_channel.view(1, -1, 1, 1, 1)
