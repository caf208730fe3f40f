"""The architecture, as docs/decisions/0001-architecture.md writes it down: who may import whom, and what loads when."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "ctvae"
HEAVY = ("torch", "monai", "nibabel", "pydicom", "matplotlib", "sklearn", "skimage", "scipy", "lightning_fabric")


def name_of(path: Path) -> str:
    """`training.train` for src/ctvae/training/train.py, `models` for src/ctvae/models/__init__.py."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if name_of(path)}


def table() -> list[list[str]]:
    """The modules of each layer, in order, from the table in the decision."""
    text = (ROOT / "docs" / "decisions" / "0001-architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+)[^|]*\|([^|]*)\|$", text, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(len(rows)))
    return [re.findall(r"`([\w.*]+)`", re.sub(r"\([^)]*\)", "", modules)) for _, modules in rows]


def layer_of(module: str) -> int | None:
    if module == "__main__":
        return len(table()) - 1
    found = [
        level
        for level, patterns in enumerate(table())
        if any(module == pattern.removesuffix(".*") or fnmatch(module, pattern) for pattern in patterns)
    ]
    assert len(found) <= 1, f"{module} stands in two layers"
    return found[0] if found else None


def imports_of(path: Path) -> set[str]:
    """Our modules that a file imports anywhere, functions included; names of things inside modules are left out."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {name.removeprefix("ctvae.") for name in found if name.startswith("ctvae.")}
    return ours & set(MODULES) - {name_of(path)}


def test_the_reader_of_imports_sees_them_all(tmp_path):
    file = PACKAGE / "phantoms.py"
    assert {"canvas", "volume", "nifti"} <= imports_of(file), "nifti is imported inside a function"


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_place(module):
    assert layer_of(module) is not None, f"add `{module}` to the table in docs/decisions/0001-architecture.md"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module):
    own = layer_of(module)
    for imported in sorted(imports_of(MODULES[module])):
        level = layer_of(imported)
        if level is None or own is None:
            continue  # test_every_module_has_a_place says so
        assert level <= own, f"{module} (layer {own}) may not import {imported} (layer {level})"


def test_no_cycles():
    finished: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"import cycle: {' -> '.join([*trail[trail.index(module) :], module])}"
        if module not in finished:
            for imported in sorted(imports_of(MODULES[module])):
                if not imported.startswith(f"{module}."):  # a package that looks its own files up
                    visit(imported, (*trail, module))
            finished.add(module)

    for module in MODULES:
        visit(module, ())


def test_the_lines_that_mutations_change_are_there():
    """Or benchmarks/mutations.py, which takes minutes, has gone stale without anybody's notice."""
    spec = importlib.util.spec_from_file_location("mutations", ROOT / "benchmarks" / "mutations.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules["mutations"] = mutations = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutations)
    for mutation in mutations.MUTATIONS:
        assert (PACKAGE / mutation.module).read_text(encoding="utf-8").count(mutation.right) == 1, mutation
        assert (ROOT / "tests" / mutation.test).is_file()


def test_every_module_says_what_it_is():
    written = {name: path.read_text(encoding="utf-8") for name, path in MODULES.items()}
    without = [name for name, text in written.items() if text and not ast.get_docstring(ast.parse(text))]
    assert not without


@pytest.mark.parametrize("module", ["ctvae", "ctvae.cli", "ctvae.__main__", "ctvae.errors", "ctvae.progress"])
def test_cheap_modules_load_nothing_heavy(module):
    code = f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not set(HEAVY) & set(loaded)


ORDERS = {
    "name from the package": "from ctvae import prepare",
    "attribute of the package": "import ctvae; prepare = ctvae.prepare",
    "after the module": "import ctvae.prepare; import ctvae; prepare = ctvae.prepare",
    "from after the module": "from ctvae.prepare import prepare as a; from ctvae import prepare; assert a is prepare",
    "after somebody else's import": "import ctvae.demo; import ctvae; prepare = ctvae.prepare",
    "by importlib": "import importlib; importlib.import_module('ctvae.prepare'); from ctvae import prepare",
    "twice": "import ctvae; ctvae.prepare; import ctvae.prepare; prepare = ctvae.prepare",
}


@pytest.mark.parametrize("statements", ORDERS.values(), ids=ORDERS)
def test_a_function_named_like_its_module_is_the_function_in_every_order(statements):
    check = "import sys, types; assert isinstance(prepare, types.FunctionType), prepare"
    check += "; assert isinstance(sys.modules['ctvae.prepare'], types.ModuleType)"
    done = subprocess.run([sys.executable, "-c", f"{statements}; {check}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there():
    code = (
        "import ctvae, sys, types\n"
        "assert 'torch' not in sys.modules\n"
        "for name in ctvae.__all__:\n"
        "    assert callable(getattr(ctvae, name)) and not isinstance(getattr(ctvae, name), types.ModuleType), name\n"
        "    assert getattr(ctvae, name).__doc__, name\n"
        "try:\n"
        "    ctvae.nothing\n"
        "except AttributeError as error:\n"
        "    assert 'nothing' in str(error)\n"
        "else:\n"
        "    raise AssertionError\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
