"""The whole path by itself: phantoms -> prepare -> train -> generate -> evaluate, on two cores in a few minutes."""

from __future__ import annotations

import sys
from pathlib import Path

from ctvae.evaluation.evaluate import evaluate
from ctvae.generate import generate, load, packaged_models
from ctvae.phantoms import write_phantoms
from ctvae.prepare import prepare
from ctvae.progress import Progress
from ctvae.training.train import train

SCANS = 48
SPLIT_SEED = 7  # 40 phantoms to train on, 4 to validate, 4 to test
SHAPE = (64, 64, 64)  # D H W
SPACING_MM = (6.25, 6.25, 3.0)
TRAINING_MINUTES = 4.5  # autoencoder and prior together; the rest of the demo takes about a minute
SYNTHETIC_SCANS = 4
PRIOR = "gaussian"  # the one that is judged: after minutes a fitted Gaussian is far ahead of the flow, which wants hours
PACKAGED = "headneck"


def demo(out: Path | str, *, scans: int = SCANS, minutes: float = TRAINING_MINUTES) -> Path:
    """Draw `scans` phantoms, train `wavelet3d` on them for `minutes`, generate and judge; returns the report's page.

    The flow's samples go to `out/synthetic-flow`, those of the fitted Gaussian, which are judged, to `out/synthetic`.
    Where this installation has the packaged head-and-neck model, scans from it are written first, to `out/headneck`.
    Called again on the same folder it goes on where it stopped. Raises InputError when `out` cannot be written.
    """
    folder = Path(out)
    if PACKAGED in packaged_models():
        _say(f"scans from the packaged model '{PACKAGED}', trained on real patients")
        for path in generate(PACKAGED, folder / PACKAGED, count=SYNTHETIC_SCANS):
            _say(f"  {path}")
    _say(f"1/5 drawing {scans} phantoms")
    write_phantoms(folder / "scans", scans, shape=SHAPE, spacing_mm=SPACING_MM)
    _say("2/5 preparing them")
    with Progress("prepare") as bar:
        prepare(folder / "scans", folder / "dataset", slices=SHAPE[0], seed=SPLIT_SEED, progress=bar.report)
    _say(f"3/5 training for {minutes:g} minutes")
    run = train(folder / "dataset", folder / "run", minutes=minutes)
    _say(f"4/5 generating {SYNTHETIC_SCANS} synthetic scans")
    generate(run, folder / "synthetic-flow", count=SYNTHETIC_SCANS)
    generate(run, folder / "synthetic", count=SYNTHETIC_SCANS, prior=PRIOR)
    _say("5/5 judging them")
    with Progress("evaluate") as bar:
        evaluate(
            folder / "dataset", folder / "synthetic", folder / "report",
            reconstruct=load(run).reconstruct_volume, progress=bar.report,
        )  # fmt: skip
    return folder / "report" / "index.html"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
