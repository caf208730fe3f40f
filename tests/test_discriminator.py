"""What the patch discriminator sees."""

from __future__ import annotations

from statistics import fmean

import pytest
import torch

from ctvae.models import discriminator as module
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


def test_steepness_is_the_gradients_square(monkeypatch):
    """Of both views' logits along all that they see, by autograd; the finite difference has it in the mean over its noise."""
    monkeypatch.setattr(module, "STEP", 1e-3)
    torch.manual_seed(0)
    discriminator, x = PatchDiscriminator(4, SOFT).double(), patches(0.05, 1)[..., :4, :4, :4].double()
    bands = discriminator._standard(discriminator._bands(x)).requires_grad_()
    logit = discriminator._judged(bands)[0]
    assert logit.shape == (1, 2, 1, 1, 1)
    (slope,) = torch.autograd.grad(logit.sum(), bands)
    random = torch.Generator().manual_seed(2)
    found = [discriminator.steepness(x, lambda shape: torch.randn(shape, generator=random))[1].item() for _ in range(4000)]
    assert fmean(found) == pytest.approx(slope.square().sum().item() / 2, rel=0.1)  # squares of a normal: 2.2 % expected


def test_steepness_is_lowered_by_training_on_it():
    torch.manual_seed(0)
    discriminator, x = PatchDiscriminator(4, SOFT), patches(0.05, 1)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3)
    sizes = []
    for seed in range(30):
        random = torch.Generator().manual_seed(seed)
        _, size = discriminator.steepness(x, lambda shape, random=random: torch.randn(shape, generator=random))
        optimizer.zero_grad()
        size.backward()
        optimizer.step()
        sizes.append(size.item())
    assert fmean(sizes[-5:]) < 0.5 * fmean(sizes[:5])


@pytest.mark.parametrize("soft", [(0.2, 0.2), (1.0, -1.0)])
def test_a_window_without_soft_tissue_is_seen_twice(soft):
    discriminator = PatchDiscriminator(4, soft)
    bands = discriminator._bands(torch.rand(1, 1, 8, 8, 8))
    torch.testing.assert_close(bands[:, WHOLE], bands[:, WINDOW])


def test_neither_view_is_told_by_the_other():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(4, SOFT)
    x = (2 * torch.rand(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1)) - 1).requires_grad_()
    bone = torch.where(x > SOFT[1] + 0.1, 0.95, x)  # beyond the window of soft tissue
    (whole, soft), (other, same) = (discriminator(v)[0].unbind(1) for v in (x, bone))
    torch.testing.assert_close(soft, same)
    assert not torch.allclose(whole, other)


def test_values_that_no_file_holds_give_a_decoder_no_lesson():
    """A decoder is off by a little in air, beyond -1000 HU, where a scan is clipped: to be told that is to learn nothing else."""
    torch.manual_seed(0)
    discriminator, real = PatchDiscriminator(4, SOFT), patches(0.05, 1)
    discriminator.observe(real)
    decoded = torch.where(real < -0.9, real - 0.1, real).requires_grad_()
    logits, _ = discriminator(decoded)
    torch.testing.assert_close(logits, discriminator(decoded.clamp(-1, 1))[0])
    (slope,) = torch.autograd.grad(logits.sum(), decoded)
    assert not slope[decoded < -1].any()
    assert slope[decoded > -1].any()


def test_any_size_is_taken():
    logits, features = PatchDiscriminator(4, SOFT)(torch.rand(2, 1, 6, 9, 12))
    assert logits.shape == (2, 2, 2, 3, 3)
    assert len(features) == 8
