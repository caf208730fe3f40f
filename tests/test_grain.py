"""Noise beside the latents: white, the same for the same latents, and as much of it as features say."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from ctvae.config import Wavelet3D
from ctvae.models import build
from ctvae.models.grain import Grain, white

STEP = (1, 2, 2)


def latents(seed: int = 0, shape=(2, 3, 12, 16, 16)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_it_is_uniform_with_variance_one():
    values = white(latents(), 0, STEP)
    assert values.shape == (2, 1, 12, 32, 32)
    edge = np.sqrt(3)
    assert stats.kstest(values.flatten().numpy(), "uniform", (-edge, 2 * edge)).pvalue > 0.01
    assert values.var().item() == pytest.approx(1, abs=0.02)


def test_it_is_white():
    """No frequency has more than another: the periodogram of white noise is exponential, and flat in the mean."""
    values = white(latents(), 0, STEP)[:, 0]
    power = torch.fft.fftn(values, dim=(1, 2, 3)).abs().square().flatten(1)[:, 1:] / values[0].numel()
    for axis in (1, 2, 3):
        lag = (values.diff(dim=axis).square().mean() / 2).item()
        assert lag == pytest.approx(1, abs=0.03)  # neighbours share nothing
    assert stats.kstest(power.numpy()[0, : power.shape[1] // 2], "expon").pvalue > 0.001


def test_fields_and_channels_are_independent():
    z = latents()
    fields = torch.cat([white(z, number, STEP) for number in range(4)], dim=1)
    moved = z.clone()
    moved[:, 1] = torch.nextafter(z[:, 1], z[:, 1] + 1)  # by as little as a latent can hold
    everything = torch.cat((fields, white(moved, 0, STEP)), dim=1).transpose(0, 1).flatten(1)
    off = torch.corrcoef(everything) - torch.eye(5)
    assert off.abs().max() < 0.03


def test_a_part_of_the_latents_has_its_part_of_the_noise():
    z = latents()
    whole = white(z, 2, STEP)
    torch.testing.assert_close(white(z[..., 3:9, 2:5, 7:], 2, STEP), whole[..., 3:9, 4:10, 14:], rtol=0, atol=0)
    torch.testing.assert_close(white(z.to(memory_format=torch.channels_last_3d), 2, STEP), whole, rtol=0, atol=0)
    zeros = torch.zeros(1, 2, 4, 4, 4)
    torch.testing.assert_close(white(-zeros, 0, STEP), white(zeros, 0, STEP), rtol=0, atol=0)


def test_it_is_what_it_was():
    """Integers alone decide, so any machine draws these: by the same steps in Python's own integers."""
    z = torch.tensor([0.5, -1.25]).view(1, 2, 1, 1, 1)

    def mixed(x: int) -> int:
        for _ in range(2):
            x = (x ^ (x >> 16)) * 0x45D9F3B % 2**32
        return x ^ (x >> 16)

    key = 0
    for value in (0.5, -1.25):
        key = mixed(key ^ int(np.float32(value).view(np.uint32)))
    exact = [(mixed(key ^ mixed(1 * 4 + 1 + n)) / (2**32 - 1) - 0.5) * np.sqrt(12) for n in range(4)]
    np.testing.assert_allclose(white(z, 1, STEP).flatten(), exact, rtol=1e-5, atol=1e-6)


def test_it_begins_as_nothing_and_features_say_how_much():
    grain, x = Grain(4), latents(shape=(1, 4, 4, 4, 4))
    noise = white(latents(1, (1, 2, 4, 4, 4)), 0, (1, 1, 1))
    torch.testing.assert_close(grain(x, noise), x, rtol=0, atol=0)
    grain.amount.weight.data.normal_(generator=torch.Generator().manual_seed(2))
    columns = F.normalize(x[0].flatten(1), dim=0) * 2  # root mean square 1 over four channels
    exact = x[0].flatten(1) + noise.flatten() * (grain.amount.weight.data[:, :, 0, 0, 0] @ columns)
    torch.testing.assert_close(grain(x, noise)[0].flatten(1), exact, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_each_block_of_a_decoder_has_its_own():
    """What a decoder with noise makes of latents does not hang on the latents alone once amounts are other than nothing."""
    cfg = Wavelet3D(strides=((2, 2, 2), (1, 2, 2)), widths=(4, 6), blocks=(1, 2), latent_channels=3, grain=True)
    torch.manual_seed(0)
    decoder = build(cfg, (4, 8, 8)).decoder
    z = latents(shape=(1, 3, 8, 8, 8))
    nudged = torch.nextafter(z, z + 1)
    plain = decoder(z)
    assert (decoder(nudged) - plain).abs().max() < 1e-5
    changes = []
    for level, block in product(range(2), range(2)):
        if block < len(decoder.grains[level]):
            amount = decoder.grains[level][block].amount
            amount.weight.data.fill_(0.1)
            changes.append(decoder(z) - plain)
            assert (decoder(nudged) - decoder(z)).abs().max() > 1e-3
            amount.weight.data.zero_()
    assert len(changes) == 3
    off = torch.corrcoef(torch.stack([change.flatten() for change in changes])) - torch.eye(3)
    assert off.abs().max() < 0.2
