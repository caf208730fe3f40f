"""Rows of a tensor in safetensors files on disk: what is asked for is read, nothing else is held.

Rows are read, not memory-mapped: pages of a map that were looked at once count as the process's memory until somebody else
needs it, and a reader of all rows would seem to hold them all.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ctvae.errors import ModelError

TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True)
class Stretch:
    """The rows of one file."""

    path: Path
    start: int  # of the first row in the file, in bytes
    shape: tuple[int, ...]  # rows, then a row's
    kind: torch.dtype

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.kind.itemsize


class Rows:
    """[N ...], or those of its rows that `chosen` names. `rows[[3, 1]]` and `rows[2:5]` are tensors."""

    def __init__(self, stretches: Sequence[Stretch], chosen: Sequence[int] | None = None):
        assert len({(stretch.shape[1:], stretch.kind) for stretch in stretches}) == 1
        self._stretches, self._chosen = stretches, chosen
        self._ends = list(accumulate(stretch.shape[0] for stretch in stretches))

    def __len__(self) -> int:
        return self._ends[-1] if self._chosen is None else len(self._chosen)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), *self._stretches[0].shape[1:]))

    @property
    def ndim(self) -> int:
        return len(self._stretches[0].shape)

    def chosen(self, indices: Sequence[int]) -> Rows:
        """Without reading them."""
        return Rows(self._stretches, [self._number(i) for i in indices])

    def __getitem__(self, indices: Sequence[int] | slice) -> Tensor:
        """Raises ModelError where a file has gone."""
        wanted = range(len(self))[indices] if isinstance(indices, slice) else indices
        first = self._stretches[0]
        raw = torch.empty(len(wanted), first.row_bytes, dtype=torch.uint8)
        with ExitStack() as stack:
            files: dict[int, BinaryIO] = {}
            for row, index in zip(raw.numpy(), wanted, strict=True):
                number = self._number(index)
                place = bisect_right(self._ends, number)
                stretch = self._stretches[place]
                try:
                    if place not in files:
                        files[place] = stack.enter_context(stretch.path.open("rb", buffering=0))
                    self._read(files[place], number - self._ends[place] + stretch.shape[0], stretch, memoryview(row))
                except OSError as error:
                    raise ModelError(f"{stretch.path}: cannot be read ({error.strerror or error}); copy it again") from error
        return raw.view(first.kind).view(len(wanted), *first.shape[1:])

    def _number(self, index: int) -> int:
        """Among all rows on disk."""
        number = range(len(self))[index]
        return number if self._chosen is None else self._chosen[number]

    def _read(self, file: BinaryIO, row: int, stretch: Stretch, into: memoryview) -> None:
        file.seek(stretch.start + row * stretch.row_bytes)
        got = 0
        while got < len(into):
            more = file.readinto(into[got:])  # type: ignore[attr-defined]
            if not more:
                raise OSError("it has become shorter")
            got += more


def blocks(count: int, most: int) -> Iterator[slice]:
    """`count` rows in runs of at most `most`."""
    for start in range(0, count, most):
        yield slice(start, min(count, start + most))


def opened(path: Path, large: Sequence[str]) -> tuple[dict[str, Stretch], dict[str, Tensor], dict[str, Any]]:
    """A file that `checkpoint.save` wrote: where the rows of the tensors called `large` lie, the others, and its description.

    Raises ModelError where the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:  # refuses a header that claims more than the file holds
            meta = json.loads((file.metadata() or {})["ctvae"])
            names = set(file.keys())
            small = {name: file.get_tensor(name) for name in sorted(names - set(large))}
        return {name: _stretch(path, name) for name in large}, small, meta
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError, MemoryError) as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"{path}: not a ctvae weights file or damaged ({said}); train again or copy it again") from error


def _stretch(path: Path, name: str) -> Stretch:
    """From the header: eight bytes that say how long it is, then JSON, then the numbers."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
    kind, shape = TYPES[entry["dtype"]], tuple(entry["shape"])
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"{name} {str(shape)[:50]} is not rows of numbers")
    return Stretch(path, 8 + length + entry["data_offsets"][0], shape, kind)
