"""Real scans spoilt in known ways, judged as if they were synthetic: does each measure move the right way?

An anchor is made from real patients who are not in the reference. The untouched ones say what a perfect generator would
get in the same numbers; the spoilt ones must be caught by the measures that are there to catch them. Reconstructions show
what the autoencoder alone costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from scipy.ndimage import gaussian_filter

from ctvae.evaluation.cohort import Cohort, Scan
from ctvae.volume import Volume

MOST = 16  # scans of each anchor; fewer where the synthetic set is smaller, so that both have the same floors
MOST_RECONSTRUCTED = 8
NOISE_HU = 60.0
Spoil = Callable[[Volume], Volume]


@dataclass(frozen=True, eq=False)
class Anchor:
    """A synthetic side made of real scans. `moves` are the measures that must leave their floor, all of them."""

    name: str
    meaning: str
    scans: list[Scan]
    moves: tuple[str, ...] = ()


def anchors(real: Cohort, size: int, reconstruct: Spoil | None) -> Iterator[Anchor]:
    """Untouched, blurred, noisy, mirrored and, with a model, reconstructed real scans; `size` of each, as far as there are."""
    chosen = sorted(real.others, key=lambda scan: scan.split == "train")  # those that no model has seen come first
    some = chosen[: min(size, MOST)]
    yield Anchor("other real", "real scans of other patients, untouched", _spoilt("other real", some, lambda v: v))
    yield Anchor("blurred", "the same, blurred by 1 voxel", _spoilt("blurred", some, blurred), ("power_spectrum",))
    yield Anchor("noisy", "the same with noise of 60 HU", _spoilt("noisy", some, noisy), ("noise", "power_spectrum"))
    yield Anchor("mirrored", "the same, left and right exchanged", _spoilt("mirrored", some, mirrored), ("handedness",))
    if reconstruct:
        few = some[:MOST_RECONSTRUCTED]
        yield Anchor("reconstructed", "real scans encoded and decoded by the model", _spoilt("reconstructed", few, reconstruct))


def blurred(volume: Volume) -> Volume:
    return Volume(_hu(gaussian_filter(volume.hu.astype(np.float32), 1.0)), volume.affine)


def noisy(volume: Volume) -> Volume:
    """White noise of NOISE_HU; a volume always gets the same."""
    rng = np.random.default_rng([int(np.abs(volume.hu[len(volume.hu) // 2]).sum(dtype=np.int64)), 5])
    return Volume(_hu(volume.hu + rng.normal(0, NOISE_HU, volume.hu.shape)), volume.affine)


def mirrored(volume: Volume) -> Volume:
    return Volume(np.ascontiguousarray(volume.hu[:, :, ::-1]), volume.affine)


def _hu(hu: np.ndarray) -> np.ndarray:
    return np.rint(hu).clip(-1024, 3071).astype(np.int16)


def _spoilt(name: str, scans: Sequence[Scan], spoil: Spoil) -> list[Scan]:
    return [replace(scan, name=f"{name}/{scan.name}", digest=None, load=partial(_loaded, scan, spoil)) for scan in scans]


def _loaded(scan: Scan, spoil: Spoil) -> Volume:
    return spoil(scan.load())
