"""Documentation that runs: every `ctvae ...` line parses, linked files exist, and (slow) every command is run on phantoms.

For the latter each block of commands is given to bash as it stands, in a folder that has what the page takes for granted. What it
calls `ctvae` and `torchrun` makes the networks small and the training short, and two processes stand for eight; `srun` and
`scontrol` stand for Slurm's.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer import TyperException
from typer.main import get_command

from ctvae import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = get_command(cli.app).commands
SMALL = [  # settings for networks that train in seconds
    "model.strides=[[2,2,2],[2,2,2]]",
    "model.widths=[4,8]",
    "model.blocks=[1,1]",
    "model.latent_channels=4",
    "prior.widths=[8,32]",
    "prior.detail_width=8",
    "prior.blocks=1",
    "prior.mlp_width=16",
    "prior.sampling_steps=2",
]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def shell_lines(page: Path) -> list[str]:
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def inline_commands(page: Path) -> list[str]:
    """`ctvae VERB ...` in running text and tables, placeholders and all."""
    return re.findall(r"`(ctvae [a-z][^`]*)`", page.read_text(encoding="utf-8"))


LINES = [
    pytest.param(line, id=f"{page.name}:{line[:50]}")
    for page in PAGES
    for line in [*shell_lines(page), *inline_commands(page)]
    if line.startswith("ctvae ")
]


@pytest.mark.parametrize("line", LINES)
def test_commands_in_the_documentation_parse(line):
    """Verb, options and the type of every value; the files need not exist. `M` and `A,B` stand for values."""
    _, verb, *arguments = shlex.split(line.partition(" #")[0].replace("--minutes M", "--minutes 1"))
    assert verb in COMMANDS
    if verb != "plan" and not {"--out", "-o"} & set(arguments):  # a command that is only named, such as `ctvae methods`
        assert {argument for argument in arguments if argument.startswith("-")} <= {"--help"}
        return
    try:
        COMMANDS[verb].make_context(verb, arguments)
    except TyperException as error:
        raise AssertionError(f"{line}: {error.format_message()}") from None


def test_there_are_commands_to_check():
    verbs = {parameter.values[0].split()[1] for parameter in LINES}
    assert verbs >= {
        "prepare",
        "train",
        "generate",
        "reconstruct",
        "vary",
        "interpolate",
        "evaluate",
        "compare",
        "demo",
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_files_exist(page):
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_the_documentation_names_what_exists(page):
    import ctvae

    for block in blocks(page, "python"):
        compile(block, page.name, "exec")
        assert set(re.findall(r"\bctvae\.(\w+)\(", block)) <= set(ctvae.__all__)


def test_make_targets_in_the_readme_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {line.split()[1] for line in shell_lines(ROOT / "README.md") if line.startswith("make ")}
    assert {"demo", "test"} <= named <= targets


def test_ci_runs_what_the_readme_says():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text(encoding="utf-8")
    subprocess.run(["bash", "-n", str(script)], check=True)


STAND_INS = {
    "ctvae": "{python} {tests}/test_docs.py ctvae",
    "torchrun": "{python} {tests}/test_docs.py torchrun",
    "python": "{python}",
    "srun": "exec",
    "scontrol": "echo localhost #",
}


def main(name: str, *arguments: str) -> None:
    """What a block calls `ctvae` or `torchrun`."""
    words = list(arguments)
    if name == "torchrun":
        words[words.index("--nproc-per-node") + 1] = "2"
        start = words.index("ctvae") + 1
        command = ["-m", "torch.distributed.run", *words[:start], *quickened(words[start:])]
    else:
        command = ["-m", "ctvae", *quickened(words)]
    os.execv(sys.executable, [sys.executable, *command])


def quickened(words: list[str]) -> list[str]:
    """A command's arguments as they stand, but with small networks and seconds of training."""
    words = list(words)
    verb = words[0]
    shorter = {"--minutes": "0.1", "--hours": "0.005"} | ({"--size": "32"} if verb == "prepare" else {})
    for option in shorter.keys() & set(words):
        words[words.index(option) + 1] = shorter[option]
    if verb == "train" and not {"--minutes", "--hours", "--plan"} & set(words):
        words += ["--minutes", "0.1"]
    if verb in ("train", "plan") and "--plan" not in words:  # a plan has them already
        words += [word for setting in SMALL for word in ("--set", setting)]
    return words


def run_block(block: str, folder: Path) -> None:
    """By bash, in `folder`."""
    stand_ins = folder / ".stand-ins"
    stand_ins.mkdir(exist_ok=True)
    for name, command in STAND_INS.items():
        line = command.format(python=shlex.quote(sys.executable), tests=shlex.quote(str(ROOT / "tests")))
        (stand_ins / name).write_text(f"#!/bin/bash\n{line} \"$@\"\n")
        (stand_ins / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1"}
    ours = {"PATH": f"{stand_ins}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    script = "set -e -o pipefail\n" + block.replace("/shared/", "")
    environment = os.environ | slurm | ours
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """What the pages take for granted: scans, labels, a DICOM study, a table, a dataset with groups along the body, and a run."""
    import hostile_dicom

    from ctvae import Dataset, nifti, prepare, train
    from ctvae.phantoms import write_phantoms

    folder = tmp_path_factory.mktemp("given")
    write_phantoms(folder / "scans", 12, shape=(96, 80, 80), spacing_mm=(4.0, 4.0, 3.0))
    for n, path in enumerate(sorted((folder / "scans").glob("*.nii.gz"))):
        labels = path.parent / "labels" / path.name
        path.rename(path.with_name(f"P{n:02d}_{path.name}"))
        labels.rename(labels.with_name(f"P{n:02d}_{path.name}"))
    shutil.copytree(folder / "scans" / "labels", folder / "labels")
    shutil.copytree(folder / "scans", folder / "headneck")
    study = folder / "dicom" / "P99_study"
    study.mkdir(parents=True)
    whole, _ = nifti.read(next((folder / "scans").glob("*.nii.gz")))
    for n, image in enumerate(hostile_dicom.series(whole.hu)):
        image.save_as(study / f"{n:03d}", enforce_file_format=True)
    prepare(folder / "scans", folder / "dataset", slices=32, stride=16, fractions=(0.7, 0.15, 0.15), workers=1)
    train(folder / "dataset", folder / "run", minutes=0.2, overrides=SMALL)
    patients = sorted({group.patient for group in Dataset.open(folder / "dataset").groups("train")})
    rows = [f"{patient},{50 + 3 * n},{'FM'[n % 2]}" for n, patient in enumerate(patients)]
    (folder / "table.csv").write_text("\n".join(["patient,age,sex", *rows]))
    views = [f"{patient},{('whole', 'cut')[n % 2]}" for n, patient in enumerate(patients)]
    (folder / "views.csv").write_text("\n".join(["patient,view", *views]))
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    (folder / "docs").symlink_to(ROOT / "docs")
    return folder


BLOCKS = [
    pytest.param(block, id=f"{page.name}:{block[:40]}")
    for page in PAGES
    if page.name != "tutorial.md"
    for block in blocks(page, "sh")
    if not block.startswith(("make ", "pip "))
]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_of_commands_works_as_written(block, given, tmp_path):
    folder = Path(shutil.copytree(given, tmp_path / "here", symlinks=True))
    made = set(re.findall(r"--out (\S+)", block.replace("/shared/", "")))
    for name in made & {"dataset", "run"}:
        shutil.rmtree(folder / name)
    run_block(block, folder)
    for name in made - {"$prior"}:
        assert (folder / name).exists(), name


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_tutorial_works_as_written(tmp_path):
    """All of it, in order, in an empty folder."""
    tutorial = blocks(ROOT / "docs" / "tutorial.md", "sh")
    assert len(tutorial) >= 8
    for block in tutorial:
        run_block(block, tmp_path)
    assert len(list((tmp_path / "synthetic").glob("*.nii.gz"))) == 4
    assert len(list((tmp_path / "variations").glob("*.nii.gz"))) == 2
    assert (tmp_path / "again.nii.gz").exists()
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page
    assert not re.search(r"(src|href)=[\"']https?:", page), "the page needs nothing from outside"


if __name__ == "__main__":
    main(*sys.argv[1:])
