"""The calibration by place: against numpy, scipy, counted voxels and known distributions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from ctvae.calibration import (
    FILE,
    HALO,
    LUNG_SIGMA,
    Calibration,
    Places,
    band,
    between_slices,
    body,
    curve,
    detail,
    highest,
    level_of,
    smoothed,
    smoothed_within,
)
from ctvae.checkpoint import load, save
from ctvae.errors import ModelError
from ctvae.grain import Grain
from ctvae.models.tone import KNOTS
from ctvae.tiling import tiled
from ctvae.training.calibration import Example, _balanced, _detailed, _settled, fit

SOFT = (-0.16, 0.24)
SHAPE = (24, 32, 40)


def noise(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(seed))


def slab(depth: int = 10) -> Tensor:
    """Air, and from voxel `depth` of W on fat: [1 1 D H W]."""
    x = torch.full((1, 1, *SHAPE), -1.0)
    x[..., depth:] = -0.1
    return x


def ball(radius: float = 10.0) -> Tensor:
    """Fat in air, with an edge of one voxel: [1 1 D H W]."""
    grid = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in SHAPE), indexing="ij")
    distance = radius - np.sqrt(sum(axis**2 for axis in grid))
    return torch.from_numpy(-1 + 0.9 * np.clip(distance + 0.5, 0, 1)).float()[None, None]


def roughness(x: Tensor) -> float:
    """Mean |difference| of neighbours in the body's rim, in the soft tissue window."""
    inside = (Places.of(x, SOFT).rim & body(x))[0, 0].numpy()
    window = x.clamp(*SOFT)[0, 0].numpy()
    steps = []
    for axis in range(3):
        both = np.take(inside, range(1, SHAPE[axis]), axis) & np.take(inside, range(SHAPE[axis] - 1), axis)
        steps.append(np.abs(np.diff(window, axis=axis))[both])
    return float(np.concatenate(steps).mean())


def test_a_curve_is_numpys_interpolation():
    values, y = torch.randn(KNOTS, generator=torch.Generator().manual_seed(0)), torch.linspace(-1.3, 1.3, 977)
    np.testing.assert_allclose(curve(y, values), np.interp(y.numpy(), np.linspace(-1, 1, KNOTS), values.numpy()), atol=1e-4)


@pytest.mark.parametrize("sigma", [0.3, 0.6, 1.0])
def test_smoothing_is_scipys_gaussian(sigma):
    x = noise(1).clamp(max=SOFT[1])
    wanted = ndimage.gaussian_filter(x[0, 0].double().numpy(), sigma, radius=2, mode="nearest")
    np.testing.assert_allclose(smoothed(x, sigma, SOFT)[0, 0], wanted, atol=1e-5)
    assert torch.equal(smoothed(x, 0.0, SOFT), x)


def test_smoothing_within_a_place_is_a_normalised_convolution():
    """Knutsson and Westin 1993: scipy's Gaussian of what lies within, over that of the place."""
    x = noise(1)
    where = noise(2) > 0.3
    inside, values = where[0, 0].double().numpy(), x[0, 0].double().numpy()
    around = {"sigma": 0.8, "radius": 2, "mode": "nearest"}
    wanted = ndimage.gaussian_filter(values * inside, **around) / ndimage.gaussian_filter(inside, **around)
    np.testing.assert_allclose(smoothed_within(x, where, 0.8)[where], wanted[inside > 0], atol=1e-5)
    changed = torch.where(where, x, 9.0)
    torch.testing.assert_close(smoothed_within(changed, where, 0.8)[where], smoothed_within(x, where, 0.8)[where])
    assert torch.equal(smoothed_within(x, where, 0.0), x)


def test_what_is_brighter_than_soft_tissue_is_not_smeared():
    x = torch.full((1, 1, *SHAPE), SOFT[1])
    x[0, 0, 12, 16, 20] = 1.0
    torch.testing.assert_close(smoothed(x, 0.8, SOFT), x)


def test_detail_is_what_scipys_gaussian_takes_of_soft_tissue():
    x = 0.3 * noise(2)
    window = x.clamp(*SOFT)[0, 0].double().numpy()
    wanted = window - ndimage.gaussian_filter(window, 0.6, radius=2, mode="nearest")
    np.testing.assert_allclose(detail(x, SOFT)[0, 0], wanted, atol=1e-6)


@pytest.mark.parametrize("reach", [1, 2, 4])
def test_the_highest_around_is_scipys_filter(reach):
    x = noise(3)
    wanted = ndimage.maximum_filter(x[0, 0].numpy(), 2 * reach + 1, mode="constant", cval=-np.inf)
    np.testing.assert_array_equal(highest(x, reach)[0, 0], wanted)


def test_places_of_a_slab():
    """Voxels 0 to 9 of W are air: 0 to 7 see nothing else within two; the rim goes on for four voxels."""
    places = Places.of(slab(10), SOFT)
    assert places.empty[0, 0, 12, 16].nonzero().flatten().tolist() == list(range(8))
    assert places.rim[0, 0, 12, 16].nonzero().flatten().tolist() == [8, 9, 10, 11]
    assert not places.lung.any()
    assert not places.cavity.any()


def test_a_lung_is_wide_and_an_airway_is_not():
    """Nine voxels wide in the body: a lung, its border with the tissue included. Three: a cavity."""
    for width, is_lung in ((9, True), (3, False)):
        x = torch.full((1, 1, *SHAPE), 0.05)
        x[0, 0, 7 : 7 + width, 10 : 10 + width, 12 : 12 + width] = -0.85
        places, dark = Places.of(x, SOFT), x < SOFT[0]
        found, other = (places.lung, places.cavity) if is_lung else (places.cavity, places.lung)
        assert torch.equal(found, dark)
        assert not other.any()


def test_what_is_next_to_a_cavity_with_air_is_hollow():
    x = torch.full((1, 1, *SHAPE), 0.05)
    x[0, 0, 7:10, 20:23, 22:25] = -0.2  # fat that came out too dark
    assert Places.of(x, SOFT).cavity.any()
    assert not Places.of(x, SOFT).hollow.any()
    x = torch.full((1, 1, *SHAPE), 0.05)
    x[0, 0, 7:10, 10:13, 12:15] = -0.85
    cavity, hollow = (getattr(Places.of(x, SOFT), name)[0, 0].numpy() for name in ("cavity", "hollow"))
    np.testing.assert_array_equal(hollow, ndimage.binary_dilation(cavity, np.ones((3, 3, 3))))
    x = chest(-0.8, -0.9)
    places = Places.of(x, SOFT)
    assert not (places.hollow & (places.lung | places.rim | places.empty)).any()
    assert (places.hollow & ~places.cavity).any()


def stippled(seed: int) -> Example:
    """A ball, and a decoder that knows its outline to half a voxel, under a curve that makes steps of it."""
    real = ball()
    raw = (smoothed(real, 0.7, SOFT) + 0.25 * noise(seed) * Places.of(real, SOFT).rim).clamp(-1.1, 1)
    toned = torch.where(raw < -0.6, -1.0, torch.where(raw > -0.4, -0.1, 4.5 * (raw + 0.6) - 1.0))
    return Example(raw, toned, real, SOFT)


def test_stippled_outlines_become_as_smooth_as_those_of_scans():
    examples = [stippled(seed) for seed in range(3)]
    calibration = fit(examples, SOFT)
    other = stippled(7)
    made, wanted = calibration(other.raw, other.toned), roughness(other.real)
    assert roughness(other.toned) > 1.5 * wanted
    assert roughness(made) == pytest.approx(wanted, rel=0.15)  # of one that it was not fitted to
    assert calibration.sigma > 0.2
    assert (calibration.plane_gain, calibration.depth_gain) == (0, 0)  # dots are no matter of bands
    error = [(x - other.real).square().mean().item() for x in (other.toned, made)]
    assert error[1] < 0.7 * error[0]
    assert torch.equal(made[Places.of(other.toned, SOFT).empty], other.toned[Places.of(other.toned, SOFT).empty])


def test_outlines_that_are_right_are_not_smoothed():
    real = ball()
    assert fit([Example(real, real, real, SOFT)], SOFT).sigma == 0.0


def chest(lung: float, airway: float, seed: int = 0) -> Tensor:
    x = torch.full((1, 1, *SHAPE), 0.05) + 0.01 * noise(seed)
    x[0, 0, 4:18, 4:18, 4:18] = lung + 0.02 * noise(seed + 1, (14, 14, 14))[0, 0]
    x[0, 0, 4:18, 24:27, 30:33] = airway + 0.02 * noise(seed + 2, (14, 3, 3))[0, 0]
    return x


def test_lungs_and_airways_of_one_decoded_value_get_their_own():
    """Both come out at -0.8; a single curve would have to send them to one value."""
    decoded, real = chest(-0.8, -0.8), chest(-0.7, -0.95, seed=5)
    calibration = fit([Example(decoded, decoded, real, SOFT)], SOFT)
    made = calibration(decoded, decoded)
    assert made[0, 0, 4:18, 4:18, 4:18].mean().item() == pytest.approx(-0.7, abs=0.01)
    assert made[0, 0, 4:18, 24:27, 30:33].mean().item() == pytest.approx(-0.95, abs=0.01)
    spread = made[0, 0, 4:18, 4:18, 4:18].std().item()
    assert spread == pytest.approx(0.02, rel=0.2)


def test_a_lattice_in_lungs_goes_and_their_spread_stays():
    real = chest(-0.7, -0.95, seed=5)
    grain = torch.from_numpy(ndimage.gaussian_filter(noise(7)[0, 0].numpy(), 2.0, mode="wrap"))[None, None]
    real = torch.where(real < -0.5, real + 0.3 * grain, real)
    checks = 0.06 * torch.tensor([1.0, -1.0]).repeat(SHAPE[2] // 2)
    decoded = torch.where(real < -0.5, real + checks, real)
    made = fit([Example(decoded, decoded, real, SOFT)], SOFT)(decoded, decoded)

    def lattice(x: Tensor) -> float:
        return (x[0, 0, 6:16, 6:16, 6:16] * checks[6:16].sign()).mean().abs().item()

    assert lattice(decoded) == pytest.approx(0.06, abs=0.005)
    assert lattice(made) < 0.02
    spreads = [x[0, 0, 4:18, 4:18, 4:18].std().item() for x in (made, real)]
    assert spreads[0] == pytest.approx(spreads[1], rel=0.1)
    assert fit([Example(real, real, real, SOFT)], SOFT).lung_sigma == 0  # as rough as scans: left alone


@pytest.mark.parametrize("share", [0.8, 0.35])
def test_detail_that_is_too_weak_gets_the_power_that_it_has_in_scans(share):
    """Of a decoder that has been sharpened, and of one that has not."""
    real = 0.05 + (0.02 if share > 0.5 else 0.06) * noise(9)  # grain would bring what even tissue lacks
    decoded = 0.05 + share * (real - 0.05)
    calibration = fit([Example(decoded, decoded, real, SOFT)], SOFT)
    power = [detail(x, SOFT).square().mean().item() for x in (decoded, calibration(decoded, decoded), real)]
    assert power[0] == pytest.approx(share**2 * power[2], rel=0.01)
    assert power[1] == pytest.approx(power[2], rel=0.03)
    assert fit([Example(real, real, decoded, SOFT)], SOFT).gain == 0.0  # it is never smoothed


def test_bone_that_is_blurred_from_slice_to_slice_gets_its_power_back():
    real = (0.6 + 0.1 * noise(9)).clamp(0.3, 0.95)
    decoded = torch.from_numpy(ndimage.gaussian_filter1d(real.numpy(), 0.4, axis=2, radius=2, mode="nearest"))
    calibration = fit([Example(decoded, decoded, real, SOFT)], SOFT)
    made = calibration(decoded, decoded)
    power = [between_slices(x, SOFT).square().mean().item() for x in (decoded, made, real)]
    assert power[0] < 0.8 * power[2]
    assert power[1] == pytest.approx(power[2], rel=0.05)
    assert (made - real).abs().mean() < 0.6 * (decoded - real).abs().mean()
    assert fit([Example(real, real, real, SOFT)], SOFT).slice_gain == 0
    blurred = torch.from_numpy(ndimage.gaussian_filter1d(real.numpy(), 1.0, axis=2, radius=4, mode="nearest"))
    shown = [(Example(blurred, blurred, real, SOFT), blurred)]
    assert _detailed(shown, Calibration.nothing(SOFT)).slice_gain == 1  # more where soft tissue takes more:
    tissue = 0.08 * noise(10)
    real, blurred = (torch.cat((bone, 0.05 + share * tissue), dim=4) for bone, share in ((real, 1), (blurred, 0.35)))
    found = _detailed([(Example(blurred, blurred, real, SOFT), blurred)], Calibration.nothing(SOFT))
    assert 1 < found.slice_gain <= found.gain
    wanted = real.clamp(SOFT[1], 1.0).double().numpy()
    wanted = wanted - ndimage.gaussian_filter1d(wanted, 0.6, axis=2, radius=2, mode="nearest")
    np.testing.assert_allclose(between_slices(real, SOFT), wanted, atol=1e-5)


def test_a_band_is_what_lies_between_two_of_scipys_gaussians():
    x = 0.3 * noise(2)
    window = x.clamp(*SOFT)[0, 0].double().numpy()
    for axes in ((0, 1, 2), (1, 2), (0,)):
        near, far = window, window
        for axis in axes:
            near = ndimage.gaussian_filter1d(near, 0.8, axis, radius=3, mode="nearest")
            far = ndimage.gaussian_filter1d(far, 1.8, axis, radius=5, mode="nearest")
        np.testing.assert_allclose(band(x, SOFT, axes)[0, 0], near - far, atol=1e-6)


def test_bands_get_the_power_that_they_have_in_scans():
    """A decoder that makes what lies between both Gaussians too strong in plane and too weak along D."""
    smooth = torch.from_numpy(ndimage.gaussian_filter(noise(9)[0, 0].numpy(), 1.0, mode="wrap"))[None, None]
    real = 0.05 + 0.03 * smooth / smooth.std()
    decoded = real + 0.15 * band(real, SOFT, (1, 2)) - 0.1 * band(real, SOFT, (0,))
    calibration = _balanced([(Example(decoded, decoded, real, SOFT), decoded)], Calibration.nothing(SOFT))
    assert calibration.plane_gain < -0.05
    assert calibration.depth_gain > 0.03
    made = calibration(decoded, decoded)
    for axes in ((1, 2), (0,)):
        before, now, wanted = (band(x, SOFT, axes).square().mean().sqrt().item() for x in (decoded, made, real))
        assert abs(now / wanted - 1) < 0.1 * abs(before / wanted - 1)
    assert (made - real).abs().mean() < 0.3 * (decoded - real).abs().mean()
    right = _balanced([(Example(real, real, real, SOFT), real)], Calibration.nothing(SOFT))
    assert abs(right.plane_gain) + abs(right.depth_gain) < 1e-6


def test_values_of_each_place_are_those_of_scans_after_all_that_follows_the_first_curves():
    """Detail that grows stretches the values of outlines, and of lungs beside tissue; at the end they are as they were."""
    examples = []
    for seed in range(4):
        outline = torch.where(noise(seed) > 0, ball(), ball(9.0))
        real = outline + 0.1 * noise(seed + 10) * (outline > -0.9)
        real[0, 0, 8:16, 10:22, 12:26] = -0.5 + 0.2 * noise(seed + 20, (8, 12, 14))[0, 0]
        examples.append(Example(real, real, real, SOFT))
    shown = [(e, e.real) for e in examples]
    plain = replace(Calibration.nothing(SOFT), gain=0.9)

    def off(of: Calibration, place: str) -> float:
        """Mean difference of quantiles, those of air left out."""
        where = [getattr(e.places, place) for e in examples]
        made = torch.cat([of.applied(e.raw, e.toned, e.places)[w] for e, w in zip(examples, where, strict=True)])
        wanted = torch.cat([e.real[w] for e, w in zip(examples, where, strict=True)])
        shares = np.linspace((wanted < -0.95).float().mean().item() + 0.02, 0.98, 49)
        return float(np.abs(np.quantile(made.numpy(), shares) - np.quantile(wanted.numpy(), shares)).mean())

    settled = _settled(shown, plain)
    for place in ("rim", "lung", "hollow"):
        assert off(plain, place) > 0.003
        assert off(settled, place) < min(0.002, 0.5 * off(plain, place))  # knots are 0.01 apart
    soft = ~(examples[0].places.rim | examples[0].places.lung | examples[0].places.hollow)
    made, before = (of.applied(examples[0].raw, examples[0].toned, examples[0].places) for of in (settled, plain))
    assert torch.equal(made[soft], before[soft])


def test_places_that_no_scan_has_have_no_curve():
    x = 0.05 + 0.02 * noise(1)
    calibration = _settled([(Example(x, x, x, SOFT), x)], Calibration.nothing(SOFT))
    assert calibration.after is not None
    for values in calibration.after:
        torch.testing.assert_close(values, torch.linspace(-1, 1, KNOTS))


def flat(level: float, seed: int) -> Tensor:
    """Soft tissue about a level, fat 0.12 below it, air and bone, a quarter of W each."""
    x = torch.cat([torch.full((1, 1, 24, 32, 10), value) for value in (-1.0, level - 0.12, level, 0.7)], dim=4)
    return x + 0.004 * noise(seed)


def test_soft_tissue_gets_the_level_of_its_own_scan_back():
    """Decoders that halve how far levels are from their mean; the median is numpy's."""
    levels = np.linspace(0.0, 0.08, 9)
    examples = [Example(*2 * (flat(0.04 + 0.5 * (level - 0.04), 1),), flat(level, 2), SOFT) for level in levels]
    values = examples[0].real.numpy()
    assert examples[0].real_level == pytest.approx(np.median(values[(values > -0.035) & (values < 0.115)]), abs=1e-6)
    calibration = replace(fit(examples, SOFT), gain=0.0, slice_gain=0.0, plane_gain=0.0, depth_gain=0.0, dots=None)
    assert calibration.level == pytest.approx(0.04, abs=0.002)
    assert calibration.level_gain == pytest.approx(1.0, abs=0.05)
    decoded = flat(0.06, 3)
    made = calibration(decoded, decoded, level_of(decoded, SOFT))
    soft, fat, bone = ((0, 0, slice(6, -6), slice(6, -6), slice(a, b)) for a, b in ((22, 29), (15, 19), (32, 39)))
    assert made[soft].mean().item() == pytest.approx(0.08, abs=0.003)
    assert (made - decoded)[fat].mean().item() == pytest.approx(0.02, abs=0.003)  # it moves along
    torch.testing.assert_close(made[bone], decoded[bone], atol=1e-5, rtol=0)
    torch.testing.assert_close(calibration(decoded, decoded)[soft], decoded[soft], atol=1e-5, rtol=0)  # of a patch
    assert fit(examples[:7], SOFT).level_gain == 0.0  # too few for a line
    assert fit([Example(e.real, e.real, e.raw, SOFT) for e in examples], SOFT).level_gain == 0.0  # never nearer to the mean


def test_a_volume_without_soft_tissue_has_no_level():
    assert level_of(torch.full((1, 1, 4, 4, 4), -1.0), SOFT) is None


def test_a_file_gives_the_same(tmp_path):
    calibration = fit([stippled(0)], SOFT)
    calibration.save(tmp_path / FILE)
    example = stippled(1)
    made = calibration(example.raw, example.toned)
    torch.testing.assert_close(Calibration.load(tmp_path / FILE)(example.raw, example.toned), made)
    assert Calibration.load(tmp_path / FILE).grain is None
    grain = Grain(noise(1, (7, 7, 7))[0, 0], noise(2, (7, 7, 7))[0, 0], torch.linspace(0.5, 1.5, 11))
    replace(calibration, grain=grain).save(tmp_path / FILE)
    for name, values in vars(Calibration.load(tmp_path / FILE).grain).items():
        assert torch.equal(values, getattr(grain, name))


def test_a_file_of_before_smooths_no_lungs_and_moves_no_levels(tmp_path):
    newer = {"lung_sigma": LUNG_SIGMA, "slice_gain": 0.5, "level": -0.04, "level_gain": 1.0}
    newer |= {"plane_gain": -0.1, "depth_gain": 0.1}
    replace(fit([stippled(0)], SOFT), **newer).save(tmp_path / FILE)
    known = Calibration.load(tmp_path / FILE)
    assert {name: getattr(known, name) for name in newer} == newer
    tensors, told = load(tmp_path / FILE)
    of_before = {name: tensor for name, tensor in tensors.items() if name not in ("after", "dots")}
    save(tmp_path / FILE, of_before, {name: value for name, value in told.items() if name not in newer})
    before = Calibration.load(tmp_path / FILE)
    assert [getattr(before, name) for name in newer] == [0, 0, 0, 0, 0, 0]
    assert before.after is None
    assert before.dots is None


@pytest.mark.parametrize(
    ("curves", "meta"),
    [
        ({"rim": torch.zeros(3)}, {}), ({"lung": torch.full((KNOTS,), torch.nan)}, {}), ({}, {"sigma": -1.0}),
        ({}, {"gain": "much"}), ({}, {"soft": [0.2, -0.1]}), ({}, {"soft": None}),
        ({"grain.soft": torch.zeros(7, 7, 7)}, {}),
        ({f"grain.{name}": torch.zeros(3) for name in ("soft", "lung", "strengths")}, {}),
        ({}, {"lung_sigma": "wide"}), ({}, {"level": -1.5}), ({}, {"level_gain": -0.5}), ({}, {"plane_gain": -1.5}),
        ({"after": torch.zeros(2, KNOTS)}, {}), ({"after": torch.full((3, KNOTS), torch.inf)}, {}),
        ({"dots": torch.zeros(4, KNOTS)}, {}),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_line(tmp_path, curves, meta):
    fit([stippled(0)], SOFT).save(tmp_path / FILE)
    tensors, told = load(tmp_path / FILE)
    save(tmp_path / FILE, {**tensors, **curves}, {**told, **meta})
    with pytest.raises(ModelError, match=FILE):
        Calibration.load(tmp_path / FILE)


@pytest.mark.parametrize("seed", range(6))
def test_what_lies_beyond_the_halo_does_not_matter(seed):
    """Volumes of coarse noise that have all places; slabs of three slices with their halo, and the whole."""
    shape = (60, 24, 24)
    grain = ndimage.gaussian_filter(noise(seed, shape)[0, 0].numpy(), (3, 2, 2))
    x = torch.from_numpy(0.5 * grain / grain.std() - 0.8).clamp(-1, 0.3)[None, None]
    where = Places.of(x, SOFT)
    assert all(place.any() for place in (where.empty, where.rim, where.lung, where.cavity))
    knots = torch.linspace(-1, 1, KNOTS)
    calibration = Calibration(knots - 0.1, 0.8 * knots, 0.5 * knots, 0.6, 0.5, SOFT, lung_sigma=0.8, slice_gain=0.7)
    after = torch.stack((0.9 * knots, knots + 0.1, 0.7 * knots))
    calibration = replace(calibration, plane_gain=-0.2, depth_gain=0.3, after=after, dots=(0.5 * knots - 0.5).expand(8, -1))
    one = (1, 1, 1)
    taps = noise(seed + 20, (2, 7, 7))[0, 0].repeat(1, 4, 1)[:, :7] * 0.01
    calibration = replace(calibration, grain=Grain(*taps[:, None].expand(2, 7, 7, 7).unbind(), torch.ones(2)))
    white = noise(seed + 30, shape)
    both = torch.cat((x, white), dim=1)

    def apply(part: Tensor) -> Tensor:
        return calibration(part[:, :1], part[:, :1], None, part[:, 1:])

    pieces = tiled(apply, both, factor_in=one, factor_out=one, tile=(3, 24, 24), halo=(HALO, 0, 0))
    torch.testing.assert_close(pieces, calibration(x, x, None, white), atol=1e-6, rtol=0)
    assert not torch.equal(pieces, calibration(x, x))


def test_none_is_none():
    """With curves as they were, no smoothing and no more detail, a volume stays as it is."""
    nothing = Calibration.nothing(SOFT)
    x = stippled(0).raw.clamp(-1, 1)
    torch.testing.assert_close(nothing(x, x), x)
    torch.testing.assert_close(replace(nothing, sigma=0.5)(x, x)[Places.of(x, SOFT).empty], x[Places.of(x, SOFT).empty])
