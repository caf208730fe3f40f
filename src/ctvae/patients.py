"""Whose scan it is, and which split the patient belongs to."""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ctvae.dataset import SPLITS
from ctvae.errors import InputError, ScanRejected
from ctvae.scan import Found, without_suffix

Shares = tuple[float, float, float]  # of train, validation, test
BY_DEFAULT = "header or file name"


class Patients:
    """Who a scan is of."""

    def __init__(self, found: Iterable[Found], pattern: str | None, known: dict[str, str] | None):
        self.pattern, self.known = pattern, known
        pairs = ((_number(scan.root, scan.stem), _number(scan.path.parent)) for scan in found)
        where = np.fromiter((number for pair in pairs for number in pair), np.uint64).reshape(-1, 2)  # [N 2]
        names, folders = np.unique(np.unique(where, axis=0)[:, 0], return_counts=True)
        self.ambiguous = set(names[folders > 1].tolist())  # such as s001/ct.nii, s002/ct.nii

    def of(self, scan: Found, header: str | None) -> str:
        """The patient of `scan`; `header` is its hashed DICOM PatientID.

        Raises ScanRejected for a scan that the pattern or the CSV does not know: a guess could leak into a test.
        """
        if self.known is not None:
            patient = self.known.get(without_suffix(scan.path.name)) or self.known.get(without_suffix(scan.name))
            if not patient:
                raise ScanRejected("patient unknown: not in the patient CSV; add a row for it")
            return patient
        if self.pattern is not None:
            match = re.search(self.pattern, scan.path.name)
            if not (match and match[1]):
                raise ScanRejected(f"patient unknown: the file name does not match '{self.pattern}'")
            return match[1]
        ambiguous = _number(scan.root, scan.stem) in self.ambiguous
        return header or (without_suffix(scan.name) if ambiguous else scan.stem)


def _number(*names: Path | str) -> int:
    """For the names: eight bytes, where names of very many scans would take much memory."""
    return int.from_bytes(hashlib.sha256(b"\0".join(map(os.fsencode, names))).digest()[:8], "big")


def told_apart_by(pattern: str | None, patient_csv: Path | str | None) -> str:
    """How patients are told apart, for the settings."""
    if pattern is not None and patient_csv is not None:
        raise InputError("give a patient pattern or a patient CSV, not both")
    if pattern is None:
        return "csv" if patient_csv is not None else BY_DEFAULT
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise InputError(f"patient pattern '{pattern}': not a regular expression ({error})") from error
    if groups != 1:
        raise InputError(f"patient pattern '{pattern}': needs one group in parentheses, such as '(.*)_scan'")
    return f"pattern {pattern}"


def known_patients(path: Path | str | None) -> dict[str, str] | None:
    """Patient by file name without suffix, from a CSV with columns scan and patient. Raises InputError."""
    if path is None:
        return None
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as CSV ({getattr(error, 'strerror', None) or error})") from error
    if not rows or not {"scan", "patient"} <= set(rows[0]):
        raise InputError(f"{path}: needs a header line with the columns scan and patient, and a row per scan")
    return {without_suffix((row["scan"] or "").strip()): (row["patient"] or "").strip() for row in rows}


def assign(
    patients: set[str], seed: int, fractions: Shares, earlier: dict[str, str]
) -> tuple[dict[str, str], list[str]]:
    """The split of each patient, and what a reader should know about it.

    Patients in `earlier` stay where they were. One patient at least is in train.
    """
    splits = {who: earlier.get(who) or split_of(who, seed, fractions) for who in sorted(patients)}
    notes = []
    if splits and "train" not in splits.values():
        chosen = min(splits, key=lambda who: _lot(who, seed))
        splits[chosen] = "train"
        notes.append(f"no patient fell to train; {chosen} was put there so that there is one")
    for split, share in zip(SPLITS, fractions, strict=True):
        if share and split not in splits.values():
            notes.append(f"no patient fell to {split}: there are only {len(splits)}, and each is drawn for itself")
    return splits, notes


def split_of(patient: str, seed: int, fractions: Shares) -> str:
    """train, validation or test: a function of the patient alone, whoever else there is."""
    return SPLITS[int(np.searchsorted(np.cumsum(fractions)[:2], _lot(patient, seed), side="right"))]


def _lot(patient: str, seed: int) -> float:
    """A number in 0..1 drawn for the patient."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{patient}".encode()).digest()[:6], "big") / 2**48
