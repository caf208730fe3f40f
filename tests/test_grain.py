"""Grain: covariances against sums written out, filters against known noise, strengths against numpy's quantiles."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from ctvae.blur import blurred
from ctvae.calibration import FILE, Calibration, Places
from ctvae.device import generator
from ctvae.errors import InputError
from ctvae.generate import Model, generate, sidecar
from ctvae.grain import QUANTILES, REACH, SIGHT, Covariance, Grain, filtered, missing, strengths
from ctvae.models.tone import KNOTS
from ctvae.training.calibration import Example, _grained, fit

TAPS = 2 * REACH + 1
SOFT = (-0.16, 0.24)
SHAPE = (24, 32, 40)


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(1, 1, *shape, generator=generator(seed, 0))


def test_a_covariance_is_the_mean_product_of_pairs_that_are_both_inside():
    x, where = noise(0, 9, 10, 11), noise(1, 9, 10, 11) > -0.5
    found = Covariance.of(x, where)
    values, inside = x[0, 0].double().numpy(), where[0, 0].numpy().astype(float)
    around = {"sigma": SIGHT, "radius": 6, "mode": "nearest"}
    values = (values - ndimage.gaussian_filter(values * inside, **around) / ndimage.gaussian_filter(inside, **around)) * inside
    for lag in itertools.product((-3, 0, 2), (-1, 0, 3), (0, 1)):
        here = tuple(slice(max(0, -step), size - max(0, step)) for step, size in zip(lag, values.shape, strict=True))
        there = tuple(slice(max(0, step), size + min(0, step)) for step, size in zip(lag, values.shape, strict=True))
        at = tuple(REACH + step for step in lag)
        assert found.pairs[at].item() == pytest.approx((inside[here] * inside[there]).sum(), abs=1e-6)
        assert found.sums[at].item() == pytest.approx((values[here] * values[there]).sum(), abs=1e-4)
    assert found.variance == pytest.approx((values**2).sum() / inside.sum(), rel=1e-5)
    twice = Covariance.total([found, found])
    assert (twice.voxels, twice.variance) == pytest.approx((2 * inside.sum(), found.variance))


def test_blur_is_scipys():
    x = noise(2, 12, 13, 14)
    wanted = ndimage.gaussian_filter(x[0, 0].double().numpy(), 2.0, radius=6, mode="nearest")
    np.testing.assert_allclose(blurred(x, 2.0, 6)[0, 0], wanted, atol=1e-6)


@pytest.mark.parametrize("taps", [(0.0, 1.0, 0.0), (0.3, 1.0, 0.3), (-0.2, 1.0, -0.2)])
def test_what_is_missing_has_the_covariance_of_the_noise_that_was_left_out(taps):
    """Noise under a known filter on top of what is decoded, itself noise of another kind."""
    size, everywhere = (40, 40, 40), torch.ones(1, 1, 40, 40, 40, dtype=torch.bool)
    along = torch.tensor(taps)
    kernel = torch.zeros(TAPS, TAPS, TAPS)
    kernel[REACH - 1 : REACH + 2, REACH - 1 : REACH + 2, REACH - 1 : REACH + 2] = torch.einsum("i,j,k->ijk", along, along, along)
    decoded = blurred(noise(3, *size), 1.0, 3)
    left_out = filtered(noise(4, *size), kernel)
    real, made = (Covariance.of(x, everywhere) for x in (decoded + left_out, decoded))
    lacking = missing(real, made)
    found, wanted = (Covariance.of(x, everywhere) for x in (filtered(noise(5, *size), lacking), left_out))
    assert lacking.square().sum().item() == pytest.approx(wanted.variance, rel=0.05)
    for axis in range(3):
        at = [REACH] * 3
        at[axis] += 1
        ratios = [float(c.mean[tuple(at)]) / c.variance for c in (found, wanted)]
        assert ratios[0] == pytest.approx(ratios[1], abs=0.15)  # the taper takes a quarter of neighbours' covariance


def test_nothing_is_missing_where_there_is_noise_enough_or_nothing_to_see():
    everywhere, few = torch.ones(1, 1, 20, 20, 20, dtype=torch.bool), torch.zeros(1, 1, 20, 20, 20, dtype=torch.bool)
    few[..., :4, :4, :4] = True
    weak, strong = noise(6, 20, 20, 20), 2 * noise(6, 20, 20, 20)
    assert missing(Covariance.of(strong, everywhere), Covariance.of(weak, everywhere)).any()
    assert not missing(Covariance.of(weak, everywhere), Covariance.of(strong, everywhere)).any()
    assert not missing(Covariance.of(strong, few), Covariance.of(weak, few)).any()
    assert not missing(Covariance.of(strong, ~everywhere), Covariance.of(weak, ~everywhere)).any()


def test_strengths_are_those_of_scans():
    """Of nine scans with known noise on top of the same decoded one; drawn ones are spread like them."""
    everywhere = torch.ones(1, 1, 24, 24, 24, dtype=torch.bool)
    decoded, known = noise(7, 24, 24, 24), np.linspace(0.0, 2.0, 9)
    real = [Covariance.of(decoded + k * noise(8 + n, 24, 24, 24), everywhere) for n, k in enumerate(known)]
    found = strengths(real, [Covariance.of(decoded, everywhere)] * 9)
    wanted = np.quantile(known, np.linspace(0, 1, QUANTILES))
    np.testing.assert_allclose(found / found[-1], wanted / wanted[-1], atol=0.06)
    grain = Grain(torch.zeros(TAPS, TAPS, TAPS), torch.zeros(TAPS, TAPS, TAPS), found)
    drawn = grain.white(torch.Size((4000, 1, 4, 4, 4)), generator(1, 0)).square().mean((1, 2, 3, 4))
    assert drawn.mean().item() == pytest.approx(1.0, rel=0.05)
    assert drawn.sqrt().quantile(0.5).item() == pytest.approx(found[QUANTILES // 2].item(), rel=0.1)
    assert torch.equal(strengths(real[:3], real[:3]), torch.ones(QUANTILES))  # too few to say
    assert torch.equal(strengths(real, real), torch.ones(QUANTILES))  # nothing is lacking


@pytest.fixture(scope="module")
def grained(tiny_run, tmp_path_factory):
    """The tiny run with a calibration that does nothing but give soft tissue and lungs grain."""
    run = shutil.copytree(tiny_run, tmp_path_factory.mktemp("grained") / "run")
    taps = torch.zeros(TAPS, TAPS, TAPS)
    taps[REACH, REACH, REACH] = 0.05
    same = (torch.linspace(-1, 1, KNOTS) for _ in range(3))
    grain = Grain(taps, taps.clone(), torch.linspace(0.5, 1.5, QUANTILES))
    Calibration(*same, sigma=0.0, gain=0.0, soft=(-0.16, 0.24), grain=grain).save(run / FILE)
    return run


def test_samples_have_grain_unless_it_is_not_wanted(grained):
    model = Model(grained)
    asked = ((0, 0.0), (0, None), (1, None), (0, 2.0))
    plain, one, other, double = (model.generate(seed=3, index=index, steps=2, grain=grain) for index, grain in asked)
    latent = model.draw("flow", 3, 0, 2).latent
    np.testing.assert_array_equal(plain.volume.hu, model.decode(latent))
    np.testing.assert_array_equal(one.volume.hu, model.generate(seed=3, index=0, steps=2).volume.hu)
    inside = (plain.volume.hu > -100) & (plain.volume.hu < 180)
    added = (one.volume.hu - plain.volume.hu)[inside].astype(float)
    assert 20 < added.std() < 80  # HU: half to one and a half times 50
    twice = (double.volume.hu - plain.volume.hu)[inside].astype(float)
    middle = np.abs(twice) < 100  # elsewhere the window ends
    np.testing.assert_allclose(twice[middle], 2 * added[middle], atol=2)
    assert (plain.provenance["grain"], one.provenance["grain"]) == (0.0, 1.0)
    assert other.provenance["index"] == 1
    np.testing.assert_array_equal(one.volume.hu[plain.volume.hu < -990], plain.volume.hu[plain.volume.hu < -990])


def test_reconstructions_have_none(grained, tiny_run):
    with_, without = (Model(run) for run in (grained, tiny_run))
    z = torch.zeros(1, *with_.network.latent_shape)
    np.testing.assert_allclose(with_.decode(z), without.decode(z), atol=1)
    assert np.abs(with_.decode(z, generator(0, 0)) - without.decode(z)).max() > 20


def test_a_folder_says_which_grain_it_has(grained, tmp_path):
    path = generate(grained, tmp_path, count=1, steps=2)[0]
    assert json.loads(sidecar(path).read_text())["grain"] == 1.0
    with pytest.raises(InputError, match="--grain"):
        generate(grained, tmp_path, count=1, steps=2, grain=0.5)
    assert generate(grained, tmp_path, count=1, steps=2, grain=1.0) == [path]


def test_grain_is_the_noise_that_is_missing():
    """Decoders give half of a scan's variance or less; samples with grain have all of it, in the frequencies of scans."""
    smooth = torch.from_numpy(ndimage.gaussian_filter(noise(1, *SHAPE)[0, 0].numpy(), 0.8, mode="wrap"))[None, None]
    decoded = 0.05 + 0.006 * smooth / smooth.std()
    known = (0.5, 1.0, 1.5, 0.8)
    examples = [Example(decoded, decoded, decoded + 0.008 * s * noise(10 + n, *SHAPE), SOFT) for n, s in enumerate(known)]
    calibration = replace(fit(examples, SOFT), gain=0.0, plane_gain=0.0, depth_gain=0.0)
    wanted = 0.008 * np.sqrt(np.mean(np.square(known)))
    assert calibration.grain is not None
    made = calibration(decoded, decoded, None, noise(50, *SHAPE))
    added = (made - decoded)[0, 0, 4:-4, 4:-4, 4:-4]
    assert added.std().item() < 1.15 * wanted  # the gain has brought some of it
    refitted = _grained([(e, e.under(calibration)) for e in examples], calibration)
    added = (refitted(decoded, decoded, None, noise(50, *SHAPE)) - decoded)[0, 0, 4:-4, 4:-4, 4:-4]
    assert added.std().item() == pytest.approx(wanted, rel=0.06)
    for axis in range(3):
        a, b = (added.narrow(axis, start, added.shape[axis] - 1) for start in (0, 1))
        assert abs((a * b).mean() / added.square().mean()) < 0.1  # white, as what is missing is
    torch.testing.assert_close(refitted(decoded, decoded), decoded, atol=1e-4, rtol=0)  # without: as it is


def test_a_decoder_that_lacks_no_noise_gets_no_grain():
    real = 0.05 + 0.02 * noise(3, *SHAPE)
    assert fit([Example(real, real, real, SOFT)] * 4, SOFT).grain is None


def test_lungs_have_grain_of_their_own_and_air_has_none():
    decoded = torch.full((1, 1, *SHAPE), 0.05) + 0.01 * noise(1, *SHAPE)
    inside = (0, 0, slice(4, 20), slice(4, 28), slice(4, 20))
    decoded[inside] = -0.75 + 0.02 * noise(2, *SHAPE)[inside]
    decoded[..., 32:] = -1.0
    real = decoded.clone()
    real[inside] += 0.05 * noise(3, *SHAPE)[inside]
    calibration = _grained([(Example(decoded, decoded, real, SOFT), decoded)], Calibration.nothing(SOFT))
    assert calibration.grain is not None
    assert calibration.grain.lung.square().sum().sqrt().item() == pytest.approx(0.05, rel=0.06)
    assert not calibration.grain.soft.any()
    added = calibration(decoded, decoded, None, noise(4, *SHAPE)) - decoded
    assert added[0, 0, 6:18, 6:26, 6:18].std().item() == pytest.approx(0.05, rel=0.06)
    assert added[..., 22:].abs().max() < 1e-5
    assert Places.of(decoded, SOFT).empty.any()
