"""A disk that is full and a folder that cannot be written: one line, exit code 2, and nothing that was written is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import hostile_files
import pytest

from ctvae import files, nifti
from ctvae.volume import Volume, plain_affine

SHAPE = (16, 24, 24)
SCRIPT = """
import json, resource, sys
from ctvae.__main__ import run
for limit, arguments in json.loads(sys.argv[1]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    print("exit code", run(arguments), file=sys.stderr)
"""  # SIGXFSZ is ignored by Python: a file that grows over the limit fails as on a full disk


def ran(*commands: tuple[int, list[str]]) -> list[list[str]]:
    """Lines on stderr of each command, its exit code last; `commands` are (most bytes per file or -1, arguments)."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(commands)], capture_output=True, text=True, check=True)
    lines, each = [], []
    for line in done.stderr.splitlines():
        each.append(line)
        if line.startswith("exit code"):
            lines.append(each)
            each = []
    return lines


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def scans(tmp_path) -> Path:
    for seed, side in ((0, 24), (1, 32), (2, 24)):  # groups of 9.6, 16.7 and 9.6 kB: the second does not fit the small disk
        hu = hostile_files.body(seed, (8, side, side))
        nifti.write(tmp_path / "scans" / f"s{seed}.nii", Volume(hu, plain_affine((1.5, 1.5, 3), hu.shape)))
    return tmp_path / "scans"


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_prepare_on_a_full_disk_goes_on_when_there_is_space(scans, tmp_path, workers):
    through, out = tmp_path / "through", tmp_path / "out"
    prepare = ["prepare", str(scans), "--slices", "8", "--rest", "drop", "--workers", workers]
    first = [*prepare, "--out", str(through)]
    command = [*prepare, "--patients-of", str(through), "--out", str(out)]
    whole, full, again = ran((-1, first), (12_000, command), (-1, command))
    assert whole[-1] == again[-1] == "exit code 0"
    assert full[-1] == "exit code 2", full
    (line,) = (line for line in full if line.startswith("error: "))
    assert "cannot be written (File too large)" in line
    assert content(out) == content(through)


def test_what_was_prepared_stays_when_the_disk_is_full(scans, tmp_path):
    out = tmp_path / "out"
    command = ["prepare", str(scans), "--slices", "8", "--rest", "drop", "--workers", "1", "--out", str(out)]
    ran((-1, command))
    before = content(out)
    hu = hostile_files.body(9, SHAPE)
    nifti.write(scans / "s9.nii", Volume(hu, plain_affine((1.5, 1.5, 3), hu.shape)))
    (full,) = ran((1000, command))
    assert full[-1] == "exit code 2"
    assert content(out) == before


@pytest.mark.parametrize("verb", ["prepare", "export"])
def test_a_place_that_cannot_be_written_is_one_line(scans, tmp_path, verb, request):
    place = "/proc/ctvae/out" if Path("/proc/self").exists() else str(tmp_path / "file" / "out")
    (tmp_path / "file").write_text("")
    source = scans if verb == "prepare" else request.getfixturevalue("tiny_run")
    (lines,) = ran((-1, [verb, str(source), "--out", place, *(["--slices", "8"] if verb == "prepare" else [])]))
    assert lines[-1] == "exit code 2"
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert not any("Traceback" in line for line in lines)


def test_what_a_killed_writer_left_is_swept_and_others_stay(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    with files.atomic(tmp_path / "a.nii.gz") as mine:
        mine.write_text("being written")
        dead = tmp_path / mine.name.replace(f"-{os.getpid()}.", f"-{child.pid}.")
        elsewhere = tmp_path / ".a.ffffff-1.partial.nii.gz"
        strange = tmp_path / ".partial"
        for path in (dead, elsewhere, strange, tmp_path / "kept.nii"):
            path.write_text("x")
        assert files.is_partial(dead)
        assert not files.is_partial(tmp_path / "kept.nii")
        files.sweep(tmp_path)
        assert not dead.exists()
        assert all(path.exists() for path in (mine, elsewhere, strange, tmp_path / "kept.nii"))
    files.sweep(tmp_path / "missing")


def test_a_dataset_that_was_killed_at_its_first_file_can_be_prepared(scans, tmp_path):
    from ctvae.prepare import prepare

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".prepare.ffffff-1.partial.json").write_text("{")
    assert prepare(scans, tmp_path / "out", slices=8, workers=1).groups()
