"""Distances between sets of vectors against closed forms, brute force and what chance gives."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from ctvae.evaluation import distances


def spd(rng: np.random.Generator, size: int) -> np.ndarray:
    root = rng.normal(size=(size, size))
    return root @ root.T + 0.1 * np.eye(size)


def test_frechet_of_independent_gaussians_is_the_sum_over_axes():
    mean, std = np.array([1.0, -2.0, 0.5]), np.array([2.0, 0.5, 3.0])
    distance = distances.frechet_gaussians(mean, np.diag(std**2), np.zeros(3), np.eye(3))
    assert distance == pytest.approx((mean**2).sum() + ((std - 1) ** 2).sum())


def test_frechet_of_correlated_gaussians_in_two_dimensions():
    rng = np.random.default_rng(0)
    a, b = spd(rng, 2), spd(rng, 2)
    # tr (AB)^(1/2) in two dimensions: sqrt(tr AB + 2 sqrt(det AB))
    expected = np.trace(a) + np.trace(b) - 2 * np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    assert distances.frechet_gaussians(np.zeros(2), a, np.zeros(2), b) == pytest.approx(expected)


def test_frechet_agrees_with_the_matrix_square_root():
    rng = np.random.default_rng(1)
    a, b, mean = spd(rng, 12), spd(rng, 12), rng.normal(size=12)
    expected = mean @ mean + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert distances.frechet_gaussians(mean, a, np.zeros(12), b) == pytest.approx(expected, rel=1e-6)


def test_frechet_of_large_samples_approaches_the_closed_form():
    rng = np.random.default_rng(2)
    mean, std = np.array([1.0, 0.0, -1.0, 0.0]), np.array([1.0, 2.0, 0.5, 1.0])
    x, y = rng.normal(size=(20000, 4)) * std + mean, rng.normal(size=(20000, 4))
    assert distances.frechet(x, y) == pytest.approx(2.0 + 1.0 + 0.25, rel=0.03)


def test_kernel_distance_is_what_the_double_sum_says():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(7, 5)), rng.normal(size=(4, 5)) + 1

    def k(a, b):
        return (a @ b / 5 + 1) ** 3

    xx = np.mean([k(x[i], x[j]) for i in range(7) for j in range(7) if i != j])
    yy = np.mean([k(y[i], y[j]) for i in range(4) for j in range(4) if i != j])
    xy = np.mean([k(a, b) for a in x for b in y])
    assert distances.kernel_distance(x, y) == pytest.approx(xx + yy - 2 * xy)


def test_kernel_distance_between_halves_of_one_set_is_zero_on_average():
    rng = np.random.default_rng(4)
    scans = rng.normal(size=(40, 6))
    values = []
    for _ in range(600):
        order = rng.permutation(40)
        values.append(distances.kernel_distance(scans[order[:20]], scans[order[20:]]))
    # Within and across, every pair of distinct scans is equally likely: the expectation is exactly 0.
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(600)
    assert distances.kernel_distance(scans[:20], scans[20:] + 1) > 5 * np.std(values)


def test_neighbourhoods_of_one_source_and_of_two():
    rng = np.random.default_rng(5)
    real, same, far = rng.normal(size=(200, 4)), rng.normal(size=(200, 4)), rng.normal(size=(200, 4)) + 50
    alike = distances.neighbourhoods(same, real)
    assert alike["density"] == pytest.approx(1.0, abs=0.15)  # Naeem et al. 2020: expectation 1
    assert alike["coverage"] == pytest.approx(1 - 0.5**5, abs=0.05)  # their closed form for equal sizes: about 1 - 2^-k
    assert min(alike["precision"], alike["recall"]) > 0.85
    assert distances.neighbourhoods(far, real) == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}


def test_collapse_lowers_coverage_but_not_precision():
    rng = np.random.default_rng(6)
    real = rng.normal(size=(100, 4))
    collapsed = real[rng.integers(3, size=100)] + 0.01 * rng.normal(size=(100, 4))
    found = distances.neighbourhoods(collapsed, real)
    assert found["precision"] == 1.0
    assert found["coverage"] < 0.4
    assert found["recall"] < 0.2


def test_classifier_is_blind_to_one_source_and_sees_two():
    rng = np.random.default_rng(7)
    same = [distances.classifier_auc(rng.normal(size=(30, 5)), rng.normal(size=(30, 5)), seed=i) for i in range(20)]
    assert np.mean(same) == pytest.approx(0.5, abs=0.07)
    assert distances.classifier_auc(rng.normal(size=(30, 5)) + 3, rng.normal(size=(30, 5))) > 0.99


def test_folds_do_not_split_a_patient():
    rng = np.random.default_rng(8)
    identity = rng.normal(size=(10, 40))  # ten patients, five scans each, whose label a classifier could learn by heart
    x, y = np.repeat(identity[:5], 5, axis=0), np.repeat(identity[5:], 5, axis=0)
    patients = np.repeat(np.arange(10), 5)
    by_heart = distances.classifier_auc(x, y)
    assert by_heart > 0.95
    assert distances.classifier_auc(x, y, patients) < 0.9


def test_standardising_has_the_reference_as_its_unit_and_a_limit():
    rng = np.random.default_rng(9)
    reference = rng.normal(5, 3, size=(50, 2))
    z = distances.standardise(reference, reference)
    np.testing.assert_allclose([z.mean(axis=0), z.std(axis=0)], [[0, 0], [1, 1]], atol=1e-9)
    assert distances.standardise(np.array([[1e9, 5.0]]), reference)[0, 0] == distances.FURTHEST_SIGMA
    constant = np.full((5, 1), 2.0)
    np.testing.assert_array_equal(distances.standardise(constant, constant), np.zeros((5, 1)))
