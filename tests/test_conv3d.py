"""`conv3d`: parameter counts by hand and from the published code, the guard at stride 1, and that it learns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ctvae.errors import ConfigError, DoesNotFit
from ctvae.models.conv3d import Conv3DVAE, feature_shape, linear_parameters, linear_weights
from ctvae.networks import Conv3D

SMALL = Conv3D(widths=(4, 8, 16), latent_size=6)
SEED_SIZE = (64, 256, 256)


@pytest.fixture
def model() -> Conv3DVAE:
    torch.manual_seed(0)
    return Conv3DVAE(SMALL, (16, 24, 32))


@pytest.fixture
def volume() -> torch.Tensor:
    noise = torch.rand(2, 1, 16, 24, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return nn.functional.avg_pool3d(noise, 3, stride=1, padding=1)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_parameters_follow_the_formula():
    """At 64 x 256 x 256, by hand: 4^3 kernels through 1-16-32-64-128-256-512 channels, 512 x 1 x 4 x 4 features."""
    kernels = 64 * (1 * 16 + 16 * 32 + 32 * 64 + 64 * 128 + 128 * 256 + 256 * 512)
    widths = 16 + 32 + 64 + 128 + 256 + 512
    encoder = kernels + 3 * widths  # bias, and BatchNorm's weight and bias
    linear = 2 * (8192 * 64 + 64) + (64 * 8192 + 8192)
    decoder = kernels + (widths - 512 + 1) + 2 * widths
    assert parameters(Conv3DVAE(Conv3D(), SEED_SIZE)) == encoder + linear + decoder == 23_936_545


def test_stride_1_makes_the_published_linear_layers():
    """The published code has 13824 features for its 21^3 cubes, written into it as a number."""
    cited = Conv3D(stride=1, widths=(32, 64, 128, 256, 512, 512))
    assert feature_shape(cited, (21, 21, 21)) == (512, 3, 3, 3)
    assert linear_weights(cited, (21, 21, 21)) == 13824 * 64


@pytest.mark.parametrize(("stride", "shape"), [(1, (12, 11, 10)), (2, (8, 16, 24))])
def test_linear_layers_match_their_closed_form(stride, shape):
    cfg = Conv3D(stride=stride, widths=(2, 3, 5), latent_size=7)
    model = Conv3DVAE(cfg, shape)
    linear = (model.to_mean, model.to_logvar, model.from_latent)
    assert [layer.weight.numel() for layer in linear] == [linear_weights(cfg, shape)] * 3
    assert sum(parameters(layer) for layer in linear) == linear_parameters(cfg, shape)


@pytest.mark.parametrize(("stride", "shape"), [(1, (12, 11, 10)), (2, (8, 16, 24))])
def test_features_are_where_the_formula_puts_them(stride, shape):
    cfg = Conv3D(stride=stride, widths=(2, 3, 5), latent_size=7)
    model = Conv3DVAE(cfg, shape)
    features = model.encoder(torch.zeros(2, 1, *shape))
    assert features.shape[1:] == feature_shape(cfg, shape)
    assert model.decoder(features).shape == (2, 1, *shape)


def test_stride_1_on_a_ct_group_is_refused_before_anything_is_allocated(monkeypatch):
    def no_layer(*_args, **_kwargs):
        raise AssertionError("a layer was built")

    for layer in ("Linear", "Conv3d", "ConvTranspose3d"):
        monkeypatch.setattr(nn, layer, no_layer)
    cfg = Conv3D(stride=1)
    assert linear_weights(cfg, SEED_SIZE) == 46 * 238 * 238 * 512 * 64  # every convolution takes 3 voxels off each axis
    assert linear_weights(cfg, SEED_SIZE) == pytest.approx(8.5e10, rel=0.01)
    with pytest.raises(DoesNotFit, match=r"8\.5e\+10 weights each need 4,\d+ GB to train; set model\.stride=2"):
        Conv3DVAE(cfg, SEED_SIZE)


def test_a_volume_smaller_than_the_kernels_is_refused():
    with pytest.raises(ConfigError, match=r"16 x 64 x 64 is too small; make every side of data\.shape at least 19"):
        Conv3DVAE(Conv3D(stride=1), (16, 64, 64))


def test_batch_norm_with_a_single_value_is_named():
    model = Conv3DVAE(SMALL, (8, 8, 8))
    with pytest.raises(ConfigError, match=r"autoencoder\.batch=2"):
        model.encode(torch.zeros(1, 1, 8, 8, 8))
    assert model.eval().encode(torch.zeros(1, 1, 8, 8, 8))[0].shape == (1, 1, 6)


@pytest.mark.parametrize("shape", [(16, 24, 32), (8, 16, 8), (24, 8, 16)])
def test_shapes(shape):
    model = Conv3DVAE(SMALL, shape)
    mean, logvar = model.encode(torch.zeros(2, 1, *shape))
    assert mean.shape == logvar.shape == (2, *model.latent_shape) == (2, 1, 6)
    assert model.decode(mean).shape == (2, 1, *shape)
    assert model.spatial is False


def test_logvar_stays_in_its_range(model, volume):
    with torch.no_grad():
        model.to_logvar.weight.mul_(1e6)
    logvar = model.encode(volume)[1]
    assert logvar.min() == -30
    assert logvar.max() == 20


def objective(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    mean, logvar = model.encode(x)
    z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    return (model.decode(z) - x).square().mean()


def test_gradient_reaches_every_parameter(model, volume):
    objective(model, volume).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert math.isfinite(parameter.grad.sum()), name
        assert parameter.grad.abs().sum() > 0, name


def test_the_decoder_uses_the_latent(model):
    """The published `decode` starts behind the dense layer and so never sees a latent; ours does."""
    model.eval()
    with torch.no_grad():
        apart = (model.decode(torch.ones(1, 1, 6)) - model.decode(-torch.ones(1, 1, 6))).abs().mean()
    assert apart > 1e-4


def test_one_volume_can_be_learned(model):
    x = torch.full((1, 1, 16, 24, 32), -1.0)
    x[..., 6:18, 8:24] = 0.0  # a body in air
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = objective(model, x).item()
    for _ in range(40):
        optimizer.zero_grad()
        objective(model, x).backward()
        optimizer.step()
    assert objective(model, x).item() < min(0.5 * first, 0.5 * x.var().item())  # x.var(): the best constant


def test_eval_is_deterministic_and_blind_to_the_batch(model, volume):
    model.eval()
    z = model.encode(volume)[0]
    assert torch.equal(z, model.encode(volume)[0])
    torch.testing.assert_close(model.encode(volume[:1])[0], z[:1])  # running statistics, not the batch's
    assert torch.equal(model.decode(z), model.decode(z))
