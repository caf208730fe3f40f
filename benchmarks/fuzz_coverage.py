"""Coverage-guided fuzzing of the readers, by Atheris (libFuzzer), beside the planned damage of fuzz_files.py.

    pip install atheris                       # wheels for Linux; not among the project's own dependencies
    python benchmarks/fuzz_coverage.py nifti --runs 20000 --seed 7
    python benchmarks/fuzz_coverage.py gzip --runs 20000 --seed 7
    python benchmarks/fuzz_coverage.py dicom --runs 20000 --seed 7

Bytes are changed so that lines of ctvae, nibabel and pydicom are reached that none before them reached: those of a NIfTI file, of
a gzipped one, or of one slice of a DICOM series. Well done is what it is there: read, or refused by an InputError of one line
that names the file; a warning is not. Anything else ends the run, and so do 20 seconds or 512 MB more than the imports take; the
bytes are then left in `--out`.
"""

from __future__ import annotations

import argparse
import gzip
import os
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
with atheris.instrument_imports(include=["ctvae", "nibabel", "pydicom"]):
    import hostile_dicom
    import hostile_files

    from ctvae import nifti
    from ctvae.errors import InputError
    from ctvae.scan import read_scan
    from ctvae.volume import Volume, plain_affine

SHAPE = (4, 8, 8)  # small, so that most bytes are header
SPACING_MM = (1.5, 1.5, 3.0)
SECONDS, MEGABYTES = 20, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("nifti", "gzip", "dicom"))
    parser.add_argument("--runs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(), help="folder for an input that was not taken well")
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="coverage", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    child = os.fork()
    if not child:
        fuzz(scratch, arguments)  # leaves by itself
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    shutil.rmtree(scratch)
    print(f"{arguments.kind}, seed {arguments.seed}: exit code {code}")
    sys.exit(1 if code else 0)


def fuzz(scratch: Path, arguments: argparse.Namespace) -> None:
    target = Target(scratch / "target", arguments.kind, arguments.runs)
    corpus = scratch / "corpus"
    corpus.mkdir()
    (corpus / "plain").write_bytes(target.plain)
    limits = [f"-timeout={SECONDS}", f"-rss_limit_mb={MEGABYTES + status_mb('VmRSS')}", f"-artifact_prefix={arguments.out}/"]
    options = [f"-runs={arguments.runs}", f"-seed={arguments.seed}", f"-max_len={2 * len(target.plain)}", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *limits, *options, str(corpus)], target.take)
    atheris.Fuzz()


class Target:
    """Where inputs are put, and what a good one is."""

    def __init__(self, folder: Path, kind: str, runs: int):
        self.runs, self.tally = runs, Counter[str]()
        folder.mkdir()
        hu = hostile_files.body(0, SHAPE)
        if kind == "dicom":
            self.path = folder
            images = hostile_dicom.series(hu)
            for n, image in enumerate(images):
                image.save_as(folder / f"IM{n}", enforce_file_format=True)
            self.file = folder / "IM1"
        else:
            self.path = self.file = folder / ("scan.nii.gz" if kind == "gzip" else "scan.nii")
            nifti.write(folder / "scan.nii", Volume(hu, plain_affine(SPACING_MM, SHAPE)))
            raw = (folder / "scan.nii").read_bytes()
            self.file.write_bytes(gzip.compress(raw, 1) if kind == "gzip" else raw)
        self.plain = self.file.read_bytes()
        assert self.said() == ""

    def take(self, content: bytes) -> None:
        """One input. Whatever is raised here is a finding."""
        self.file.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            said = self.said()
        assert not said or (str(self.path) in said and "\n" not in said and len(said) < 600), repr(said)
        self.tally["refused" if said else "read"] += 1
        if self.tally.total() == self.runs:
            print(f"{dict(self.tally)}, peak {status_mb('VmHWM')} MB", flush=True)

    def said(self) -> str:
        try:
            read_scan(self.path)
        except InputError as error:
            return str(error)
        return ""


def status_mb(key: str) -> int:
    """Of this process: VmRSS, resident now, or VmHWM, at most."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) // 1024 for line in file if line.startswith(key + ":"))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
