"""JSON with very many entries, of which one at a time is in memory: read from a file, kept packed, or spooled to disk.

    members   of a JSON file, in order, its lists entry by entry (ijson)
    Packed    entries in memory, compressed: some tenths of a kilobyte each, where as objects they are some kilobytes
    Spool     entries in an unnamed file on disk, eight bytes each in memory
"""

from __future__ import annotations

import json
import tempfile
import zlib
from array import array
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import ijson

from ctvae import files
from ctvae.errors import InputError

Event = tuple[str, Any]  # of ijson: what begins, ends or is there, and its value

CHUNK = 2**14  # bytes
PER_BLOCK = 64  # entries that are packed together
MOST_DEPTH = 100  # json, which writes them again, stops at some thousand


def members(path: Path, most_bytes: int = files.MOST_JSON_BYTES) -> Iterator[tuple[str, Any]]:
    """Key and value of each member of the object in a JSON file, in order.

    A value that is a list comes as an iterator of its entries, to be used up before the next member is asked for. Raises
    ValueError, at the place, for damaged, very large and very deep files, for numbers that are none or do not fit into 64
    bits, and where there is no object; OSError as `open`.
    """
    if path.stat().st_size > most_bytes:
        raise ValueError(f"larger than {most_bytes} bytes")
    with path.open("rb") as file:
        events = _events(file)
        if next(events, None) != ("start_map", None):
            raise ValueError("no object")
        for event, key in events:
            if event == "end_map":
                continue  # what comes after it is refused by the parser
            event, value = next(events)
            if event == "start_array":
                entries = _entries(events)
                yield key, entries
                for _ in entries:  # that nobody wanted
                    pass
            else:
                yield key, _value(event, value, events)


def _events(file: BinaryIO) -> Iterator[Event]:
    try:
        yield from ijson.basic_parse(file, buf_size=CHUNK, use_float=True)
    except ijson.JSONError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _entries(events: Iterator[Event]) -> Iterator[Any]:
    """Of a list that has begun, up to its end."""
    for event, value in events:
        if event == "end_array":
            return
        yield _value(event, value, events)


def _value(event: str, value: Any, events: Iterator[Event]) -> Any:
    """The value that begins with an event."""
    builder, depth = ijson.ObjectBuilder(), 0
    while True:
        builder.event(event, value)
        depth += event.startswith("start_") - event.startswith("end_")
        if depth > MOST_DEPTH:
            raise ValueError("nested too deeply")
        if not depth:
            return builder.value
        event, value = next(events)


class Packed:
    """JSON values, compressed. What comes out is a copy each time."""

    def __init__(self, values: Iterable[Any] = ()):
        self._blocks: list[bytes] = []
        self._count = 0
        block: list[str] = []
        for value in values:
            block.append(json.dumps(value, ensure_ascii=False))
            self._count += 1
            if len(block) == PER_BLOCK:
                self._close(block)
        if block:
            self._close(block)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        for block in self._blocks:
            yield from json.loads(zlib.decompress(block))

    def _close(self, block: list[str]) -> None:
        self._blocks.append(zlib.compress(f"[{','.join(block)}]".encode(), 1))
        block.clear()


class Spool:
    """JSON values in a file without a name in `folder`, which is gone once it is closed; read in any order, when all are in."""

    def __init__(self, folder: Path):
        self._folder, self._starts, self._end = folder, array("q"), 0
        try:
            self._file = tempfile.TemporaryFile(dir=folder, prefix=".", suffix=files.PARTIAL)  # noqa: SIM115 (see close)
        except OSError as error:
            raise self._full(error) from error

    def __len__(self) -> int:
        return len(self._starts)

    def close(self) -> None:
        with suppress(OSError):  # of a full disk, where what it writes last does not matter any more
            self._file.close()

    def append(self, value: Any) -> None:
        """Raises InputError when the disk is full."""
        line = json.dumps(value, ensure_ascii=False).encode() + b"\n"
        try:
            self._file.write(line)
        except OSError as error:
            raise self._full(error) from error
        self._starts.append(self._end)
        self._end += len(line)

    def __getitem__(self, number: int) -> Any:
        try:
            self._file.seek(self._starts[number])
            return json.loads(self._file.readline())
        except OSError as error:
            raise self._full(error) from error

    def _full(self, error: OSError) -> InputError:
        return InputError(f"{self._folder}: cannot be written ({error.strerror or error}); free space or choose another folder")
