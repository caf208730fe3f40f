"""What to expect from how many scans: the flow trained from random weights on a part of the training patients, equal steps each.

    python benchmarks/learning_curve.py DATASET --counts 25 50 99 --steps 600 --out FOLDER

Patients are drawn in one order, so the fewer are among the more. All flows are on latents of one trained autoencoder (`--model`),
which may have seen every training patient: the curve is that of the prior alone. With `--autoencoder-minutes M` each part trains
an autoencoder of its own for so long.

Printed for each part, and drawn into FOLDER/learning-curve.png: loss on the groups trained on (mean of the last fifth) and on the
validation patients, how far samples are from these (kernel distance of latents), and how many samples are nearer to a training
patient than held-out groups come (`ctvae/training/watch.py`). A part whose figures are in FOLDER is not done again.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

from ctvae.dataset import FILE, Dataset
from ctvae.model import model_folder
from ctvae.runlog import Run
from ctvae.training.train import train

SHARE_OF_CURVE = 0.2


def part(dataset: Path, patients: int, out: Path) -> Path:
    """A dataset with the groups of so many training patients, and all others' splits as they are; its voxels are linked."""
    content = json.loads((dataset / FILE).read_text())
    training = sorted({group["patient"] for group in content["groups"] if group["split"] == "train"})
    if patients > len(training):
        raise SystemExit(f"{dataset}: has {len(training)} training patients, not {patients}")
    kept = set(random.Random(0).sample(training, len(training))[:patients])
    content["groups"] = [group for group in content["groups"] if group["split"] != "train" or group["patient"] in kept]
    out.mkdir(parents=True, exist_ok=True)
    (out / FILE).write_text(json.dumps(content))
    if not (out / "groups").exists():
        (out / "groups").symlink_to((dataset / "groups").resolve())
    return out


def without_flow(model: str, out: Path) -> Path:
    """The autoencoder of a model alone, so that no flow begins with weights that have seen everyone."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("config.yaml", "autoencoder.safetensors"):
        shutil.copyfile(model_folder(model) / name, out / name)
    return out


def measured(asked: argparse.Namespace, patients: int) -> dict[str, Any]:
    kept = asked.out / f"{patients}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    data, folder = part(asked.dataset, patients, asked.out / f"dataset-{patients}"), asked.out / f"run-{patients}"
    settings = [f"prior.steps={asked.steps}", "prior.looks=1", "prior.log_every=20", *asked.settings]
    if asked.autoencoder_minutes:
        train(data, folder, stage="autoencoder", minutes=asked.autoencoder_minutes, overrides=settings)
        train(data, folder, stage="prior", overrides=settings)
    else:
        train(data, folder, stage="prior", overrides=settings, start=without_flow(asked.model, asked.out / "autoencoder"))
    with (folder / "logs" / "flow.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    prior = Run(folder).state["stages"]["prior"]
    figures = {
        "patients": patients,
        "groups": len(Dataset.open(data).groups("train")),
        "steps": asked.steps,
        "training": fmean(losses[-max(1, round(SHARE_OF_CURVE * len(losses))) :]),
        "held_out": prior["flow_loss"],
        "distance": prior["distance"],
        "copies": prior["copies"],
    }
    kept.write_text(json.dumps(figures))
    return figures


def drawn(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, copies) = pyplot.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    counts = [row["patients"] for row in rows]
    for name, label in (("training", "patients trained on"), ("held_out", "validation patients")):
        losses.plot(counts, [row[name] for row in rows], "o-", label=label)
    losses.set(xlabel="training patients", ylabel="flow matching loss")
    losses.legend(frameon=False)
    copies.plot(counts, [100 * row["copies"] for row in rows], "o-", color="C3")
    copies.set(xlabel="training patients", ylabel="samples that look like copies, %", ylim=(-2, 102))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--counts", type=int, nargs="+", default=[25, 50, 99])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--model", default="headneck")
    parser.add_argument("--autoencoder-minutes", type=float)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    rows = [measured(asked, patients) for patients in asked.counts]
    print("| training patients | groups | loss on them | loss on validation patients | distance of samples | copies |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['patients']} | {row['groups']} | {row['training']:.3f} | {row['held_out']:.3f} | {row['distance']:.3f} "
            f"| {row['copies']:.0%} |"
        )
    drawn(rows, asked.out / "learning-curve.png")


if __name__ == "__main__":
    main()
