"""Files are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ctvae import files
from ctvae.errors import InputError


def test_the_temporary_file_keeps_both_suffixes_and_leaves_nothing_behind(tmp_path):
    with files.atomic(tmp_path / "sub" / "scan.nii.gz") as temporary:
        assert temporary.name.endswith(".nii.gz")  # nibabel chooses compression by it
        assert temporary.parent == tmp_path / "sub"
        temporary.write_bytes(b"content")
        assert not (tmp_path / "sub" / "scan.nii.gz").exists()
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["scan.nii.gz"]
    assert (tmp_path / "sub" / "scan.nii.gz").read_bytes() == b"content"


def fail_while_writing(path: Path, failure: BaseException) -> None:
    with files.atomic(path) as temporary:
        temporary.write_text("half")
        raise failure


@pytest.mark.parametrize("failure", [ValueError("ours"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failure_while_writing_leaves_the_old_file(tmp_path, failure):
    path = tmp_path / "a.json"
    files.write_json(path, {"kept": True})
    with pytest.raises(type(failure)):
        fail_while_writing(path, failure)
    assert json.loads(path.read_text()) == {"kept": True}
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_disk_before_it_has_its_name_and_the_name_after(tmp_path, monkeypatch):
    flush, rename, done = os.fsync, os.replace, []

    def flushed(descriptor: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        flush(descriptor)

    def renamed(old: Path, new: Path) -> None:
        done.append(f"{old} -> {new}")
        rename(old, new)

    monkeypatch.setattr(files.os, "fsync", flushed)
    monkeypatch.setattr(files.os, "replace", renamed)
    with files.atomic(tmp_path / "a.txt") as temporary:
        temporary.write_text("content")
        assert done == []
    assert done == [str(temporary), f"{temporary} -> {tmp_path / 'a.txt'}", str(tmp_path)]


def test_a_disk_that_fills_up_is_one_line_and_the_old_file_stays(tmp_path):
    """The operating system's own refusal: a process that may not write files over 1000 bytes."""
    path = tmp_path / "a.txt"
    path.write_text("old")
    code = (
        "import resource, signal, sys; from pathlib import Path; from ctvae import files, errors\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        f"    files.write_text(Path({str(path)!r}), 'x' * 10_000)\n"
        "except errors.InputError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{path}: cannot be written (File too large)")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_no_space_left_names_the_file_and_the_remedy(tmp_path):
    message = r"x\.txt: cannot be written \(No space left on device\); free space"
    with pytest.raises(InputError, match=message), files.atomic(tmp_path / "x.txt"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        files.write_text(tmp_path / "file" / "below.txt", "text")


def test_json_is_readable_and_comes_back(tmp_path):
    content = {"method": "wavelet3d", "spacing_mm": [0.7, 0.7, 2.5], "note": "Größe"}
    files.write_json(tmp_path / "a.json", content)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "Größe" in text
    assert text.endswith("}\n")
    assert json.loads(text) == content


def test_two_writers_do_not_share_a_temporary_file(tmp_path):
    with files.atomic(tmp_path / "a.json") as first, files.atomic(tmp_path / "b.json") as second:
        first.write_text("1")
        second.write_text("2")
    assert (Path(tmp_path / "a.json").read_text(), (tmp_path / "b.json").read_text()) == ("1", "2")


@pytest.mark.parametrize("call", ["open", "fsync"])
def test_a_system_that_cannot_flush_folders_is_no_trouble(tmp_path, monkeypatch, call):
    """Windows opens no folders; some network file systems do not flush them. A file that is not flushed is trouble."""
    real, refused = getattr(files.os, call), []

    def refuse(target, *rest):
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target
        if Path(path).is_dir() or "trouble" in str(path):
            refused.append(path)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(target, *rest)

    monkeypatch.setattr(files.os, call, refuse)
    files.write_text(tmp_path / "fine.txt", "kept")
    assert (tmp_path / "fine.txt").read_text() == "kept"
    assert refused == [tmp_path] or refused == [str(tmp_path)]
    with pytest.raises(InputError, match="Invalid argument"):
        files.write_text(tmp_path / "trouble.txt", "lost")
    assert [path.name for path in tmp_path.iterdir()] == ["fine.txt"]


def test_one_process_at_a_time_is_at_work_in_a_folder(tmp_path):
    code = "import sys, time; from pathlib import Path; from ctvae.files import occupied\n"
    code += "with occupied(Path(sys.argv[1]), 'ctvae train'): print('in', flush=True); time.sleep(60)"
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        with pytest.raises(InputError, match="another `ctvae train` is at work in it"), files.occupied(folder, "ctvae train"):
            pytest.fail("two at once")
        other.kill()
    with files.occupied(folder, "ctvae train"):  # who was killed holds nothing
        (folder / "kept").write_text("")
    assert [path.name for path in folder.iterdir()] == ["kept"]


def test_a_folder_made_for_work_that_is_refused_is_gone_again(tmp_path):
    with pytest.raises(ValueError, match="refused"), files.occupied(tmp_path / "a" / "run", "ctvae train"):
        raise ValueError("refused")
    assert not (tmp_path / "a" / "run").exists()


def test_a_file_in_a_folders_place_is_left_for_the_work_to_complain_about(tmp_path):
    (tmp_path / "run").write_text("mine")
    with files.occupied(tmp_path / "run", "ctvae train"):
        pass
    assert (tmp_path / "run").read_text() == "mine"
