"""Copies of training scans are found, and nothing else is taken for one."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.stats import binomtest

from ctvae.evaluation import memorization

SHAPE = (16, 24, 24)


def cells(seed: int) -> np.ndarray:
    """A smooth random scan [d h w]: no two are alike."""
    rng = np.random.default_rng([seed, 9])
    return (gaussian_filter(rng.normal(size=SHAPE), 2) * 3000).clip(-1000, 1000).astype(np.int16)


def vectors(seeds) -> dict[str, np.ndarray]:
    return {"voxels": memorization.voxels(np.stack([cells(seed) for seed in seeds]))}


TRAINING = vectors(range(40))
PATIENTS = [f"p{i}" for i in range(40)]
HELD_OUT = vectors(range(100, 120))


def test_scans_of_other_patients_are_no_copies():
    found = memorization.judge(vectors(range(200, 240)), HELD_OUT, TRAINING, PATIENTS)
    assert found["verdict"] == "none found"
    assert found["copies"] == []
    assert found["calibration"] == "held-out patients"


@pytest.mark.parametrize("noise_hu", [0, 30])
def test_two_planted_copies_among_forty_are_found(noise_hu):
    made = np.stack([cells(seed) for seed in range(200, 240)])
    made[7], made[31] = cells(3), cells(22)
    made = (made + np.random.default_rng(1).normal(0, noise_hu, made.shape)).astype(np.int16)
    found = memorization.judge({"voxels": memorization.voxels(made)}, HELD_OUT, TRAINING, PATIENTS)
    assert found["verdict"] == "copies"
    assert found["copies"] == [7, 31]
    assert {(pair["synthetic"], pair["training"]) for pair in found["pairs"][:2]} == {(7, 3), (31, 22)}
    assert found["spaces"]["voxels"]["share_nearer"] == 2 / 40


def test_a_blurred_average_near_to_everyone_is_no_copy():
    average = np.mean([cells(seed) for seed in range(40)], axis=0).astype(np.int16)
    made = np.stack([average] * 10)
    found = memorization.judge({"voxels": memorization.voxels(made)}, HELD_OUT, TRAINING, PATIENTS)
    assert found["spaces"]["voxels"]["share_nearer"] == 1.0  # by distance alone it would be one
    assert found["verdict"] == "none found"


def test_without_held_out_scans_training_patients_calibrate_each_other():
    made = np.stack([*(cells(seed) for seed in range(200, 209)), cells(5)])
    empty = {"voxels": np.empty((0, 0))}
    found = memorization.judge({"voxels": memorization.voxels(made)}, empty, TRAINING, PATIENTS)
    assert found["copies"] == [9]
    assert found["calibration"] == "training patients against each other"


def test_distance_is_root_mean_square_hu_to_the_nearest_patient():
    training = np.stack([np.full(SHAPE, hu, dtype=np.int16) for hu in (0, 100, 110, 300, 400, 500, 600)])
    patients = ["a", "b", "b", "c", "d", "e", "f"]  # b has two groups, which count once
    made = memorization.voxels(np.full((1, *SHAPE), 104, dtype=np.int16))
    close = memorization.closeness(made, memorization.voxels(training), patients)
    assert close.nearest[0] == 1
    assert close.distance[0] == pytest.approx(4, abs=1e-3)
    assert close.ratio[0] == pytest.approx(4 / np.mean([104, 196, 296, 396, 496]), abs=1e-4)


@pytest.mark.parametrize(("hits", "count"), [(0, 12), (5, 20), (20, 20)])
def test_wilson_interval_equals_scipy(hits, count):
    low, high = binomtest(hits, count).proportion_ci(method="wilson")
    assert memorization.wilson(hits, count) == pytest.approx([low, high], abs=1e-4)


def test_too_few_patients_are_said_so():
    assert memorization.judge_scans([], [], [], [])["status"] == "not enough"
