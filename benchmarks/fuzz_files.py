"""Damaged NIfTI files and DICOM folders through the reader and `prepare`, in processes with limits on time and memory.

    python benchmarks/fuzz_files.py --count 10000 --seed 0

Two thirds are NIfTI files, one third DICOM folders of about six files (`tests/hostile_files.py`; a case depends on seed and
index alone, so that `--only INDEX` repeats one). Each is found and read as `ctvae prepare` does it, and what is accepted is
cropped, resampled, cut and written. Well done is: accepted, or refused by an InputError of one line that names the file.
Anything else, a warning on stderr included, is listed and the exit code is 1.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
BATCH = 1000  # cases per process, unless it dies
Outcome = tuple[str, str, float]  # kind, what was said, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="index of the first case")
    parser.add_argument("--only", type=int, help="repeat one case and show its traceback")
    parser.add_argument("--seconds", type=float, default=20.0, help="limit for one case, of processor time")
    parser.add_argument("--megabytes", type=int, default=512, help="limit on what a process may allocate on top of its imports")
    arguments = parser.parse_args()
    if arguments.only is not None:
        arguments.first, arguments.count = arguments.only, 1
    start, failed, tally, peaks = time.monotonic(), [], Counter(), [0.0]
    slowest = (0.0, "")
    for first in range(arguments.first, arguments.first + arguments.count, BATCH):
        stop = min(first + BATCH, arguments.first + arguments.count)
        for index, described, (kind, said, seconds) in _batch(first, stop, arguments, peaks):
            tally[kind] += 1
            slowest = max(slowest, (seconds, f"case {index}: {described}"))
            if kind not in ("accepted", "refused"):
                failed.append(f"{kind} case {index} ({described}): {said}")
                print(failed[-1], flush=True)
            elif kind == "refused":
                tally[f"  {_reason(said)}"] += 1
            if arguments.only is not None:
                print(f"{kind} ({described}): {said}")
    for kind, count in sorted(tally.items(), key=lambda item: (item[0].startswith("  "), -item[1])):
        print(f"{count:7d} {kind}")
    print(f"{arguments.count} cases, seed {arguments.seed}, {time.monotonic() - start:.0f} s; slowest {slowest[0]:.2f} s "
          f"({slowest[1]}); a process grew by at most {max(peaks):.0f} MB (limit {arguments.megabytes}); "
          f"{len(failed)} failures")  # fmt: skip
    sys.exit(1 if failed else 0)


def _batch(first: int, stop: int, arguments: argparse.Namespace, peaks: list[float]):
    """(index, what was done, outcome) of each case; a process that dies or hangs is replaced by another."""
    context = get_context("spawn")
    while first < stop:
        ours, theirs = context.Pipe()
        limit_bytes = arguments.megabytes * 2**20
        task = (theirs, arguments.seed, first, stop, limit_bytes, arguments.only is not None)
        worker = context.Process(target=_work, args=task)
        worker.start()
        theirs.close()
        ours.recv()  # imports are done
        index, described = first, "?"
        try:
            while first < stop:
                if not ours.poll(15 * arguments.seconds):
                    raise TimeoutError
                index, described, outcome, peak_mb = ours.recv()
                if outcome is not None:
                    peaks.append(peak_mb)
                    yield index, described, outcome if outcome[2] <= arguments.seconds else ("SLOW", *outcome[1:])
                    first = index + 1
        except TimeoutError:
            yield index, described, ("HANGS", "no answer", arguments.seconds)
            first = index + 1
        except EOFError:
            worker.join()
            yield index, described, ("DIES", f"exit code {worker.exitcode}", 0.0)
            first = index + 1
        worker.kill()
        worker.join()


def _work(pipe: Connection, seed: int, first: int, stop: int, limit_bytes: int, loud: bool) -> None:
    from hostile_dicom import dicom_case
    from hostile_files import nifti_case

    import ctvae.prepare  # noqa: F401 (imported before memory is limited)

    scratch = Path(tempfile.mkdtemp(prefix="fuzz"))
    _try(*nifti_case(scratch, 0, -1), scratch)  # warm up: what is imported late
    _try(*dicom_case(scratch, 0, -1), scratch)
    imported = _status("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (imported + limit_bytes, imported + limit_bytes))
    before = _status("VmRSS")
    pipe.send(None)
    for index in range(first, stop):
        folder = scratch / str(index)
        folder.mkdir()
        path, described = (dicom_case if index % 3 == 0 else nifti_case)(folder, seed, index)
        pipe.send((index, described, None, 0.0))
        start = time.process_time()
        kind, said = _try(path, described, folder, loud)
        pipe.send((index, described, (kind, said, time.process_time() - start), (_status("VmHWM") - before) / 2**20))
        shutil.rmtree(folder)
    shutil.rmtree(scratch)


def _try(path: Path, described: str, folder: Path, loud: bool = False) -> tuple[str, str]:
    """Read one case as `prepare` would; what became of it."""
    from ctvae.errors import InputError
    from ctvae.intake import Job, Settings, prepare_scan
    from ctvae.scan import find_scans

    settings = Settings(slices=4, size=32, rest="pad", stride=4, crop_body=True)
    reasons = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            for n, found in enumerate(find_scans([path])):
                record = prepare_scan(Job(found, f"scan{n}", folder / "out", settings, None, ""))
                reasons.append(f"{record['source']}: {record['reason']}" if record["reason"] else "")
        except InputError as error:
            reasons = [str(error)]
        except Exception as error:
            if loud:
                traceback.print_exc()
            frame = traceback.extract_tb(error.__traceback__)[-1]
            return "CRASHES", f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"[:300]
    if warned:
        return "WARNS", str(warned[0].message)[:200]
    said = next((reason for reason in reasons if reason), "")
    if said and (path.name not in said or "\n" in said or len(said) > 600):
        return "SAYS BADLY", repr(said)[:300]
    return ("refused", said) if said else ("accepted", "")


def _reason(said: str) -> str:
    """A message without what is different in each: names, numbers, what stands in brackets."""
    words = re.sub(r"^d\d+/\w+: ", "", said.partition(": ")[2] or said)
    return re.sub(r"-?\d[\d.e+x-]*", "#", words.partition("(")[0].partition(";")[0])[:90].strip(" :")


def _status(key: str) -> int:
    """Of this process, in bytes."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
