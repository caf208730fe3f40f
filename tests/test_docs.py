"""Documentation that runs: every `ctvae ...` line parses, linked files exist, the tutorial works on phantoms."""

from __future__ import annotations

import os
import re
import shlex
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
SMALL = [  # settings for the tutorial's networks that train in seconds
    "model.strides=[[2,2,2],[2,2,2]]",
    "model.widths=[4,8]",
    "model.blocks=[1,1]",
    "model.latent_channels=4",
    "prior.widths=[8,32]",
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


def quickened(line: str) -> list[str]:
    """A tutorial command as it stands, but with small networks and seconds of training."""
    words = shlex.split(line)
    if words[0] == "python":
        return [sys.executable, *words[1:]]
    assert words[0] == "ctvae"
    if "--minutes" in words:
        words[words.index("--minutes") + 1] = "0.1"
    small = [word for setting in SMALL for word in ("--set", setting)] if words[1] == "train" else []
    return [sys.executable, "-m", "ctvae", *words[1:], *small]


@pytest.mark.slow
def test_the_tutorial_works_as_written(tmp_path):
    """Every command of the tutorial, in order, in an empty folder."""
    lines = shell_lines(ROOT / "docs" / "tutorial.md")
    assert len(lines) >= 9
    for line in lines:
        done = subprocess.run(quickened(line), cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert len(list((tmp_path / "synthetic").glob("*.nii.gz"))) == 4
    assert len(list((tmp_path / "variations").glob("*.nii.gz"))) == 2
    assert (tmp_path / "again.nii.gz").exists()
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page
    assert not re.search(r"(src|href)=[\"']https?:", page), "the page needs nothing from outside"
