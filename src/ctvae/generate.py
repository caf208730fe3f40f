"""The verbs that use a trained model: generate, reconstruct, vary, interpolate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctvae import files, nifti, pictures, preprocess
from ctvae.checkpoint import file_hash
from ctvae.device import generator
from ctvae.errors import InputError
from ctvae.model import Model as TrainedModel
from ctvae.model import Posterior, model_folder, packaged_models
from ctvae.progress import Progress
from ctvae.ranks import joined
from ctvae.sampling import Sampling
from ctvae.scan import Scan, read_scan
from ctvae.version import __version__
from ctvae.volume import Volume, plain_affine

__all__ = ["Model", "Synthetic", "generate", "interpolate", "load", "packaged_models", "reconstruct", "vary"]
DESCRIPTION = "SYNTHETIC CT made by ctvae, not a patient"
MOST_DESCRIBED = 79  # letters in a NIfTI header
# Of sidecars that do not say all of it:
BEFORE = {"steps": None, "solver": "heun", "schedule": "equal", "autoguidance": 1.0, "rescale": 0.0, "kept_noise": 0.0}


@dataclass(frozen=True)
class Synthetic:
    """A synthetic scan and where it came from."""

    volume: Volume
    provenance: dict[str, Any]

    def save(self, path: Path | str) -> Path:
        """Write NIfTI in HU and a JSON sidecar beside it; returns the NIfTI's path. Raises InputError."""
        target = Path(path)
        if not nifti.is_nifti(target):
            raise InputError(f"{target}: a scan's name ends in .nii or .nii.gz")
        nifti.write(target, self.volume, description=described(self.provenance))
        files.write_json(sidecar(target), self.provenance)
        return target


def described(provenance: Mapping[str, Any]) -> str:
    """For a header, if its sidecar gets lost: synthetic, by which model (the first digits of its hash), which draw."""
    text = f"{DESCRIPTION}; model {provenance['model_sha256'][:8]}"
    drawn = f"{text} seed {provenance['seed']} index {provenance['index']}" if "seed" in provenance else text
    return drawn if len(drawn) <= MOST_DESCRIBED else text  # rather than a number cut short


def sidecar(path: Path) -> Path:
    """`x.nii.gz` -> `x.json`."""
    return path.with_name(path.name.removesuffix(".gz").removesuffix(".nii") + ".json")


class Model(TrainedModel):
    """A trained model that hands out scans with their provenance."""

    def generate(
        self,
        seed: int = 0,
        index: int = 0,
        prior: str = "flow",
        steps: int | None = None,
        *,
        solver: str | None = None,
        guidance: float | None = None,
        conditions: Mapping[str, float | str] | None = None,
        slices: int | None = None,
        schedule: str | None = None,
        autoguidance: float | None = None,
        rescale: float | None = None,
        kept_noise: float | None = None,
        grain: float | None = None,
    ) -> Synthetic:
        """Volume number `index` of `seed`: the same whatever else is generated, in HU, int16, with a patient's spacing.

        The rest as in the verb `ctvae.generate`. Raises ModelError, ConfigError or InputError.
        """
        asked = Sampling(steps, solver, guidance, conditions or {}, slices, schedule, autoguidance, rescale, kept_noise, grain)
        return self.sampled(seed, index, prior, asked)

    def sampled(self, seed: int, index: int, prior: str, asked: Sampling) -> Synthetic:
        """`generate`, with what is asked of the draw as one."""
        draw = self.draw(prior, seed, index, asked=asked)
        facts = self.facts(asked)
        hu = _middle(self.decode(draw.latent, generator(seed, index, stream=61), facts.get("grain", 0.0)), facts["slices"])
        x_mm, z_mm = draw.told["pixel_mm"], draw.told["slice_mm"]
        volume = Volume(hu, plain_affine((x_mm, x_mm, z_mm), (hu.shape[0], hu.shape[1], hu.shape[2])))
        origin = {"prior": prior, "prior_sha256": self.prior_hash(prior), "seed": seed, "index": index}
        if draw.positions:
            facts["positions"] = [round(position, 6) for position in draw.positions]
        return Synthetic(volume, self.provenance(**origin, conditions=draw.conditions, **facts))

    def facts(self, asked: Sampling) -> dict[str, Any]:
        """What is asked of a draw, defaults filled in. Raises InputError where grain is asked of a model that has none."""
        facts = asked.facts(self.cfg.prior, self.shape)
        if self.calibration is not None and self.calibration.grain is not None:
            return {**facts, "grain": 1.0 if asked.grain is None else asked.grain}
        if asked.grain is not None:
            raise InputError(f"{self.folder}: has no measured noise for --grain; leave it out, or train --stage calibration anew")
        return facts

    def provenance(self, **facts: Any) -> dict[str, Any]:
        return {
            "synthetic": True,
            "ctvae": __version__,
            "method": self.cfg.method,
            "model_sha256": self.hash,
            "window_hu": list(self.cfg.data.window_hu),
            **facts,
        }


def load(model: Path | str) -> Model:
    """A run folder or the name of a packaged model, ready to use. Raises ModelError."""
    return Model(model_folder(model))


def generate(
    model: Path | str,
    out: Path | str,
    *,
    count: int = 4,
    seed: int = 0,
    prior: str = "flow",
    steps: int | None = None,
    overwrite: bool = False,
    solver: str | None = None,
    guidance: float | None = None,
    conditions: Mapping[str, float | str] | None = None,
    slices: int | None = None,
    schedule: str | None = None,
    autoguidance: float | None = None,
    rescale: float | None = None,
    kept_noise: float | None = None,
    grain: float | None = None,
) -> list[Path]:
    """Write `count` synthetic scans of `seed` as NIfTI with JSON sidecars, and `contact-sheet.png`; returns the scans.

    `steps`, `solver` (ab2, heun or euler), `schedule` of the steps (logit or equal), `guidance` by the conditions and
    `autoguidance` away from the Gaussian (1: none) are the flow's, and so is `rescale`: how far what is guided gets the spread of
    what is not (0 to 1), and `kept_noise`: the share of the noise found midway that is kept as detail (0: none); None:
    the model's own. `grain`: how strong the noise is that its decoder leaves out, times that of scans (0: none; `grain.py`).
    `conditions` are what the scans are to be, by name, such as {"position": 0.4, "sex": "F"}; what is not given is drawn
    from the training groups nearest to it. `slices` none: as many as the model's groups. Fewer are the middle of a group;
    more are one volume of overlapping slabs denoised together (spatial latents only), at a position along the body that is
    moved where the volume would not fit (`FlowPrior.draw`).

    Scans that the same call wrote before are kept. Processes that torchrun started share them out. Raises ModelError and
    ConfigError, and InputError where other scans are in the way or the model cannot do what is asked.
    """
    asked = Sampling(steps, solver, guidance, conditions or {}, slices, schedule, autoguidance, rescale, kept_noise, grain)
    folder = Path(out)
    paths = [folder / f"synthetic-{seed}-{index:04d}.nii.gz" for index in range(count)]
    with joined() as ranks:
        if ranks.first:
            files.sweep(folder)
        loaded, mine = load(model), range(ranks.rank, count, ranks.world)
        if not overwrite:
            _refuse_foreign([paths[index] for index in mine], loaded, prior, asked)
        ranks.barrier()
        with Progress(f"generate ({prior})", total=count) as bar:
            for index in mine:
                if overwrite or not (paths[index].exists() and sidecar(paths[index]).exists()):
                    loaded.sampled(seed, index, prior, asked).save(paths[index])
                bar.update(index + 1)
        ranks.barrier()
        if ranks.first:
            _contact_sheet(paths, folder, loaded)
    return paths


def _middle(hu: np.ndarray, slices: int) -> np.ndarray:
    """`slices` of [D H W], as many above as below left out."""
    start = (len(hu) - slices) // 2
    return hu[start : start + slices]


def _refuse_foreign(paths: list[Path], model: Model, prior: str, asked: Sampling) -> None:
    facts = model.facts(asked)
    before = {**Sampling().facts(model.cfg.prior, model.shape), **BEFORE}
    ours = {"model_sha256": model.hash, "prior_sha256": model.prior_hash(prior), "prior": prior, **facts}
    for path in paths:
        if path.exists() and sidecar(path).exists() and not ours.items() <= {**before, **_told(sidecar(path))}.items():
            raise InputError(
                f"{path}: was made by another model, prior or --steps, --solver, --schedule, --guidance, --autoguidance, "
                "--rescale, --kept-noise, --grain, --condition, --slices; choose another --out or --overwrite"
            )


def _told(path: Path) -> dict[str, Any]:
    """What a sidecar says; nothing where it is damaged."""
    try:
        told = files.read_json(path)
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _contact_sheet(paths: list[Path], folder: Path, model: Model, most: int = 12) -> None:
    scans = [(path.name.removesuffix(".nii.gz"), nifti.read(path)[0]) for path in paths[:most]]
    pictures.contact_sheet(scans, folder / "contact-sheet.png", model.cfg.data.window_hu)


def reconstruct(model: Path | str, scan: Path | str, out: Path | str, refine: int = 0) -> Path:
    """Encode and decode one scan: same shape, affine and stored axes, HU. Raises ModelError and InputError.

    `refine` steps of gradient descent bring the latents nearer to the scan, each as long as two to three decodings.
    """
    loaded, source, target = load(model), read_scan(scan), Path(out)
    if not nifti.is_nifti(target):
        raise InputError(f"{target}: --out names a .nii or .nii.gz file")
    again = loaded.reconstruct_volume(source.volume, refine)
    facts = loaded.provenance(made_by="reconstruct", source_sha256=_hash(source), refine=refine)
    nifti.write(target, again, source.orientation, described(facts))
    files.write_json(sidecar(target), facts)
    return target


def vary(
    model: Path | str, scan: Path | str, out: Path | str, *, alpha: float = 0.5, count: int = 4, seed: int = 0
) -> list[tuple[Path, dict[str, float]]]:
    """Decode mu + alpha * sigma * noise around a real scan, and say how far each volume came from its source.

    sigma is the posterior's standard deviation. Distances: root mean square and mean absolute HU against the scan and
    against its plain reconstruction. Raises ModelError and InputError.
    """
    loaded, source, folder = load(model), read_scan(scan), Path(out)
    posterior = loaded.encode(source.volume)
    plain = loaded.decode_onto(posterior.mean, posterior)
    results, sheet = [], [("scan", source.volume), ("reconstruction", plain)]
    with Progress("vary", total=count) as bar:
        for index in range(count):
            volume = loaded.decode_onto(_around(posterior, alpha, generator(seed, index, stream=13)), posterior)
            distances = _distances(volume, source.volume, plain, loaded.cfg.data.window_hu)
            path = folder / f"variation-{seed}-{index:04d}.nii.gz"
            facts = loaded.provenance(made_by="vary", alpha=alpha, seed=seed, index=index, source_sha256=_hash(source))
            nifti.write(path, volume, source.orientation, described(facts))
            files.write_json(sidecar(path), {**facts, "distances": distances})
            results.append((path, distances))
            sheet.append((f"variation {index}", volume))
            bar.update(index + 1)
    pictures.contact_sheet(sheet, folder / "contact-sheet.png", loaded.cfg.data.window_hu)
    return results


def interpolate(model: Path | str, a: Path | str, b: Path | str, out: Path | str, *, count: int = 5) -> list[Path]:
    """Decode `count` points of the straight line between two scans' latents, ends included, on the model's own grid.

    Each scan's middle slab is taken, centred on its body; spacings are interpolated too. Raises ModelError, InputError.
    """
    loaded, folder = load(model), Path(out)
    if count < 2:
        raise InputError(f"-n {count}: a path needs at least its two ends; give 2 or more")
    scans = [read_scan(path) for path in (a, b)]
    slabs = [middle_slab(scan.volume, loaded.shape) for scan in scans]
    first, last = (loaded.encode(slab).mean for slab in slabs)
    paths, sheet = [], []
    for index, share in enumerate(np.linspace(0, 1, count).tolist()):
        spacing = [(1 - share) * x + share * y for x, y in zip(slabs[0].spacing_mm, slabs[1].spacing_mm, strict=True)]
        hu = loaded.decode(torch.lerp(first, last, share))
        volume = Volume(hu, plain_affine((spacing[0], spacing[1], spacing[2]), loaded.shape))
        facts = loaded.provenance(made_by="interpolate", share=share, sources_sha256=[_hash(scan) for scan in scans])
        paths.append(Synthetic(volume, facts).save(folder / f"interpolation-{index:04d}.nii.gz"))
        sheet.append((f"{share:.2f}", volume))
    pictures.contact_sheet(sheet, folder / "contact-sheet.png", loaded.cfg.data.window_hu)
    return paths


def middle_slab(volume: Volume, shape: tuple[int, int, int]) -> Volume:
    """A block of `shape` about the middle of the body; air where the scan is smaller."""
    body = preprocess.body_box(volume)
    start = [b + (have - want) // 2 for b, have, want in zip(body.start, body.shape, shape, strict=True)]
    return preprocess.cut(volume, preprocess.Box((start[0], start[1], start[2]), shape))


def _around(posterior: Posterior, alpha: float, random: torch.Generator) -> torch.Tensor:
    return posterior.mean + alpha * posterior.std * torch.randn(posterior.mean.shape, generator=random)


def _distances(volume: Volume, scan: Volume, plain: Volume, window_hu: tuple[float, float]) -> dict[str, float]:
    """HU distances inside the model's window, from the scan and from its plain reconstruction."""
    clipped = np.clip(scan.hu.astype(np.float32), *window_hu)
    figures = {}
    for name, other in (("scan", clipped), ("reconstruction", plain.hu.astype(np.float32))):
        difference = volume.hu.astype(np.float32) - other
        figures[f"rms_hu_from_{name}"] = round(math.sqrt(float(np.square(difference).mean())), 2)
        figures[f"mean_abs_hu_from_{name}"] = round(float(np.abs(difference).mean()), 2)
    return figures


def _hash(scan: Scan) -> str:
    """Of the source file, so that a variation can be traced by who holds the scan and by nobody else."""
    return file_hash(scan.path) if scan.path.is_file() else "dicom"
