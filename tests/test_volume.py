"""Geometry against positions in the patient, and the way back against the stored bits."""

from __future__ import annotations

from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest

from ctvae.volume import Volume, block_affine, canonical, plain_affine, position_mm, resampled_affine

SIGNED_ORDERS = [(axes, signs) for axes in permutations(range(3)) for signs in product((1, -1), repeat=3)]


def rotation(degrees_xyz: tuple[float, float, float]) -> np.ndarray:
    x, y, z = np.radians(degrees_xyz)
    about_x = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
    about_y = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    about_z = np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
    return about_x @ about_y @ about_z


def stored_scan(axes: tuple[int, ...], signs: tuple[int, ...], turn=(0.0, 0.0, 0.0)) -> tuple[np.ndarray, np.ndarray]:
    """Random voxels [I J K] and an affine whose voxel axes run along the named patient axes."""
    spacing_mm = np.array([0.7, 1.1, 3.3])
    matrix = np.zeros((3, 3))
    for voxel_axis in range(3):
        matrix[axes[voxel_axis], voxel_axis] = signs[voxel_axis] * spacing_mm[voxel_axis]
    affine = np.eye(4)
    affine[:3, :3] = rotation(turn) @ matrix
    affine[:3, 3] = 11.1, -222.2, 33.3
    return np.random.default_rng(0).integers(-1000, 2000, (4, 5, 6), dtype=np.int16), affine


@pytest.mark.parametrize("turn", [(0.0, 0.0, 0.0), (12.0, -7.0, 20.0)], ids=["straight", "oblique"])
@pytest.mark.parametrize(("axes", "signs"), SIGNED_ORDERS)
def test_every_storage_order_comes_back_bit_for_bit(axes, signs, turn):
    data, affine = stored_scan(axes, signs, turn)
    volume, orientation = canonical(data, affine)
    assert nib.aff2axcodes(volume.affine) == ("L", "P", "S")  # against nibabel's own reading of an affine
    again, affine_again = orientation.restore(volume)
    np.testing.assert_array_equal(again, data)
    np.testing.assert_array_equal(affine_again, affine)
    assert again.dtype == data.dtype


@pytest.mark.parametrize(("axes", "signs"), SIGNED_ORDERS[::5])
def test_voxels_keep_their_place_in_the_patient(axes, signs):
    data, affine = stored_scan(axes, signs, (5.0, 10.0, -15.0))
    data[:] = 0
    data[3, 1, 4] = 1
    volume, _ = canonical(data, affine)
    (index,) = np.argwhere(volume.hu)
    np.testing.assert_allclose(position_mm(volume.affine, tuple(index)), (affine @ [3, 1, 4, 1])[:3], atol=1e-9)


def test_a_crop_goes_back_to_the_stored_axes_at_its_own_place():
    data, affine = stored_scan((2, 0, 1), (1, -1, -1), (5.0, 10.0, -15.0))
    volume, orientation = canonical(data, affine)
    crop = Volume(volume.hu[1:3, 2:, 1:4], block_affine(volume.affine, (1, 2, 1)))
    stored, stored_affine = orientation.restore(crop)
    for index in np.ndindex(crop.shape):
        place = position_mm(crop.affine, index)
        ijk = np.rint(np.linalg.solve(stored_affine, [*place, 1]))[:3].astype(int)
        assert stored[tuple(ijk)] == crop.hu[index]


def test_spacing_is_x_y_z_and_shape_d_h_w():
    volume = Volume(np.zeros((2, 3, 4), np.int16), plain_affine((0.5, 0.6, 2.0), (2, 3, 4)))
    assert volume.spacing_mm == pytest.approx((0.5, 0.6, 2.0))
    assert volume.shape == (2, 3, 4)


def test_plain_affine_is_canonical_with_its_middle_at_the_origin():
    shape = (5, 6, 8)
    affine = plain_affine((0.8, 0.9, 2.5), shape)
    assert nib.aff2axcodes(affine) == ("L", "P", "S")
    corners = [position_mm(affine, corner) for corner in product(*((-0.5, n - 0.5) for n in shape))]
    np.testing.assert_allclose(np.mean(corners, axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(np.ptp(corners, axis=0), (8 * 0.8, 6 * 0.9, 5 * 2.5))


def test_resampling_keeps_the_faces_of_the_volume_in_place():
    affine = stored_scan((0, 1, 2), (-1, -1, 1), (5.0, 10.0, -15.0))[1]
    old, new = (4, 10, 12), (4, 5, 30)
    resampled = resampled_affine(affine, old, new)
    for low_or_high in product((0, 1), repeat=3):
        old_face = tuple(n * f - 0.5 for n, f in zip(old, low_or_high, strict=True))
        new_face = tuple(n * f - 0.5 for n, f in zip(new, low_or_high, strict=True))
        np.testing.assert_allclose(position_mm(resampled, new_face), position_mm(affine, old_face), atol=1e-9)
