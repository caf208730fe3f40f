"""The picture on top of the README: held-out scans, their reconstructions, and what each prior generates.

    python benchmarks/readme_picture.py RUN DATASET docs/images/headneck.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from ctvae import pictures
from ctvae.dataset import Dataset
from ctvae.generate import load

SCANS = 2
PRIORS = ("flow", "gaussian", "normal")


def main(run: str, dataset: str, out: str) -> None:
    model, data = load(run), Dataset.open(dataset)
    missing = [prior for prior in PRIORS if prior not in model.priors()]
    if missing:
        sys.exit(f"{run}: has no prior {' or '.join(missing)}; the picture wants a run folder, not an exported model")
    groups = data.groups("test")
    scans = [data.volume(groups[index]) for index in (len(groups) // 4, len(groups) // 2)]
    bands = [
        ("HELD-OUT SCANS", [(f"patient {i + 1}", scan) for i, scan in enumerate(scans)]),
        ("RECONSTRUCTED", [(f"patient {i + 1}", model.reconstruct_volume(scan)) for i, scan in enumerate(scans)]),
    ]
    for prior in PRIORS:
        samples = [(f"sample {i + 1}", model.generate(0, i + 1, prior).volume) for i in range(SCANS)]
        bands.append((f"GENERATED, {prior}", samples))
    pictures.side_by_side(bands, Path(out), model.cfg.data.window_hu)


if __name__ == "__main__":
    main(*sys.argv[1:4])
