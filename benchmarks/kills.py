"""Kill -9 at random moments of prepare, train, generate and evaluate: the same command goes on, and ends as if nothing had been.

    python benchmarks/kills.py --trials 10 --kills 3 --seed 0
    python benchmarks/kills.py --verbs train --trials 3 --kills 10

Phantoms are prepared, a network of a few thousand weights is trained for seconds (all four stages, fp32), and
each verb is run once through. Then, `--trials` times: begun in an empty folder, killed with all its processes after a random
time, `--kills` times over (or until it is done), and at last left to finish; kills are spread over the whole of a run. Every file
that it leaves is compared byte for byte with the run that was not killed: of report.json and index.html all but the time of day,
of weights the tensors, of run.json all but the seconds, of curves steps and losses (figures of held-out groups are NaN after a
kill until they are taken again). TensorBoard's events hold times and are not compared.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
TIMES = re.compile(rb'"[a-z_]*seconds": [\d.]+|20\d\d-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(\+00:00)?( UTC)?')
LENGTHS = (
    "autoencoder.steps=24", "polish.steps=12", "prior.steps=36", "autoencoder.save_every=2", "polish.save_every=2",
    "prior.save_every=4", "finish.enabled=true", "finish.steps=8", "finish.log_every=2", "finish.save_every=2", "finish.batch=1",
    "finish.drawn=2", "finish.discriminator_width=4", "finish.precision=fp32",
)  # fmt: skip
Verb = Callable[[Path], list[str]]  # the folder to write -> the command line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbs", default="prepare,train,generate,evaluate")
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="kills"))
    try:
        verbs = staged(scratch)
        chosen = {name: verbs[name] for name in arguments.verbs.split(",")}
        failed = sum(_judge(name, verb, scratch / name, arguments) for name, verb in chosen.items())
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    sys.exit(1 if failed else 0)


def staged(scratch: Path) -> dict[str, Verb]:
    """What the verbs need, and their command lines. Everything is imported here once, so that the kills meet work."""
    from conftest import TINY

    import ctvae.evaluation.evaluate
    import ctvae.generate  # noqa: F401
    from ctvae.phantoms import write_phantoms

    scans, data, run, made = (scratch / name for name in ("scans", "data", "run", "made"))
    write_phantoms(scans, 8, shape=(64, 32, 32), spacing_mm=(12.5, 12.5, 4.5))
    prepare = ["prepare", str(scans), "--slices", "32", "--fractions", "0.5,0.25,0.25", "--workers"]
    settings = [word for setting in (*TINY, *LENGTHS) for word in ("--set", setting)]
    train = ["train", str(data), *settings, "--out"]
    for command in (
        [*prepare, "1", "--out", str(data)],
        [*train, str(run)],
        ["generate", str(run), "--out", str(made), "-n", "6"],
    ):
        if finish(command) != 0:
            raise SystemExit(f"could not stage: {command}")
    return {
        "prepare": lambda out: [*prepare, "2", "--patients-of", str(data), "--out", str(out)],
        "train": lambda out: [*train, str(out)],
        "generate": lambda out: ["generate", str(run), "--out", str(out), "-n", "6"],
        "evaluate": lambda out: ["evaluate", "--real", str(data), "--synthetic", str(made), "--out", str(out)],
    }


def _judge(name: str, verb: Verb, folder: Path, arguments: argparse.Namespace) -> int:
    """Number of trials that did not end as they should."""
    start = time.monotonic()
    if finish(verb(folder / "through")) != 0:
        raise SystemExit(f"{name}: does not run through")
    seconds = time.monotonic() - start
    expected = content(folder / "through")
    longest = seconds * min(1.0, 2 / arguments.kills)
    failed = killed = 0
    for trial in range(arguments.trials):
        rng = random.Random(f"{arguments.seed} {name} {trial}")
        out = folder / f"trial-{trial}"
        moments = []
        for _ in range(arguments.kills):
            moments.append(rng.uniform(0, longest))
            if not _killed(verb(out), moments[-1]):
                break
            killed += 1
        code = finish(verb(out))
        changed = different(expected, content(out))
        if code or changed:
            failed += 1
            print(f"{name} trial {trial}, killed after {moments}: exit code {code}, different: {changed[:5]} "
                  f"{[_first(expected[n], content(out)[n]) for n in changed if n in expected and (out / n).exists()][:2]}",
                  flush=True)  # fmt: skip
        shutil.rmtree(out)
    print(f"{name}: {killed} kills in {arguments.trials} trials (one run: {seconds:.1f} s, {len(expected)} files), "
          f"{arguments.trials - failed} ended equal, {failed} did not; seed {arguments.seed}", flush=True)  # fmt: skip
    return failed


def fork(command: list[str], said: str = os.devnull) -> int:
    """The process id, and group, of a child that runs the command line; `said` is a file that takes what it says on stderr."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if not os.environ.get("LOUD"):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    from ctvae.__main__ import run

    os._exit(run(command))


def finish(command: list[str], said: str = os.devnull) -> int:
    """Its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(fork(command, said), 0)[1])


def _killed(command: list[str], after_seconds: float) -> bool:
    """Whether the command was still running when it was killed, with all its workers."""
    child = fork(command)
    deadline = time.monotonic() + after_seconds
    while time.monotonic() < deadline:
        done, _ = os.waitpid(child, os.WNOHANG)
        if done:
            return False
        time.sleep(0.002)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def content(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones too: nothing that a killed writer left may stay. Without times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "tfevents" not in path.name:
            raw = path.read_bytes().replace(str(folder).encode(), b"OUT")
            plain = {".safetensors": _tensors, ".csv": _losses}.get(path.suffix, lambda raw: TIMES.sub(b"TIME", raw))
            found[str(path.relative_to(folder))] = plain(raw)
    return found


def _tensors(raw: bytes) -> bytes:
    """Of a safetensors file without its description, which says how long training took."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    return json.dumps(header).encode() + raw[8 + length :]


def _losses(raw: bytes) -> bytes:
    """Step and loss of a curve."""
    return "\n".join(f"{row['step']} {row['loss']}" for row in csv.DictReader(raw.decode().splitlines())).encode()


def _first(expected: bytes, found: bytes) -> list[str]:
    """The first lines of two files that differ."""
    pairs = zip(expected.splitlines(), found.splitlines(), strict=False)
    return next(([f"{one[:80]!r}", f"{other[:80]!r}"] for one, other in pairs if one != other), ["length"])


def different(expected: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    return sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
