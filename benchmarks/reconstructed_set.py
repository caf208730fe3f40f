"""What the autoencoder alone gives away: one reconstruction per validation patient, as a folder for `ctvae evaluate --synthetic`.

    python benchmarks/reconstructed_set.py MODEL DATASET --out FOLDER [--originals]
    ctvae evaluate --real DATASET --synthetic FOLDER --out REPORT

The patients are not those of the test split that judge: a pair of a scan and its reconstruction would mislead the classifiers.
With --originals the scans themselves are written: what the report says of these patients when nothing is wrong with them.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np

from ctvae import intensity
from ctvae.dataset import Dataset, Group
from ctvae.generate import Synthetic, load
from ctvae.volume import Volume, block_affine


def one_per_patient(groups: list[Group]) -> list[Group]:
    """A group of each patient at random, so that they lie anywhere along the body."""
    choose, of = random.Random(0), {}
    for group in sorted(groups, key=lambda group: group.id):
        of.setdefault(group.patient, []).append(group)
    return [choose.choice(of[patient]) for patient in sorted(of)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--originals", action="store_true")
    options = parser.parse_args()
    model, data = load(options.model), Dataset.open(options.dataset)
    for number, group in enumerate(one_per_patient(data.groups(options.split))):
        hu = np.clip(data.hu(group), *model.cfg.data.window_hu).astype(np.int16)
        offset = intensity.offset_of_fit(group.shape, model.shape)
        scan = Volume(intensity.fit_to_shape(hu, model.shape, (0, 0, 0)), block_affine(group.affine, offset))
        again = scan if options.originals else model.reconstruct_volume(scan)
        made = Synthetic(again, model.provenance(made_by="reconstruct"))
        print(made.save(options.out / f"reconstruction-{number:04d}.nii.gz"))


if __name__ == "__main__":
    main()
