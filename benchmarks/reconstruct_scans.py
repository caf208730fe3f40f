"""Reconstruct every scan of a folder with a model and check that shape and affine come back bit for bit.

    python benchmarks/reconstruct_scans.py MODEL SCANS...

Prints a Markdown row per scan: shape, PSNR and SSIM over -1000..1000 HU, seconds, peak resident memory of the process.
Exits with 1 if any shape or affine differs.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

from ctvae.evaluation.similarity import psnr, ssim
from ctvae.generate import reconstruct
from ctvae.scan import find_scans


def main(model: str, sources: list[str]) -> int:
    print("| scan | voxels | geometry | PSNR dB | SSIM | s | peak GB |\n|---|---|---|---|---|---|---|")
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for found in find_scans([Path(source) for source in sources]):
            start = time.perf_counter()
            written = reconstruct(model, found.path, Path(folder) / "again.nii.gz")
            seconds = time.perf_counter() - start
            before, after = nib.load(found.path), nib.load(written)
            same = before.shape == after.shape and np.array_equal(before.affine, after.affine)
            wrong += not same
            a, b = (np.clip(np.asarray(image.dataobj, np.float32), -1000, 1000) for image in (before, after))
            peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(
                f"| {found.name} | {'x'.join(map(str, before.shape))} | {'identical' if same else 'DIFFERS'} "
                f"| {psnr(b, a, 2000):.1f} | {ssim(b, a, 2000):.3f} | {seconds:.1f} | {peak_gb:.1f} |",
                flush=True,
            )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
