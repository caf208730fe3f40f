"""`slice2d` and `stack2d`: slice order, parameter counts from the layers' formulas, and that they learn."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ctvae.models.slice2d import ImageStackVAE, Slice2DVAE, pack, unpack
from ctvae.models.stack2d import Stack2DVAE
from ctvae.networks import Slice2D, Stack2D

SHAPE = (8, 32, 48)


def slice2d() -> Slice2DVAE:
    return Slice2DVAE(Slice2D(widths=(4, 8), latent_size=5), SHAPE)


def stack2d() -> Stack2DVAE:
    return Stack2DVAE(Stack2D(base=4, stages=3, slices_per_stack=4, latent_size=5), SHAPE)


@pytest.fixture(params=[slice2d, stack2d], ids=["slice2d", "stack2d"])
def model(request) -> ImageStackVAE:
    torch.manual_seed(0)
    return request.param()


@pytest.fixture
def volume() -> torch.Tensor:
    return torch.rand(2, 1, *SHAPE, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("slices", [1, 2, 4, 8])
def test_pack_and_unpack_are_inverse(slices, volume):
    images = pack(volume, slices)
    assert images.shape == (2 * 8 // slices, slices, 32, 48)
    assert torch.equal(unpack(images, 8), volume)


@pytest.mark.parametrize("slices", [1, 2, 4])
@pytest.mark.parametrize("bright", [0, 3, 7])
def test_one_bright_slice_is_one_bright_channel(slices, bright):
    x = torch.full((2, 1, *SHAPE), -1.0)
    x[1, 0, bright] = 1.0
    stack, channel = divmod(bright, slices)
    images = pack(x, slices)
    assert (images[8 // slices + stack, channel] == 1).all()
    assert (images == 1).sum() == 32 * 48


def test_a_slice_changes_its_own_latent_only():
    model, x = stack2d(), torch.zeros(1, 1, *SHAPE)
    changed = x.clone()
    changed[0, 0, 5] = 1.0
    moved = (model.encode(changed)[0] != model.encode(x)[0]).any(-1)[0]
    assert moved.tolist() == [False, True]  # slice 5 is in the second stack of 4


def test_a_latent_changes_its_own_slices_only():
    model, z = stack2d(), torch.zeros(1, 2, 5)
    changed = z.clone()
    changed[0, 1] = 1.0
    moved = (model.decode(changed) != model.decode(z)).flatten(3).any(-1)[0, 0]
    assert moved.tolist() == [False] * 4 + [True] * 4


def test_shapes(model, volume):
    mean, logvar = model.encode(volume)
    assert mean.shape == logvar.shape == (2, *model.latent_shape)
    assert model.decode(mean).shape == volume.shape
    assert model.spatial is False


@pytest.mark.parametrize(("shape", "slices"), [((64, 64, 64), 64), ((12, 64, 80), 4), ((5, 16, 16), 5)])
def test_stacks_of_other_shapes(shape, slices):
    model = Stack2DVAE(Stack2D(base=2, stages=4, slices_per_stack=slices, latent_size=3), shape)
    z = model.encode(torch.zeros(1, 1, *shape))[0]
    assert z.shape == (1, shape[0] // slices, 3)
    assert model.decode(z).shape == (1, 1, *shape)


def test_slice2d_takes_any_depth():
    model = slice2d()
    assert model.decode(model.encode(torch.zeros(1, 1, 3, 32, 48))[0]).shape == (1, 1, 3, 32, 48)


def test_logvar_stays_in_its_range(model, volume):
    logvar = model.encode(volume * 1e6)[1]
    assert logvar.min() >= -30
    assert logvar.max() <= 20


def test_parameters_follow_the_formula():
    """stack2d-small at 64 x 256 x 256, by hand: 4^2 kernels through 64-2-4-8-16 channels, 16 x 16 x 16 features."""
    kernels = 16 * (64 * 2 + 2 * 4 + 4 * 8 + 8 * 16)
    encoder = kernels + (2 + 4 + 8 + 16) + 2 * (4096 * 128 + 128)
    decoder = kernels + (8 + 4 + 2 + 64) + (128 * 4096 + 4096)
    model = Stack2DVAE(Stack2D(), (64, 256, 256))
    assert sum(p.numel() for p in model.parameters()) == encoder + decoder == 1_586_796


def objective(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    mean, logvar = model.encode(x)
    z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    return (model.decode(z) - x).square().mean()


def test_gradient_reaches_every_parameter(model, volume):
    objective(model, volume).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_one_volume_can_be_learned(model):
    x = torch.full((1, 1, *SHAPE), -1.0)
    x[..., 8:24, 12:36] = 0.0  # a body in air
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = objective(model, x).item()
    for _ in range(60):
        optimizer.zero_grad()
        objective(model, x).backward()
        optimizer.step()
    assert objective(model, x).item() < min(0.5 * first, 0.5 * x.var().item())  # x.var(): the best constant


def test_an_untrained_decoder_draws_air(model):
    drawn = model.decode(torch.zeros(1, *model.latent_shape))
    assert drawn.mean().item() == pytest.approx(-1.0, abs=0.1)


def test_the_same_input_gives_the_same_output(model, volume):
    model.eval()
    z = model.encode(volume)[0]
    assert torch.equal(z, model.encode(volume)[0])
    assert torch.equal(model.decode(z), model.decode(z))
