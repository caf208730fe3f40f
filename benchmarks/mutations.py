"""Ten core lines made wrong, one at a time: the tests of that module have to notice each.

    python benchmarks/mutations.py

For each line a copy of the tree gets the wrong line, and the named test file is run on it. A mutation that passes its tests
survives and makes the exit code 1. The test files are run on the untouched copy first.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutation:
    """A line's `right` text, once in `module`, its `wrong` one, and the test file that should notice."""

    module: str
    right: str
    wrong: str
    test: str


MUTATIONS = (
    Mutation("volume.py", "to_old[:3, 3] = ratio / 2 - 0.5", "to_old[:3, 3] = ratio / 2", "test_volume.py"),
    Mutation("volume.py", "CANONICAL_SIGNS = (-1.0, -1.0, 1.0)", "CANONICAL_SIGNS = (-1.0, 1.0, 1.0)", "test_volume.py"),
    Mutation("haar.py", "torch.stack((mean + half, mean - half)", "torch.stack((mean - half, mean + half)", "test_haar.py"),
    Mutation("flow.py", "return (1 - tb) * x0 + tb * x1", "return tb * x0 + (1 - tb) * x1", "test_flow.py"),
    Mutation("flow.py", "velocity(x + h * now, x.new_full((len(x),), end))", "velocity(x + h * now, t)", "test_flow.py"),
    Mutation("flow.py", "slope = now + h / (2 * h_before) * (now - before)", "slope = now", "test_flow.py"),
    Mutation("slabs.py", "return total / weight", "return total", "test_slabs.py"),
    Mutation("slabs.py", "shift = max(0.0, least - (middle + steps[0]))", "shift = max(0.0, least - middle)", "test_slabs.py"),
    Mutation("conditions.py", "if len(patients) > 1", "if len(patients) > 0", "test_conditions.py"),
    Mutation("losses.py", "0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)", "0.5 * (mean.square() + logvar.exp() - logvar)",
             "test_losses.py"),
    Mutation("tiling.py", "slice(max(0, a - reach), min(length, b + reach))", "slice(max(0, a - reach), min(length, b))",
             "test_tiling.py"),
    Mutation("intensity.py", "np.rint((np.clip(x, -1.0, 1.0) + 1.0)", "np.floor((np.clip(x, -1.0, 1.0) + 1.0)",
             "test_intensity.py"),
    Mutation("files.py", "temporary.unlink(missing_ok=True)", "pass", "test_files.py"),
    Mutation("preprocess.py", "max(0.0, (factor - 1) / 2)", "0.0 * max(0.0, (factor - 1) / 2)", "test_preprocess.py"),
    Mutation("dicom.py", "affine[:3, 0] = along_row * column_mm", "affine[:3, 0] = along_row * row_mm", "test_dicom.py"),
    Mutation("intake.py", 'files.inside(group["path"])', "pass", "test_untrusted.py"),
    Mutation("nifti.py", "file.read(1)  # the end of a gzip", "pass  # the end of a gzip", "test_nifti.py"),
    Mutation("patients.py", 'f"{seed}:{patient}"', 'f"{seed}:{len(patient)}"', "test_prepare.py"),
    Mutation("checkpoint.py", "(1 + step) / (10 + step)", "(1 + step) / (20 + step)", "test_checkpoint.py"),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutations") as scratch:
        tree = Path(scratch)
        for name in ("src", "tests", "docs", "pyproject.toml", "README.md"):
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, tree / name)
        for test in sorted({mutation.test for mutation in MUTATIONS}):
            if not _passes(tree, test):
                raise SystemExit(f"{test} fails before anything is changed")
        survived = [mutation for mutation in MUTATIONS if _survives(tree, mutation)]
    print(f"{len(MUTATIONS) - len(survived)} of {len(MUTATIONS)} mutations caught, {time.monotonic() - start:.0f} s")
    sys.exit(1 if survived else 0)


def _survives(tree: Path, mutation: Mutation) -> bool:
    path = tree / "src" / "ctvae" / mutation.module
    right = path.read_text(encoding="utf-8")
    if right.count(mutation.right) != 1:
        raise SystemExit(f"{mutation.module}: {mutation.right!r} is there {right.count(mutation.right)} times, not once")
    path.write_text(right.replace(mutation.right, mutation.wrong), encoding="utf-8")
    try:
        survives = _passes(tree, mutation.test)
    finally:
        path.write_text(right, encoding="utf-8")
    print(f"{'SURVIVES' if survives else 'caught'}  {mutation.module}: {mutation.wrong.strip()}  ({mutation.test})", flush=True)
    return survives


def _passes(tree: Path, test: str) -> bool:
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/{test}"]
    environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{test} could not be run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


if __name__ == "__main__":
    main()
