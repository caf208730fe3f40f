"""What the prior may be told about a volume: measured of its group, and columns of a user's table.

    position         of the group's middle along its scan: 0 lowest slice, 1 highest
    pixel_mm         in plane
    slice_mm         from slice to slice
    width_mm         of the group in plane: of the body where `prepare` cropped to it, else the field of view
    age              a column of numbers
    sex=F, sex=M     a column of categories: 1 for the volume's own, 0 for the others
    turned_degrees, zoom, moved_slices, moved_rows, moved_columns, mirrored
                     how an augmented encoding differs from its group (Karras et al. 2022, appendix F.2); a new volume is always
                     told that nothing was done, so what augmentation looks like does not leak into it

A value that is not known is NaN, which the networks take as withheld.

Shapes:  N training groups x encodings   K conditions
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ctvae import files
from ctvae.config import nearest
from ctvae.dataset import Group
from ctvae.errors import ConfigError, InputError, ModelError
from ctvae.scan import without_suffix

BUILT_IN = ("position", "pixel_mm", "slice_mm", "width_mm")
BEFORE_NAMES = BUILT_IN[:3]  # of files that do not say which
AUGMENTED = ("turned_degrees", "zoom", "moved_slices", "moved_rows", "moved_columns", "mirrored")
OF_GROUP = (*BUILT_IN, *AUGMENTED)
KEYS = ("scan", "patient")
MISSING = {"", "na", "n/a", "nan", "null"}
MOST_CATEGORIES = 20
LONGEST_NAME = 40
DIGITS = 3  # significant ones that are kept of a user's numbers: enough for an age, too few for a record number
NEAR = 0.1  # share of the training groups that count as near to what was asked
TOLERANCE = 0.01  # beyond the known values, in their own size


# --- of a group -----------------------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """What augmentation does to a group, in the order of AUGMENTED; without arguments nothing."""

    degrees: float = 0.0  # in plane, about the middle, from W towards H
    zoom: float = 1.0  # in plane; 1.1: larger
    slices: int = 0  # so many voxels the body is moved along D, H, W, before it is turned
    rows: int = 0
    columns: int = 0
    mirrored: bool = False  # left for right, last of all


def of_group(group: Group, change: Change = Change()) -> list[float]:
    """In the order of OF_GROUP; magnified in plane a group's pixels are smaller and the patient is as wide as before."""
    x_mm, _, z_mm = group.spacing_mm
    return [group.position, x_mm / change.zoom, z_mm, group.shape[2] * x_mm, *map(float, change)]


def scan_mm(group: Group) -> float:
    """Length of the scan that the group comes from: `position` is (first slice + half the group) / slices of the scan."""
    slices = (group.first_slice + group.shape[0] / 2) / max(group.position, 1e-6)
    return round(slices) * group.spacing_mm[2]


# --- of a table -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """A user's columns, as numbers for each group of a dataset."""

    names: tuple[str, ...] = ()  # such as age, sex=F, sex=M
    rows: Mapping[str, Sequence[float]] | None = None  # by group id, NaN where not known

    def of(self, ids: Sequence[str]) -> Tensor:
        """[len(ids) K]"""
        rows = self.rows or {}
        unknown = [math.nan] * len(self.names)
        return torch.tensor([rows.get(id, unknown) for id in ids], dtype=torch.float32).view(len(ids), len(self.names))

    def save(self, path: Path) -> None:
        """As JSON, NaN as null."""
        rows = {id: [None if math.isnan(x) else x for x in row] for id, row in (self.rows or {}).items()}
        files.write_json(path, {"names": self.names, "groups": rows})

    @classmethod
    def load(cls, path: Path) -> Columns:
        """Raises ModelError where the file is damaged."""
        try:
            content = files.read_json(path)
            rows = {id: [math.nan if x is None else float(x) for x in row] for id, row in content["groups"].items()}
            return cls(tuple(map(str, content["names"])), rows)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path}: missing or damaged; train again with --conditions and another --out") from error

    def same_as(self, other: Columns) -> bool:
        ids = sorted({*(self.rows or {}), *(other.rows or {})})
        return self.names == other.names and torch.allclose(self.of(ids), other.of(ids), rtol=0, atol=0, equal_nan=True)


def read_columns(path: Path | str, groups: Sequence[Group], wanted: Sequence[str] | None) -> tuple[Columns, list[str]]:
    """The `wanted` columns of a CSV (none: all) for `groups`, and what a reader should know.

    A row is found by its `scan`, the file's name without suffix as in `prepare --patient-csv`, or by its `patient`, as
    dataset.json calls them. A column whose values are all numbers is one condition; any other is one for each category.
    Numbers keep three significant digits, and a category that only one training patient has counts as missing, so that
    nobody is known by it. Raises InputError, and ConfigError for an unknown column.
    """
    table = _Table(Path(path))
    names = table.columns(wanted)
    matched = {group.id: row for group in groups if (row := table.row(group)) is not None}
    if not matched:
        raise InputError(f"{path}: none of its rows is a scan or patient of the dataset; see scans in dataset.json")
    without = len({group.source for group in groups if group.id not in matched})
    notes = [f"{path}: no row for {without} scans; the prior is told nothing of them"] if without else []
    told: list[str] = []
    rows: dict[str, list[float]] = {id: [] for id in matched}
    training = [group for group in groups if group.split == "train" and group.id in matched]
    for name in names:
        values = {id: (row[name] or "").strip() for id, row in matched.items()}
        column = _numbers(name, values) or _categories(table.path, name, values, training)
        told += column.names
        notes += column.notes
        for id, numbers in column.rows.items():
            rows[id] += numbers
    return Columns(tuple(told), rows), notes


class _Table:
    """A CSV with a row per scan or patient."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file)
                self.header = [name for name in reader.fieldnames or () if name]
                rows = list(reader)
        except (OSError, ValueError, csv.Error) as error:
            raise InputError(f"{path}: cannot be read as CSV ({getattr(error, 'strerror', None) or error})") from error
        if not rows or not set(KEYS) & set(self.header):
            raise InputError(f"{path}: needs a header line with the column scan or patient, and a row for each")
        self.by = {key: {without_suffix((row.get(key) or "").strip()): row for row in rows} for key in KEYS}
        for known in self.by.values():
            known.pop("", None)

    def columns(self, wanted: Sequence[str] | None) -> list[str]:
        has = [name for name in self.header if name not in KEYS]
        names = has if wanted is None else list(wanted)
        for name in names:
            if name not in has:
                closest = nearest(name, has)
                raise ConfigError(f"prior.columns: {self.path} has no column '{name}'{closest} (it has: {', '.join(has)})")
            if name in OF_GROUP or "=" in name or len(name) > LONGEST_NAME:
                raise InputError(f"{self.path}: a column cannot be called '{name[:LONGEST_NAME]}'; give it another name")
        if not names:
            raise InputError(f"{self.path}: has no column beside {' and '.join(KEYS)}")
        return names

    def row(self, group: Group) -> dict[str, Any] | None:
        name = without_suffix(group.source)
        scans, patients = self.by["scan"], self.by["patient"]
        return scans.get(name.rpartition("/")[2]) or scans.get(name) or patients.get(without_suffix(group.patient))


@dataclass(frozen=True)
class _Column:
    names: list[str]
    rows: dict[str, list[float]]
    notes: list[str]


def _numbers(name: str, values: dict[str, str]) -> _Column | None:
    """The column, if all that it has are numbers."""
    try:
        numbers = {id: math.nan if text.lower() in MISSING else float(text) for id, text in values.items()}
    except ValueError:
        return None
    if any(map(math.isinf, numbers.values())) or all(map(math.isnan, numbers.values())):
        return None
    return _Column([name], {id: [rounded(number)] for id, number in numbers.items()}, [])


def _categories(path: Path, name: str, values: dict[str, str], training: Sequence[Group]) -> _Column:
    holders: dict[str, set[str]] = {}
    for group in training:
        if values[group.id].lower() not in MISSING:
            holders.setdefault(values[group.id], set()).add(group.patient)
    kept = sorted(value for value, patients in holders.items() if len(patients) > 1)
    alone = len(holders) - len(kept)
    if not 1 <= len(kept) <= MOST_CATEGORIES or any(len(value) > LONGEST_NAME for value in kept):
        raise InputError(
            f"{path}: column '{name}' has {len(holders)} texts among the training patients, {len(kept)} of them shared by two or "
            f"more: not a category; choose columns with --set prior.columns=[A,B]"
        )
    unknown = [math.nan] * len(kept)
    rows = {id: [float(text == value) for value in kept] if text in kept else unknown for id, text in values.items()}
    notes = [f"{path}: {alone} values of '{name}' count as missing, as only one training patient has them"] if alone else []
    return _Column([f"{name}={value}" for value in kept], rows, notes)


def rounded(number: float) -> float:
    """To DIGITS significant digits."""
    return float(f"{number:.{DIGITS}g}")


# --- known to a trained model -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """The conditions of one volume, and the length of the scan that it is thought to be of."""

    names: tuple[str, ...]
    values: list[float]  # NaN: withheld
    scan_mm: float

    def __getitem__(self, name: str) -> float:
        return self.values[self.names.index(name)]

    def having(self, name: str, value: float) -> Told:
        values = [value if other == name else own for other, own in zip(self.names, self.values, strict=True)]
        return Told(self.names, values, self.scan_mm)

    def described(self) -> dict[str, float | str]:
        """For people: categories by name, without what is withheld and what tells of augmentation."""
        described: dict[str, float | str] = {}
        for name, value in zip(self.names, self.values, strict=True):
            column, separator, category = name.partition("=")
            if not separator and name not in AUGMENTED and not math.isnan(value):
                described[name] = value
            elif separator and value == 1:
                described[column] = category
        return described


@dataclass(frozen=True)
class Known:
    """The conditions of a prior's training groups, from which those of a new volume are drawn."""

    names: tuple[str, ...]
    rows: Tensor  # [N K]
    scan_mm: Tensor  # [N]

    @classmethod
    def of_groups(cls, groups: Sequence[Group], columns: Columns) -> Known:
        """Of groups of a dataset, told a user's columns as well."""
        rows = torch.cat((torch.tensor([of_group(group) for group in groups]), columns.of([group.id for group in groups])), dim=1)
        return cls((*OF_GROUP, *columns.names), rows, torch.tensor([scan_mm(group) for group in groups]))

    @classmethod
    def from_file(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], depth: int, source: Path) -> Known:
        """Of the prior file `source`, for groups of `depth` slices. Raises ModelError where names and numbers do not match.

        Files that do not say how long their groups' scans were: as long as the longest has to have been, in which the
        lowest or highest position known is that of the first or last group.
        """
        rows = tensors["conditions.known"].float()
        names = meta.get("conditions", BEFORE_NAMES)
        texts = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
        if rows.ndim != 2 or not len(rows) or not texts or len(names) != rows.shape[1] or not {*BEFORE_NAMES} <= {*names}:
            raise ModelError(f"{source}: its conditions and their names do not match; train the prior again")
        if "conditions.scan_mm" in tensors:
            return cls(tuple(names), rows, tensors["conditions.scan_mm"].float())
        position, slice_mm = rows[:, names.index("position")], rows[:, names.index("slice_mm")]
        shortest_mm = depth * slice_mm / (2 * torch.minimum(position, 1 - position).clamp_min(0.02))
        return cls(tuple(names), rows, shortest_mm.amax().expand(len(rows)))

    def given(self, asked: Mapping[str, float | str]) -> dict[str, float]:
        """What was asked, by the names of the conditions. Raises InputError, with the nearest right name or value."""
        given: dict[str, float] = {}
        columns = {name.partition("=")[0] for name in self.names if name not in AUGMENTED}
        for name, value in asked.items():
            if name not in columns:
                has = ", ".join(sorted(columns))
                raise InputError(f"condition '{name}': the model knows no such{nearest(name, sorted(columns))} (it knows: {has})")
            given |= {name: self._number(name, value)} if name in self.names else self._category(name, value)
        return given

    def _category(self, name: str, asked: float | str) -> dict[str, float]:
        value = f"{asked:g}" if isinstance(asked, float) else str(asked)
        own = [known for known in self.names if known.startswith(f"{name}=")]
        values = [known.partition("=")[2] for known in own]
        if value not in values:
            alike = [known for known in values if known.lower() == value.lower()]
            closest = f", did you mean '{alike[0]}'?" if alike else nearest(value, values)
            raise InputError(f"condition {name}={value}: the model knows no such{closest} (it knows: {', '.join(values)})")
        return {known: float(known == f"{name}={value}") for known in own}

    def _number(self, name: str, value: float | str) -> float:
        try:
            number = float(value)
        except ValueError:
            raise InputError(f"condition {name}={value}: is not a number") from None
        least, most = self.range(name)
        slack = TOLERANCE * max(abs(least), abs(most))
        if not least - slack <= number <= most + slack:
            near = least if number < least else most
            raise InputError(f"condition {name}={value}: the model knows {least:.4g} to {most:.4g}; the nearest is {near:.4g}")
        return number

    def range(self, name: str) -> tuple[float, float]:
        """Least and greatest of a training group."""
        column = self.rows[:, self.names.index(name)]
        column = column[~column.isnan()]
        return (column.amin().item(), column.amax().item()) if len(column) else (math.nan, math.nan)

    def pick(self, random: torch.Generator, given: Mapping[str, float]) -> Told:
        """The conditions of one training group, drawn at random, with what is `given` in their place.

        So spacings come out as often as they came in, and values that go together stay together: where something is given,
        the group is one of the tenth that come nearest to it (of all that come as near), in standard deviations.
        """
        near = torch.arange(len(self.rows))
        if given:
            distance = self._distance(given)
            near = near[distance <= distance.kthvalue(max(1, math.ceil(NEAR * len(distance)))).values]
        row = int(near[int(torch.randint(len(near), (), generator=random))])
        values = [given.get(name, own) for name, own in zip(self.names, self.rows[row].tolist(), strict=True)]
        return Told(self.names, values, self.scan_mm[row].item())

    def _distance(self, given: Mapping[str, float]) -> Tensor:
        """Of each training group [N]; one whose value is not known is further than all that are."""
        total = torch.zeros(len(self.rows))
        for name, value in given.items():
            column = self.rows[:, self.names.index(name)]
            off = (column - value).square() / column[~column.isnan()].var(correction=0).clamp_min(1e-6)
            total += off.nan_to_num(off.nan_to_num(0).amax().item() + 1)
        return total
