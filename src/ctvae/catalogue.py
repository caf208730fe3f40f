"""What `dataset.json` says of all scans, gathered from their records one at a time: entries wait on disk, sums in memory."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ctvae import __version__
from ctvae.dataset import Dataset
from ctvae.entries import Spool
from ctvae.errors import InputError
from ctvae.intake import HISTOGRAM_HU, Record, Settings
from ctvae.patients import assign
from ctvae.preprocess import BODY_HU

PERCENTILES = (0.5, 5.0, 50.0, 95.0, 99.5)
OF_SCAN = ("source", "shape", "spacing_mm", "body_mm", "box", "plane", "labels", "sha256")
MOST_NAMED = 5  # scans without labels, in a note


class Catalogue:
    """The entries and figures of the dataset in `out`; a context manager. Its length is the number of groups."""

    def __init__(self, out: Path, settings: Settings):
        self.out, self.settings = out, settings
        self.rejected: list[dict[str, str]] = []
        self._patients: set[str] = set()
        self._scans, self._groups, self._ids = Spool(out), Spool(out), list[str]()
        self._measures, self._labels = _Measures(), _LabelNotes()

    def __enter__(self) -> Catalogue:
        return self

    def __exit__(self, *_: object) -> None:
        self._scans.close()
        self._groups.close()

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, patient: str, record: Record) -> None:
        """One usable scan."""
        self._patients.add(patient)
        whose = {"patient": patient, "split": None}  # drawn when all are known
        self._scans.append({**whose, "groups": len(record["groups"])} | {key: record[key] for key in OF_SCAN})
        for group in record["groups"]:
            self._ids.append(group["id"])
            self._groups.append({"id": group["id"], **whose, **group})
        self._measures.add(record)
        self._labels.add(record)

    def content(self, notes: Sequence[str]) -> dict[str, Any]:
        """Everything in `dataset.json` but its version, with `notes` at the end of its own."""
        settings = self.settings
        splits, drawn = assign(self._patients, settings.seed, settings.fractions, _earlier_splits(self.out))
        by_id = sorted(range(len(self._ids)), key=self._ids.__getitem__)
        return {
            "ctvae": __version__,
            "settings": asdict(settings),
            "measured": self._measures.summed_up(),
            "notes": [*drawn, *(self._labels.told() if settings.labels else []), *notes],
            "rejected": self.rejected,
            "scans": Rows(self._scans, range(len(self._scans)), splits),
            "groups": Rows(self._groups, by_id, splits),
        }


class Rows:
    """Entries of a spool in `order`, with their patients' splits; gone through as often as one likes."""

    def __init__(self, spool: Spool, order: Sequence[int], splits: dict[str, str]):
        self._spool, self._order, self._splits = spool, order, splits

    def __iter__(self) -> Iterator[Record]:
        for number in self._order:
            entry = self._spool[number]
            yield {**entry, "split": self._splits[entry["patient"]]}


def _earlier_splits(out: Path) -> dict[str, str]:
    """Who was in which split when the dataset was last finished."""
    try:
        return Dataset.open(out).splits()
    except InputError:
        return {}


class _LabelNotes:
    """What became of the scans' label maps."""

    def __init__(self) -> None:
        self._notes: list[str] = []
        self._missing: list[str] = []  # the first of them
        self._without = self._scans = 0

    def add(self, record: Record) -> None:
        self._scans += 1
        if ": " in record["labels"]:
            self._notes.append(f"{record['source']}: labels {record['labels']}")
        if record["labels"] == "none":
            self._without += 1
            self._missing += [record["source"]] if len(self._missing) < MOST_NAMED else []

    def told(self) -> list[str]:
        more = ", ..." if self._without > MOST_NAMED else ""
        note = f"no label file for {self._without} of {self._scans} scans: {', '.join(self._missing)}{more}"
        return [*self._notes, note] if self._without else self._notes


class _Measures:
    """What the scans are like."""

    def __init__(self) -> None:
        self._histogram = np.zeros(len(HISTOGRAM_HU) - 1, np.int64)
        self._shapes: Counter[str] = Counter()
        self._slices, self._lowest_hu, self._highest_hu = array("q"), array("q"), array("q")
        self._spacing_mm, self._body_mm = array("d"), array("d")

    def add(self, record: Record) -> None:
        self._histogram += np.array(record.get("histogram", 0), np.int64)
        self._shapes.update("x".join(map(str, group["shape"])) for group in record["groups"])
        self._slices.append(record["shape"][0])
        self._lowest_hu.append(record["hu_range"][0])
        self._highest_hu.append(record["hu_range"][1])
        self._spacing_mm.extend(record["spacing_mm"])
        self._body_mm.extend(record["body_mm"])

    def summed_up(self) -> dict[str, Any]:
        """HU percentiles are read off the histogram of all, to 10 HU."""
        body = np.where(HISTOGRAM_HU[:-1] >= BODY_HU, self._histogram, 0)
        return {
            "scans": len(self._slices),
            "scan_slices": _spread(self._slices),
            **{f"spacing_{axis}_mm": _spread(self._spacing_mm[i::3]) for i, axis in enumerate("xyz")},
            **{f"body_{axis}_mm": _spread(self._body_mm[i::2]) for i, axis in enumerate("xy")},
            "hu_range": [min(self._lowest_hu), max(self._highest_hu)],
            "hu_percentiles": _percentiles(self._histogram),
            "hu_percentiles_above_-300": _percentiles(body),
            "group_shapes": dict(sorted(self._shapes.items())),
        }


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = float(np.min(values)), float(np.median(values)), float(np.max(values))
    return {"min": round(low, 4), "median": round(middle, 4), "max": round(high, 4)}


def _percentiles(histogram: np.ndarray) -> dict[str, int]:
    share = np.cumsum(histogram) / max(1, histogram.sum())
    middles = (HISTOGRAM_HU[:-1] + HISTOGRAM_HU[1:]) // 2
    return {f"{p:g}": int(middles[np.searchsorted(share, p / 100)]) for p in PERCENTILES}
