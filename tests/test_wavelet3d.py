"""`wavelet3d` and its blocks: any size on the grid, no voxel sees another's norm, recomputed gradients are the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ctvae import haar
from ctvae.models import build
from ctvae.models.blocks import ChannelNorm, Conv, ResBlock
from ctvae.models.wavelet3d import INITIAL_LOGVAR, Wavelet3DVAE, halo
from ctvae.networks import Wavelet3D

CONFIGS = {
    "two levels": Wavelet3D(strides=((2, 2, 2),) * 2, widths=(4, 8), blocks=(1, 2), latent_channels=3),
    "flat": Wavelet3D(strides=((1, 2, 2), (2, 2, 2)), widths=(4, 8), blocks=(1, 1), latent_channels=2),
    "deeper decoder": Wavelet3D(
        strides=((2, 2, 2),) * 2, widths=(4, 8), blocks=(1, 2), decoder_blocks=(3, 2), latent_channels=3
    ),
    "a curve": Wavelet3D(strides=((2, 2, 2),) * 2, widths=(4, 8), blocks=(1, 1), latent_channels=2, tone=True),
    "one level": Wavelet3D(strides=((2, 2, 1),), widths=(6,), blocks=(1,), latent_channels=2),
    "strided": Wavelet3D(
        strides=((2, 2, 2), (1, 2, 2), (2, 1, 2)), widths=(4, 8, 6), blocks=(1, 2, 1), latent_channels=3, strided=True
    ),
}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lively(module: nn.Module) -> nn.Module:
    """Every parameter moved off its start, where much is zero."""
    random = torch.Generator().manual_seed(5)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=random)
    return module


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def model(request) -> Wavelet3DVAE:
    torch.manual_seed(0)
    return build(request.param, request.param.grid)


@torch.no_grad()
@pytest.mark.parametrize("cells", [(1, 1, 1), (3, 2, 5)], ids=str)
def test_any_size_on_the_grid_comes_back(model, cells):
    size = [n * step for n, step in zip(cells, model.cfg.grid, strict=True)]
    mean, logvar = model.encode(noise(2, 1, *size))
    assert mean.shape == logvar.shape == (2, model.cfg.latent_channels, *cells)
    assert model.decode(mean).shape == (2, 1, *size)


def test_the_latent_shape_is_said_beforehand():
    model = build(CONFIGS["flat"], (8, 24, 16))
    assert model.latent_shape == (2, 4, 6, 4)
    assert model.encode(torch.zeros(1, 1, 8, 24, 16))[0].shape[1:] == model.latent_shape


def test_a_size_off_the_grid_is_refused():
    with pytest.raises(ValueError, match="is not a multiple of 2"):
        build(CONFIGS["two levels"], (4, 4, 4)).encode(torch.zeros(1, 1, 4, 6, 4))


@torch.no_grad()
def test_strided_convolutions_can_be_what_haar_steps_and_convolutions_are():
    cfg = CONFIGS["strided"]
    torch.manual_seed(0)
    plain, strided = (lively(build(cfg.model_copy(update={"strided": kind}), cfg.grid)) for kind in (False, True))
    own = ("encoder.entries.1", "encoder.entries.2", "decoder.exits.0", "decoder.exits.1")
    strided.load_state_dict({key: value for key, value in plain.state_dict().items() if not key.startswith(own)}, strict=False)
    entries = zip(cfg.strides[1:], cfg.widths[:-1], plain.encoder.entries[1:], strided.encoder.entries[1:], strict=True)
    for steps, finer, entry, kernel in entries:
        taps = haar.bands(steps)
        analysis = haar.forward(torch.eye(taps).view(taps, 1, *steps), steps).view(taps, taps)  # [tap band]
        kernel.weight[:] = torch.einsum("obc,tb->oct", entry.weight.view(-1, taps, finer), analysis).view(kernel.weight.shape)
        kernel.bias[:] = entry.bias
    exits = zip(cfg.strides[:0:-1], cfg.widths[-2::-1], plain.decoder.exits[:-1], strided.decoder.exits[:-1], strict=True)
    for steps, finer, leave, kernel in exits:
        taps = haar.bands(steps)
        synthesis = haar.inverse(torch.eye(taps).view(taps, taps, 1, 1, 1), steps).view(taps, taps)  # [band tap]
        leave.bias[finer:] = 0  # a transposed convolution's is the same for all its taps
        kernel.weight[:] = torch.einsum("bcw,bt->wct", leave.weight.view(taps, finer, -1), synthesis).view(kernel.weight.shape)
        kernel.bias[:] = leave.bias[:finer]
    x = noise(1, 1, *(2 * step for step in cfg.grid))
    mean = plain.encode(x)[0]
    torch.testing.assert_close(strided.encode(x)[0], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(strided.decode(mean), plain.decode(mean), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_posteriors_begin_narrow(model):
    _, logvar = model.encode(noise(1, 1, *(4 * step for step in model.cfg.grid)))
    assert logvar.mean().item() == pytest.approx(INITIAL_LOGVAR, abs=1.0)


@torch.no_grad()
def test_samples_of_a_batch_do_not_see_each_other(model):
    lively(model)
    x = noise(3, 1, *(2 * step for step in model.cfg.grid))
    torch.testing.assert_close(model.encode(x)[0][1:2], model.encode(x[1:2])[0], rtol=1e-4, atol=1e-5)


def test_the_decoder_reaches_exactly_as_far_as_the_halo_counts():
    """Count by gradient: which latent voxels along W one image voxel depends on."""
    for cfg in CONFIGS.values():
        model = lively(build(cfg, cfg.grid)).double()
        reach = halo(cfg)[2]
        z = noise(1, cfg.latent_channels, 1, 1, 4 * reach).double().requires_grad_()
        model.decode(z)[..., 2 * reach * cfg.grid[2]].sum().backward()
        assert z.grad is not None
        touched = z.grad.abs().sum((0, 1, 2, 3)).nonzero().flatten()
        left, right = 2 * reach - touched.min().item(), touched.max().item() - 2 * reach
        assert reach - 2 <= max(left, right) <= reach


def test_recomputing_blocks_gives_the_same_gradients():
    x, cfg = noise(1, 1, 8, 8, 8), CONFIGS["two levels"]
    gradients, losses = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = lively(build(cfg.model_copy(update={"checkpointing": checkpointing}), (8, 8, 8)))
        loss = model.decode(model.encode(x)[0]).square().mean()
        loss.backward()
        losses.append(loss.item())
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert losses[0] == losses[1]
    for plain, recomputed in zip(*gradients, strict=True):
        assert (plain is None) == (recomputed is None)
        if plain is not None:
            assert torch.equal(plain, recomputed)


def test_checkpointing_does_recompute():
    model = build(CONFIGS["two levels"].model_copy(update={"checkpointing": True}), (4, 4, 4))
    calls = []
    model.encoder.levels[0][0].conv1.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    mean, _ = model.encode(noise(1, 1, 4, 4, 4))
    assert len(calls) == 1
    mean.sum().backward()
    assert len(calls) == 2
    with torch.no_grad():
        model.encode(noise(1, 1, 4, 4, 4))
    assert calls == [True, True, False]


def test_the_norm_is_each_voxels_own_root_mean_square():
    norm = ChannelNorm(5)
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    x = 3 * noise(2, 5, 2, 3, 4)
    rms = (x.square().mean(1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), x / rms * norm.weight.view(1, 5, 1, 1, 1))


def test_a_voxel_does_not_change_its_neighbours_norm():
    norm, x = ChannelNorm(5), noise(2, 5, 2, 3, 4)
    changed = x.clone()
    changed[1, :, 0, 2, 3] = 100.0
    moved = (norm(changed) != norm(x)).any(1).nonzero().tolist()
    assert moved == [[1, 0, 2, 3]]


def test_a_block_starts_as_the_identity():
    x = noise(1, 4, 4, 5, 6)
    assert torch.equal(ResBlock(4)(x), x)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 6])
def test_a_convolutions_bf16_gradient_is_right_at_any_depth(depth):
    """oneDNN's is wrong at a depth of 2 (torch 2.13): up to infinite."""
    torch.manual_seed(0)
    conv, x, g = Conv(16, 16, 3, padding=1), noise(2, 16, depth, 6, 8), noise(2, 16, depth, 6, 8, seed=1)
    weight = conv.weight.detach().clone().requires_grad_()
    (F.conv3d(x, weight, conv.bias, padding=1) * g).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
    (y.float() * g).sum().backward()
    assert conv.weight.grad is not None
    assert weight.grad is not None
    assert (conv.weight.grad - weight.grad).norm() < 0.01 * weight.grad.norm()


def test_shallow_volumes_train_in_bf16():
    """8 slices are 4 at the finest and 2 at the coarsest grid."""
    torch.manual_seed(0)
    model, x = lively(build(CONFIGS["two levels"], (8, 16, 16))), noise(2, 1, 8, 16, 16)
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = (model.decode(model.encode(x)[0]) - x).square().mean()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert F.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.99
    assert gradients[1].norm().item() == pytest.approx(gradients[0].norm().item(), rel=0.05)
