"""`wavelet3d` starts as the best linear code of its data: the Karhunen-Loeve transform of its blocks.

One latent voxel stands for a block of `grid` image voxels. The linear code of Z numbers per block with the least squared
error is the projection on the Z principal directions of such blocks (Karhunen 1947, Loeve 1948; Jolliffe 2002). The
network's trunk is linear around its residual blocks, which start as zero, so it can be given exactly that transform to
begin with: learning then starts where a linear code ends, instead of finding it by gradient descent.

Shapes:  N blocks   P voxels of a block   Z latent channels   Haar coefficients of a block: P again
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ctvae import haar
from ctvae.config import Wavelet3D
from ctvae.models.wavelet3d import Wavelet3DVAE

LEAST_STD = 1e-3  # of a principal direction in which the blocks hardly vary


class Transform(NamedTuple):
    """Blocks [N P] to whitened principal coordinates [N Z] and back."""

    mean: Tensor  # [P]
    directions: Tensor  # [P Z], orthonormal
    std: Tensor  # [Z]


def fits(cfg: Wavelet3D) -> bool:
    """Whether every level is wide enough to carry the Haar coefficients of a block, and the last one the latents."""
    carried = [math.prod(haar.bands(stride) for stride in cfg.strides[: level + 1]) for level in range(len(cfg.strides))]
    enough = all(width >= count for width, count in zip(cfg.widths[:-1], carried[:-1], strict=True))
    return enough and len(cfg.strides) > 1 and cfg.latent_channels <= min(cfg.widths[-1], carried[-1])


def principal(volumes: Tensor, cfg: Wavelet3D) -> Transform:
    """The Karhunen-Loeve transform of the blocks of `volumes` [B 1 D H W]."""
    blocks = volumes[:, 0]
    for axis, step in enumerate(cfg.grid, start=1):
        blocks = blocks.unfold(axis, step, step)
    blocks = blocks.reshape(-1, math.prod(cfg.grid))  # [N P]
    values, vectors = torch.linalg.eigh(torch.cov(blocks.T).double())
    z = cfg.latent_channels
    std = values[-z:].flip(0).clamp_min(0).sqrt().float().clamp_min(LEAST_STD)
    return Transform(blocks.mean(0), vectors[:, -z:].flip(1).float(), std)


@torch.no_grad()
def start(network: Wavelet3DVAE, transform: Transform) -> None:
    """Set the trunk so that encoding and decoding are `transform` and its inverse; other channels keep their start."""
    cfg, encoder, decoder = network.cfg, network.encoder, network.decoder
    z, last = cfg.latent_channels, len(cfg.strides) - 1
    to_coefficients = haar_matrix(cfg)  # [coefficients P]
    carried = 1
    for level, (stride, entry, leave) in enumerate(zip(cfg.strides, encoder.entries, reversed(decoder.exits), strict=True)):
        finer = cfg.widths[level - 1] if level else 1
        rows = torch.tensor([band * finer + c for band in range(haar.bands(stride)) for c in range(carried)])
        carried *= haar.bands(stride)
        if level < last:
            _select(entry, torch.arange(carried), rows, torch.eye(carried))
            _select(leave, rows, torch.arange(carried), torch.eye(carried))
        else:
            analysis = (transform.directions / transform.std).T @ torch.linalg.inv(to_coefficients)  # [Z coefficients]
            synthesis = to_coefficients @ (transform.directions * transform.std)  # [coefficients Z]
            _select(entry, torch.arange(z), rows, analysis, -(transform.directions / transform.std).T @ transform.mean)
            _select(leave, rows, torch.arange(z), synthesis, to_coefficients @ transform.mean)
    _select(encoder.to_moments, torch.arange(z), torch.arange(z), torch.eye(z))
    _select(decoder.entry, torch.arange(z), torch.arange(z), torch.eye(z))


def haar_matrix(cfg: Wavelet3D) -> Tensor:
    """The Haar steps of all levels as a matrix [P P], a block's voxels to coefficients in the trunk's order of channels."""
    size = math.prod(cfg.grid)
    x = torch.eye(size).reshape(size, 1, *cfg.grid)
    for stride in cfg.strides:
        x = haar.forward(x, stride)
    return x.flatten(1).T.contiguous()


def _select(conv: nn.Module, rows: Tensor, columns: Tensor, matrix: Tensor, bias: Tensor | None = None) -> None:
    """Output channels `rows` of `conv` become `matrix` times input channels `columns`, and see nothing else."""
    assert isinstance(conv, nn.Conv3d)
    assert conv.bias is not None
    centre = tuple(size // 2 for size in conv.kernel_size)
    conv.weight[rows] = 0.0
    conv.weight[rows[:, None], columns[None, :], centre[0], centre[1], centre[2]] = matrix
    conv.bias[rows] = 0.0 if bias is None else bias
