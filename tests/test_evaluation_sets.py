"""What stands around the measures: chance for several at once, ranking, left and right, odd scans, the network, the viewer."""

from __future__ import annotations

import base64
import re
import statistics
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.networks import nets
from safetensors.torch import save_file
from scipy.ndimage import gaussian_filter

from ctvae import nifti
from ctvae.errors import InputError
from ctvae.evaluation import handedness, medicalnet, network, outliers, ranking, realism
from ctvae.evaluation.features import TEXTURE_NAMES
from ctvae.evaluation.gallery import VIEWED_SIDE, packed
from ctvae.evaluation.grid import body_mask
from ctvae.volume import Volume, plain_affine


def judged(floor: np.ndarray, value: float = 0.0, family: str = "a", spread: float = 0.1) -> realism.Judged:
    """A measure that ought to be low, with this floor, and halves of standard deviation `spread` around its value."""
    low, middle, high = (float(q) for q in np.quantile(floor, (0.025, 0.5, 0.975)))
    distance = float(realism.widths("lower", value, low, middle, high))
    entry = {
        "direction": "lower", "floor": {"low": low, "median": middle, "high": high}, "floor_widths": distance, "family": family,
    }  # fmt: skip
    return realism.Judged(entry, floor, value + np.random.default_rng(3).normal(0, spread, 40))


def test_chance_counts_what_moves_together():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=400)
    together = realism.outside_by_chance([judged(shared) for _ in range(30)])
    apart = realism.outside_by_chance([judged(rng.normal(size=400)) for _ in range(30)])
    assert together["mean"] == apart["mean"] == pytest.approx(30 * 0.025, abs=0.01)  # one-sided: 2.5 % are above
    assert together["most"] == 0  # all thirty at once or none, and all at once is rare
    assert 2 <= apart["most"] <= 3  # binomial(30, 0.025): 95 % have at most 2
    normal = statistics.NormalDist().inv_cdf  # half-widths of one side, 97.5 % of a normal distribution
    assert together["furthest"] == pytest.approx(normal(0.95) / normal(0.975), rel=0.1)
    assert apart["furthest"] == pytest.approx(normal(0.95 ** (1 / 30)) / normal(0.975), rel=0.1)  # the largest of thirty
    assert realism.outside_by_chance([]) is None


def test_the_score_is_the_mean_over_families_of_capped_distances():
    floor = np.linspace(-1, 1, 1001)  # median 0, edge 0.95
    measures = [judged(floor, v, family) for v, family in ((0.95, "a"), (2.85, "a"), (1e6, "b"), (-5, "c"))]
    worse = [judged(floor, 95.0, m.entry["family"]) for m in measures]
    rows = ranking.rank([ranking.Entrant("worse", worse, 0), ranking.Entrant("better", measures, 0)])
    assert [row["name"] for row in rows] == ["better", "worse"]
    assert rows[0]["score"] == pytest.approx(((1 + 3) / 2 + 10 + 0) / 3, abs=1e-6)
    assert rows[1]["score"] == pytest.approx(10)
    assert rows[0]["interval"][0] < rows[0]["score"] < rows[0]["interval"][1]
    assert rows[0]["not_told_from"] == []


def test_what_may_be_chance_is_not_told_apart_and_copies_come_last():
    floor = np.linspace(-1, 1, 1001)
    noisy = [judged(floor, 1.0, spread=0.5)]
    jittered = realism.Judged(noisy[0].entry, floor, 1.01 + np.random.default_rng(8).normal(0, 0.5, 40))
    rows = ranking.rank([ranking.Entrant("a", noisy, 1), ranking.Entrant("b", [jittered], 0)])
    assert [(row["name"], row["not_told_from"]) for row in rows] == [("b", ["a"]), ("a", ["b"])]
    none = realism.Judged({"status": "not enough"})
    assert ranking.rank([ranking.Entrant("a", [none], 0)])[0]["rank"] is None


def bodies(count: int, lateral: float, seed: int) -> list[SimpleNamespace]:
    """Random scans on the common cells; an organ of `lateral` HU sits more or less on the left."""
    rng = np.random.default_rng(seed)
    d, h, w = np.meshgrid(*(np.linspace(-1, 1, n) for n in (24, 48, 48)), indexing="ij")
    scans = []
    for _ in range(count):
        organ = ((d - rng.normal(0, 0.2)) ** 2 + (h - rng.normal(0, 0.1)) ** 2 + (w - 0.4 - rng.normal(0, 0.1)) ** 2) < 0.1
        cells = gaussian_filter(rng.normal(size=(24, 48, 48)), 3) * 2000 + lateral * organ
        scans.append(SimpleNamespace(cells=cells.astype(np.int16), learned=np.zeros((2, 64))))
    return scans


def mirrored(scans: list[SimpleNamespace]) -> list[SimpleNamespace]:
    return [SimpleNamespace(cells=scan.cells[..., ::-1], learned=scan.learned[::-1]) for scan in scans]


@pytest.mark.parametrize(("lateral", "told"), [(300, True), (0, False)])
def test_mirrored_scans_are_told_where_left_and_right_differ(lateral, told):
    real, made = bodies(40, lateral, 1), bodies(20, lateral, 2)
    scans = [*real, *made, *mirrored(made)]
    patients = np.array([f"p{i}" for i in range(len(scans))])
    right = handedness.right_way(handedness.differences(scans), np.arange(40), patients, seed=0)
    if told:
        assert right[:40].mean() > 0.9
        assert right[40:60].mean() > 0.9
    else:
        assert 0.25 < right[:40].mean() < 0.75
    np.testing.assert_array_equal(right[60:], ~right[40:60])  # a mirror image is judged the other way, always


def test_a_patient_is_judged_by_folds_that_have_not_seen_him():
    scans = bodies(40, 0, 3)  # nothing to learn: only by heart could a classifier be right
    everyone = [*scans, *scans]
    patients = np.array([f"p{i}" for i in range(40)] * 2)
    right = handedness.right_way(handedness.differences(everyone), np.arange(40), patients, seed=0)
    np.testing.assert_array_equal(right[40:], right[:40])
    strangers = np.array([*(f"p{i}" for i in range(40)), *(f"q{i}" for i in range(40))])
    assert handedness.right_way(handedness.differences(everyone), np.arange(40), strangers, seed=0)[40:].mean() > 0.9


def measured(spacing_mm: tuple[float, float, float], width_mm: float, seed: int) -> tuple:
    texture = np.random.default_rng(seed).uniform(0.95, 1.05, len(TEXTURE_NAMES)) * 100
    texture[TEXTURE_NAMES.index("body_width_mm")] = width_mm
    return f"s{seed}", spacing_mm, SimpleNamespace(texture=texture)


def test_single_scans_that_stand_out_are_named_and_common_traits_told_once():
    real = [measured((4.0 + 0.05 * i, 4.0, 3.0), 400 + i, i) for i in range(12)]
    made = [measured((4.1, 4.0, 3.0), 405, 50 + i) for i in range(9)]
    assert outliers.stand_out(made, real) == {"status": "ok", "scans": [], "traits": []}
    lost = measured((1.0, 1.0, 1.0), 100, 70)
    found = outliers.stand_out([*made, lost], real)
    assert [odd["name"] for odd in found["scans"]] == ["s70"]
    assert found["scans"][0]["why"][0] == "voxels 1.00 mm wide (real 4 to 4.55)"
    assert "a body 100 mm wide (real 400 to 411)" in found["scans"][0]["why"]
    coarse = [measured((8.0, 4.0, 3.0), 405, i) for i in range(9)]
    found = outliers.stand_out(coarse, real)
    assert (found["scans"], found["traits"]) == ([], ["voxels 8.00 mm wide (real 4 to 4.55)"])
    assert outliers.stand_out(made, real[:5]) == {"status": "not enough", "need": 8, "have": 5}


def block(seed: int) -> np.ndarray:
    """A body with a bone in its front, and noise of 20 HU. [D H W]"""
    hu = np.full((30, 40, 60), -1000.0)
    hu[:, 8:32, 8:50] = 40 + np.random.default_rng(seed).normal(0, 20, (30, 24, 42))
    hu[:, 12:20, 12:20] = 700
    return hu


def test_the_network_that_ships_tells_scans_apart_and_sees_mirror_images():
    hu = block(4)
    scan = network.learned(hu, (5.0, 5.0, 5.0))
    assert scan.shape == (2, network.FEATURES)
    np.testing.assert_allclose(network.learned(hu[..., ::-1].copy(), (5.0, 5.0, 5.0)), scan[::-1], rtol=1e-3, atol=1e-3)
    fine = network.learned(hu.repeat(2, 0).repeat(2, 1).repeat(2, 2), (2.5, 2.5, 2.5))
    np.testing.assert_allclose(fine, scan, rtol=1e-3, atol=1e-3)  # the same body at another voxel size
    other_noise, on_its_front = (network.learned(x, (5.0, 5.0, 5.0)) for x in (block(5), hu[:, ::-1].copy()))
    turned, by_chance = (np.linalg.norm(x[0] - scan[0]) for x in (on_its_front, other_noise))
    assert turned > 3 * by_chance  # an untrained network does not tell them apart
    for flat in (-1000.0, 0.0, 3000.0):
        assert np.isfinite(network.learned(np.full((11, 12, 13), flat), (1.0, 1.0, 1.0))).all()
    assert len(resources.files("ctvae.evaluation").joinpath(network.WEIGHTS).read_bytes()) < 4e6


def test_volumes_for_the_viewer_are_the_scans_and_not_too_large(tmp_path):
    hu = np.random.default_rng(5).integers(-1000, 2000, (20, 30, 40)).astype(np.int16)
    file = tmp_path / "v.nii.gz"
    file.write_bytes(base64.b64decode(packed(Volume(hu, plain_affine((2.0, 2.0, 3.0), hu.shape)))))
    again, _ = nifti.read(file)
    np.testing.assert_array_equal(again.hu, hu)
    assert again.spacing_mm == pytest.approx((2.0, 2.0, 3.0))
    large = Volume(np.zeros((20, 300, 256), dtype=np.int16), plain_affine((1.0, 1.0, 3.0), (20, 300, 256)))
    file.write_bytes(base64.b64decode(packed(large)))
    again, _ = nifti.read(file)
    assert max(again.hu.shape) <= VIEWED_SIDE
    assert again.spacing_mm == pytest.approx((2.0, 300 / VIEWED_SIDE, 3.0))


@pytest.mark.parametrize(("name", "shortcut"), [("resnet10", "B"), ("resnet18", "A"), ("resnet50", "B")])
def test_medicalnet_weights_are_read_once_they_are_safetensors(name, shortcut, tmp_path, monkeypatch):
    """A checkpoint laid out like MedicalNet's, turned into safetensors as the documentation says, gives the features of MONAI's
    own network."""
    torch.manual_seed(0)
    network = getattr(nets, name)(
        spatial_dims=3, n_input_channels=1, feed_forward=False, shortcut_type=shortcut, bias_downsample=False
    ).eval()
    published = {f"module.{key}": value for key, value in network.state_dict().items()}
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": published}, "resnet_10_23dataset.pth")
    page = Path(__file__).parents[1] / "docs" / "evaluation.md"
    (recipe,) = [block for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S) if "torch.load" in block]
    exec(recipe)
    hu = gaussian_filter(np.random.default_rng(1).normal(size=(20, 24, 28)), 2) * 2000
    found = medicalnet.load(tmp_path / "resnet_10_23dataset.safetensors")
    x, body = network_input(hu)
    x = (x - x[body > 0].mean()) / (x[body > 0].std() + 1e-6)
    with torch.inference_mode():
        expected = network(x[None, None])[0].numpy()
    np.testing.assert_allclose(found.features(hu, (5.0, 5.0, 5.0)), expected, rtol=1e-4, atol=1e-5)


def network_input(hu: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(hu.clip(-1000, 1000) / 1000).float(), torch.from_numpy(body_mask(hu.astype(np.float32)))


def test_a_file_that_is_no_medicalnet_is_refused_in_one_line(tmp_path):
    (tmp_path / "text").write_text("nothing")
    torch.save({"layer1.0.conv1.weight": torch.zeros(3)}, tmp_path / "pickle")
    save_file({"layer1.0.conv1.weight": torch.zeros(3)}, tmp_path / "other")
    reasons = {"none": "no such file", "text": "not safetensors", "pickle": "not safetensors", "other": "not the weights"}
    for name, reason in reasons.items():
        with pytest.raises(InputError, match=reason) as caught:
            medicalnet.load(tmp_path / name)
        assert "\n" not in str(caught.value)
