"""Classical priors against Gaussians and clusters whose moments are known."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load, save

from ctvae.priors import PRIORS, GaussianPrior, MixturePrior, NormalPrior

LATENT_SHAPE = (2, 3)


def dense_covariance(prior: GaussianPrior) -> np.ndarray:
    factors = prior.factors.reshape(len(prior.factors), -1)
    return factors.T @ factors + np.diag(prior.rest.ravel())


def draws(prior, count: int, seed: int = 0) -> np.ndarray:
    return np.stack([prior.sample(np.random.default_rng((seed, index))) for index in range(count)]).reshape(count, -1)


@pytest.fixture(scope="module")
def posteriors() -> tuple[np.ndarray, np.ndarray]:
    """Means of a correlated Gaussian and unequal variances, [400 2 3] each."""
    rng = np.random.default_rng(1)
    mixing = rng.normal(size=(6, 6))
    means = rng.normal(size=(400, 6)) @ mixing + np.arange(6)
    variances = rng.uniform(0.1, 0.5, size=(400, 6))
    return means.reshape(-1, *LATENT_SHAPE).astype(np.float32), variances.reshape(-1, *LATENT_SHAPE).astype(np.float32)


@pytest.fixture(scope="module")
def clusters() -> tuple[np.ndarray, np.ndarray]:
    """Two round clusters 10 apart along the first number, 50 and 150 volumes; no posterior variance."""
    rng = np.random.default_rng(2)
    means = 0.5 * rng.normal(size=(200, 4))
    means[:50, 0] += 10
    return means.astype(np.float32), np.zeros((200, 4), np.float32)


def test_normal_has_unit_moments():
    sampled = draws(NormalPrior((4, 5)), 4000)
    np.testing.assert_allclose(sampled.mean(0), 0, atol=5 / np.sqrt(4000))
    np.testing.assert_allclose(np.cov(sampled.T), np.eye(20), atol=6 / np.sqrt(4000))


def test_gaussian_covariance_is_numpys_plus_the_mean_variance(posteriors):
    means, variances = posteriors
    prior = GaussianPrior.fit(means, variances)
    flat = means.reshape(400, -1)
    np.testing.assert_allclose(prior.mean.ravel(), flat.mean(0), rtol=1e-5)
    expected = np.cov(flat.T) + np.diag(variances.reshape(400, -1).mean(0))
    np.testing.assert_allclose(dense_covariance(prior), expected, atol=1e-4)


def test_gaussian_samples_have_its_moments(posteriors):
    prior = GaussianPrior.fit(*posteriors)
    sampled = draws(prior, 6000)
    covariance = dense_covariance(prior)
    std = np.sqrt(np.diag(covariance))
    np.testing.assert_array_less(np.abs(sampled.mean(0) - prior.mean.ravel()), 5 * std / np.sqrt(6000))
    np.testing.assert_array_less(np.abs(np.cov(sampled.T) - covariance), 8 * np.outer(std, std) / np.sqrt(6000))


def test_gaussian_of_few_volumes_keeps_their_exact_covariance():
    means = np.random.default_rng(3).normal(size=(5, 40)).astype(np.float32)
    prior = GaussianPrior.fit(means, np.zeros_like(means))
    assert prior.factors.shape == (4, 40)  # N - 1
    np.testing.assert_allclose(dense_covariance(prior), np.cov(means.T), atol=1e-5)


@pytest.mark.parametrize("kind", [GaussianPrior, MixturePrior])
def test_one_volume_leaves_its_own_posterior(kind):
    mean, variance = np.full((1, 3), 2.0, np.float32), np.full((1, 3), 0.25, np.float32)
    sampled = draws(kind.fit(mean, variance), 4000)
    np.testing.assert_allclose(sampled.mean(0), 2.0, atol=0.05)
    np.testing.assert_allclose(sampled.var(0), 0.25, rtol=0.15)


def test_mixture_finds_the_two_clusters(clusters):
    prior = MixturePrior.fit(*clusters)
    assert len(prior.weights) == 2
    np.testing.assert_allclose(sorted(prior.weights), [0.25, 0.75], atol=1e-3)
    first = draws(prior, 1000)[:, 0]
    assert np.mean(first > 5) == pytest.approx(0.25, abs=0.06)
    assert not np.any((first > 2.5) & (first < 7.5))  # a single Gaussian would put a third of its mass there


def test_mixture_keeps_the_variance_that_its_coordinates_leave_out(clusters):
    means, _ = clusters
    prior = MixturePrior.fit(means, np.full_like(means, 0.5))
    assert len(prior.centres[0]) < 4  # so that something is left out
    expected = means.var(0, ddof=1) + 0.5
    np.testing.assert_allclose(draws(prior, 6000).var(0), expected, rtol=0.15)


def test_mixture_of_one_gaussian_is_one_component(posteriors):
    assert len(MixturePrior.fit(*posteriors).weights) == 1


def test_mixture_keeps_correlation_inside_a_cluster():
    rng = np.random.default_rng(4)
    tilted = rng.normal(size=(400, 2)) @ np.array([[1.0, 0.9], [0.0, 0.3]])
    mirrored = rng.normal(size=(400, 2)) @ np.array([[1.0, -0.9], [0.0, 0.3]]) + [6.0, 0.0]
    means = np.concatenate([tilted, mirrored]).astype(np.float32)
    sampled = draws(MixturePrior.fit(means, np.zeros_like(means)), 3000)
    left = sampled[:, 0] < 3
    assert np.corrcoef(sampled[left].T)[0, 1] == pytest.approx(np.corrcoef(tilted.T)[0, 1], abs=0.05)
    assert np.corrcoef(sampled[~left].T)[0, 1] == pytest.approx(np.corrcoef(mirrored.T)[0, 1], abs=0.05)


@pytest.mark.parametrize("name", PRIORS)
def test_a_stored_prior_draws_the_same(name, posteriors):
    prior = PRIORS[name].fit(*posteriors)
    restored = PRIORS[name].from_tensors(load(save(prior.tensors())))
    for index in range(3):
        drawn = prior.sample(np.random.default_rng((7, index)))
        np.testing.assert_array_equal(restored.sample(np.random.default_rng((7, index))), drawn)
        assert drawn.shape == LATENT_SHAPE
        assert drawn.dtype == np.float32


@pytest.mark.parametrize("name", PRIORS)
def test_the_seed_and_index_decide_the_draw(name, posteriors):
    prior = PRIORS[name].fit(*posteriors)
    again = PRIORS[name].fit(*posteriors)
    np.testing.assert_array_equal(draws(prior, 3, seed=5), draws(again, 3, seed=5))
    assert not np.array_equal(draws(prior, 1, seed=5), draws(prior, 1, seed=6))
