"""`conv3d`: 3D convolutions to one dense latent vector per volume, after a published VAE for turbulence cubes.

Shapes:  B batch   D H W voxels   d h w voxels after the last convolution   C channels   Z latent size

The cited net ("Convolutional VAE for 3D Turbulence Data", github.com/agrija9) is six 4^3 convolutions with BatchNorm
and ReLU, two linear layers for mean and log variance, one back, and six transposed convolutions, all at stride 1
without padding on 21^3 cubes. At stride 2 with padding 1 every convolution halves its input, and 64 x 256 x 256 fits.
`docs/methods/conv3d.md` lists what differs from the published code and why.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
from torch import Tensor, nn

from ctvae.errors import ConfigError, DoesNotFit
from ctvae.models.autoencoder import Autoencoder
from ctvae.models.slice2d import start_from_air
from ctvae.networks import Conv3D, Size3

KERNEL = 4
LINEAR_LAYERS = 3  # to mean, to log variance, back from the latent
BYTES_PER_WEIGHT = 16  # float32: the weight, its gradient, Adam's two moments
MEMORY_LIMIT_GB = 24


def feature_shape(cfg: Conv3D, shape: Size3) -> tuple[int, int, int, int]:
    """C d h w after the last convolution. Raises ConfigError where a volume is too small for the kernels."""
    shrunk = [_after_convolutions(size, cfg) for size in shape]
    if min(shrunk) < 1:
        least = cfg.stride ** len(cfg.widths) if cfg.stride > 1 else (KERNEL - 1) * len(cfg.widths) + 1
        size = " x ".join(map(str, shape))
        raise ConfigError(f"conv3d: a volume of {size} is too small; make every side of data.shape at least {least}")
    return cfg.widths[-1], shrunk[0], shrunk[1], shrunk[2]


def _after_convolutions(size: int, cfg: Conv3D) -> int:
    if cfg.stride == 1:
        return size - (KERNEL - 1) * len(cfg.widths)
    step = cfg.stride ** len(cfg.widths)
    assert size % step == 0 or size < step, f"{size} is off the model's grid of {step}"
    return size // step


def linear_weights(cfg: Conv3D, shape: Size3) -> int:
    """Weights of each of the three linear layers: features after the last convolution times latent size."""
    return math.prod(feature_shape(cfg, shape)) * cfg.latent_size


def linear_parameters(cfg: Conv3D, shape: Size3) -> int:
    """Parameters of the three linear layers together, biases included."""
    return LINEAR_LAYERS * linear_weights(cfg, shape) + 2 * cfg.latent_size + math.prod(feature_shape(cfg, shape))


def check_fits(cfg: Conv3D, shape: Size3) -> None:
    """Raises DoesNotFit where the linear layers alone would pass MEMORY_LIMIT_GB in training. Allocates nothing."""
    need_gb = linear_parameters(cfg, shape) * BYTES_PER_WEIGHT / 1e9
    if need_gb > MEMORY_LIMIT_GB:
        remedy = "set model.stride=2" if cfg.stride == 1 else "use a smaller data.shape or model.latent_size"
        raise DoesNotFit(
            f"conv3d at stride {cfg.stride} on {' x '.join(map(str, shape))}: {LINEAR_LAYERS} linear layers of "
            f"{linear_weights(cfg, shape):.2g} weights each need {need_gb:,.0f} GB to train; {remedy}"
        )


class Conv3DVAE(Autoencoder):
    """One latent vector per volume. BatchNorm sees the batch in training and running statistics in `eval()`."""

    spatial = False

    def __init__(self, cfg: Conv3D, shape: Size3):
        super().__init__()
        check_fits(cfg, shape)
        self.latent_shape = (1, cfg.latent_size)  # N Z
        self.feature_shape = feature_shape(cfg, shape)
        features = math.prod(self.feature_shape)
        self.encoder = _encoder(cfg)
        self.to_mean = nn.Linear(features, cfg.latent_size)
        self.to_logvar = nn.Linear(features, cfg.latent_size)
        self.from_latent = nn.Linear(cfg.latent_size, features)
        self.decoder = _decoder(cfg)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and log variance of volumes in -1..1: [B 1 D H W] -> 2 x [B 1 Z].

        Raises ConfigError in training where the deepest BatchNorm would see one number per channel.
        """
        if self.training and len(x) * math.prod(self.feature_shape[1:]) == 1:
            raise ConfigError("conv3d: one volume this small leaves BatchNorm a single value; set autoencoder.batch=2")
        with self._precision(x):
            features = self.encoder(x).flatten(1)  # [B 1 D H W] -> [B C d h w] -> [B C*d*h*w]
            mean, logvar = self.to_mean(features).float(), self.to_logvar(features).float()  # 2 x [B Z]
        return mean[:, None], logvar.clamp(-30.0, 20.0)[:, None]

    def decode(self, z: Tensor) -> Tensor:
        """Volumes, in -1..1 up to the fit's error: [B 1 Z] -> [B 1 D H W]."""
        with self._precision(z):
            features = self.from_latent(z[:, 0]).unflatten(1, self.feature_shape)  # [B Z] -> [B C d h w]
            return self.decoder(features)

    def _precision(self, x: Tensor) -> AbstractContextManager[object]:
        """float32 where oneDNN's bf16 gradients are wrong or crash: features of height 1 and depth 2 and up (docs/log.md)."""
        _, depth, height, _ = self.feature_shape
        wrong = x.device.type == "cpu" and height == 1 and depth >= 2
        return torch.autocast("cpu", enabled=False) if wrong else nullcontext()


def _padding(cfg: Conv3D) -> int:
    """1 halves exactly at stride 2; none at stride 1, as in the cited net."""
    return 1 if cfg.stride == 2 else 0


def _encoder(cfg: Conv3D) -> nn.Sequential:
    layers: list[nn.Module] = []
    for c_in, c_out in pairwise((1, *cfg.widths)):
        convolution = nn.Conv3d(c_in, c_out, KERNEL, stride=cfg.stride, padding=_padding(cfg))
        layers += [convolution, nn.BatchNorm3d(c_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _decoder(cfg: Conv3D) -> nn.Sequential:
    """BatchNorm, ReLU, transposed convolution per stage; the last convolution is the linear output."""
    layers: list[nn.Module] = []
    for c_in, c_out in pairwise((*cfg.widths[::-1], 1)):
        convolution = nn.ConvTranspose3d(c_in, c_out, KERNEL, stride=cfg.stride, padding=_padding(cfg))
        layers += [nn.BatchNorm3d(c_in), nn.ReLU(inplace=True), convolution]
    start_from_air(layers[-1])
    return nn.Sequential(*layers)
