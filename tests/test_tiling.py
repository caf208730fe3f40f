"""Tiles against the whole: what they cover, and networks applied by tiles with and without enough halo."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ctvae.models.wavelet3d import Wavelet3DVAE
from ctvae.networks import Wavelet3D
from ctvae.tiling import Size3, scaled, tiled, tiles

ONE = (1, 1, 1)
WAVELETS = {
    "one level": Wavelet3D(strides=((2, 2, 2),), widths=(6,), blocks=(1,), latent_channels=3),
    "two levels": Wavelet3D(strides=((2, 2, 2),) * 2, widths=(4, 6), blocks=(1, 2), latent_channels=3),
    "deeper decoder": Wavelet3D(
        strides=((2, 2, 2),) * 2, widths=(4, 6), blocks=(1, 1), decoder_blocks=(3, 1), latent_channels=3
    ),
    "anisotropic": Wavelet3D(strides=((1, 2, 2), (2, 2, 2)), widths=(4, 6), blocks=(2, 1), latent_channels=3),
    "strided": Wavelet3D(strides=((2, 2, 2), (1, 2, 2)), widths=(4, 6), blocks=(1, 2), latent_channels=3, strided=True),
    "three levels": Wavelet3D(strides=((2, 2, 2), (1, 2, 2), (2, 1, 2)), widths=(4, 4, 6), blocks=(1, 0, 1)),
}


@settings(max_examples=200, deadline=None)
@given(*[st.tuples(*[st.integers(1, 12)] * 3)] * 2, st.tuples(*[st.integers(0, 5)] * 3))
def test_tiles_keep_each_cell_once_and_read_its_halo(size, tile, halo):
    kept = np.zeros(size, int)
    for part in tiles(size, tile, halo):
        kept[part.keep] += 1
        whole = np.arange(np.prod(size)).reshape(size)
        np.testing.assert_array_equal(whole[part.read][part.inside()], whole[part.keep])
        for axis in range(3):
            keep, read = part.keep[axis], part.read[axis]
            assert read.start == max(0, keep.start - halo[axis])
            assert read.stop == min(size[axis], keep.stop + halo[axis])
            assert keep.stop - keep.start <= tile[axis]
    assert (kept == 1).all()


def test_slices_in_cells_become_slices_in_voxels():
    assert scaled((slice(1, 3), slice(0, 2), slice(5, 6)), (1, 2, 4)) == (slice(1, 3), slice(0, 4), slice(20, 24))


@pytest.fixture(scope="module")
def convolutions() -> nn.Module:
    """Reaches 2 voxels."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.SiLU(), nn.Conv3d(4, 3, 3, padding=1)).double()


@torch.no_grad()
def test_tiled_convolutions_equal_the_whole(convolutions):
    x = torch.randn(2, 2, 7, 11, 13, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sizes = []

    def apply(part: Tensor) -> Tensor:
        sizes.append(part.shape[2:])
        return convolutions(part)

    found = tiled(apply, x, factor_in=ONE, factor_out=ONE, tile=(3, 4, 5), halo=(2, 2, 2))
    torch.testing.assert_close(found, convolutions(x), rtol=0, atol=1e-12)
    assert len(sizes) == 3 * 3 * 3
    assert max(map(tuple, sizes)) <= (7, 8, 9)  # never more than a tile and its halo


@torch.no_grad()
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_halo_one_voxel_short_on_one_axis_shows(convolutions, axis):
    x = torch.randn(1, 2, 7, 11, 13, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    halo = tuple(1 if a == axis else 2 for a in range(3))
    found = tiled(convolutions, x, factor_in=ONE, factor_out=ONE, tile=(3, 4, 5), halo=halo)
    assert (found - convolutions(x)).abs().max() > 1e-4


def vae(cfg: Wavelet3D) -> Wavelet3DVAE:
    """With blocks that do something, unlike at the start; double, so that only the halo makes a difference."""
    torch.manual_seed(0)
    model = Wavelet3DVAE(cfg, cfg.grid)
    for parameter in model.parameters():
        if parameter.ndim == 5:
            nn.init.normal_(parameter, std=2.0 / parameter[0].numel() ** 0.5)
    return model.double().eval()


def differences(model: Wavelet3DVAE, size: Size3, tile: Size3, halo: Size3) -> tuple[float, float]:
    """Largest error of tiled encoding and of tiled decoding relative to the largest value; `size` in latent voxels."""
    grid = model.cfg.grid
    random = torch.Generator().manual_seed(1)
    voxels = [n * step for n, step in zip(size, grid, strict=True)]
    x = torch.randn(1, 1, *voxels, generator=random, dtype=torch.float64)
    z = torch.randn(1, model.cfg.latent_channels, *size, generator=random, dtype=torch.float64)
    errors = []
    for apply, volume, factors in ((lambda v: torch.cat(model.encode(v), 1), x, (grid, ONE)), (model.decode, z, (ONE, grid))):
        whole = apply(volume)
        found = tiled(apply, volume, factor_in=factors[0], factor_out=factors[1], tile=tile, halo=halo)
        errors.append(((found - whole).abs().max() / whole.abs().max()).item())
    return errors[0], errors[1]


@torch.no_grad()
@pytest.mark.parametrize("axis", [0, 1, 2], ids="DHW")
@pytest.mark.parametrize("cfg", WAVELETS.values(), ids=WAVELETS)
def test_tiled_wavelet3d_equals_the_whole(cfg, axis):
    model = vae(cfg)
    size = tuple(2 * model.halo[axis] + 9 if a == axis else 3 for a in range(3))
    tile = tuple(4 if a == axis else 2 for a in range(3))
    assert max(differences(model, size, tile, model.halo)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("axis", [0, 1, 2], ids="DHW")
@pytest.mark.parametrize("cfg", WAVELETS.values(), ids=WAVELETS)
def test_a_halo_two_voxels_short_shows(cfg, axis):
    model = vae(cfg)
    size = tuple(2 * model.halo[axis] + 9 if a == axis else 3 for a in range(3))
    tile = tuple(4 if a == axis else 2 for a in range(3))
    short = tuple(n - 2 if a == axis else n for a, n in enumerate(model.halo))
    assert max(differences(model, size, tile, short)) > 1e-5
