"""A plan, and a plan in words: the table of stages, the peaks, what was chosen; and the same as a file that people edit."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import yaml

from ctvae.networks import Size3
from ctvae.planning.sizes import written
from ctvae.planning.stages import Stage


@dataclass(frozen=True)
class Plan:
    """What a run needs and how it is to be set up. Sizes are D H W; peaks exclude Python and PyTorch themselves.

    `fits`: the settings in `plan` stay within the memory; `as_asked`: they are those that were asked for.
    """

    method: str
    size: Size3
    padded: Size3  # on the method's grid: what the network sees
    memory_gb: float
    device: str
    fits: bool
    as_asked: bool
    note: str
    train_peak_gb: float
    prior_peak_gb: float
    encode_peak_gb: float
    decode_peak_gb: float
    parameters: int
    gflop_per_step: float
    plan: dict[str, Any]
    overrides: tuple[str, ...]  # for load_recipe, --set and plan.yaml
    step_gb: dict[str, float]  # what a training step's peak is made of
    train_phases_gb: dict[str, float]
    prior_phases_gb: dict[str, float]
    stages: tuple[Stage, ...]


def as_text(plan: Plan) -> str:
    """Everything that `ctvae plan` prints for people."""
    lines = [f"{plan.method} on {_size(plan)}, {plan.memory_gb:g} GB on {plan.device}", ""]
    lines += [*_stages(plan), "", *_peaks(plan), ""]
    lines += [f"{key.replace('_', ' ')}: {_value(value)}" for key, value in plan.plan.items()]
    return "\n".join([*lines, "", plan.note])


def as_yaml(plan: Plan) -> str:
    """A file for `ctvae train --plan`: the method, then one setting per line as `--set` would take it."""
    head = [
        f"# {plan.method} on {_size(plan)} in {plan.memory_gb:g} GB. Use it: ctvae train DATASET --out RUN --plan THIS_FILE",
        f"# predicted: training {plan.train_peak_gb:.2f} GB, prior {plan.prior_peak_gb:.2f}, encoding {plan.encode_peak_gb:.2f}, "
        f"decoding {plan.decode_peak_gb:.2f} by tiles of {_value(plan.plan['decode_tile'])}",
        "# Every line is a setting (key: value, as in --set); change what you like and plan again to see what it needs.",
    ]
    settings = {"method": plan.method} | dict(_setting(text) for text in plan.overrides)
    return "\n".join([*head, *(f"{key}: {flow(value)}" for key, value in settings.items())]) + "\n"


def as_json(plan: Plan) -> dict[str, Any]:
    """Plain values of every field."""
    tree = {field.name: getattr(plan, field.name) for field in fields(plan)}
    return tree | {"stages": [vars(stage) for stage in plan.stages]}


def refusal_json(method: str, size: Size3, memory_gb: float, note: str) -> dict[str, Any]:
    """The same object for a network that cannot even be counted, as the cited net at stride 1: what is not known is null."""
    unknown = dict.fromkeys(field.name for field in fields(Plan))
    return unknown | {"method": method, "size": size, "memory_gb": memory_gb, "fits": False, "as_asked": False, "note": note}


def _setting(override: str) -> tuple[str, Any]:
    key, _, text = override.partition("=")
    return key, yaml.safe_load(text)


def _size(plan: Plan) -> str:
    padded = f", padded to {written(plan.padded)}" if plan.padded != plan.size else ""
    return f"{written(plan.size)} (D H W{padded})"


def _stages(plan: Plan) -> list[str]:
    rows = [("stage", "output", "parameters", "GFLOP")]
    rows += [(s.name, "x".join(map(str, s.shape)), f"{s.parameters:,}", f"{s.gflop:.1f}") for s in plan.stages]
    rows.append(("autoencoder", "", f"{plan.parameters:,}", f"{plan.gflop_per_step:.1f} per training step"))
    widths = [max(len(row[column]) for row in rows[:-1]) for column in range(4)]
    return [f"{n:<{widths[0]}}  {s:<{widths[1]}}  {p:>{widths[2]}}  {g:>{widths[3]}}" for n, s, p, g in rows]


def _peaks(plan: Plan) -> list[str]:
    parts = ", ".join(f"{name} {gb:.2f}" for name, gb in plan.step_gb.items())
    phases = ", ".join(f"{name} {gb:.2f}" for name, gb in plan.train_phases_gb.items())
    prior = ", ".join(f"{name} {gb:.2f}" for name, gb in plan.prior_phases_gb.items())
    return [
        "peaks in GB",
        f"training  {plan.train_peak_gb:8.2f}   {phases}",
        f"          of a step: {parts}",
        f"prior     {plan.prior_peak_gb:8.2f}   {prior}",
        f"encoding  {plan.encode_peak_gb:8.2f}",
        f"decoding  {plan.decode_peak_gb:8.2f}",
    ]


def _value(value: Any) -> str:
    if isinstance(value, tuple | list):
        return " ".join(map(written, value)) if isinstance(value[0], tuple | list) else written(value)  # type: ignore[arg-type]
    return {"None": "none", "True": "yes", "False": "no"}.get(str(value), str(value))


def flow(value: Any) -> str:
    """A value as one line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
