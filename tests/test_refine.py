"""Latents refined for one scan: against least squares, never further off than the encoder's, by tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ctvae import nifti
from ctvae.cli import app
from ctvae.generate import load
from ctvae.refine import refined
from ctvae.volume import Volume

BLUR = torch.tensor([0.25, 0.5, 0.25]).view(1, 1, 3, 1, 1)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def blurred(z: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.conv3d(z, BLUR, padding=(1, 0, 0))


def test_a_linear_decoder_is_solved_by_least_squares():
    def decode(z: torch.Tensor) -> torch.Tensor:  # 6 numbers -> 8
        return torch.nn.functional.conv_transpose3d(z.view(1, 1, 6, 1, 1), BLUR)

    matrix = torch.stack([decode(row).flatten() for row in torch.eye(6)], dim=1)
    x = noise(1, 1, 8, 1, 1)
    solution = torch.linalg.lstsq(matrix, x.flatten()[:, None]).solution.flatten()
    found = refined(decode, noise(1, 1, 6, 1, 1, seed=2), x, steps=3000)
    torch.testing.assert_close(found.flatten(), solution, rtol=0.02, atol=0.02)


def test_it_never_ends_further_off_than_it_began():
    z = noise(1, 1, 8, 3, 3)
    assert refined(blurred, z, blurred(z), steps=5) is z  # nothing is nearer than the scan itself
    assert refined(blurred, z, noise(1, 1, 8, 3, 3, seed=3), steps=0) is z


@pytest.fixture(scope="module")
def scan() -> Volume:
    d, h, w = np.mgrid[-1:1:21j, -1:1:30j, -1:1:26j]
    body = np.where(d**2 / 4 + h**2 + w**2 < 0.6, 40 + 200 * np.sin(9 * h) * np.cos(7 * d + 5 * w), -1000)
    return Volume(body.astype(np.int16), np.diag([2.0, 2.0, 3.0, 1.0]))


def error(model, scan: Volume, refine: int) -> float:
    again = model.reconstruct_volume(scan, refine)
    assert again.hu.shape == scan.hu.shape
    np.testing.assert_array_equal(again.affine, scan.affine)
    return float(np.square(again.hu.astype(float) - np.clip(scan.hu, -1000, 1000)).mean())


def test_a_reconstruction_comes_nearer_to_its_scan(scan):
    model = load("headneck")
    before, after = error(model, scan, 0), error(model, scan, 10)
    assert after < 0.8 * before
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.network.parameters())


def test_tiles_reach_what_the_whole_reaches(scan, monkeypatch):
    model = load("headneck")
    whole, plain = error(model, scan, 3), error(model, scan, 0)
    monkeypatch.setattr(model, "_tile", lambda *_, **__: (3, 4, 4))  # eight of them
    assert abs(error(model, scan, 3) - whole) < 0.1 * (plain - whole)


def test_the_command_says_how_many_steps(tiny_run, scan, tmp_path):
    nifti.write(tmp_path / "scan.nii.gz", scan)
    arguments = [str(tmp_path / "scan.nii.gz"), "--out", str(tmp_path / "again.nii.gz"), "--refine", "2"]
    done = CliRunner().invoke(app, ["reconstruct", str(tiny_run), *arguments])
    assert done.exit_code == 0, done.output
    assert '"refine": 2' in (tmp_path / "again.json").read_text()
