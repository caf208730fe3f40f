"""Arguments and options that several commands have or that take much room, and the texts of some as values."""

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

# --- how scans become a dataset ------------------------------------------------------------------------------------------

Rest = Annotated[
    Literal["overlap", "drop", "pad"],
    typer.Option(help="Slices left over: a group that overlaps, none, or padding."),
]
Stride = Annotated[
    int | None, typer.Option(min=1, help="Slices from one group to the next. [default: --slices]")
]
Labels = Annotated[
    list[Path] | None, typer.Option(help="Folder of label maps with the scans' file names; repeatable.")
]
PatientPattern = Annotated[
    str | None, typer.Option(help="Regular expression; its first group in the file name is the patient.")
]
PatientsOf = Annotated[
    Path | None,
    typer.Option(metavar="DATASET", help="Give DICOM patients the pseudonyms, and so the splits, of this dataset."),
]

# --- what training and its plan are given --------------------------------------------------------------------------------

TrainingMemory = Annotated[
    str | None, typer.Option(help="Train with what fits, e.g. 12GB. [default: the card's, else what is free]")
]
Memory = Annotated[
    str | None, typer.Option(help="What there is, e.g. 24GB or 500MB. [default: the card's, else what is free]")
]
TrainingHours = Annotated[
    float | None, typer.Option(min=0.001, help="Set the steps to fill this time, from what one takes here.")
]
Hours = Annotated[
    float | None, typer.Option(min=0.001, help="Set the steps to fill this time; trains a few to measure one.")
]
Table = Annotated[
    Path | None,
    typer.Option(help="CSV with a row per scan or patient; its columns (--set prior.columns=[A,B]: those) are conditions."),
]
Start = Annotated[
    Path | None, typer.Option("--from", metavar="MODEL", help="Begin with a trained model's weights instead of random ones.")
]

# --- how the flow draws --------------------------------------------------------------------------------------------------

Solver = Annotated[
    Literal["ab2", "heun", "euler"] | None,
    typer.Option(help="ab2, euler: one evaluation a step; heun: two. [default: ab2]"),
]
Schedule = Annotated[
    Literal["logit", "equal"] | None,
    typer.Option(help="Steps that are short near both ends, or equal ones. [default: logit]"),
]
Guidance = Annotated[
    float | None, typer.Option(min=0, help="How much to lean on the conditions; 1: none. [default: the model's]")
]
Autoguidance = Annotated[
    float | None,
    typer.Option(min=0, help="How far to lead away from the flow's own Gaussian; 1: none. [default: the model's]"),
]
Rescale = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="How far guided scans get the contrast of unguided ones. [default: the model's]"),
]
KeptNoise = Annotated[
    float | None,
    typer.Option(min=0, help="How much of the noise found midway is kept as detail. [default: the model's]"),
]
Grain = Annotated[
    float | None,
    typer.Option(min=0, help="Strength of the noise that its decoder leaves out, times that of scans. [default: 1; 0: none]"),
]
Conditions = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="What to be, e.g. position=0.4 or sex=F; repeatable. [default: as in training]"),
]
SlicesOfVolume = Annotated[
    int | None, typer.Option(min=2, help="Axial slices; more than the model's are slabs made as one. [default: the model's]")
]

# --- how scans are judged ------------------------------------------------------------------------------------------------

JudgedModel = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Judge this model's reconstructions of the real scans as well.")
]
MedicalNet = Annotated[
    Path | None, typer.Option(metavar="FILE", help="MedicalNet weights as safetensors (docs), for one more feature space.")
]
Cache = Annotated[
    Path | None, typer.Option(help="Keep what is measured of each scan here; reports on the same scans share it.")
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
