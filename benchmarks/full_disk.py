"""A disk that is full after more and more of what a command writes: one line, and with space it ends as if nothing had been.

    python benchmarks/full_disk.py --sizes 5
    python benchmarks/full_disk.py --verbs train --sizes 12

Linux, as root: a tmpfs is mounted, with room for 1/6, 2/6 ... of what the command takes when there is enough (`--sizes` 5). The
same commands as `kills.py` runs, and the other verbs that write. Well done is exit code 2, one line that begins with `error:`,
no traceback, every weights file whole, no temporary file left; then, with space, the same command, and every file as of a run
that had space from the start. A size that was enough after all is counted apart.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kills import Verb, content, different, finish, staged
from safetensors.numpy import load_file

from ctvae import files

ENOUGH_BYTES = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, default=5)
    parser.add_argument("--verbs", default="prepare,train,generate,evaluate,reconstruct,vary,interpolate,export")
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="full"))
    try:
        verbs = {**staged(scratch), **others(scratch)}
        failed = sum(judged(name, verbs[name], scratch / name, arguments.sizes) for name in arguments.verbs.split(","))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    sys.exit(1 if failed else 0)


def others(scratch: Path) -> dict[str, Verb]:
    """The verbs that are done in a moment."""
    run, scan = str(scratch / "run"), str(scratch / "scans" / "phantom_000.nii.gz")
    return {
        "reconstruct": lambda out: ["reconstruct", run, scan, "--out", str(out / "again.nii.gz")],
        "vary": lambda out: ["vary", run, scan, "--out", str(out), "-n", "2"],
        "interpolate": lambda out: ["interpolate", run, scan, scan, "--out", str(out), "-n", "2"],
        "export": lambda out: ["export", run, "--out", str(out)],
    }


def judged(name: str, verb: Verb, folder: Path, sizes: int) -> int:
    """Number of sizes at which something was not as it should be."""
    with disk(folder / "disk") as place:
        if finish(verb(place / "out")) != 0:
            raise SystemExit(f"{name}: does not run through")
        expected, taken = content(place / "out"), used_bytes(place)
    failed = enough = 0
    for part in range(1, sizes + 1):
        with disk(folder / "disk", taken * part // (sizes + 1)) as place:
            said = folder / "said"
            code = finish(verb(place / "out"), str(said))
            wrong = [] if code == 0 else complaints(code, said.read_text(), place)
            enough += code == 0
            sized(place, ENOUGH_BYTES)
            again = finish(verb(place / "out"))
            changed = different(expected, content(place / "out"))
        if wrong or again or changed:
            failed += 1
            print(f"{name}, room for {part} of {sizes + 1} parts of {taken} bytes: {wrong}, then exit code {again}, "
                  f"different: {changed[:5]}", flush=True)  # fmt: skip
    print(f"{name}: full at {sizes - enough} of {sizes} sizes ({taken / 1e3:.0f} kB are enough), {failed} not as they should be",
          flush=True)  # fmt: skip
    return failed


def complaints(code: int, said: str, place: Path) -> list[str]:
    """What is not as it should be after the disk was full."""
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    wrong = [f"exit code {code}"] * (code != 2) + [f"{len(errors)} lines of error"] * (len(errors) != 1)
    wrong += [line for line in said.splitlines() if "Traceback" in line or "Error" in line.partition(":")[0]]
    for path in place.rglob("*"):
        if path.is_file() and files.is_partial(path):
            wrong.append(f"{path.name} left")
        elif path.suffix == ".safetensors":
            load_file(path)  # raises where it is not whole
    return wrong


@contextmanager
def disk(place: Path, most_bytes: int = ENOUGH_BYTES) -> Iterator[Path]:
    """A disk of that size at `place`, empty, for the time of the block."""
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={most_bytes}", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)  # a worker may be dying still, with a file open


def sized(place: Path, most_bytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={most_bytes}", str(place)], check=True)


def used_bytes(place: Path) -> int:
    stat = os.statvfs(place)
    return (stat.f_blocks - stat.f_bfree) * stat.f_frsize


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
