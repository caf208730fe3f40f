"""Latents to unit variance and back, and posterior samples, against moments that are known."""

from __future__ import annotations

import math

import pytest
import torch

from ctvae.config import Prior
from ctvae.device import generator
from ctvae.errors import ModelError
from ctvae.latents import LatentCode, LatentSet
from ctvae.training.prior import Batch, FlowObjective

GROUPS = 60


def spatial_latents(posterior_std: float = 0.5) -> LatentSet:
    """Smooth maps plus noise, channels of unequal offset and scale: [N 3 4 6 8]."""
    random = torch.Generator().manual_seed(0)
    smooth = torch.randn(GROUPS, 3, 2, 3, 4, generator=random).repeat_interleave(2, 2).repeat_interleave(2, 3)
    smooth = smooth.repeat_interleave(2, 4) + 0.1 * torch.randn(GROUPS, 3, 4, 6, 8, generator=random)
    offset, scale = torch.tensor([5.0, -2.0, 0.0]), torch.tensor([3.0, 0.2, 1.0])
    wide = scale.view(1, 3, 1, 1, 1)
    means = smooth * wide + offset.view(1, 3, 1, 1, 1)
    logvars = (2 * (posterior_std * wide).log()).expand_as(means)
    return LatentSet(means, logvars, torch.zeros(GROUPS, 3), [f"g{i}" for i in range(GROUPS)])


def vector_latents() -> LatentSet:
    """2 vectors of 5 numbers per group, every number with its own moments."""
    random = torch.Generator().manual_seed(1)
    scale = torch.rand(2, 5, generator=random) * 4 + 0.1
    means = (torch.randn(400, 2, 5, generator=random) + 3) * scale
    logvars = (scale.square() * 0.3).log().expand_as(means)
    return LatentSet(means, logvars, torch.zeros(400, 3), [f"g{i}" for i in range(400)])


def sampled(latents: LatentSet, times: int = 4) -> torch.Tensor:
    random = torch.Generator().manual_seed(2)
    return torch.cat([latents.posterior_sample(list(range(len(latents))), random) for _ in range(times)])


@pytest.mark.parametrize("posterior_std", [0.01, 0.5, 2.0])
def test_samples_have_unit_variance_per_channel(posterior_std):
    latents = spatial_latents(posterior_std)
    x = LatentCode.fit(latents).encode(sampled(latents))
    assert x.shape == (4 * GROUPS, 3, 4, 6, 8)
    torch.testing.assert_close(x.mean((0, 2, 3, 4)), torch.zeros(3), rtol=0, atol=0.05)
    torch.testing.assert_close(x.std((0, 2, 3, 4)), torch.ones(3), rtol=0, atol=0.03)


def test_vectors_of_samples_have_unit_variance():
    latents = vector_latents()
    flat = LatentCode.fit(latents).encode(sampled(latents, 8))
    assert flat.shape == (3200, 10)
    torch.testing.assert_close(flat.mean(0), torch.zeros(10), rtol=0, atol=0.08)
    torch.testing.assert_close(flat.std(0), torch.ones(10), rtol=0, atol=0.06)


@pytest.mark.parametrize("latents", [spatial_latents(), vector_latents()], ids=["spatial", "vector"])
def test_decode_is_the_inverse_of_encode(latents):
    code = LatentCode.fit(latents)
    z = sampled(latents, 1).double()
    torch.testing.assert_close(code.decode(code.encode(z)), z, rtol=1e-6, atol=1e-6)


def test_one_group_without_variance_does_not_divide_by_zero():
    still = torch.zeros(1, 2, 4, 4, 4)
    code = LatentCode.fit(LatentSet(still, still - 30, torch.zeros(1, 3), ["g"]))
    assert code.encode(still).isfinite().all()


def test_posterior_samples_have_the_posteriors_moments():
    mean, std = torch.tensor([[-3.0, 0.0, 5.0]]), torch.tensor([[0.1, 1.0, 4.0]])
    latents = LatentSet(mean.half(), (2 * std.log()).half(), torch.zeros(1, 3), ["g"])
    draws = latents.posterior_sample([0] * 20_000, torch.Generator().manual_seed(4))
    assert draws.dtype == torch.float32
    assert ((draws.mean(0) - mean[0]).abs() < 5 * std[0] / math.sqrt(20_000)).all()
    torch.testing.assert_close(draws.std(0), std[0], rtol=0.03, atol=0)


def test_a_batch_depends_on_seed_and_step_alone():
    latents = spatial_latents()
    z, std, _ = latents.batch(4, seed=0, step=3)
    assert z.shape == std.shape
    assert torch.equal(latents.batch(4, seed=0, step=3)[0], z)
    assert not torch.equal(latents.batch(4, seed=0, step=4)[0], z)
    assert not torch.equal(latents.batch(4, seed=1, step=3)[0], z)


def test_an_epoch_of_batches_holds_every_group_once():
    numbers = torch.arange(12.0)[:, None]
    latents = LatentSet(numbers, numbers * 0 - 30, numbers, [f"g{i}" for i in range(12)])
    for epoch in range(3):
        told = torch.cat([latents.batch(4, seed=5, step=3 * epoch + step)[2] for step in range(3)])
        assert sorted(told.flatten().tolist()) == list(range(12))


def test_standard_deviations_are_scaled_as_latents_are():
    latents = spatial_latents()
    code, (mean, std, _) = LatentCode.fit(latents), latents.batch(4, seed=0, step=0)
    torch.testing.assert_close(code.scaled(std), code.encode(mean + std) - code.encode(mean))


def test_noise_is_fresh_each_time_a_group_is_seen():
    seen = []

    def still(x, t, c):
        seen.append(x)
        return torch.zeros_like(x)

    objective = FlowObjective(still, Prior())  # type: ignore[arg-type]
    batch = Batch(torch.zeros(1, 4), torch.ones(1, 4), torch.zeros(1, 3))
    for step in range(50):
        objective(batch, generator(0, step))
    objective(batch, generator(0, 49))
    assert len(torch.cat(seen).unique()) == 200
    assert torch.equal(seen[-1], seen[-2])


def test_latents_come_back_from_their_file(tmp_path):
    latents = spatial_latents()
    latents.save(tmp_path / "latents.safetensors")
    again = LatentSet.load(tmp_path / "latents.safetensors")
    assert again.groups == latents.groups
    for name in ("means", "logvars", "conditions"):
        assert torch.equal(getattr(again, name)[:], getattr(latents, name)[:])


def test_a_missing_latents_file_is_one_line(tmp_path):
    with pytest.raises(ModelError, match=r"latents\.safetensors: not a ctvae weights file or damaged"):
        LatentSet.load(tmp_path / "latents.safetensors")


def test_latents_of_earlier_versions_tell_scans_apart():
    still = torch.zeros(3, 1, 1, 1, 1)
    old = LatentSet(still, still, torch.zeros(3, 3), ["a_b_0000", "a_b_0032", "c_12345"])
    assert old.whose == ["a_b", "a_b", "c"]
