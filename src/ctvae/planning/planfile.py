"""plan.yaml: a plan as a file that people read and edit, and that `ctvae train --plan` takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ctvae import files
from ctvae.config import load_recipe
from ctvae.errors import ConfigError
from ctvae.planning.report import Plan, as_yaml, flow


def write_plan(found: Plan, path: Path) -> None:
    """Write plan.yaml. Raises InputError when it cannot be written."""
    files.write_text(path, as_yaml(found))


def plan_overrides(path: Path | str) -> list[str]:
    """The settings of a plan.yaml as `key=value`, for `load_recipe`. Raises ConfigError, which names the file."""
    tree = _read_plan(path)
    overrides = [f"{key}={flow(value)}" for key, value in _settings(tree) if key != "method"]
    load_recipe(str(tree["method"]), overrides, source=str(path))
    return overrides


def plan_method(path: Path | str) -> str:
    """The method that a plan.yaml is for. Raises ConfigError."""
    return str(_read_plan(path)["method"])


def _read_plan(path: Path | str) -> dict[str, Any]:
    try:
        tree = files.read_yaml(Path(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as a plan ({str(error).splitlines()[0]})") from error
    if not isinstance(tree, dict) or "method" not in tree or not all(isinstance(key, str) for key in tree):
        raise ConfigError(f"{path}: not a plan; it has a line `method: NAME` and lines `key: value` as for --set")
    return tree


def _settings(tree: dict[str, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    """Keys with their sections; those that a person wrote as sections, `autoencoder: {batch: 2}`, likewise."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{section}{key}.")
        else:
            yield f"{section}{key}", value
