"""Classical priors over the latents of a trained autoencoder: normal, gaussian, mixture.

Shapes:  N training volumes   P = prod(latent_shape) numbers per volume   R rank   K mixture components

An autoencoder turns its training volumes into posteriors N(m_i, diag(v_i)); what a prior has to match is their average,
the aggregate posterior. Its covariance is cov(m) + diag(mean v): a low-rank part, because N is small, plus a diagonal
rest. No more is stored: 250 volumes of 70000 numbers take 70 MB where the full covariance would take 20 GB.

A prior is one frozen dataclass of float32 arrays with `fit`, `sample`, `tensors` and `from_tensors`. The caller derives
`rng` from (seed, index), so that volume i of a seed is the same whatever is drawn beside it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from sklearn.mixture import GaussianMixture

Floats = NDArray[np.floating[Any]]
Tensors = dict[str, np.ndarray]

EXPLAINED_VARIANCE = 0.95
MOST_COORDINATES = 64
MOST_COMPONENTS = 8
VOLUMES_PER_COMPONENT = 10  # below this a component can settle on one volume and memorise it
VARIANCE_FLOOR = 1e-4  # of each component, relative to the leading coordinate's variance
BLOCK_NUMBERS = 2**20  # of all volumes, that are in float64 at a time: 8 MiB


@dataclass(frozen=True)
class NormalPrior:
    """N(0, I), what a VAE is trained towards and what the research group sampled."""

    latent_shape: tuple[int, ...]

    @classmethod
    def fit(cls, means: Floats, variances: Floats) -> NormalPrior:
        """Takes the latents' shape and nothing else from posterior `means` and `variances` [N *latent_shape]."""
        return cls(means.shape[1:])

    def sample(self, rng: np.random.Generator) -> Floats:
        """One volume's latent, [*latent_shape]."""
        return rng.standard_normal(self.latent_shape, dtype=np.float32)

    def tensors(self) -> Tensors:
        return {"latent_shape": np.asarray(self.latent_shape, dtype=np.int64)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> NormalPrior:
        return cls(tuple(int(size) for size in tensors["latent_shape"]))


@dataclass(frozen=True)
class GaussianPrior:
    """N(mean, factors^T factors + diag(rest)): the Gaussian with the aggregate posterior's mean and covariance."""

    mean: Floats  # [*latent_shape]
    factors: Floats  # [R *latent_shape], principal directions times their standard deviations
    rest: Floats  # [*latent_shape], variance beyond the factors

    @classmethod
    def fit(cls, means: Floats, variances: Floats) -> GaussianPrior:
        """Posterior `means` and `variances` [N *latent_shape] of N training volumes; exact at any N."""
        axes = _Axes.of(means)
        factors = axes.directions(axes.stds)  # [R P]
        return cls(
            mean=axes.mean.reshape(means.shape[1:]),
            factors=factors.reshape(-1, *means.shape[1:]),
            rest=variances.mean(axis=0, dtype=np.float64).astype(np.float32),
        )

    def sample(self, rng: np.random.Generator) -> Floats:
        """One volume's latent, [*latent_shape]."""
        weights = rng.standard_normal(len(self.factors), dtype=np.float32)  # [R]
        noise = rng.standard_normal(self.mean.shape, dtype=np.float32)
        return self.mean + np.tensordot(weights, self.factors, axes=1) + np.sqrt(self.rest) * noise

    def tensors(self) -> Tensors:
        return {"mean": self.mean, "factors": self.factors, "rest": self.rest}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> GaussianPrior:
        return cls(tensors["mean"], tensors["factors"], tensors["rest"])


@dataclass(frozen=True)
class MixturePrior:
    """A Gaussian mixture over the leading principal coordinates, plus a diagonal Gaussian for all the rest."""

    mean: Floats  # [*latent_shape]
    directions: Floats  # [R *latent_shape], orthonormal
    rest: Floats  # [*latent_shape], variance beyond the coordinates
    weights: Floats  # [K]
    centres: Floats  # [K R]
    choleskies: Floats  # [K R R], lower triangles of the components' covariances

    @classmethod
    def fit(cls, means: Floats, variances: Floats) -> MixturePrior:
        """Posterior `means` and `variances` [N *latent_shape] of N training volumes.

        Coordinates: the fewest principal ones with 95 % of the variance, at most 64. Components: 1 to 8, and full or
        diagonal covariances, by the Bayesian information criterion (Schwarz 1978).
        """
        latent_shape = means.shape[1:]
        axes = _Axes.of(means)
        axes = axes.first(_coordinates_needed(axes.stds))
        directions = axes.directions(np.ones_like(axes.stds))  # [R P]
        within = np.einsum("rp,rp,r->p", directions, directions, np.square(axes.stds))
        beyond = (axes.variances() - within).clip(0)  # variance of each number that the coordinates leave out
        weights, centres, choleskies = _fit_mixture(axes.coordinates)
        rest = variances.mean(axis=0, dtype=np.float64) + beyond.reshape(latent_shape)
        return cls(
            mean=axes.mean.reshape(latent_shape),
            directions=directions.reshape(-1, *latent_shape),
            rest=rest.astype(np.float32),
            weights=weights.astype(np.float32),
            centres=centres.astype(np.float32),
            choleskies=choleskies.astype(np.float32),
        )

    def sample(self, rng: np.random.Generator) -> Floats:
        """One volume's latent, [*latent_shape]."""
        component = int(np.searchsorted(np.cumsum(self.weights[:-1]), rng.random(), side="right"))
        noise = rng.standard_normal(self.centres.shape[1], dtype=np.float32)  # [R]
        coordinates = self.centres[component] + self.choleskies[component] @ noise
        rest = np.sqrt(self.rest) * rng.standard_normal(self.mean.shape, dtype=np.float32)
        return self.mean + np.tensordot(coordinates, self.directions, axes=1) + rest

    def tensors(self) -> Tensors:
        return dict(vars(self))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> MixturePrior:
        names = ("mean", "directions", "rest", "weights", "centres", "choleskies")
        return cls(*(tensors[name] for name in names))


ClassicalPrior = NormalPrior | GaussianPrior | MixturePrior
PRIORS: dict[str, type[ClassicalPrior]] = {"normal": NormalPrior, "gaussian": GaussianPrior, "mixture": MixturePrior}


@dataclass(frozen=True)
class _Axes:
    """Principal axes of volumes, R <= N - 1 of them, the longest first.

    By way of the N x N inner products, some numbers of all volumes at a time in float64. A singular value decomposition would
    hold several copies of all volumes.
    """

    rows: Floats  # [N P]
    mean: Floats  # [P]
    lengths: Floats  # [R], singular values
    shares: Floats  # [N R], orthonormal: of each volume in each axis

    @classmethod
    def of(cls, means: Floats) -> _Axes:
        rows = np.asarray(means, dtype=np.float32).reshape(len(means), -1)
        axes = cls(rows, rows.mean(axis=0, dtype=np.float64).astype(np.float32), np.empty(0), np.empty((len(rows), 0)))
        products = np.zeros((len(rows), len(rows)))
        for _, centred in axes._blocks():
            products += centred @ centred.T
        squares, shares = np.linalg.eigh(products)  # ascending
        lengths = np.sqrt(squares[::-1].clip(0))
        noise_floor = lengths[0] * max(rows.shape) * np.finfo(np.float32).eps
        rank = min(len(rows) - 1, int((lengths > noise_floor).sum()))  # centring takes one dimension away
        return replace(axes, lengths=lengths, shares=shares[:, ::-1]).first(rank)

    def first(self, rank: int) -> _Axes:
        return replace(self, lengths=self.lengths[:rank], shares=self.shares[:, :rank])

    @property
    def stds(self) -> Floats:
        """[R] of the volumes along each axis."""
        return self.lengths / math.sqrt(max(1, len(self.rows) - 1))

    @property
    def coordinates(self) -> Floats:
        """[N R] of the volumes."""
        return self.shares * self.lengths

    def directions(self, lengths: Floats) -> Floats:
        """[R P] along each axis, as long as `lengths` [R] say."""
        weights = (self.shares * (lengths / self.lengths)).T  # [R N]
        directions = np.empty((len(weights), self.rows.shape[1]), np.float32)
        for numbers, centred in self._blocks():
            directions[:, numbers] = weights @ centred
        return directions

    def variances(self) -> Floats:
        """[P] of each number over the volumes."""
        sums = [np.square(centred).sum(axis=0) for _, centred in self._blocks()]
        return np.concatenate(sums) / max(1, len(self.rows) - 1)

    def _blocks(self) -> Iterator[tuple[slice, Floats]]:
        """Some numbers of all volumes, less their mean: [N p] in float64."""
        step = max(1, BLOCK_NUMBERS // len(self.rows))
        for start in range(0, self.rows.shape[1], step):
            numbers = slice(start, start + step)
            yield numbers, self.rows[:, numbers].astype(np.float64) - self.mean[numbers]


def _coordinates_needed(stds: Floats) -> int:
    """How many leading coordinates hold EXPLAINED_VARIANCE of the whole, at most MOST_COORDINATES."""
    shares = np.cumsum(stds.astype(np.float64) ** 2)
    if not len(shares):
        return 0
    return min(MOST_COORDINATES, int(np.searchsorted(shares, EXPLAINED_VARIANCE * shares[-1])) + 1)


def _fit_mixture(coordinates: Floats) -> tuple[Floats, Floats, Floats]:
    """Weights [K], centres [K R] and Cholesky factors [K R R] of the mixture with the lowest BIC."""
    rank = coordinates.shape[1]
    if rank == 0:  # one volume, or volumes that are all the same
        return np.ones(1), np.zeros((1, 0)), np.zeros((1, 0, 0))
    scale = float(coordinates.std(axis=0).max())
    scaled = coordinates.astype(np.float64) / scale
    fitted = [_em(scaled, components, kind) for components, kind in _candidates(*scaled.shape)]
    best = min(fitted, key=lambda mixture: mixture.bic(scaled))
    covariances = best.covariances_  # [K R R], or [K R] where diagonal
    if covariances.ndim == 2:
        covariances = covariances[:, :, None] * np.eye(rank)
    return best.weights_, best.means_ * scale, np.linalg.cholesky(covariances) * scale


def _candidates(volumes: int, rank: int) -> list[tuple[int, str]]:
    """Numbers of components and their kind of covariance that so many volumes can support; (1, diag) always.

    A single full component would be the diagonal one again: principal coordinates are uncorrelated.
    """
    most = min(MOST_COMPONENTS, max(1, volumes // VOLUMES_PER_COMPONENT))
    diagonal = [(k, "diag") for k in range(1, most + 1)]
    full = [(k, "full") for k in range(2, most + 1) if volumes >= 4 * k * rank]
    return diagonal + full


def _em(scaled: Floats, components: int, kind: str) -> GaussianMixture:
    """One mixture by expectation maximisation. One that has not converged is still a density that the BIC can judge."""
    from sklearn.exceptions import ConvergenceWarning  # a second of processor time, which drawing and planning do not need
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(components, covariance_type=kind, reg_covar=VARIANCE_FLOOR, n_init=3, max_iter=300, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return mixture.fit(scaled)


CLOSED_FORM: dict[str, type[NormalPrior] | type[GaussianPrior] | type[MixturePrior]] = {
    "normal": NormalPrior,
    "gaussian": GaussianPrior,
    "mixture": MixturePrior,
}
