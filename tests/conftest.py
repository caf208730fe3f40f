"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

REPOSITORY = Path(__file__).parents[1]
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real CT scans; skips the test where there is none."""
    folder = Path(os.environ.get("CTVAE_DATA") or REPOSITORY.parent / "shared" / "data")
    if not (folder / "index.csv").is_file():
        pytest.skip("needs the real CT scans of CTVAE_DATA or ../shared/data")
    return folder


@pytest.fixture(scope="session")
def scan_hu() -> Callable[..., np.ndarray]:
    """`scan_hu(seed, shape)`: int16 HU [D H W] that pass for CT: an oblong body with noise in air."""

    def make(seed: int = 0, shape: tuple[int, int, int] = (20, 24, 32)) -> np.ndarray:
        rng = np.random.default_rng(seed)
        z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
        body = (y / 0.6) ** 2 + (x / 0.8) ** 2 < 1
        hu = np.where(body, 40 + 20 * np.sin(3 * z + seed) + 60 * (x > 0.2), -1000)
        return np.maximum(hu + rng.normal(0, 10, shape), -1024).round().astype(np.int16)

    return make


@pytest.fixture(scope="session")
def write_nifti() -> Callable[..., Path]:
    """`write_nifti(path, hu [D H W], spacing_mm (x y z))` writes a canonical file, with nibabel alone."""

    def write(path: Path, hu: np.ndarray, spacing_mm: tuple[float, float, float] = (1.5, 1.5, 3.0)) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        image = nib.Nifti1Image(hu.transpose(2, 1, 0), LPS @ np.diag([*spacing_mm, 1.0]))
        image.set_sform(image.affine, code="scanner")
        image.set_qform(image.affine, code="scanner")
        nib.save(image, path)
        return path

    return write


@pytest.fixture(scope="module")
def bf16_machine() -> Iterator[None]:
    """Plans are made as for a machine that computes in bf16, whichever this is."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("planner", "planning.remedies"):
            patch.setattr(f"ctvae.{module}.computes_bf16", lambda: True)
        yield


@pytest.fixture
def scans(tmp_path, scan_hu, write_nifti) -> Path:
    """Four scans of 20 slices, 24 x 32 pixels."""
    for seed in range(4):
        write_nifti(tmp_path / "scans" / f"case_{seed}.nii.gz", scan_hu(seed))
    return tmp_path / "scans"


TINY = (  # a wavelet3d that trains in a second
    "model.widths=[4,8]", "model.blocks=[1,1]", "model.latent_channels=2",
    "autoencoder.steps=6", "autoencoder.log_every=2", "autoencoder.save_every=2", "autoencoder.precision=fp32",
    "prior.steps=9", "prior.log_every=2", "prior.save_every=2", "prior.precision=fp32", "prior.batch=2",
    "prior.widths=[8,32]", "prior.blocks=1", "prior.rank=2", "prior.mlp_width=16", "prior.sampling_steps=2",
    "prior.detail_width=0",
    "model.strides=[[2,2,2],[2,2,2]]", "data.patch=null", "polish.enabled=true", "polish.steps=4", "polish.log_every=2",
    "polish.save_every=2", "polish.discriminator_width=4", "polish.precision=fp32", "autoencoder.batch=1", "finish.enabled=false",
    "calibration.enabled=false",
)  # fmt: skip


@pytest.fixture(scope="session")
def tiny_settings() -> tuple[str, ...]:
    """`--set` overrides for `tiny_dataset`: 6 steps of the autoencoder, 4 of its polish and 9 of the flow."""
    return TINY


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory) -> Path:
    """Eight phantoms of 64 x 32 x 32 voxels, prepared; all three splits have some."""
    from ctvae.phantoms import write_phantoms
    from ctvae.prepare import prepare

    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, 8, shape=(64, 32, 32), spacing_mm=(12.5, 12.5, 4.5))
    return prepare(folder, folder / "dataset", slices=64, fractions=(0.5, 0.25, 0.25), workers=1).folder


@pytest.fixture(scope="session")
def tiny_run(tiny_dataset, tmp_path_factory) -> Path:
    """A finished wavelet3d run with `tiny_settings`. Not to be changed."""
    from ctvae.training.train import train

    return train(tiny_dataset, tmp_path_factory.mktemp("tiny") / "run", overrides=TINY)
