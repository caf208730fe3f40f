"""Synthetic scans against real ones: every measure with its real-against-real floor and its interval.

A measure is a function of two sets of scans. Its value takes the synthetic set and the real reference. Its floor is
what the same function gives when real scans of other patients stand in for the synthetic ones: many random splits of
the real patients into two disjoint sets of the same two sizes. Sizes matter: most of these measures shrink as sets
grow, so a value says little without the floor at its own size. The interval repeats the measure on random halves of
both sets (balanced half-sampling, McCarthy 1969: the bootstrap's variance, without the duplicated scans that upset
nearest-neighbour measures), centred on the value.

Measures of the same scans move together. So split b of the real patients, and half b of each side, is the same for every
measure: then one can count how many measures leave their floor at once when real scans are compared with real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import wasserstein_distance

from ctvae.evaluation import distances, handedness
from ctvae.evaluation.features import FULL_HU, TISSUE_HU
from ctvae.evaluation.similarity import levels, ms_ssim
from ctvae.evaluation.summary import HISTOGRAM_EDGES_HU, Summary

SPLITS = 100
HALVES = 100
CLASSIFIER_SPLITS = 40
INTERVAL = (0.025, 0.975)
DIVERSITY_SCANS = 20
HAND_PATIENTS = 20  # real patients to learn left and right from
TIMES_REAL = "\N{MULTIPLICATION SIGN} real"
SPACES = {"texture": "texture", "layout": "layout", "learned": "learned", "medicalnet": "MedicalNet"}
Indices = NDArray[np.integer]
Direction = Literal["lower", "higher", "target"]
Array = NDArray[np.floating]


@dataclass(frozen=True)
class Measure:
    """One number about two sets of scans, given as indices into all scans."""

    id: str
    title: str
    unit: str
    direction: Direction  # which side of the floor is worse; "target": both are
    need: int  # scans on each side
    meaning: str
    family: str  # measures of one family see the same things
    of: Callable[[Indices, Indices], float]
    repeats: int = SPLITS
    all_real: bool = False  # against every real patient that the floor can spare, not only the held-out reference
    usable: NDArray[np.bool_] | None = None  # scans that have what the measure needs
    bounds: tuple[float, float] = (-np.inf, np.inf)  # of the value, and so of its interval


@dataclass(frozen=True)
class Sides:
    """Indices of the scans: synthetic, real reference, every real patient (reference included)."""

    synthetic: Indices
    reference: Indices
    real: Indices


@dataclass(frozen=True, eq=False)
class Judged:
    """A measure's entry in report.json, and the repeats that it rests on, for statements about several measures."""

    entry: dict[str, Any]
    floor: Array = field(default_factory=lambda: np.empty(0))  # [splits] real against real
    halves: Array = field(default_factory=lambda: np.empty(0))  # [repeats] centred on the value; empty without interval


Floors = dict[tuple[str, int, int], Array]  # by measure and the two sizes: sets of one size share it


def measures(
    scans: Sequence[Summary], real: Indices, sets: Sequence[Indices], patients: Sequence[str], seed: int
) -> Iterator[Measure]:
    """Every realism measure over `scans`, of which `patients` names the patient and `sets` are the synthetic sides."""
    named = np.array(patients)
    yield from _intensity(scans)
    yield from _grain(scans)
    for space, name in SPACES.items():
        vectors = np.stack([np.atleast_2d(getattr(scan, space))[0] for scan in scans])
        if vectors.shape[1] == 0:
            continue  # the user has no weights of it
        yield from _distribution(space, f"{name} features", distances.standardise(vectors, vectors[real]), named, seed)
    yield _handedness(scans, real, named, seed)
    yield from _diversity(scans, [*sets, real], seed)


def judge(measure: Measure, sides: Sides, seed: int, floors: Floors | None = None, interval: bool = True) -> Judged:
    """The measure's value, interval, floor, and whether the value lies within the floor."""
    synthetic, reference, real = (_usable(side, measure) for side in (sides.synthetic, sides.reference, sides.real))
    if measure.all_real:  # as many stand in for the synthetic ones as there are of those, half at most
        size = min(len(synthetic), len(real) // 2)
        reference = _ranked(real, seed, 1)[size:]
    else:
        size = min(len(synthetic), len(real) - len(reference))
    head = {"id": measure.id, "title": measure.title, "unit": measure.unit, "direction": measure.direction}
    head |= {"family": measure.family, "meaning": measure.meaning}
    have = {"synthetic": len(synthetic), "reference": len(reference), "other_real": len(real) - len(reference)}
    if min(len(synthetic), len(reference), size) < measure.need:
        return Judged({**head, "status": "not enough", "need": measure.need, "have": have})
    chosen = np.sort(_ranked(synthetic, seed, 2)[:size])
    value = measure.of(chosen, reference)
    floor = _floor(measure, real, size, len(reference), seed, {} if floors is None else floors)
    low, middle, high = np.quantile(floor, [INTERVAL[0], 0.5, INTERVAL[1]])
    halves = _halves(measure, chosen, reference, value, seed) if interval else np.empty(0)
    entry = {
        **head,
        "status": "ok",
        "value": value,
        "interval": _interval(value, halves) if len(halves) else None,
        "floor": {"median": float(middle), "low": float(low), "high": float(high), "splits": measure.repeats},
        "within_floor": bool(_within(measure.direction, value, low, high)),
        "floor_widths": float(widths(measure.direction, value, low, middle, high)),
        "scans": {"synthetic": size, "reference": len(reference)},
    }
    return Judged(entry, floor, halves)


def outside_by_chance(judged: Sequence[Judged]) -> dict[str, Any] | None:
    """How many of the measures leave their floors at once when real scans are compared with real ones, how far the furthest is.

    Each measure's floor leaves 5 % of its own splits outside, or 2.5 % where only one side is worse; how many it is together
    depends on how much the measures have in common. `most` and `furthest`, in half-widths, hold in 95 % of the splits.
    """
    known = [one for one in judged if len(one.floor)]
    if not known:
        return None
    splits = min(len(one.floor) for one in known)
    outside = [[not _within_floor(one.entry, value) for value in one.floor[:splits]] for one in known]
    count = np.sum(outside, axis=0)  # [splits]
    off = [_off(one.entry, one.floor[:splits]) for one in known]
    furthest = float(np.quantile(np.max(off, axis=0), 0.95))
    most = int(np.quantile(count, 0.95))
    return {"measures": len(known), "splits": splits, "mean": float(count.mean()), "most": most, "furthest": furthest}


def _off(entry: dict[str, Any], values: Array) -> Array:
    floor = entry["floor"]
    return np.asarray(widths(entry["direction"], values, floor["low"], floor["median"], floor["high"]))


def widths(direction: Direction, value: Any, low: float, middle: float, high: float) -> Any:
    """How far values are on the worse side of the floor's median, in half-widths of the floor; 1 is its edge."""
    up, down = (value - middle) / max(high - middle, 1e-12), (middle - value) / max(middle - low, 1e-12)
    return up if direction == "lower" else down if direction == "higher" else np.maximum(up, down)


def _usable(side: Indices, measure: Measure) -> Indices:
    return side if measure.usable is None else side[measure.usable[side]]


def _ranked(side: Indices, seed: int, draw: int) -> Indices:
    """The scans in a random order that is the same for whatever subset is asked about, so that measures share it."""
    order = np.random.default_rng([seed, 3, draw]).random(int(side.max(initial=0)) + 1)
    return side[np.argsort(order[side])]


def _floor(measure: Measure, real: Indices, size: int, reference_size: int, seed: int, floors: Floors) -> Array:
    key = (measure.id, size, reference_size)
    if key not in floors:
        orders = [_ranked(real, seed, 100 + b) for b in range(measure.repeats)]
        floors[key] = np.array([measure.of(o[:size], o[size : size + reference_size]) for o in orders])
    return floors[key]


def _halves(measure: Measure, synthetic: Indices, reference: Indices, value: float, seed: int) -> Array:
    half = [max(len(side) // 2, 1) for side in (synthetic, reference)]
    if min(half) < max(measure.need // 2, 2):
        return np.empty(0)
    draws = range(1000, 1000 + min(measure.repeats, HALVES))
    some = [(_ranked(synthetic, seed, b)[: half[0]], _ranked(reference, seed, b)[: half[1]]) for b in draws]
    repeats = np.array([measure.of(a, b) for a, b in some])
    return np.clip(value + repeats - repeats.mean(), *measure.bounds)


def _interval(value: float, halves: Array) -> list[float]:
    """95 % of the centred halves; the value itself always lies within, however skew they are."""
    low, high = np.quantile(halves, INTERVAL)
    return [float(min(low, value)), float(max(high, value))]


def _within_floor(entry: dict[str, Any], value: float) -> bool:
    return _within(entry["direction"], value, entry["floor"]["low"], entry["floor"]["high"])


def _within(direction: Direction, value: float, low: float, high: float) -> bool:
    return (direction == "higher" or value <= high) and (direction == "lower" or value >= low)


def _intensity(scans: Sequence[Summary]) -> Iterator[Measure]:
    histogram = np.stack([scan.histogram for scan in scans])
    tissue = np.stack([scan.tissue for scan in scans])
    centres = (HISTOGRAM_EDGES_HU[:-1] + HISTOGRAM_EDGES_HU[1:]) / 2

    def histogram_distance(a: Indices, b: Indices) -> float:
        return float(wasserstein_distance(centres, centres, histogram[a].mean(axis=0), histogram[b].mean(axis=0)))

    yield Measure(
        "hu_histogram", "HU histogram distance", "HU", "lower", 3,
        "How far, on average, voxels of the body would have to move in HU to turn one histogram into the other.",
        "intensities", histogram_distance, bounds=(0.0, np.inf),
    )  # fmt: skip
    for index, name in enumerate(TISSUE_HU):
        yield Measure(
            f"tissue_{name}", f"Share of {name} in the body", "points", "target", 3,
            f"Percentage points of the body's voxels that are {name} by HU, more (+) or fewer (-) than in real scans.",
            "intensities", lambda a, b, i=index: float(100 * (tissue[a, i].mean() - tissue[b, i].mean())),  # type: ignore[misc]
        )  # fmt: skip


def _grain(scans: Sequence[Summary]) -> Iterator[Measure]:
    step = np.array([float(scan.step_hu) for scan in scans])
    spectrum = np.stack([scan.spectrum for scan in scans])
    noise = np.stack([scan.noise for scan in scans])
    noise_hu = np.array([float(scan.noise_hu) for scan in scans])
    has_noise = np.isfinite(noise_hu)
    yield Measure(
        "slice_continuity", "Slice-to-slice change", TIMES_REAL, "target", 3,
        "Mean |difference| of neighbouring slices over that of real scans: above 1 the slices do not fit together, "
        "below 1 they are too alike.",
        "grain", lambda a, b: float(step[a].mean() / max(step[b].mean(), 1e-9)),
    )  # fmt: skip
    yield Measure(
        "power_spectrum", "Power spectrum of slices", "dB", "lower", 3,
        "Root mean square difference of the two mean spectra over spatial frequencies: blur and invented "
        "detail both count.",
        "grain", lambda a, b: decibels_apart(spectrum[a], spectrum[b]), bounds=(0.0, np.inf),
    )  # fmt: skip
    yield Measure(
        "noise", "Noise in soft tissue", TIMES_REAL, "target", 3,
        "Standard deviation in small homogeneous patches of soft tissue, over that of real scans.",
        "grain", lambda a, b: float(noise_hu[a].mean() / max(noise_hu[b].mean(), 1e-9)), usable=has_noise,
    )  # fmt: skip
    yield Measure(
        "noise_spectrum", "Noise power spectrum", "dB", "lower", 3,
        "Root mean square difference of the two mean noise spectra in those patches: strength and grain of the noise.",
        "grain", lambda a, b: decibels_apart(noise[a], noise[b]), usable=has_noise, bounds=(0.0, np.inf),
    )  # fmt: skip
    yield Measure(
        "noise_spectrum_worst", "Noise power spectrum, worst frequency", "%", "lower", 3,
        "The same at the frequency where the two mean spectra differ most, the larger over the smaller: 20 is a fifth more.",
        "grain", lambda a, b: percent_at_worst(noise[a], noise[b]), usable=has_noise, bounds=(0.0, np.inf),
    )  # fmt: skip


def decibels_apart(a: Array, b: Array) -> float:
    """Root mean square difference in dB between the mean spectra of a [n bins] and b [m bins]."""
    return float(np.sqrt(np.mean(_decibels(a, b) ** 2)))


def percent_at_worst(a: Array, b: Array) -> float:
    """By how many percent the larger of the two mean spectra [n bins], [m bins] exceeds the other where that is most."""
    return float(100 * (10 ** (np.abs(_decibels(a, b)).max() / 10) - 1))


def _decibels(a: Array, b: Array) -> Array:
    """[bins]"""
    return 10 * (np.log10(np.maximum(a.mean(axis=0), 1e-6)) - np.log10(np.maximum(b.mean(axis=0), 1e-6)))


def _distribution(space: str, name: str, z: Array, patients: NDArray, seed: int) -> Iterator[Measure]:
    yield Measure(
        f"frechet_{space}", f"Frechet distance, {name}", "", "lower", 8,
        "Distance between the two clouds of scans, as Gaussians: 0 when means and spreads agree.",
        space, lambda a, b: distances.frechet(z[a], z[b]), bounds=(0.0, np.inf),
    )  # fmt: skip
    yield Measure(
        f"kernel_{space}", f"Kernel distance, {name}", "", "lower", 8,
        "Unbiased distance between the two clouds without assuming Gaussians; around 0 when they come from one source.",
        space, lambda a, b: distances.kernel_distance(z[a], z[b]),
    )  # fmt: skip
    for kind, meaning in (
        ("precision", "Share of synthetic scans that lie where real ones lie: low when many look like no real scan."),
        ("recall", "Share of real scans that lie where synthetic ones lie: low when kinds of patients are missing."),
        ("density", "How deep among real scans the synthetic ones lie; about 1 for real ones, and not capped there."),
        ("coverage", "Share of real scans with a synthetic one in their neighbourhood: low when the model collapses."),
    ):
        yield Measure(
            f"{kind}_{space}", f"{kind.capitalize()}, {name}", "", "higher", 12, meaning, space,
            lambda a, b, k=kind: distances.neighbourhoods(z[a], z[b])[k],  # type: ignore[misc]
            bounds=(0.0, np.inf if kind == "density" else 1.0),
        )  # fmt: skip
    yield Measure(
        f"classifier_{space}", f"Classifier AUC, {name}", "AUC", "lower", 10,
        "How well a simple classifier tells synthetic from real scans of patients it has not seen: 0.5 is "
        "guessing, 1 is always.",
        space, lambda a, b: distances.classifier_auc(z[a], z[b], patients[np.concatenate([a, b])], seed),
        repeats=CLASSIFIER_SPLITS, all_real=True, bounds=(0.0, 1.0),
    )  # fmt: skip


def _handedness(scans: Sequence[Summary], real: Indices, patients: NDArray, seed: int) -> Measure:
    known = len(set(patients[real])) >= HAND_PATIENTS
    right = np.zeros(len(scans), dtype=bool)
    if known:
        right = handedness.right_way(handedness.differences(scans), real, patients, seed)
    return Measure(
        "handedness", "Left and right as in real scans", "", "higher", 5 if known else HAND_PATIENTS,
        "Share of scans that a classifier of real scans and their mirror images takes for not mirrored: low when left and right "
        "are exchanged. Where it is near one half for real scans too, left and right cannot be told in them.",
        "handedness", lambda a, b: float(right[a].mean()), bounds=(0.0, 1.0),
    )  # fmt: skip


def _diversity(scans: Sequence[Summary], sets: Sequence[Indices], seed: int) -> Iterator[Measure]:
    """Likeness of pairs of samples minus that of pairs of real scans, from at most DIVERSITY_SCANS of each."""
    usable = np.zeros(len(scans), dtype=bool)
    for side in sets:  # each side's choice does not depend on who else is there
        usable[_ranked(side, seed, 4)[:DIVERSITY_SCANS]] = True
    small = {int(i): np.clip(scans[int(i)].cells, *FULL_HU).astype(np.float32) for i in np.flatnonzero(usable)}
    known: dict[tuple[int, int], float] = {}

    def likeness(i: int, j: int) -> float:
        pair = (min(i, j), max(i, j))
        if pair not in known:
            known[pair] = ms_ssim(small[pair[0]], small[pair[1]], FULL_HU[1] - FULL_HU[0])
        return known[pair]

    def to_others(indices: Indices) -> Array:
        """[n n-1]"""
        return np.array([[likeness(int(i), int(j)) for j in indices if j != i] for i in indices])

    scales = levels(scans[0].cells.shape)
    yield Measure(
        "diversity", "Likeness among samples", "MS-SSIM", "target", 4,
        f"MS-SSIM ({scales} scales) of pairs of synthetic scans minus that of pairs of real ones: above 0 "
        "the samples are too alike.",
        "diversity", lambda a, b: float(to_others(a).mean() - to_others(b).mean()), usable=usable, all_real=True,
    )  # fmt: skip
    yield Measure(
        "diversity_nearest", "Likeness of nearest samples", "MS-SSIM", "target", 4,
        "The same for each scan's most similar companion only: far above 0 when a model repeats a few scans.",
        "diversity", lambda a, b: float(to_others(a).max(axis=1).mean() - to_others(b).max(axis=1).mean()),
        usable=usable, all_real=True,
    )  # fmt: skip
