"""Do the scans have their organs on the right side? A mirrored scan is a patient that does not exist.

For a scan x and its mirror image Mx (left and right exchanged), a difference of any features f(x) - f(Mx) changes its
sign when x is mirrored and is 0 for a scan that is its own mirror image. A logistic regression without intercept learns
from real scans which sign is which ("visual chirality", Lin et al. 2020), and is asked about scans of patients that
it has not seen. How well it does on real ones says how much of left and right there is to see.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from ctvae.evaluation.features import FULL_HU
from ctvae.evaluation.summary import Summary

FOLDS = 5
BLOCK = 4  # cells of the common box averaged into one
Array = NDArray[np.floating]


def differences(scans: Sequence[Summary]) -> Array:
    """f(x) - f(Mx) of each scan: coarse cells, left half minus the mirrored right half, and the network's features."""
    cells = np.stack([np.clip(scan.cells, *FULL_HU) for scan in scans]).astype(np.float32)  # [n d h w]
    n, d, h, w = cells.shape
    coarse = cells.reshape(n, d // BLOCK, BLOCK, h // BLOCK, BLOCK, w // BLOCK, BLOCK).mean(axis=(2, 4, 6))
    halves = (coarse - coarse[..., ::-1])[..., : w // BLOCK // 2].reshape(n, -1)
    seen = np.stack([scan.learned[0] - scan.learned[1] for scan in scans])
    return np.concatenate([halves, seen], axis=1)


def right_way(difference: Array, real: NDArray[np.integer], patients: NDArray, seed: int) -> NDArray[np.bool_]:
    """For each scan, does a classifier of real scans that has not seen its patient say that it is not mirrored? [n]

    `difference` [n F] of all scans; `real` are the indices of the real ones; `patients` [n] names everybody's patient.
    """
    scale = np.sqrt(np.mean(difference[real] ** 2, axis=0)) + 1e-9
    x = np.clip(difference / scale, -5, 5) / np.sqrt(difference.shape[1])
    fold_of = _folds(sorted(set(patients[real])), seed)
    votes, voters = np.zeros(len(x)), np.zeros(len(x))
    for fold in range(FOLDS):
        known = real[[fold_of[patient] != fold for patient in patients[real]]]
        model = LogisticRegression(C=1.0, fit_intercept=False, solver="liblinear", random_state=seed)
        model.fit(np.concatenate([x[known], -x[known]]), np.repeat([1, 0], len(known)))
        unseen = np.array([fold_of.get(patient, fold) == fold for patient in patients])
        votes[unseen] += model.decision_function(x[unseen])
        voters[unseen] += 1
    return votes / voters > 0


def _folds(patients: Sequence[str], seed: int) -> dict[str, int]:
    order = np.random.default_rng([seed, 31]).permutation(len(patients))
    return {patients[int(i)]: place % FOLDS for place, i in enumerate(order)}
