"""Batches of training groups: what they depend on, how they are augmented, which patches and shapes they have."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import Tensor

from ctvae.conditions import OF_GROUP, of_group
from ctvae.config import Data, load_recipe
from ctvae.dataset import Dataset
from ctvae.training.groups import TrainingGroups, in_plane, training_shape

SHAPE = (64, 32, 32)


@pytest.fixture
def dataset(tiny_dataset) -> Dataset:
    return Dataset.open(tiny_dataset)


def groups_of(dataset: Dataset, **settings) -> TrainingGroups:
    return TrainingGroups(dataset, dataset.groups("train"), Data(**settings), SHAPE)


def test_batches_depend_on_seed_and_step_alone(dataset):
    groups = groups_of(dataset, noise_hu=5.0)
    x = groups.batch(2, seed=0, step=5)
    assert x.shape == (2, 1, *SHAPE)
    assert torch.equal(groups_of(dataset, noise_hu=5.0).batch(2, seed=0, step=5), x)
    assert not torch.equal(groups.batch(2, seed=0, step=6), x)
    assert not torch.equal(groups.batch(2, seed=1, step=5), x)


def test_a_plain_group_is_the_datasets_hu(dataset):
    groups = groups_of(dataset)
    hu = np.clip(dataset.hu(groups.groups[0]), -1000, 1000)
    volume = groups.as_volume(0, groups.plain(0)[0])
    np.testing.assert_array_equal(volume.hu, hu)
    np.testing.assert_allclose(volume.affine, groups.groups[0].affine)


def test_an_augmented_group_is_shifted_within_its_limits(dataset):
    groups, seen = groups_of(dataset, max_shift_voxels=(0, 2, 1)), set()
    plain = groups.plain(0)[0]
    for seed in range(40):
        x = groups.augmented(0, torch.Generator().manual_seed(seed))[0]
        shifts = [
            (h, w) for h in range(-2, 3) for w in range(-1, 2)
            if torch.equal(x[:, 4:-4, 4:-4], torch.roll(plain, (-h, -w), (1, 2))[:, 4:-4, 4:-4])
        ]  # fmt: skip
        assert len(shifts) == 1
        seen.add(shifts[0])
    assert len(seen) > 10  # of 15


def disc(centre: tuple[float, float], radius: float) -> Tensor:
    """[1 2 48 64] in -1..1, a smooth disc in air."""
    h, w = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
    distance = ((h - centre[0]).square() + (w - centre[1]).square()).sqrt()
    return (2 * torch.sigmoid(radius - distance) - 1).expand(1, 2, 48, 64)


@pytest.mark.parametrize(("degrees", "zoom"), [(0.0, 1.0), (30.0, 1.0), (-50.0, 1.2), (0.0, 0.8)])
def test_a_group_is_turned_and_magnified_in_plane_about_its_centre(degrees, zoom):
    h, w = 8.0, -3.0  # from the centre, in voxels
    angle = math.radians(degrees)
    moved = zoom * (h * math.cos(angle) + w * math.sin(angle)), zoom * (w * math.cos(angle) - h * math.sin(angle))
    x = in_plane(disc((23.5 + h, 31.5 + w), 6.0), degrees, zoom)
    expected = (2 * torch.sigmoid(6.0 - radii(moved) / zoom) - 1).expand(1, 2, 48, 64)
    assert (x - expected).abs().max() < 0.02  # cubic splines of a soft edge


def test_a_turned_group_keeps_the_power_of_its_detail():
    """Grain as strong from voxel to voxel as that of CT at 4 mm; straight lines between voxels would leave 0.80 of its spread."""
    grain = scipy.ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(1, 2, 96, 96)), (0, 0, 0.6, 0.6))
    grain = torch.from_numpy(grain / grain.std() * 0.2).float()
    for degrees, zoom in ((2.0, 1.0), (6.0, 1.05), (-4.0, 0.93)):
        turned = in_plane(grain, degrees, zoom)[..., 12:-12, 12:-12]
        assert turned.std() / grain.std() == pytest.approx(1.0, abs=0.06)


def radii(centre: tuple[float, float]) -> Tensor:
    h, w = torch.meshgrid(torch.arange(48.0) - 23.5, torch.arange(64.0) - 31.5, indexing="ij")
    return ((h - centre[0]).square() + (w - centre[1]).square()).sqrt()


def test_a_turned_group_keeps_its_amount_of_body_and_says_its_zoom(dataset):
    groups = groups_of(dataset, max_shift_voxels=(0, 0, 0))
    body = (groups.plain(0) > -0.3).sum().item()
    zooms = []
    for seed in range(10):
        x, change = groups.turned(0, torch.Generator().manual_seed(seed), 10.0, 0.1)
        assert 1 / 1.1 <= change.zoom <= 1.1
        zooms.append(change.zoom)
        assert (x > -0.3).sum().item() == pytest.approx(body * change.zoom**2, rel=0.12)
    assert min(zooms) < 0.97
    assert max(zooms) > 1.03


def test_a_mirrored_group_is_the_other_left_for_right_and_says_so(dataset):
    groups, said = groups_of(dataset, max_shift_voxels=(0, 3, 3)), []
    for seed in range(12):
        plain, before = groups.turned(0, torch.Generator().manual_seed(seed), 8.0, 0.1)
        x, change = groups.turned(0, torch.Generator().manual_seed(seed), 8.0, 0.1, mirror=0.5)
        assert change == before._replace(mirrored=change.mirrored)
        assert torch.equal(x, plain.flip(3) if change.mirrored else plain)
        assert of_group(groups.groups[0], change)[OF_GROUP.index("mirrored")] == float(change.mirrored)
        said.append(change.mirrored)
    assert 0 < sum(said) < 12


def test_an_augmented_group_says_how_it_was_turned_and_moved(dataset):
    """What is said, done to the plain group by other means, gives the augmented one."""
    groups = groups_of(dataset, max_shift_voxels=(0, 3, 3))
    moved = set()
    for seed in range(6):
        x, change = groups.turned(0, torch.Generator().manual_seed(seed), 8.0, 0.0)
        moved.add((change.rows, change.columns))
        assert (change.zoom, change.slices) == (1.0, 0)
        there = np.roll(groups.plain(0)[0].numpy(), (change.rows, change.columns), axis=(1, 2))
        turned, other_way = (
            scipy.ndimage.rotate(there, degrees, axes=(1, 2), reshape=False, order=3, mode="grid-constant", cval=-1.0)
            for degrees in (-change.degrees, change.degrees)
        )
        middle = np.s_[:, 6:-6, 6:-6]  # nothing came round from the other side
        off, off_other_way = (np.abs(x[0].numpy() - way)[middle].mean() for way in (turned, other_way))
        assert off < (0.1 * off_other_way if abs(change.degrees) > 0.5 else 0.002)
    assert len(moved) > 3


def test_noise_has_the_deviation_that_the_settings_say(dataset):
    groups = groups_of(dataset, noise_hu=20.0, max_shift_voxels=(0, 0, 0))
    noise = (groups.augmented(0, torch.Generator().manual_seed(0)) - groups.plain(0))[groups.plain(0).abs() < 0.8]
    assert noise.std().item() * 1000 == pytest.approx(20.0, rel=0.05)


def test_patches_hold_a_voxel_of_the_body(dataset):
    groups = groups_of(dataset, patch=(8, 8, 8), max_shift_voxels=(0, 0, 0))
    x = torch.cat([groups.batch(1, seed=0, step=step) for step in range(100)])
    with_body = (x.amax((1, 2, 3, 4)) > 2 * (-300 + 1000) / 2000 - 1).float().mean()
    assert 0.9 <= with_body < 1.0


def test_patches_are_blocks_of_the_group(dataset):
    x = groups_of(dataset, patch=(16, 8, 64), max_shift_voxels=(0, 0, 0)).batch(1, seed=0, step=0)[0, 0]
    assert x.shape == (16, 8, 32)  # no longer than the group
    whole = torch.cat([groups_of(dataset).plain(index) for index in range(len(groups_of(dataset)))])
    blocks = whole.unfold(1, 16, 1).unfold(2, 8, 1)  # [N d h W 16 8]
    assert (blocks == x.permute(2, 0, 1)[None, None, None]).flatten(3).all(-1).any()


@pytest.mark.parametrize(
    ("method", "overrides", "shape"),
    [
        ("wavelet3d", [], (64, 32, 32)),
        ("wavelet3d", ["data.shape=[58,19,33]"], (60, 20, 36)),
        ("conv3d", [], (64, 64, 64)),
        ("slice2d", [], (64, 32, 32)),
    ],
)
def test_the_training_shape_is_on_the_models_grid(dataset, method, overrides, shape):
    assert training_shape(dataset, load_recipe(method, overrides)) == shape
