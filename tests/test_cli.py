"""The command line: the contract of issue 2, and one clear line for everything a user can get wrong."""

from __future__ import annotations

import ast
import errno
import inspect
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.main import get_command

import ctvae
from ctvae import __main__, cli
from ctvae.errors import InputError, ModelError

CONTRACT = {  # issue 2: arguments and options of every verb
    "prepare": ("sources", "--out", "--slices", "--size", "--labels", "--crop-body", "--workers"),
    "train": ("dataset", "--out", "--method", "--stage", "--set", "--minutes"),
    "generate": ("model", "--out", "-n", "--seed", "--prior"),
    "reconstruct": ("model", "scan", "--out"),
    "vary": ("model", "scan", "--alpha", "-n", "--out"),
    "interpolate": ("model", "a", "b", "-n", "--out"),
    "evaluate": ("--real", "--synthetic", "--out"),
    "compare": ("dataset", "--methods", "--minutes", "--out"),
    "demo": ("--out",),
}
COMMANDS = get_command(cli.app).commands


def call(capsys, *arguments: object) -> tuple[int, str, list[str]]:
    """Exit code, stdout, and the lines on stderr."""
    code = __main__.run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err.splitlines()


def refused(capsys, *arguments: object) -> str:
    """The one line that a wrong command gets."""
    code, out, lines = call(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("verb", CONTRACT)
def test_the_contract(verb):
    known = {name for parameter in COMMANDS[verb].params for name in (parameter.name, *parameter.opts)}
    assert set(CONTRACT[verb]) <= known


@pytest.mark.parametrize("verb", CONTRACT)
def test_a_verb_hands_everything_to_one_documented_function(verb):
    """Every parameter of the Python function can be set from the command line, under its name or a plain synonym."""
    function = getattr(ctvae, verb)
    assert inspect.getdoc(function)
    synonyms = {"overrides": "settings", "reconstruct": "model", "progress": "out", "memory_gb": "memory"}
    synonyms |= {"conditions": "condition"} if verb == "generate" else {}
    ours_only = {"demo": {"scans", "minutes"}}.get(verb, set())
    wanted = {synonyms.get(name, name) for name in inspect.signature(function).parameters} - ours_only
    assert wanted <= {parameter.name for parameter in COMMANDS[verb].params}


@pytest.mark.parametrize("verb", CONTRACT)
def test_defaults_are_the_functions_own(verb):
    """A command and a function of the same name do the same thing."""
    ours = {parameter.name: parameter.default for parameter in COMMANDS[verb].params}
    for name, parameter in inspect.signature(getattr(ctvae, verb)).parameters.items():
        if parameter.default is inspect.Parameter.empty or name not in ours or name == "fractions":
            continue
        assert (ours[name] or None) == (parameter.default or None), f"{verb}: {name}"


@pytest.mark.parametrize("arguments", [["--help"], ["prepare", "--help"], ["train", "-h"], ["evaluate", "--help"]])
def test_help_is_quick_and_loads_nothing_heavy(arguments):
    """Under half a second of processor time, which a busy machine does not stretch; the best of three."""
    code = (
        f"import sys; from ctvae.__main__ import run; code = run({arguments!r}); "
        "heavy = {'torch', 'nibabel', 'monai', 'matplotlib', 'sklearn', 'numpy'} & set(sys.modules); "
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        assert "Usage: ctvae" in done.stdout
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.5


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_verb_explains_itself(verb, capsys):
    code, out, _ = call(capsys, verb, "--help")
    assert code == 0
    assert "..." not in COMMANDS[verb].get_short_help_str(), "the first line is too long for the list of commands"
    if verb in CONTRACT:
        assert f"Example: ctvae {verb} " in " ".join(out.split())


def test_alone_it_shows_its_commands(capsys):
    code, out, _ = call(capsys)
    assert code == 0
    assert all(verb in out for verb in CONTRACT)


def test_the_version(capsys):
    assert call(capsys, "--version") == (0, f"ctvae {ctvae.__version__}\n", [])


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "ctvae", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"ctvae {ctvae.__version__}\n"


def test_methods_lists_the_recipes_with_a_line_each(capsys):
    code, out, _ = call(capsys, "methods")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].startswith("wavelet3d ")
    assert {line.split()[0] for line in lines} >= {"slice2d", "stack2d-small", "stack2d-large", "conv3d"}
    assert all(len(line.split()) > 4 for line in lines)


# --- what users get wrong


def test_a_misspelt_verb(capsys):
    assert "Did you mean 'train'" in refused(capsys, "trian", "dataset")


def test_a_missing_argument_and_a_missing_option(capsys, tmp_path):
    assert "DATASET" in refused(capsys, "train", "--out", tmp_path)
    assert "--out" in refused(capsys, "train", tmp_path)


def test_a_misspelt_option(capsys, tmp_path):
    assert "--minutes" in refused(capsys, "train", tmp_path, "--out", tmp_path / "run", "--minute", "3")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--size", "big"),
        ("--size", "0"),
        ("--fractions", "0.8,0.2"),
        ("--slices", "0"),
        ("--rest", "keep"),
        ("--workers", "x"),
    ],
)
def test_a_wrong_value_for_prepare(capsys, tmp_path, option, value):
    assert option in refused(capsys, "prepare", tmp_path, "--out", tmp_path / "out", option, value)


def test_an_unknown_prior_is_answered_with_the_known_ones(capsys, tmp_path):
    line = refused(capsys, "generate", tmp_path, "--out", tmp_path / "out", "--prior", "flwo")
    assert all(prior in line for prior in ("flow", "gaussian", "mixture", "normal"))


def test_prepare_of_a_missing_path(capsys, tmp_path):
    assert "nowhere" in refused(capsys, "prepare", tmp_path / "nowhere", "--out", tmp_path / "out")


def test_prepare_of_an_empty_folder(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(capsys, "prepare", tmp_path / "empty", "--out", tmp_path / "out")


def test_train_on_something_that_is_no_dataset(capsys, tmp_path):
    assert "nowhere" in refused(capsys, "train", tmp_path / "nowhere", "--out", tmp_path / "run")
    assert "ctvae prepare" in refused(capsys, "train", tmp_path, "--out", tmp_path / "run")


MODEL_VERBS = {
    "generate": ["generate", "MODEL", "--out", "OUT"],
    "reconstruct": ["reconstruct", "MODEL", "SCAN", "--out", "OUT/a.nii.gz"],
    "vary": ["vary", "MODEL", "SCAN", "--out", "OUT"],
    "interpolate": ["interpolate", "MODEL", "SCAN", "SCAN", "--out", "OUT"],
    "evaluate": ["evaluate", "--real", "SCAN", "--synthetic", "SCAN", "--model", "MODEL", "--out", "OUT"],
}


@pytest.mark.parametrize("arguments", MODEL_VERBS.values(), ids=MODEL_VERBS)
@pytest.mark.parametrize("model", ["missing", "empty", "file"])
def test_a_model_that_is_not_one(capsys, tmp_path, arguments, model):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("not a model")
    places = {"MODEL": tmp_path / model, "SCAN": tmp_path / "scan.nii.gz"}
    line = refused(capsys, *(places.get(a, a.replace("OUT", str(tmp_path / "out"))) for a in arguments))
    assert str(tmp_path / model) in line
    assert not (tmp_path / "out").exists(), "nothing is written before the model is there"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Six small phantoms, prepared."""
    from ctvae.phantoms import write_phantoms

    folder = tmp_path_factory.mktemp("scans")
    write_phantoms(folder, 6, shape=(16, 32, 32), spacing_mm=(12.5, 12.5, 9.0))
    return ctvae.prepare([folder], folder / "dataset", slices=16, workers=1).folder


def test_prepare_says_what_it_made(capsys, dataset, tmp_path):
    code, out, lines = call(
        capsys, "prepare", dataset.parent, "--out", tmp_path / "dataset", "--slices", 16, "--workers", 1
    )
    assert code == 0
    assert out.startswith("6 groups from 6 scans: train ")
    assert "16x32x32 (6)" in out
    assert "rejected" not in out
    assert lines[-1] == f"next: ctvae train {tmp_path / 'dataset'} --out RUN"


def test_prepare_lists_what_it_rejects_and_goes_on(capsys, dataset, tmp_path):
    (tmp_path / "bad.nii.gz").write_text("not gzip")
    sources = (dataset.parent, tmp_path / "bad.nii.gz")
    code, out, _ = call(capsys, "prepare", *sources, "--out", tmp_path / "dataset", "--slices", 16, "--workers", 1)
    assert code == 0
    assert "rejected 1:\n  bad.nii.gz: " in out


def test_an_unknown_method_is_answered_with_the_nearest(capsys, dataset, tmp_path):
    line = refused(capsys, "train", dataset, "--out", tmp_path / "run", "--method", "wavelet")
    assert "did you mean 'wavelet3d'?" in line
    assert not (tmp_path / "run").exists()


def test_compare_checks_every_method_before_it_trains_one(capsys, dataset, tmp_path):
    out = tmp_path / "comparison"
    line = refused(capsys, "compare", dataset, "--methods", "wavelet3d,conv2d", "--minutes", 1, "--out", out)
    assert "did you mean 'conv3d'?" in line
    assert not out.exists()


def test_an_unknown_setting_is_answered_with_the_nearest(capsys, dataset, tmp_path):
    line = refused(capsys, "train", dataset, "--out", tmp_path / "run", "--set", "autoencoder.step=3")
    assert "unknown key 'autoencoder.step', did you mean 'steps'?" in line
    line = refused(capsys, "train", dataset, "--out", tmp_path / "run", "--window", "lung")
    assert "'lung' is not one of full, abdomen, soft" in line
    assert not (tmp_path / "run").exists()


def test_an_output_that_is_a_file(capsys, dataset, tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused(capsys, "train", dataset, "--out", tmp_path / "file")
    assert str(tmp_path / "file") in refused(capsys, "prepare", dataset.parent, "--out", tmp_path / "file")


def test_evaluate_of_an_empty_folder(capsys, dataset, tmp_path):
    (tmp_path / "none").mkdir()
    assert "none" in refused(
        capsys, "evaluate", "--real", dataset, "--synthetic", tmp_path / "none", "--out", tmp_path / "out"
    )


# --- how failures end


def failing(monkeypatch, error: BaseException) -> None:
    def fail(model, out, **options):
        raise error

    monkeypatch.setattr(sys.modules["ctvae.generate"], "generate", fail)


@pytest.fixture
def generate_module():
    from ctvae.generate import generate  # noqa: F401  so that the module is loaded before a test replaces the function


@pytest.mark.parametrize("error", [InputError("a.nii: is\nempty"), ModelError("run: is unfinished")])
def test_our_errors_are_one_line(monkeypatch, capsys, generate_module, error):
    failing(monkeypatch, error)
    assert refused(capsys, "generate", "run", "--out", "x") == f"error: {str(error).replace(chr(10), ' ')}"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM])
def test_disk_trouble_is_one_line(monkeypatch, capsys, generate_module, number):
    failing(monkeypatch, OSError(number, os.strerror(number), "x/0.nii.gz"))
    line = refused(capsys, "generate", "run", "--out", "x")
    assert line.startswith(f"error: x/0.nii.gz: {os.strerror(number)}; ")
    assert "run the same command again" in line


def test_an_interrupted_command_says_how_to_go_on(monkeypatch, capsys, generate_module):
    failing(monkeypatch, KeyboardInterrupt())
    code, _, lines = call(capsys, "generate", "run", "--out", "x")
    assert (code, lines) == (130, ["interrupted; run the same command again to continue"])


@pytest.mark.parametrize("error", [ValueError("ours"), OSError(errno.EIO, "broken disk")])
def test_our_own_mistakes_keep_their_traceback(monkeypatch, generate_module, error):
    failing(monkeypatch, error)
    with pytest.raises(type(error)):
        __main__.run(["generate", "run", "--out", "x"])


def test_options_arrive_as_they_were_typed(monkeypatch, capsys, generate_module):
    seen = {}

    def generate(model, out, **options):
        seen.update(options, model=model, out=out)
        return [out / "0.nii.gz"]

    monkeypatch.setattr(sys.modules["ctvae.generate"], "generate", generate)
    code, out, _ = call(
        capsys, "generate", "run", "-o", "x", "-n", "7", "--seed", "3", "--prior", "normal", "--steps", "9"
    )
    assert (code, out) == (0, "x/0.nii.gz\n")
    assert seen == {
        "model": "run", "out": Path("x"), "count": 7, "seed": 3, "prior": "normal", "steps": 9, "overwrite": False,
        "solver": None, "guidance": None, "conditions": {}, "slices": None, "schedule": None, "autoguidance": None,
        "rescale": None, "kept_noise": None, "grain": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("typed", "override"),
    [("abdomen", "data.window_hu=abdomen"), ("-50,200", "data.window_hu=[-50,200]")],
)
def test_a_window_by_name_or_by_numbers(monkeypatch, typed, override):
    seen = {}
    from ctvae.training.train import train  # noqa: F401

    def train_(dataset, out, **options):
        seen.update(options)
        return out

    monkeypatch.setattr(sys.modules["ctvae.training.train"], "train", train_)
    assert __main__.run(["train", "d", "--out", "r", "--set", "seed=1", "--window", typed]) == 0
    assert seen["overrides"] == ["seed=1", override]


def test_commands_import_what_they_call_inside():
    """At the top of the file stand typer, the standard library and the options, for which the same holds."""
    shared = {"__future__", "pathlib", "typing", "typer"}
    assert imported_at_the_top(cli) == {*shared, "ctvae", "ctvae.options"}
    assert imported_at_the_top(cli.options) == shared


def imported_at_the_top(module: ModuleType) -> set[str]:
    return {
        name
        for node in ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)])
    }
