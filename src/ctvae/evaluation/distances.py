"""How far apart two sets of feature vectors are. Pure functions of standardised arrays [scans features].

Frechet distance (Heusel et al. 2017), with covariances shrunk after Ledoit and Wolf (2004), for sets smaller than the
number of features:

    d^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))

Kernel distance (Binkowski et al. 2018), the unbiased squared MMD under k(x, y) = (x.y / features + 1)^3; below 0 by
chance when both sets come from one source. Precision, recall (Kynkaanniemi et al. 2019), density, coverage (Naeem et
al. 2020) from balls that reach to each scan's k-th neighbour. Classifier two-sample test (Lopez-Paz and Oquab 2017).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NEIGHBOURS = 5
FOLDS = 5
FURTHEST_SIGMA = 10.0
Array = NDArray[np.floating]


def standardise(x: Array, reference: Array) -> Array:
    """x [n F] in standard deviations of `reference` [m F], clipped at +-10 so that no single feature decides alone.

    A feature that does not vary in the reference is measured against a thousandth of its size.
    """
    mean, std = reference.mean(axis=0), reference.std(axis=0)
    std = np.maximum(std, 1e-3 * np.abs(mean) + 1e-9)
    return np.clip((x - mean) / std, -FURTHEST_SIGMA, FURTHEST_SIGMA)


def frechet(x: Array, y: Array) -> float:
    """Squared Frechet distance between Gaussians fitted to x [n F] and y [m F]."""
    from sklearn.covariance import (
        ledoit_wolf,  # scikit-learn and scipy: a second of processor time, which drawing and planning do not need
    )

    return frechet_gaussians(x.mean(axis=0), ledoit_wolf(x)[0], y.mean(axis=0), ledoit_wolf(y)[0])


def frechet_gaussians(mean_x: Array, cov_x: Array, mean_y: Array, cov_y: Array) -> float:
    """Squared Frechet distance between N(mean_x, cov_x) and N(mean_y, cov_y)."""
    values, vectors = np.linalg.eigh(cov_x)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ cov_y @ root)  # of (C1 C2), similar to a symmetric matrix
    trace_of_root = np.sqrt(np.maximum(cross, 0)).sum()
    squared = np.sum((mean_x - mean_y) ** 2) + np.trace(cov_x) + np.trace(cov_y) - 2 * trace_of_root
    return float(max(squared, 0.0))


def kernel_distance(x: Array, y: Array) -> float:
    """Unbiased squared MMD between x [n F] and y [m F] under the cubic polynomial kernel."""
    features = x.shape[1]
    xx, yy, xy = ((a @ b.T / features + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (xx, yy))
    return float(within - 2 * xy.mean())


def neighbourhoods(synthetic: Array, real: Array, k: int = NEIGHBOURS) -> dict[str, float]:
    """precision, recall, density, coverage of synthetic [n F] against real [m F]; each side needs more than k scans."""
    from scipy.spatial.distance import cdist

    between = cdist(synthetic, real)  # [n m]
    real_radius = np.sort(cdist(real, real), axis=1)[:, k]  # column 0 is the scan itself
    synthetic_radius = np.sort(cdist(synthetic, synthetic), axis=1)[:, k]
    in_real_ball = between < real_radius[None]
    return {
        "precision": float(in_real_ball.any(axis=1).mean()),
        "recall": float((between < synthetic_radius[:, None]).any(axis=0).mean()),
        "density": float(in_real_ball.sum(axis=1).mean() / k),
        "coverage": float((between.min(axis=0) < real_radius).mean()),
    }


def classifier_auc(x: Array, y: Array, patients: NDArray | None = None, seed: int = 0) -> float:
    """Cross-validated AUC of a logistic regression that tells x [n F] from y [m F]; 0.5 is blind, 1 tells all apart.

    `patients` [n + m] keeps one patient's scans in one fold; without it each scan is its own.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold

    features = np.concatenate([x, y])
    label = np.repeat([1, 0], [len(x), len(y)])
    groups = np.arange(len(label)) if patients is None else patients
    folds = StratifiedGroupKFold(min(FOLDS, len(x), len(y)), shuffle=True, random_state=seed)
    score = np.zeros(len(label))
    for train, test in folds.split(features, label, groups):
        model = LogisticRegression(C=0.1, class_weight="balanced", solver="liblinear")
        score[test] = model.fit(features[train], label[train]).decision_function(features[test])
    return float(roc_auc_score(label, score))
