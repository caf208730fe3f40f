"""What the autoencoder alone gives away: one reconstruction per validation patient, as a folder for `ctvae evaluate --synthetic`.

    python benchmarks/reconstructed_set.py MODEL DATASET --out FOLDER [--mean]
    ctvae evaluate --real DATASET --synthetic FOLDER --out REPORT

Detail is drawn as for generated scans, or its mean is taken. The patients are not those of the test split that judge: a pair
of a scan and its own reconstruction would mislead the classifiers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ctvae import intensity
from ctvae.dataset import Dataset
from ctvae.device import generator
from ctvae.generate import Synthetic, load
from ctvae.volume import Volume, block_affine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--mean", action="store_true")
    options = parser.parse_args()
    model, data = load(options.model), Dataset.open(options.dataset)
    first = {group.patient: group for group in reversed(data.groups(options.split))}
    for number, group in enumerate(sorted(first.values(), key=lambda group: group.id)):
        hu = data.hu(group)
        offset = intensity.offset_of_fit(group.shape, model.shape)
        scan = Volume(intensity.fit_to_shape(hu, model.shape, (0, 0, 0)), block_affine(group.affine, offset))
        again = model.reconstruct_volume(scan, None if options.mean else generator(0, number, stream=37))
        path = options.out / f"reconstruction-{number:04d}.nii.gz"
        print(Synthetic(again, model.provenance(made_by="reconstruct")).save(path))


if __name__ == "__main__":
    main()
