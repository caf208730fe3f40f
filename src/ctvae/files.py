"""Files that are whole or absent: written beside their place, flushed to disk, then renamed. And JSON and YAML from anywhere."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from ctvae.errors import InputError

MOST_JSON_BYTES = 2**30
MOST_YAML_BYTES = 2**18
PARTIAL = ".partial"
LOCK = ".lock"


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, with the same suffixes, that replaces `path` when the block ends well.

    Raises InputError in one line when the folder cannot be written or the disk is full; `path` is then untouched.
    """
    suffix = "".join(path.suffixes[-2:])
    temporary = path.with_name(f".{path.name.removesuffix(suffix)}.{_host()}-{os.getpid()}{PARTIAL}{suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)  # the new name, too
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); free space or choose another folder") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_pieces(path: Path, pieces: Iterable[str]) -> None:
    """A text that is not in memory as a whole."""
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(pieces)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path, most_bytes: int = MOST_JSON_BYTES) -> Any:
    """What a JSON file says. Raises ValueError for damaged, very large and very deep ones, OSError as `open`."""
    if path.stat().st_size > most_bytes:
        raise ValueError(f"larger than {most_bytes} bytes")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_yaml(path: Path, most_bytes: int = MOST_YAML_BYTES) -> Any:
    """What a small YAML file says, plain values only: no tags that name code, no aliases that a few bytes multiply.

    Raises ValueError for damaged, large and deep ones, OSError as `open`.
    """
    if path.stat().st_size > most_bytes:
        raise ValueError(f"larger than {most_bytes} bytes")
    return parsed_yaml(path.read_text(encoding="utf-8"))


def parsed_yaml(text: str) -> Any:
    """As `read_yaml`, of a text."""
    import yaml

    class Plain(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("aliases (*name) are not read")
            return super().compose_node(parent, index)

    try:
        return yaml.load(text, Plain)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML ({' '.join(str(error).split())[:200]})") from error


def inside(path: str) -> str:
    """`path` itself, if it names something below the folder that it is relative to. Raises ValueError where it leaves."""
    parts = PurePosixPath(path)
    if not path or parts.is_absolute() or ".." in parts.parts or "\\" in path or ":" in path or "\0" in path:
        raise ValueError(f"path {path!r} leaves its folder")
    return path


def sweep(folder: Path) -> None:
    """Delete what writers of this machine that were killed have left directly in `folder`."""
    with suppress(OSError):
        for entry in os.scandir(folder):
            owner = entry.name.partition(PARTIAL)[0].rpartition(".")[2].partition("-")
            if PARTIAL in entry.name and owner[0] == _host() and owner[2].isdecimal() and not _runs(int(owner[2]), entry):
                Path(entry).unlink(missing_ok=True)


def is_partial(path: Path) -> bool:
    """Whether `path` is the temporary file of a writer, running or killed."""
    return path.name.startswith(".") and PARTIAL in path.name


@contextmanager
def occupied(folder: Path, work: str) -> Iterator[None]:
    """Inside the block no other process may do this `work` in `folder`. A process that was killed holds nothing.

    Raises InputError where another is at it. A folder that was made for this and stays empty is gone again.
    """
    from filelock import FileLock, Timeout

    made = not folder.exists()
    lock = FileLock(folder / LOCK, blocking=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise InputError(f"{folder}: another `{work}` is at work in it; wait until it ends, or choose another --out") from error
    except (OSError, NotImplementedError):
        pass  # a file in its place, no right to write: the work says so. A file system without locks: it does without
    try:
        yield
    finally:
        with suppress(OSError):
            if lock.is_locked:
                (folder / LOCK).unlink()  # while it is held: whoever comes next makes another
        lock.release()
        if made:
            with suppress(OSError):
                folder.rmdir()  # where nothing is in it


def _flush(path: Path) -> None:
    """To disk: a file's content, or a folder's names where the system can do that."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():
            return  # Windows opens no folders
        raise
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def _host() -> str:
    """This machine, in a few letters that do not name it."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]


def _runs(pid: int, written: os.DirEntry) -> bool:
    """Whether the process that began to write the file still runs: not one that is dead, or younger than the file."""
    import psutil

    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= written.stat().st_mtime + 1
    except psutil.NoSuchProcess:
        return False
