"""The start of `wavelet3d` against principal component analysis by scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from ctvae.config import Wavelet3D
from ctvae.models import transform_code
from ctvae.models.wavelet3d import Wavelet3DVAE

CONFIGS = {
    "two levels": Wavelet3D(strides=((2, 2, 2),) * 2, widths=(8, 16), blocks=(1, 1), latent_channels=5),
    "three levels": Wavelet3D(strides=((1, 2, 2), (2, 2, 2), (2, 1, 2)), widths=(6, 40, 12), blocks=(1, 0, 1), latent_channels=7),
}


def smooth(count: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(count, 1, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(x, size=(8, 16, 16), mode="trilinear").clamp(-1, 1)


def blocks(x: torch.Tensor, grid: tuple[int, int, int]) -> np.ndarray:
    d, h, w = grid
    n, _, depth, height, width = x.shape
    y = x.reshape(n, depth // d, d, height // h, h, width // w, w).permute(0, 1, 3, 5, 2, 4, 6)
    return y.reshape(-1, d * h * w).numpy()


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_the_network_starts_as_principal_components(cfg):
    assert transform_code.fits(cfg)
    torch.manual_seed(0)
    volumes, held_out = smooth(40), smooth(3, seed=1)
    network = Wavelet3DVAE(cfg, (8, 16, 16))
    transform_code.start(network, transform_code.principal(volumes, cfg))
    reference = PCA(cfg.latent_channels).fit(blocks(volumes, cfg.grid).astype(np.float64))
    mean, _ = network.encode(held_out)
    expected = reference.inverse_transform(reference.transform(blocks(held_out, cfg.grid)))
    np.testing.assert_allclose(blocks(network.decode(mean), cfg.grid), expected, atol=1e-4)
    moments, _ = network.encode(volumes)
    torch.testing.assert_close(moments.std((0, 2, 3, 4)), torch.ones(cfg.latent_channels), rtol=0.01, atol=0)
    torch.testing.assert_close(moments.mean((0, 2, 3, 4)), torch.zeros(cfg.latent_channels), rtol=0, atol=1e-3)


def test_a_network_too_narrow_to_carry_blocks_is_told():
    assert not transform_code.fits(Wavelet3D(strides=((2, 2, 2),) * 2, widths=(4, 8), blocks=(1, 1), latent_channels=2))
    assert transform_code.fits(Wavelet3D())
