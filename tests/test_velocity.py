"""The velocity networks: what they start as, what they see, and that bf16 gradients are right on shallow grids."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ctvae.models.velocity import Attention, Detail, Embedding, UNet, VectorNet, Velocity, coordinates, folded, halved, unfolded
from ctvae.wiener import WienerVelocity

K = 3


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lively(network: nn.Module) -> nn.Module:
    """Every parameter moved off its start, where outputs and gates are zero."""
    random = torch.Generator().manual_seed(5)
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=random)
    return network


def wiener(size: int) -> WienerVelocity:
    return WienerVelocity(noise(size, seed=7), noise(2, size, seed=8), noise(size, seed=9).square() + 0.1)


def unet() -> Velocity:
    return Velocity(UNet(channels=2, conditions=K, widths=(8, 32), blocks=1), wiener(2 * 5 * 6 * 7))


def vector_net() -> Velocity:
    return Velocity(VectorNet(size=6, conditions=K, width=8, blocks=2), wiener(6))


def detailed() -> Velocity:
    whole = UNet(channels=2, conditions=K, widths=(8, 32), blocks=1, fold=True)
    return Velocity(whole, wiener(2 * 5 * 6 * 7), Detail(channels=2, conditions=K, width=8, blocks=1))


SPATIAL = (3, 2, 5, 6, 7)
INPUTS = {"spatial": (unet, SPATIAL), "detailed": (detailed, SPATIAL), "vector": (vector_net, (3, 6))}


@pytest.fixture(params=INPUTS.values(), ids=INPUTS)
def case(request) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    make, shape = request.param
    return make(), noise(*shape)


@torch.no_grad()
def test_the_velocity_starts_as_the_wiener_filters(case):
    network, x = case
    t = torch.rand(3)
    y = network(x, t, noise(3, K))
    assert y.shape == x.shape
    assert torch.equal(y, wiener(x[0].numel())(x, t))


@torch.no_grad()
def test_samples_of_a_batch_do_not_see_each_other(case):
    network, x = case
    lively(network)
    t, c = torch.tensor([0.1, 0.5, 0.9]), noise(3, K)
    y = network(x, t, c)
    one = network(x[1:2], t[1:2], c[1:2])
    assert y.abs().max() > 0.01
    torch.testing.assert_close(y[1:2], one, rtol=0, atol=5e-6 * y.abs().max().item())


@torch.no_grad()
def test_time_and_each_condition_are_seen(case):
    network, x = case
    lively(network)
    y = network(x, torch.full((3,), 0.5), torch.zeros(3, K))
    assert not torch.allclose(network(x, torch.full((3,), 0.51), torch.zeros(3, K)), y, atol=1e-5)
    for condition in range(K):
        told = torch.zeros(3, K)
        told[:, condition] = 1.0
        assert not torch.allclose(network(x, torch.full((3,), 0.5), told), y, atol=1e-5)


@torch.no_grad()
def test_a_withheld_condition_is_not_a_zero(case):
    network, x = case
    lively(network)
    t, c = torch.full((3,), 0.5), torch.zeros(3, K)
    withheld = network(x, t, c.masked_fill(torch.tensor([False, True, False]), math.nan))
    assert withheld.isfinite().all()
    assert not torch.allclose(withheld, network(x, t, c), atol=1e-5)


def test_withheld_conditions_leave_gradients_finite(case):
    network, x = case
    lively(network)
    network(x, torch.rand(3), torch.full((3, K), math.nan)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


def test_times_close_together_have_close_embeddings():
    embedding = Embedding(K)
    t = torch.tensor([0.3, 0.3001, 0.9])
    near, far = (embedding(t, torch.zeros(3, K))[0] - embedding(t, torch.zeros(3, K))[i] for i in (1, 2))
    assert near.norm() < 0.2 * far.norm()


def test_coordinates_run_from_minus_one_to_one():
    found = coordinates(torch.zeros(2, 9, 3, 4, 5))
    assert found.shape == (2, 3, 3, 4, 5)
    assert found[1, 0, :, 2, 3].tolist() == [-1.0, 0.0, 1.0]
    torch.testing.assert_close(found[0, 1, 0, :, 4], torch.tensor([-1, -1 / 3, 1 / 3, 1]))
    assert found[0, 2, 1, 1].tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0]


def test_the_unet_sees_the_whole_volume():
    x = noise(1, 4, 9, 10, 11).requires_grad_()
    network = lively(UNet(channels=2, conditions=K, widths=(8, 32), blocks=1))
    network(x, torch.full((1,), 0.5), torch.zeros(1, K))[0, :, 0, 0, 0].sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().sum((0, 1)) > 0).all()


def test_detail_sees_what_is_near_and_not_where_it_is():
    """Two convolutions of a block, and one before and one after: four voxels to every side."""
    torch.manual_seed(0)
    network = lively(Detail(channels=2, conditions=K, width=8, blocks=1))
    x, t, c = noise(1, 4, 13, 12, 11).requires_grad_(), torch.full((1,), 0.5), torch.zeros(1, K)
    network(x, t, c)[0, :, 6, 6, 5].sum().backward()
    assert x.grad is not None
    seen = (x.grad.abs().sum((0, 1)) > 0).nonzero()
    assert seen.amin(0).tolist() == [2, 2, 1]
    assert seen.amax(0).tolist() == [10, 10, 9]
    with torch.no_grad():
        moved = network(x.roll(1, dims=3), t, c)
        torch.testing.assert_close(moved[..., 6, 7, 5], network(x, t, c)[..., 6, 6, 5])


@torch.no_grad()
def test_detail_corrects_what_the_unet_left():
    """It is asked with the guess of x_1 that filter and U-Net make together."""
    network, x, t, c = detailed(), noise(*SPATIAL), torch.tensor([0.1, 0.5, 0.9]), noise(3, K)
    lively(network)
    alone = Velocity(network.correction, wiener(2 * 5 * 6 * 7))(x, t, c)
    guess = x + (1 - t.view(3, 1, 1, 1, 1)) * alone
    torch.testing.assert_close(network(x, t, c), alone + network.detail(torch.cat((x, guess), dim=1), t, c))


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 2, 5), (2, 3, 4)], ids=str)
def test_the_unet_takes_grids_smaller_than_its_depth(size):
    y = lively(UNet(2, K, widths=(8, 32, 32), blocks=1))(noise(1, 4, *size), torch.rand(1), noise(1, K))
    assert y.shape == (1, 2, *size)
    assert y.isfinite().all()


def test_halving_takes_block_means_and_leaves_single_voxels():
    x = torch.arange(6.0).view(1, 1, 1, 2, 3)
    assert halved(x).tolist() == [[[[[2.0, 3.5]]]]]  # means of 0 1 3 4 and of 2 5


@pytest.mark.parametrize("size", [(4, 6, 8), (1, 3, 5), (5, 4, 7)])
def test_folding_is_undone(size):
    x = noise(2, 3, *size)
    y = folded(x)
    assert y.shape == (2, 24, *(math.ceil(side / 2) for side in size))
    torch.testing.assert_close(unfolded(y, size), x)


def test_folding_keeps_lengths_and_puts_means_first():
    x = noise(2, 3, 4, 6, 8)
    y = folded(x)
    torch.testing.assert_close(y.square().sum(), x.square().sum())
    torch.testing.assert_close(y[:, :3], math.sqrt(8) * nn.functional.avg_pool3d(x, 2))


@torch.no_grad()
@pytest.mark.parametrize("size", [(4, 6, 8), (5, 6, 7), (1, 2, 3)])
def test_a_folded_unet_gives_back_the_latents_grid(size):
    network = lively(UNet(channels=2, conditions=K, widths=(8, 32), blocks=1, fold=True))
    x, t, c = noise(2, 4, *size), torch.tensor([0.2, 0.7]), noise(2, K)
    y = network(x, t, c)
    assert y.shape == (2, 2, *size)
    x[..., -1, -1, -1] += 1
    assert (network(x, t, c) - y)[..., -1, -1, -1].abs().min() > 0


@torch.no_grad()
def test_attention_is_softmax_of_scaled_products():
    attention = lively(Attention(64))
    x = noise(2, 64, 2, 3, 2)
    tokens = attention.norm(x).flatten(2).mT  # [B N C]
    q, k, v = (attention.qkv(tokens)[..., 64 * i : 64 * (i + 1)] for i in range(3))
    heads = []
    for head in (slice(0, 32), slice(32, 64)):
        weights = torch.softmax(q[..., head] @ k[..., head].mT / math.sqrt(32), dim=-1)
        heads.append(weights @ v[..., head])
    expected = x + attention.out(torch.cat(heads, dim=-1)).mT.reshape(x.shape)
    torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_attention_starts_as_the_identity():
    x = noise(1, 64, 2, 3, 2)
    assert torch.equal(Attention(64)(x), x)


def gradients(network: nn.Module, *inputs: torch.Tensor, bf16: bool) -> torch.Tensor:
    network.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = network(*inputs)
    (y.float() * noise(*y.shape, seed=3)).mean().backward()
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


@pytest.mark.parametrize(("kind", "width"), [(UNet, (16, 32, 32)), (Detail, 16)], ids=["U-Net", "detail"])
@pytest.mark.parametrize("size", [(8, 10, 16), (4, 5, 8), (3, 4, 4), (2, 4, 8)], ids=str)
def test_bf16_gradients_are_right_on_shallow_grids(size, kind, width):
    """The wrong ones of oneDNN at a depth of 2 (torch 2.13) differ by their own size, up to infinity."""
    torch.manual_seed(0)
    network = lively(kind(4, K, width, blocks=1)).to(memory_format=torch.channels_last_3d)
    inputs = (noise(4, 8, *size), torch.rand(4), noise(4, K))
    exact, found = (gradients(network, *inputs, bf16=bf16) for bf16 in (False, True))
    assert found.isfinite().all()
    assert (found - exact).norm() < 0.05 * exact.norm()
