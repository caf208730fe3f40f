"""A disk that is full and a folder that cannot be written: one line, exit code 2, and nothing that was written is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import hostile_files
import pytest
import torch

from ctvae import files, nifti
from ctvae.checkpoint import load
from ctvae.volume import Volume, plain_affine

SHAPE = (16, 24, 24)
SCRIPT = """
import json, resource, sys
from ctvae.__main__ import run
for limit, arguments in json.loads(sys.argv[1]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    print("exit code", run(arguments), file=sys.stderr)
"""  # SIGXFSZ is ignored by Python: a file that grows over the limit fails as on a full disk
FULL_AFTER_SOME = """
import json, resource, sys
from ctvae.__main__ import run
from ctvae.checkpoint import Checkpoints
saves, limit, arguments = json.loads(sys.argv[1])
plain, done = Checkpoints.save, []
def save(*arguments, **more):
    plain(*arguments, **more)
    done.append(1)
    if len(done) == saves:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
Checkpoints.save = save
print("exit code", run(arguments), file=sys.stderr)
"""
AS_ANYONE = [] if os.geteuid() else ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]  # root may write everywhere


def ran(*commands: tuple[int, list[str]], by: Sequence[str] = ()) -> list[list[str]]:
    """Lines on stderr of each command, its exit code last; `commands` are (most bytes per file or -1, arguments)."""
    script = [*by, sys.executable, "-c", SCRIPT, json.dumps(commands)]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    lines, each = [], []
    for line in done.stderr.splitlines():
        each.append(line)
        if line.startswith("exit code"):
            lines.append(each)
            each = []
    return lines


def refused(lines: list[str]) -> str:
    """What a command that ended in one line said; nothing else went wrong on the way."""
    assert lines[-1] == "exit code 2", lines
    assert not any(word in line for line in lines for word in ("Traceback", "Exception")), lines
    (said,) = (line for line in lines if line.startswith("error: "))
    return said


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


@pytest.fixture
def every_verb(scans, tiny_dataset, tiny_run, tmp_path) -> list[list[str]]:
    """A command for each verb that writes, without its --out."""
    hu = hostile_files.body(5, (64, 24, 24))
    scan = str(tmp_path / "scan.nii")
    nifti.write(Path(scan), Volume(hu, plain_affine((12.0, 12.0, 4.5), hu.shape)))
    data, run = str(tiny_dataset), str(tiny_run)
    return [
        ["prepare", str(scans), "--slices", "8", "--workers", "1"],
        ["train", data, "--set", "polish.enabled=false", "--set", "finish.enabled=false"],  # sooner planned
        ["compare", data, "--methods", "slice2d", "--minutes", "0.01"],
        ["generate", run, "-n", "1"],
        ["vary", run, scan, "-n", "1"],
        ["interpolate", run, scan, scan, "-n", "2"],
        ["evaluate", "--real", data, "--synthetic", str(tiny_dataset / "groups")],
        ["export", run],
        ["reconstruct", run, scan],
        ["plan", "--size", "16x16x16", "--memory", "4GB"],
        ["demo"],
    ]


def place(command: list[str], folder: Path) -> str:
    """What the command is to write there."""
    return str(folder / {"reconstruct": "again.nii", "plan": "plan.yaml"}.get(command[0], "out"))


@pytest.mark.skipif(bool(AS_ANYONE) and not shutil.which("setpriv"), reason="root needs setpriv to be refused anything")
def test_a_folder_that_may_not_be_written_is_one_line_for_every_verb(every_verb, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    each = ran(*((-1, [*command, "--out", place(command, closed)]) for command in every_verb), by=AS_ANYONE)
    for command, lines in zip(every_verb, each, strict=True):
        assert f"{closed}" in refused(lines), command
        assert "cannot be written (Permission denied); free space or choose another folder" in refused(lines), command
    assert list(closed.iterdir()) == []


def test_a_disk_that_is_full_is_one_line_for_every_verb(every_verb, tmp_path):
    folders = [tmp_path / "full" / command[0] for command in every_verb]
    each = ran(*((64, [*command, "--out", place(command, to)]) for command, to in zip(every_verb, folders, strict=True)))
    for command, folder, lines in zip(every_verb, folders, each, strict=True):
        assert f"{folder}" in refused(lines), command
        assert "File too large" in refused(lines), command
        assert "free space or choose another folder" in refused(lines), command
        assert all(len(raw) <= 64 for raw in content(folder).values()), command


@pytest.mark.skipif(bool(AS_ANYONE) and not shutil.which("setpriv"), reason="root needs setpriv to be refused anything")
def test_a_run_that_may_no_longer_be_written_keeps_its_checkpoints(tiny_dataset, tiny_run, tiny_settings, tmp_path):
    run = tmp_path / "run"
    command = ["train", str(tiny_dataset), "--out", str(run), *(word for text in tiny_settings for word in ("--set", text))]
    script = [sys.executable, "-c", FULL_AFTER_SOME, json.dumps((1, 0, command))]
    subprocess.run(script, capture_output=True, check=True)  # stopped after its first checkpoint, by whatever
    before = content(run)
    folders = [run, *(path for path in run.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    (closed,) = ran((-1, command), by=AS_ANYONE)
    assert "cannot be written (Permission denied)" in refused(closed)
    assert content(run) == before
    for folder in folders:
        folder.chmod(0o755)
    (again,) = ran((-1, command))
    assert again[-1] == "exit code 0"
    for path in sorted(tiny_run.glob("*.safetensors")):
        one, other = load(path)[0], load(run / path.name)[0]
        assert all(torch.equal(value, other[name]) for name, value in one.items()), path.name


def test_a_place_that_cannot_be_is_one_line(scans, tmp_path):
    place = "/proc/ctvae/out" if Path("/proc/self").exists() else str(tmp_path / "file" / "out")
    (tmp_path / "file").write_text("")
    (lines,) = ran((-1, ["prepare", str(scans), "--out", place, "--slices", "8"]))
    assert "cannot be written" in refused(lines)


@pytest.mark.parametrize(
    ("saves", "limit", "kept"),
    [
        (1, 0, "autoencoder-00000002"),
        pytest.param(4, 4096, "polish-00000002", marks=pytest.mark.slow),
        pytest.param(7, 4096, "flow-00000004", marks=pytest.mark.slow),
    ],
)
def test_training_on_a_full_disk_keeps_its_checkpoints_and_goes_on(
    tiny_dataset, tiny_run, tiny_settings, tmp_path, saves, limit, kept
):
    """The disk is full after so many checkpoints; then there is space again, and the weights are those of a run with space."""
    from ctvae.training.train import train

    run = tmp_path / "run"
    command = ["train", str(tiny_dataset), "--out", str(run), *(word for text in tiny_settings for word in ("--set", text))]
    script = [sys.executable, "-c", FULL_AFTER_SOME, json.dumps((saves, limit, command))]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    assert "File too large" in refused(done.stderr.splitlines())
    held = sorted((run / "checkpoints").glob("*-[0-9]*.safetensors"))
    assert held[-1].stem == kept
    assert all(load(path)[1]["step"] for path in held)
    assert not any(files.is_partial(path) for path in run.rglob("*"))
    train(tiny_dataset, run, overrides=tiny_settings)
    for path in sorted(tiny_run.glob("*.safetensors")):
        one, other = load(path)[0], load(run / path.name)[0]
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items()), path.name


def test_scans_that_were_generated_stay_when_the_disk_is_full(tiny_run, tmp_path):
    through, out = tmp_path / "through", tmp_path / "out"
    generate = ["generate", str(tiny_run), "-n"]
    _, _, full, before, again = ran(
        (-1, [*generate, "3", "--out", str(through)]),
        (-1, [*generate, "1", "--out", str(out)]),
        (5000, [*generate, "3", "--out", str(out)]),
        (5000, [*generate, "1", "--out", str(out)]),
        (-1, [*generate, "3", "--out", str(out)]),
    )
    assert "synthetic-0-0001.nii.gz: cannot be written (File too large)" in refused(full)
    assert "contact-sheet.png: cannot be written (File too large)" in refused(before)
    assert again[-1] == "exit code 0"
    assert content(out) == content(through)


def test_an_export_that_was_interrupted_is_begun_anew(tiny_run, tmp_path):
    through, out = tmp_path / "through", tmp_path / "out"
    card = tmp_path / "card.md"
    card.write_text("# A model")
    export = ["export", str(tiny_run), "--card", str(card), "--out"]
    _, full, again, twice = ran((-1, [*export, str(through)]), (9000, [*export, str(out)]), *[(-1, [*export, str(out)])] * 2)
    assert "File too large" in refused(full)
    assert again[-1] == "exit code 0"
    assert content(out) == content(through)
    assert "is not empty" in refused(twice)


@pytest.mark.slow
def test_a_report_stays_when_the_disk_is_full(tiny_dataset, tiny_run, tmp_path):
    out, made = tmp_path / "report", tmp_path / "made"
    evaluate = ["evaluate", "--real", str(tiny_dataset), "--synthetic", str(made), "--out", str(out)]
    for lines in ran((-1, ["generate", str(tiny_run), "--out", str(made), "-n", "4"]), (-1, evaluate)):
        assert lines[-1] == "exit code 0", lines
    before = content(out)
    (full,) = ran((1000, evaluate))
    assert "cannot be written (File too large)" in refused(full)
    assert {name: raw for name, raw in content(out).items() if not name.startswith(".partial")} == before


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
