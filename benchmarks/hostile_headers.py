"""What files that claim more than they hold cost: memory and time until each is refused, in a process of its own (Linux).

    python benchmarks/hostile_headers.py
"""

from __future__ import annotations

import argparse
import gzip
import os
import random
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import hostile_dicom
import hostile_files

from ctvae import nifti
from ctvae.errors import InputError
from ctvae.scan import read_scan
from ctvae.volume import Volume, plain_affine


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| file | bytes | memory, MB | CPU s | what is said |\n|---|---|---|---|---|")
    for name in CASES:
        with get_context("spawn").Pool(1) as pool:
            size, grown_mb, seconds, said = pool.apply(measured, (name,))
        print(f"| {name} | {size:,} | {grown_mb:.1f} | {seconds:.2f} | {said} |", flush=True)


def measured(name: str) -> tuple[int, float, float, str]:
    """Bytes on disk, resident memory beyond that of reading a plain scan, processor seconds, and the reason."""
    with tempfile.TemporaryDirectory(prefix="hostile") as scratch:
        for kind in (plain, dicom):
            read_scan(kind(Path(scratch)))  # what is imported late
        path = CASES[name](Path(scratch))
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak until now
        before, start = status_mb("VmRSS"), time.process_time()
        try:
            read_scan(path)
            said = "read"
        except InputError as error:
            said = str(error).removeprefix(f"{path}: ").replace(f"{path}/", "")
        seconds, grown_mb = time.process_time() - start, status_mb("VmHWM") - before
        size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))
    return size, max(0.0, grown_mb), seconds, said


def plain(folder: Path) -> Path:
    nifti.write(folder / "plain.nii", Volume(hostile_files.body(), plain_affine((1.5, 1.5, 3.0), hostile_files.SHAPE)))
    return folder / "plain.nii"


def dicom(folder: Path, name: str = "plain", **tags: int) -> Path:
    target = folder / name
    target.mkdir()
    for n, image in enumerate(hostile_dicom.series(hostile_files.body())):
        for key, value in tags.items():
            setattr(image, key, value)
        image.save_as(target / f"IM{n:03d}", enforce_file_format=True)
    return target


def claiming(form: str, at: int, *values: int) -> Callable[[Path], Path]:
    """A plain NIfTI-1 file whose header says something else."""

    def write(folder: Path) -> Path:
        raw = bytearray(plain(folder).read_bytes())
        struct.pack_into(form, raw, at, *values)
        (folder / "claims.nii").write_bytes(raw)
        return folder / "claims.nii"

    return write


def nifti2(folder: Path) -> Path:
    import nibabel as nib

    image = nib.Nifti2Image(hostile_files.body().transpose(2, 1, 0), hostile_files.AFFINE)
    raw = bytearray(image.to_bytes())
    struct.pack_into("<8q", raw, 16, 3, 60_000, 60_000, 60_000, 1, 1, 1, 1)
    (folder / "sixty.nii").write_bytes(raw)
    return folder / "sixty.nii"


def gzipped(write: Callable[[Path], Path], zeros: bool = False) -> Callable[[Path], Path]:
    """With 128 MiB of zeros behind it, which take 130 KB, or without."""

    def packed(folder: Path) -> Path:
        raw = gzip.compress(write(folder).read_bytes()) + (hostile_files._zeros_packed() if zeros else b"")
        (folder / "packed.nii.gz").write_bytes(raw)
        return folder / "packed.nii.gz"

    return packed


def deflated(folder: Path) -> Path:
    target = dicom(folder, "deflated")
    (target / "IM003").write_bytes(hostile_dicom._deflate_bomb(random.Random(0), bytearray()))
    return target


def long_element(folder: Path) -> Path:
    """The last element, the pixels, claims four gigabytes."""
    target = dicom(folder, "long")
    raw = bytearray((target / "IM003").read_bytes())
    struct.pack_into("<I", raw, raw.rindex(b"\xe0\x7f\x10\x00OW") + 8, 2**32 - 16)
    (target / "IM003").write_bytes(raw)
    return target


CASES: dict[str, Callable[[Path], Path]] = {
    "NIfTI-2 that claims 60,000 cubed": nifti2,
    "the same, gzipped": gzipped(nifti2),
    "NIfTI-1 that claims 32,767 cubed": claiming("<8h", 40, 3, 32767, 32767, 32767, 1, 1, 1, 1),
    "NIfTI-1 that claims 1,290 cubed, just below the limit": claiming("<8h", 40, 3, 1290, 1290, 1290, 1, 1, 1, 1),
    "the same, gzipped, with 128 MiB of zeros": gzipped(claiming("<8h", 40, 3, 1290, 1290, 1290, 1, 1, 1, 1), zeros=True),
    "a whole scan, gzipped, with 128 MiB of zeros behind it": gzipped(plain, zeros=True),
    "512x512x250 zeros in 130 KB of gzip": gzipped(claiming("<8h", 40, 3, 512, 512, 250, 1, 1, 1, 1), zeros=True),
    "DICOM whose slices claim 65,535x65,535": lambda folder: dicom(folder, "large", Rows=65535, Columns=65535),
    "DICOM whose pixels claim 4 GB": long_element,
    "deflated DICOM, 256 MiB in 260 KB": deflated,
}


def status_mb(key: str) -> float:
    """Of this process: VmRSS, resident now, or VmHWM, at most."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(key + ":"))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
