"""What the decoder leaves out: closed forms while the network is untrained, tiles against the whole, resuming, files."""

from __future__ import annotations

import json
import math
from functools import partial

import nibabel as nib
import numpy as np
import pytest
import torch

from ctvae import detail as in_use
from ctvae import haar
from ctvae.checkpoint import load as load_weights
from ctvae.config import ConfigError, Detail, load_recipe
from ctvae.detail import DetailDrawer, reach
from ctvae.errors import InputError
from ctvae.export import export
from ctvae.generate import generate, load, reconstruct
from ctvae.models.detail import FIRST_LOG_STD, DetailNetwork, Trunk, told
from ctvae.training import detail as training
from ctvae.training.train import train

STD = math.exp(FIRST_LOG_STD)
PLAIN = partial(torch.autocast, "cpu", enabled=False)


def network(random_exits: bool = False, **settings) -> DetailNetwork:
    torch.manual_seed(0)
    made = DetailNetwork(Detail(guess_widths=(4, 6), widths=(4, 6, 8), precision="fp32", **settings)).eval().requires_grad_(False)
    if random_exits:
        for name, value in made.named_parameters():
            if "out." in name or "conv2" in name:
                value.copy_(0.3 * torch.randn(value.shape))
    return made


def drawer(made: DetailNetwork) -> DetailDrawer:
    return DetailDrawer(made, Detail(guess_widths=(4, 6), widths=(4, 6, 8), precision="fp32"), PLAIN)


def volume(seed: int, shape=(16, 24, 32)) -> torch.Tensor:
    return torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# --- closed forms ---------------------------------------------------------------------------------------------------------------


def test_an_untrained_flow_draws_independent_numbers_of_the_guessed_spread():
    """Between two standard Gaussians the straight path's flow is the identity: noise in a Haar band comes out as it went in."""
    y, use = volume(1), drawer(network())
    noise = torch.randn(1, 8, 8, 12, 16, generator=torch.Generator().manual_seed(5))
    exact = haar.inverse(haar.forward(y) + STD * noise)

    def error(steps: int) -> float:
        return (use.drawn(y, torch.Generator().manual_seed(5), steps + 1) - exact).abs().max().item()

    assert math.log2(error(32) / error(64)) > 1.7  # the solver's order is 2; the path's symmetry gives more
    assert error(8) < 0.05 * STD * noise.abs().max()
    torch.testing.assert_close(use.mean(y), y)


def test_the_likelihood_is_the_normal_distributions(monkeypatch):
    random = torch.Generator().manual_seed(0)
    x, mean, log_std = (torch.randn(50, generator=random) for _ in range(3))
    monkeypatch.setattr(training, "BETA", 0.0)
    exact = -torch.distributions.Normal(mean, log_std.exp()).log_prob(x).mean() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(training.gaussian_nll(x, mean, log_std), exact)


def test_the_weighted_likelihood_is_least_at_the_true_mean_and_spread():
    random = torch.Generator().manual_seed(0)
    x = 0.3 + 0.02 * torch.randn(100_000, generator=random)
    mean, log_std = (torch.tensor(value, requires_grad=True) for value in (0.3, math.log(0.02)))
    training.gaussian_nll(x, mean, log_std).backward()
    assert mean.grad is not None
    assert log_std.grad is not None
    assert abs(mean.grad) < 0.01  # of 1 at a spread away
    assert abs(log_std.grad) < 0.02 * 0.01


def test_the_loss_of_an_untrained_flow_is_what_gaussians_leave():
    """For residuals that are N(0, STD^2) the linear velocity is the best there is: E|v - E v|^2 = 1 / ((1-t)^2 + t^2)."""
    random = torch.Generator().manual_seed(1000)
    y = volume(2, (32, 32, 32))
    x = haar.inverse(haar.forward(y) + STD * torch.randn(1, 8, 16, 16, 16, generator=random))
    goal = training.DetailObjective(network())
    found = torch.stack([goal(x, y, torch.Generator().manual_seed(seed))["flow"] for seed in range(40)])
    times = [training.flow.logit_normal_times(1, seeded_after_noise(seed)) for seed in range(40)]
    exact = torch.stack([1 / ((1 - t).square() + t.square()) for t in times]).flatten()
    torch.testing.assert_close(found, exact, rtol=0.04, atol=0)


def seeded_after_noise(seed: int) -> torch.Generator:
    random = torch.Generator().manual_seed(seed)
    torch.randn(1, 8, 16, 16, 16, generator=random)
    return random


# --- tiles ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_the_reach_is_as_far_as_gradients_come(levels):
    torch.manual_seed(0)
    trunk = Trunk(1, 1, (4,) * levels, timed=False).double()
    for name, value in trunk.named_parameters():
        if "out." in name or "conv2" in name:
            torch.nn.init.normal_(value)
    size = 2 * reach(levels) // 8 * 8 + 16
    x = torch.randn(1, 1, 8, 8, size, dtype=torch.float64, requires_grad=True)
    furthest = 0
    for place in range(size // 2, size // 2 + 2 ** (levels - 1)):
        (slope,) = torch.autograd.grad(trunk(x)[..., place].sum(), x)
        seen = slope.abs().amax((0, 1, 2, 3)).nonzero().flatten()
        furthest = max(furthest, int((seen - place).abs().max()))
    assert furthest <= reach(levels)
    assert furthest >= reach(levels) - 2 ** (levels - 1)


@pytest.mark.parametrize("shape", [(16, 24, 160), (13, 24, 35)])
def test_tiles_make_no_difference(monkeypatch, shape):
    y, use = volume(3, shape), drawer(network(random_exits=True))
    whole = [use.mean(y), use.drawn(y, torch.Generator().manual_seed(1))]
    monkeypatch.setattr(in_use, "TILE_VOXELS", (8, 8, 16))
    tiled = [use.mean(y), use.drawn(y, torch.Generator().manual_seed(1))]
    for a, b in zip(whole, tiled, strict=True):
        assert a.shape == y.shape
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    assert (whole[0] - y).abs().mean() > 1e-3  # the network did something


def test_what_the_flow_is_told_is_of_about_one():
    made = network()
    context = told(*made.condition(volume(4)))
    assert context.shape == (1, 24, 8, 12, 16)
    assert 0.1 < context[:, :8].std() < 3


# --- the stage ------------------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def test_a_resumed_detail_is_bit_equal_and_leaves_the_autoencoder(tiny_dataset, tiny_run, tiny_settings, tmp_path, monkeypatch):
    calls = 0
    plain = training.DetailObjective.forward

    def stopping(self, x, y, random):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Stopped
        return plain(self, x, y, random)

    with monkeypatch.context() as patch:
        patch.setattr(training.DetailObjective, "forward", stopping)
        with pytest.raises(Stopped):
            train(tiny_dataset, tmp_path / "run", overrides=tiny_settings)
    assert (tmp_path / "run" / "decoded" / "of.json").is_file()
    train(tiny_dataset, tmp_path / "run", overrides=tiny_settings)
    for name in ("detail.safetensors", "autoencoder.safetensors"):
        ours, theirs = load_weights(tmp_path / "run" / name)[0], load_weights(tiny_run / name)[0]
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert not (tmp_path / "run" / "decoded").exists()  # it is of no more use


def test_drawn_detail_is_a_function_of_the_seed(tiny_run, tmp_path):
    model = load(tiny_run)
    first, again, other = (model.generate(seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.volume.hu, again.volume.hu)
    assert not np.array_equal(first.volume.hu, other.volume.hu)
    smooth = model.generate(seed=1, detail=False)
    off = first.volume.hu.astype(float) - smooth.volume.hu
    assert 1 < off.std() < 500
    assert (first.provenance["detail"], smooth.provenance["detail"]) == ("drawn", "mean")
    assert first.provenance["detail_sha256"] == smooth.provenance["detail_sha256"]
    (path,) = generate(tiny_run, tmp_path, count=1, seed=1)
    np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj).transpose(2, 1, 0), first.volume.hu)
    with pytest.raises(InputError, match="--no-detail"):
        generate(tiny_run, tmp_path, count=1, seed=1, detail=False)


def test_a_reconstruction_has_the_mean_unless_it_is_asked_to_draw(tiny_run, tiny_dataset, tmp_path):
    scan = next(tiny_dataset.glob("groups/**/*.nii*"), None) or next(tiny_dataset.rglob("*.nii*"))
    paths = [
        reconstruct(tiny_run, scan, tmp_path / "mean.nii.gz"),
        reconstruct(tiny_run, scan, tmp_path / "drawn.nii.gz", drawn=True),
        reconstruct(tiny_run, scan, tmp_path / "again.nii.gz", drawn=True),
    ]
    mean, drawn, again = (np.asarray(nib.load(path).dataobj) for path in paths)
    np.testing.assert_array_equal(drawn, again)
    assert not np.array_equal(mean, drawn)
    assert json.loads((tmp_path / "drawn.json").read_text())["detail"] == "drawn"


def test_an_exported_model_draws_the_same_detail(tiny_run, tmp_path):
    small = load(export(tiny_run, tmp_path / "small"))
    ours, theirs = load(tiny_run).generate(seed=3).volume.hu, small.generate(seed=3).volume.hu
    assert np.abs(ours.astype(int) - theirs).mean() < 3  # HU, of half precision


def test_vector_latents_have_no_detail():
    with pytest.raises(ConfigError, match=r"detail\.enabled: conv3d has no spatial latents"):
        load_recipe("conv3d", ["detail.enabled=true"])
