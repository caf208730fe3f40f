"""Arguments and options that several commands have, and the texts of some as values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

DatasetArgument = Annotated[Path, typer.Argument(metavar="DATASET", help="Folder that `ctvae prepare` wrote.")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Run folder, or the name of a packaged model.")]
ScanArgument = Annotated[Path, typer.Argument(metavar="SCAN", help="NIfTI file or folder of one DICOM series.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same result.")]
Count = Annotated[int, typer.Option("--count", "-n", min=1, help="How many scans.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting, e.g. autoencoder.lr=0.001; repeatable."),
]
Window = Annotated[
    str | None,
    typer.Option("--window", help="Intensity window: full, abdomen, soft, or LOW,HIGH in HU. [default: the recipe's]"),
]


def conditions(texts: list[str]) -> dict[str, float | str]:
    """`--condition NAME=VALUE`s, numbers as such."""
    asked: dict[str, float | str] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name or not value or name in asked:
            raise typer.BadParameter(f"'{text}' is not NAME=VALUE, each name once", param_hint="--condition")
        try:
            asked[name] = float(value)
        except ValueError:
            asked[name] = value
    return asked


def size(text: str) -> int | Literal["native"]:
    if text == "native":
        return "native"
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"'{text}' is neither a number of voxels nor native", param_hint="--size")
    return int(text)


def fractions(text: str) -> tuple[float, float, float]:
    try:
        training, validation, test = (float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"'{text}' is not three shares, e.g. 0.8,0.1,0.1", param_hint="--fractions") from None
    return training, validation, test


def overrides(settings: list[str] | None, window: str | None) -> list[str]:
    """`--set` and `--window` as the overrides that `load_recipe` takes."""
    if window is None:
        return settings or []
    return [*(settings or []), f"data.window_hu=[{window}]" if "," in window else f"data.window_hu={window}"]
