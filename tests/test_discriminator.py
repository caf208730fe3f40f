"""What the patch discriminator sees."""

from __future__ import annotations

import pytest
import torch

from ctvae.models.discriminator import DECAY, PatchDiscriminator

SOFT = (-0.16, 0.24)
WHOLE, WINDOW = slice(0, None, 2), slice(1, None, 2)  # each band of the one view, then of the other


def patches(contrast: float, seed: int) -> torch.Tensor:
    """Bone and air, and soft tissue whose halves differ by `contrast`."""
    random = torch.Generator().manual_seed(seed)
    x = torch.full((1, 1, 8, 8, 8), 0.04)
    x[..., 4:] += contrast
    x[:, :, :, :2], x[:, :, :, 6:] = -1.0, 0.9
    return x + 0.002 * torch.randn(x.shape, generator=random)


def test_bands_of_real_patches_have_mean_0_and_spread_1():
    discriminator = PatchDiscriminator(4, SOFT)
    torch.manual_seed(0)
    real = [0.3 + 0.1 * torch.randn(2, 1, 8, 8, 8) for _ in range(50)]
    for x in real:
        discriminator.observe(x)
    bands = torch.cat([discriminator._standard(discriminator._bands(x)) for x in real])
    torch.testing.assert_close(bands.mean((0, 2, 3, 4)), torch.zeros(16), atol=0.02, rtol=0)
    torch.testing.assert_close(bands.std((0, 2, 3, 4)), torch.ones(16), atol=0.02, rtol=0)


def test_means_go_with_the_patches_and_are_those_of_all_processes():
    discriminator = PatchDiscriminator(4, SOFT)
    discriminator.observe(torch.zeros(1, 1, 8, 8, 8), average=lambda values: values + 1)
    torch.testing.assert_close(discriminator.mean[WHOLE][1:], torch.ones(7))
    for _ in range(3):
        discriminator.observe(torch.zeros(1, 1, 8, 8, 8))
    torch.testing.assert_close(discriminator.mean[WHOLE][1:], torch.full((7,), 1 / 4))
    assert discriminator.seen == 4
    assert 0.99 < DECAY < 1


def test_contrast_of_soft_tissue_is_seen_beside_bone_and_air():
    """Ten HU between two halves of an organ, where bone and air are two thousand apart."""
    discriminator = PatchDiscriminator(4, SOFT)
    for seed in range(20):
        discriminator.observe(patches(0.0, seed))
    with_it, without = (discriminator._standard(discriminator._bands(patches(c, 99))) for c in (0.01, 0.0))
    seen = (with_it - without).abs()
    assert seen[:, WINDOW].max() > 4 * seen[:, WHOLE].max()


@pytest.mark.parametrize("soft", [(0.2, 0.2), (1.0, -1.0)])
def test_a_window_without_soft_tissue_is_seen_twice(soft):
    discriminator = PatchDiscriminator(4, soft)
    bands = discriminator._bands(torch.rand(1, 1, 8, 8, 8))
    torch.testing.assert_close(bands[:, WHOLE], bands[:, WINDOW])


def test_any_size_is_taken():
    logits, features = PatchDiscriminator(4, SOFT)(torch.rand(2, 1, 6, 9, 12))
    assert logits.shape == (2, 1, 2, 3, 3)
    assert len(features) == 4
