"""JSON with very many entries, of which one at a time is in memory: read from a file, kept packed, or spooled to disk.

    members   of a JSON file, in order, its lists entry by entry
    Packed    entries in memory, compressed: some tenths of a kilobyte each, where as objects they are some kilobytes
    Spool     entries in an unnamed file on disk, eight bytes each in memory
"""

from __future__ import annotations

import json
import re
import tempfile
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO, overload

from ctvae import files
from ctvae.errors import InputError

CHUNK = 2**16  # characters
PER_BLOCK = 64  # entries that are packed together
BLANKS = re.compile(r"[ \t\n\r]*")
GOES_ON = "0123456789.eE+-"  # after what could be a whole number: 1 of 1.5
DECODER = json.JSONDecoder()


def members(path: Path, most_bytes: int = files.MOST_JSON_BYTES) -> Iterator[tuple[str, Any]]:
    """Key and value of each member of the object in a JSON file, in order.

    A value that is a list comes as an iterator of its entries, to be used up before the next member is asked for. Raises
    ValueError, at the place, for damaged, very large and very deep files and where there is no object, OSError as `open`.
    """
    if path.stat().st_size > most_bytes:
        raise ValueError(f"larger than {most_bytes} bytes")
    with path.open(encoding="utf-8") as file:
        yield from _members(_Text(file))


def _members(text: _Text) -> Iterator[tuple[str, Any]]:
    text.take("{")
    while text.next() != "}":
        key = text.value()
        if not isinstance(key, str):
            raise ValueError("a key that is no text")
        text.take(":")
        if text.next() == "[":
            entries = _entries(text)
            yield key, entries
            for _ in entries:  # that nobody wanted
                pass
        else:
            yield key, text.value()
        if text.next() != "}":
            text.take(",")
            if text.next() == "}":
                raise ValueError("a comma before }")
    text.take("}")
    if text.next():
        raise ValueError("something after its end")


def _entries(text: _Text) -> Iterator[Any]:
    text.take("[")
    while text.next() != "]":
        yield text.value()
        if text.next() != "]":
            text.take(",")
            if text.next() == "]":
                raise ValueError("a comma before ]")
    text.take("]")


class _Text:
    """A JSON text that is read as far as it is asked for."""

    def __init__(self, file: TextIO):
        self.file, self.text, self.place = file, "", 0

    def next(self) -> str:
        """The next character that is no blank, not taken yet; none at the end."""
        while True:
            blanks = BLANKS.match(self.text, self.place)
            self.place = blanks.end() if blanks else self.place
            if self.place < len(self.text):
                return self.text[self.place]
            if not self._more():
                return ""

    def take(self, sign: str) -> None:
        found = self.next()
        if found != sign:
            raise ValueError(f"'{sign}' expected, not '{found}'" if found else f"ends where '{sign}' is expected")
        self.place += 1

    def value(self) -> Any:
        self.next()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.place)
            except RecursionError as error:
                raise ValueError("nested too deeply") from error
            except ValueError:
                if not self._more():
                    raise
                continue
            if self.text[end : end + 1] in GOES_ON and self._more():
                continue  # "" is in it, too: what ends with the text may be the beginning of a number
            self.place = end
            return value

    def _more(self) -> bool:
        """Reads on, as much again as is waiting at least, so that a long value is not begun too often."""
        rest = self.text[self.place :]
        read = self.file.read(max(CHUNK, len(rest)))
        self.text, self.place = rest + read, 0
        return bool(read)


class Packed(Sequence[Any]):
    """JSON values, compressed. What comes out is a copy each time."""

    def __init__(self, values: Iterable[Any] = ()):
        self._blocks: list[bytes] = []
        self._count = 0
        self._last: tuple[int, list[Any]] = (-1, [])  # the block that was last looked at
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

    @overload
    def __getitem__(self, place: int) -> Any: ...
    @overload
    def __getitem__(self, place: slice) -> list[Any]: ...
    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        number = place + len(self) if place < 0 else place
        if not 0 <= number < len(self):
            raise IndexError(place)
        block = number // PER_BLOCK
        if self._last[0] != block:
            self._last = block, self._opened(block)
        return self._last[1][number % PER_BLOCK]

    def __iter__(self) -> Iterator[Any]:
        for block in range(len(self._blocks)):
            yield from self._opened(block)

    def _opened(self, block: int) -> list[Any]:
        return json.loads(zlib.decompress(self._blocks[block]))  # type: ignore[no-any-return]

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
