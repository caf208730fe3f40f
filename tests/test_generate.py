"""Trained models in use: what comes out depends on the seed alone, opens in a viewer, and sits where its scan sat."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from ctvae import checkpoint
from ctvae import model as model_module
from ctvae.config import with_overrides
from ctvae.dataset import Dataset
from ctvae.errors import InputError, ModelError
from ctvae.generate import DESCRIPTION, described, generate, interpolate, load, middle_slab, reconstruct, sidecar, vary
from ctvae.scan import read_scan
from ctvae.training.train import train
from ctvae.volume import Volume, plain_affine

PRIORS = ("flow", "gaussian", "mixture", "normal")
QUICK = (
    "autoencoder.steps=3", "autoencoder.log_every=1", "autoencoder.save_every=1",
    "prior.steps=3", "prior.log_every=1", "prior.save_every=1", "prior.mlp_width=16", "prior.batch=2", "prior.sampling_steps=2",
)  # fmt: skip
OTHERS = {
    "slice2d": ("model.widths=[2,4,4]", "model.latent_size=4"),
    "stack2d-small": ("model.latent_size=8",),
    "conv3d": ("model.widths=[2,4,4,8,8,8]", "model.latent_size=8"),
}


def hu_of(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def refused(error: type[Exception], call: Callable, *arguments, **options) -> str:
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def three(tiny_run, tmp_path_factory) -> list[Path]:
    """Volumes 0 to 2 of seed 7, by the flow."""
    return generate(tiny_run, tmp_path_factory.mktemp("three"), count=3, seed=7)


@pytest.fixture(scope="module")
def scan(tmp_path_factory, scan_hu, write_nifti) -> Path:
    """Odd along every axis, none a multiple of the model's grid."""
    return write_nifti(tmp_path_factory.mktemp("scan") / "scan.nii.gz", scan_hu(1, (35, 27, 43)), (3.9, 3.9, 2.5))


# --- generate ---------------------------------------------------------------------------------------------------------


def test_a_volume_does_not_depend_on_how_many_are_asked_for(tiny_run, three, tmp_path):
    alone = generate(tiny_run, tmp_path, count=1, seed=7)
    assert [path.name for path in alone] == [three[0].name]
    np.testing.assert_array_equal(hu_of(alone[0]), hu_of(three[0]))
    last = load(tiny_run).generate(seed=7, index=2)
    np.testing.assert_array_equal(last.volume.hu.transpose(2, 1, 0), hu_of(three[2]))
    assert last.provenance == json.loads(sidecar(three[2]).read_text())


@pytest.mark.parametrize("prior", PRIORS)
def test_latents_depend_on_seed_and_index(tiny_run, prior):
    model = load(tiny_run)
    latent = model.draw(prior, 3, 1).latent
    assert latent.shape == (1, 2, 16, 8, 8)
    assert torch.equal(model.draw(prior, 3, 1).latent, latent)
    assert not torch.equal(model.draw(prior, 3, 2).latent, latent)
    assert not torch.equal(model.draw(prior, 4, 1).latent, latent)


def test_other_seeds_are_other_volumes(tiny_run, three, tmp_path):
    other = generate(tiny_run, tmp_path, count=1, seed=8)[0]
    volumes = [hu_of(path) for path in (*three, other)]
    for first in range(4):
        for second in range(first):
            assert not np.array_equal(volumes[first], volumes[second])


def test_the_files_open_as_a_ct(three, tiny_dataset):
    known = {tuple(np.float32(group.spacing_mm)) for group in Dataset.open(tiny_dataset).groups("train")}
    for path in three:
        image = nib.load(path)
        header, told = image.header, json.loads(sidecar(path).read_text())
        assert header.get_data_dtype() == np.int16
        assert header.get_xyzt_units()[0] == "mm"
        assert (int(header["qform_code"]), int(header["sform_code"])) == (1, 1)
        np.testing.assert_allclose(header.get_qform(), header.get_sform(), atol=1e-4)
        assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
        x_mm, y_mm, z_mm = (float(mm) for mm in header.get_zooms())
        assert (x_mm, z_mm) == (told["conditions"]["pixel_mm"], told["conditions"]["slice_mm"])
        assert x_mm == y_mm
        assert (np.float32(x_mm), np.float32(y_mm), np.float32(z_mm)) in known
        assert b"SYNTHETIC" in header["descrip"].tobytes()
        assert image.shape == (32, 32, 64)
        assert hu_of(path).min() >= -1000
        assert hu_of(path).max() <= 1000
        middle = image.affine @ [*((n - 1) / 2 for n in image.shape), 1]
        np.testing.assert_allclose(middle[:3], 0, atol=1e-3)


def test_the_sidecar_says_where_it_came_from(three, tiny_run):
    told = json.loads(sidecar(three[1]).read_text())
    assert told["synthetic"] is True
    assert (told["method"], told["prior"], told["seed"], told["index"], told["steps"]) == ("wavelet3d", "flow", 7, 1, 2)
    assert told["model_sha256"] == load(tiny_run).hash
    assert told["window_hu"] == [-1000, 1000]


def test_the_header_says_so_too(three, tiny_run):
    """A file that has lost its sidecar still names its model and draw."""
    for index, path in enumerate(three):
        said = nib.load(path).header["descrip"].item().decode()
        assert said == f"SYNTHETIC CT made by ctvae, not a patient; model {load(tiny_run).hash[:8]} seed 7 index {index}"
    facts = {"model_sha256": "0123456789abcdef", "seed": 10**12, "index": 3}
    assert described(facts) == "SYNTHETIC CT made by ctvae, not a patient; model 01234567"


def test_finished_files_are_kept(tiny_run, tmp_path):
    paths = generate(tiny_run, tmp_path, count=2)
    sidecar(paths[1]).unlink()  # as if stopped between the scan and its sidecar
    before = [path.stat().st_mtime_ns for path in paths]
    assert generate(tiny_run, tmp_path, count=3)[:2] == paths
    assert paths[0].stat().st_mtime_ns == before[0]
    assert paths[1].stat().st_mtime_ns != before[1]
    generate(tiny_run, tmp_path, count=1, overwrite=True)
    assert paths[0].stat().st_mtime_ns != before[0]
    assert (tmp_path / "contact-sheet.png").read_bytes()[:4] == b"\x89PNG"


def test_others_scans_are_not_taken_for_ones_own(tiny_run, tmp_path):
    path = generate(tiny_run, tmp_path, count=1, prior="normal")[0]
    line = refused(InputError, generate, tiny_run, tmp_path, count=1, prior="flow")
    assert line.startswith(f"{path}: was made by another model, prior or --steps")
    assert "--steps" in refused(InputError, generate, tiny_run, tmp_path, count=1, prior="normal", steps=9)
    sidecar(path).write_text("{")
    assert "--overwrite" in refused(InputError, generate, tiny_run, tmp_path, count=1, prior="normal")
    generate(tiny_run, tmp_path, count=1, prior="flow", overwrite=True)
    assert json.loads(sidecar(path).read_text())["prior"] == "flow"


def test_a_prior_that_was_trained_again_is_another_model(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    path = generate(run, tmp_path / "out", count=1)[0]
    told = json.loads(sidecar(path).read_text())
    assert told["prior_sha256"] == hashlib.sha256((run / "prior-flow.safetensors").read_bytes()).hexdigest()[:16]
    tensors, meta = checkpoint.load(run / "prior-flow.safetensors")
    checkpoint.save(run / "prior-flow.safetensors", {**tensors, "flow.mean": tensors["flow.mean"] + 0.1}, meta)
    assert "another model, prior" in refused(InputError, generate, run, tmp_path / "out", count=1)


def test_unknown_names_are_answered_with_the_nearest(tiny_run, tmp_path, monkeypatch):
    line = refused(ModelError, generate, tiny_run, tmp_path / "out", prior="mixtur")
    assert "has no prior 'mixtur', did you mean 'mixture'? (it has: flow, gaussian, mixture, normal)" in line
    (tmp_path / "packaged" / "headneck").mkdir(parents=True)
    (tmp_path / "packaged" / "headneck" / "config.yaml").write_text("{}")
    monkeypatch.setattr(model_module, "PACKAGED", tmp_path / "packaged")
    assert "did you mean 'headneck'? (packaged: headneck)" in refused(ModelError, load, "headnek")
    assert "its autoencoder is not trained yet" in refused(ModelError, load, "headneck")
    assert "not a model" in refused(ModelError, load, tmp_path)


def test_a_run_without_priors_says_how_to_get_them(tiny_run, tmp_path):
    for name in ("config.yaml", "autoencoder.safetensors"):
        (tmp_path / name).write_bytes((tiny_run / name).read_bytes())
    assert "none yet; train with --stage prior" in refused(ModelError, generate, tmp_path, tmp_path / "out")


def test_weights_of_another_network_are_one_line(tiny_run, tmp_path):
    text = (tiny_run / "config.yaml").read_text().replace("latent_channels: 2", "latent_channels: 3")
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "autoencoder.safetensors").write_bytes((tiny_run / "autoencoder.safetensors").read_bytes())
    assert "weights do not fit config.yaml" in refused(ModelError, load, tmp_path)


def test_a_name_that_is_no_nifti_is_refused(tiny_run, scan, tmp_path):
    synthetic = load(tiny_run).generate()
    assert "a scan's name ends in .nii or .nii.gz" in refused(InputError, synthetic.save, tmp_path / "x.png")
    assert ".nii or .nii.gz" in refused(InputError, reconstruct, tiny_run, scan, tmp_path / "x.dcm")
    assert list(tmp_path.iterdir()) == []


# --- reconstruct ------------------------------------------------------------------------------------------------------


def test_a_reconstruction_sits_where_its_scan_sits(tiny_run, scan, tmp_path):
    source, again = nib.load(scan), nib.load(reconstruct(tiny_run, scan, tmp_path / "again.nii.gz"))
    assert again.shape == source.shape == (43, 27, 35)
    np.testing.assert_array_equal(again.affine, source.affine)
    assert again.get_data_dtype() == np.int16
    told = json.loads((tmp_path / "again.json").read_text())
    assert (told["made_by"], told["synthetic"], told["model_sha256"]) == ("reconstruct", True, load(tiny_run).hash)
    assert again.header["descrip"].item().decode() == f"{DESCRIPTION}; model {told['model_sha256'][:8]}"


def turned(path: Path, codes: str, out: Path) -> Path:
    """The same scan stored in other axes, e.g. PIR."""
    image = nib.load(path)
    change = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(codes))
    nib.save(image.as_reoriented(change), out)
    return out


@pytest.mark.parametrize("codes", ["RAS", "PIR", "SLA"])
def test_stored_axes_are_kept_and_change_nothing(tiny_run, scan, tmp_path, codes):
    other = turned(scan, codes, tmp_path / "other.nii.gz")
    straight = nib.load(reconstruct(tiny_run, scan, tmp_path / "a.nii.gz"))
    found = nib.load(reconstruct(tiny_run, other, tmp_path / "b.nii.gz"))
    assert "".join(nib.aff2axcodes(found.affine)) == codes
    np.testing.assert_array_equal(found.affine, nib.load(other).affine)
    same = [np.asarray(nib.as_closest_canonical(image).dataobj) for image in (straight, found)]
    np.testing.assert_array_equal(*same)


def test_tiles_make_no_difference(tiny_run, scan_hu, monkeypatch):
    """Those of the settings, and smaller ones where less memory is free."""
    model, volume = load(tiny_run), Volume(scan_hu(3, (99, 18, 22)), plain_affine((4.0, 4.0, 2.0), (99, 18, 22)))
    sizes: list[tuple[int, ...]] = []
    plain = type(model)._decoded
    monkeypatch.setattr(type(model), "_decoded", lambda self, z: sizes.append(tuple(z.shape[2:])) or plain(self, z))
    found = []
    for tile, free_mb, parts in (((128, 256, 256), 1000, 1), ((12, 8, 16), 1000, 9 * 3 * 2), ((128, 256, 256), 1, 4)):
        model.cfg = with_overrides(model.cfg, [f"data.tile={list(tile)}"])
        monkeypatch.setattr(model_module, "free_bytes", lambda free=free_mb: free * 1e6)
        sizes.clear()
        found.append(model.reconstruct_volume(volume).hu.astype(int))
        assert len(sizes) == parts
    whole, *tiled = found
    assert max(np.abs(hu - whole).max() for hu in tiled) <= 1  # HU, where rounding falls the other way


def test_an_identity_network_would_give_the_scan_back(tiny_run, scan, monkeypatch):
    """All but the network: window, padding to the grid and its undoing are exact."""
    model, volume = load(tiny_run), read_scan(scan).volume
    monkeypatch.setattr(type(model), "_moments", lambda self, x: torch.cat((x, x), 1))
    monkeypatch.setattr(type(model), "_decoded", lambda self, z: z)
    monkeypatch.setattr(type(model), "_tiled", lambda self, apply, x, encoding: apply(x))
    np.testing.assert_array_equal(model.reconstruct_volume(volume).hu, np.clip(volume.hu, -1000, 1000))


# --- vary and interpolate ---------------------------------------------------------------------------------------------


def test_no_variation_is_the_reconstruction(tiny_run, scan, tmp_path):
    plain = hu_of(reconstruct(tiny_run, scan, tmp_path / "plain.nii.gz"))
    ((path, distances),) = vary(tiny_run, scan, tmp_path / "vary", alpha=0.0, count=1)
    np.testing.assert_array_equal(hu_of(path), plain)
    assert nib.load(path).header["descrip"].item().decode().endswith(f"; model {load(tiny_run).hash[:8]} seed 0 index 0")
    assert distances["rms_hu_from_reconstruction"] == 0
    expected = np.clip(hu_of(scan), -1000, 1000).astype(float) - plain
    assert distances["rms_hu_from_scan"] == pytest.approx(np.sqrt((expected**2).mean()), abs=0.01)
    assert distances["mean_abs_hu_from_scan"] == pytest.approx(np.abs(expected).mean(), abs=0.01)


def test_distances_grow_with_alpha(tiny_run, scan, tmp_path):
    found = [vary(tiny_run, scan, tmp_path / str(alpha), alpha=alpha, count=2) for alpha in (1.0, 8.0, 64.0)]
    rms = [[distances["rms_hu_from_reconstruction"] for _, distances in results] for results in found]
    assert all(0 < small < large for small, large in zip(rms[0], rms[1], strict=True))
    assert all(small < large for small, large in zip(rms[1], rms[2], strict=True))
    (first, _), (second, _) = found[1]
    assert not np.array_equal(hu_of(first), hu_of(second))
    np.testing.assert_array_equal(nib.load(first).affine, nib.load(scan).affine)
    assert json.loads(sidecar(second).read_text())["distances"] == found[1][1][1]


def test_a_path_runs_from_one_scan_to_the_other(tiny_run, scan, scan_hu, write_nifti, tmp_path):
    other = write_nifti(tmp_path / "other.nii.gz", scan_hu(2, (70, 40, 36)), (2.9, 2.9, 3.5))
    model = load(tiny_run)
    paths = interpolate(tiny_run, scan, other, tmp_path / "path", count=3)
    assert len(paths) == 3
    for path, end in ((paths[0], scan), (paths[2], other)):
        slab = middle_slab(read_scan(end).volume, model.shape)
        np.testing.assert_array_equal(hu_of(path).transpose(2, 1, 0), model.reconstruct_volume(slab).hu)
        np.testing.assert_allclose(nib.load(path).header.get_zooms(), slab.spacing_mm, rtol=1e-6)
    np.testing.assert_allclose(nib.load(paths[1]).header.get_zooms(), (3.4, 3.4, 3.0), rtol=1e-6)
    assert not np.array_equal(hu_of(paths[1]), hu_of(paths[0]))
    assert json.loads(sidecar(paths[1]).read_text())["share"] == 0.5


def test_a_path_has_two_ends(tiny_run, scan, tmp_path):
    assert "-n 1" in refused(InputError, interpolate, tiny_run, scan, scan, tmp_path, count=1)


# --- every method -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", OTHERS)
def test_every_method_trains_generates_and_reconstructs(method, tiny_dataset, tmp_path):
    run = train(tiny_dataset, tmp_path / "run", method=method, overrides=[*QUICK, *OTHERS[method]])
    model = load(run)
    assert tuple(model.priors()) == PRIORS
    for prior in ("flow", "normal"):
        paths = generate(run, tmp_path / prior, count=2, prior=prior)
        assert nib.load(paths[0]).shape == tuple(reversed(model.shape))
        first, second = (model.draw(prior, 0, index).latent for index in range(2))
        assert not torch.equal(first, second)
        np.testing.assert_array_equal(model.decode(second).transpose(2, 1, 0), hu_of(paths[1]))
    group = Dataset.open(tiny_dataset).groups("test")[0]
    source = tiny_dataset / group.path
    again = nib.load(reconstruct(run, source, tmp_path / "again.nii.gz"))
    assert again.shape == nib.load(source).shape
    np.testing.assert_array_equal(again.affine, nib.load(source).affine)
    if not model.network.spatial:
        assert "no latents to refine" in refused(InputError, reconstruct, run, source, tmp_path / "refined.nii.gz", refine=2)


def test_a_body_wider_than_the_models_plane_is_refused(tiny_dataset, tmp_path, scan_hu, write_nifti):
    run = train(tiny_dataset, tmp_path / "run", method="slice2d", stage="autoencoder", overrides=[*QUICK, *OTHERS["slice2d"]])
    wide = write_nifti(tmp_path / "wide.nii.gz", scan_hu(0, (20, 80, 90)), (4.0, 4.0, 4.0))
    line = refused(InputError, reconstruct, run, wide, tmp_path / "out.nii.gz")
    assert "was trained on 32x32" in line
    assert not (tmp_path / "out.nii.gz").exists()
