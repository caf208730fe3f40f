"""A trained model at rest: a run folder, or one that is packaged with ctvae, loaded for use.

Shapes:  D H W voxels   latents [1 Z d h w] or [1 N Z], with a batch axis of one
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctvae import intensity, preprocess
from ctvae.calibration import FILE as CALIBRATION
from ctvae.calibration import HALO, Calibration, level_of, thinned
from ctvae.checkpoint import built, file_hash, load
from ctvae.conditions import Known
from ctvae.config import Config, load_config, nearest
from ctvae.device import autocast, free_bytes, generator, in_bf16, place
from ctvae.errors import InputError, ModelError
from ctvae.latents import LatentCode
from ctvae.models import build
from ctvae.models.autoencoder import Autoencoder
from ctvae.models.wavelet3d import Wavelet3DVAE, halo, tile_bytes
from ctvae.networks import Size3, Wavelet3D
from ctvae.planning.sizes import smaller
from ctvae.priors import CLOSED_FORM
from ctvae.refine import refined
from ctvae.sampling import Draw, FlowPrior, Sampling, refuse
from ctvae.tiling import scaled, tiled, tiles
from ctvae.training.prior import Conditioning, build_velocity
from ctvae.volume import Volume
from ctvae.wiener import WienerVelocity

PACKAGED = Path(__file__).parent / "packaged"
CALIBRATED_TILE = (64, 128, 128)  # D H W, halo not counted
SMALLEST_TILE = (32, 64, 64)  # D H W, halo not counted: below that the halo is nearly all of it
OF_FREE_MEMORY = 0.5  # share that a tile may take
OF_A_DESCENT = 6  # times what a pass through the decoder takes: found 3 to 4 (docs/log.md, refined latents)


@dataclass(frozen=True)
class Posterior:
    """A scan's latents: mean and standard deviation [1 ...], and how to get back onto its grid."""

    mean: Tensor
    std: Tensor
    box: preprocess.Box
    scan: Volume


class Model:
    """An autoencoder and its priors. `ctvae.load` makes one."""

    def __init__(self, folder: Path):
        self.folder = folder
        tensors, meta = load(folder / "autoencoder.safetensors")
        self.cfg: Config = load_config(folder / "config.yaml")
        self.shape: Size3 = _sizes(meta, "shape", 3, folder)  # type: ignore[assignment]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network: Autoencoder = self._ready(lambda: build(self.cfg.model, self.shape), tensors)
        self.hash = file_hash(folder / "autoencoder.safetensors")
        calibrated = folder / CALIBRATION
        self.calibration = Calibration.load(calibrated) if calibrated.is_file() else None
        if self.calibration is not None:
            self.hash = hashlib.sha256(f"{self.hash} {file_hash(calibrated)}".encode()).hexdigest()[:16]
            if not isinstance(self.cfg.model, Wavelet3D):
                raise ModelError(f"{calibrated}: is of a wavelet3d model, this is {self.cfg.method}; remove it")

    def _ready(self, make: Callable[[], Any], tensors: dict[str, Tensor]) -> Any:
        network = built(make, tensors, self.folder)
        place(network, self.device)
        return network.eval().requires_grad_(False)

    # --- encode and decode -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, scan: Volume, refine: int = 0) -> Posterior:
        """Any scan for `wavelet3d`; for the others one that fits the model's plane. Raises InputError for a wrong shape.

        The mean is then followed by `refine` steps of gradient descent through the decoder (`refine.py`).
        """
        if refine and not isinstance(self.cfg.model, Wavelet3D):
            raise InputError(f"{self.cfg.method} has no latents to refine step by step; leave it out, or use a wavelet3d model")
        box = self._box(scan)
        block = preprocess.cut(scan, box)
        x = torch.from_numpy(intensity.from_hu(block.hu, self.cfg.data.window_hu))[None, None]
        if isinstance(self.cfg.model, Wavelet3D):
            moments = self._tiled(self._moments, x, encoding=True)
        else:
            moments = torch.cat([self._moments(part) for part in x.split(self.shape[0], dim=2)], dim=1)
        mean, logvar = moments.chunk(2, dim=1 if isinstance(self.cfg.model, Wavelet3D) else 2)
        if refine:
            mean = self._refined(mean, x, refine)
        return Posterior(mean, (0.5 * logvar).exp(), box, scan)

    @torch.no_grad()
    def decode(self, z: Tensor, noise: torch.Generator | None = None, strength: float = 1.0) -> np.ndarray:
        """Latents [1 ...] -> int16 HU [D H W]. With `noise`, that of a scan, `strength` times as strong (`grain.py`)."""
        if self.calibration is not None:
            x = self._calibrated(self.raw(z), noise, strength)
        elif isinstance(self.cfg.model, Wavelet3D):
            x = self._tiled(self._decoded, z, encoding=False)
        else:
            per_group = self.network.latent_shape[0]
            x = torch.cat([self._decoded(part) for part in z.split(per_group, dim=1)], dim=2)
        return intensity.to_hu(x[0, 0].numpy(), self.cfg.data.window_hu)

    @torch.no_grad()
    def raw(self, z: Tensor) -> Tensor:
        """What the decoder of a `wavelet3d` makes of latents [1 Z d h w] before its own curve: [1 1 D H W]."""
        return self._tiled(self._raw, z, encoding=False)

    @torch.no_grad()
    def toned(self, raw: Tensor) -> Tensor:
        """Under the decoder's own curve, if it has one: like raw."""
        assert isinstance(self.network, Wavelet3DVAE)
        tone = self.network.decoder.tone
        return raw if tone is None else tone(raw.to(self.device)).cpu()  # type: ignore[no-any-return]

    def decode_onto(self, z: Tensor, posterior: Posterior) -> Volume:
        """Latents -> the grid of the scan that `posterior` came from; air where the model did not look."""
        block = Volume(self.decode(z), posterior.scan.affine)
        scan = posterior.scan
        air = Volume(np.full(scan.shape, intensity.AIR_HU, np.int16), scan.affine)
        return preprocess.paste(block, posterior.box, air)

    def reconstruct_volume(self, scan: Volume, refine: int = 0) -> Volume:
        """Encode, with `refine` steps of descent, and decode: same shape and affine, HU within the model's window."""
        posterior = self.encode(scan, refine)
        return self.decode_onto(posterior.mean, posterior)

    def _box(self, scan: Volume) -> preprocess.Box:
        """The block that the network is shown: the scan on the model's grid, or the model's plane about the body."""
        if isinstance(self.cfg.model, Wavelet3D):
            return preprocess.grid_box(scan.shape, self.cfg.model.grid)
        depth, height, width = self.shape
        body = preprocess.body_box(scan)
        if body.shape[1] > height or body.shape[2] > width:
            raise InputError(
                f"the body in this scan spans {body.shape[1]}x{body.shape[2]} voxels, {self.cfg.method} was trained on "
                f"{height}x{width}; prepare the scan like the training data, or use a wavelet3d model, which takes any size"
            )
        starts = [b + (have - want) // 2 for b, have, want in zip(body.start[1:], body.shape[1:], (height, width), strict=True)]
        slices = math.ceil(scan.shape[0] / depth) * depth
        return preprocess.Box((0, starts[0], starts[1]), (slices, height, width))

    def _moments(self, x: Tensor) -> Tensor:
        with self._autocast():
            mean, logvar = self.network.encode(x.to(self.device))
        return torch.cat((mean, logvar), dim=1 if mean.ndim == 5 else 2).float().cpu()

    def _decoded(self, z: Tensor) -> Tensor:
        return self._decoding(z.to(self.device)).float().cpu()

    def _raw(self, z: Tensor) -> Tensor:
        assert isinstance(self.network, Wavelet3DVAE)
        with self._autocast():
            return self.network.decoder.raw(z.to(self.device)).cpu()

    def _calibrated(self, raw: Tensor, noise: torch.Generator | None, strength: float) -> Tensor:
        """Tile by tile, each with what its voxels depend on: it takes twenty times the memory of a tile."""
        assert self.calibration is not None
        one, reach, calibration = (1, 1, 1), (HALO, HALO, HALO), self.calibration
        level = level_of(self.toned(thinned(raw)), calibration.soft)
        volumes = [raw]
        if noise is not None and calibration.grain is not None:
            volumes.append(strength * calibration.grain.white(raw.shape, noise))

        def apply(x: Tensor) -> Tensor:  # [1 1 D H W], or with white noise [1 2 D H W]
            raw, *noise = x.split(1, dim=1)
            return calibration(raw, self.toned(raw), level, *noise)

        return tiled(apply, torch.cat(volumes, dim=1), factor_in=one, factor_out=one, tile=CALIBRATED_TILE, halo=reach)

    def _autocast(self) -> torch.autocast:
        return autocast(self.cfg.autoencoder.precision, self.device)

    def _refined(self, z: Tensor, x: Tensor, steps: int) -> Tensor:
        """By tiles, each with its halo: what of it belongs to others is refined with it and not kept."""
        assert isinstance(self.cfg.model, Wavelet3D)
        network, grid = self.cfg.model, self.cfg.model.grid
        depth, height, width = x.shape[2:]
        out = torch.empty_like(z)
        tile = self._tile(network, (depth, height, width), held=OF_A_DESCENT)
        d, h, w = z.shape[2:]
        for part in tiles((d, h, w), tile, halo(network)):
            target = x[(..., *scaled(part.read, grid))].to(self.device)
            found = refined(self._decoding, z[(..., *part.read)].to(self.device), target, steps)
            out[(..., *part.keep)] = found[(..., *part.inside())].cpu()
        return out

    def _decoding(self, z: Tensor) -> Tensor:
        with self._autocast():
            return self.network.decode(z)

    def _tiled(self, apply: Any, x: Tensor, *, encoding: bool) -> Tensor:
        assert isinstance(self.cfg.model, Wavelet3D)
        grid = self.cfg.model.grid
        one = (1, 1, 1)
        factor_in, factor_out = (grid, one) if encoding else (one, grid)
        depth, height, width = (side * factor for side, factor in zip(x.shape[2:], factor_out, strict=True))
        tile = self._tile(self.cfg.model, (depth, height, width))
        return tiled(apply, x, factor_in=factor_in, factor_out=factor_out, tile=tile, halo=halo(self.cfg.model))

    def _tile(self, network: Wavelet3D, size: Size3, held: int = 1) -> Size3:
        """A tile of a volume of `size` voxels, in latents: what the settings say, or smaller where less memory is free now.

        `held`: how many times as much is held as one pass through encoder or decoder takes.
        """
        number = 2 if in_bf16(self.cfg.autoencoder.precision) else 4
        sizes = [self.cfg.data.tile, *smaller(self.cfg.data.tile, network.grid, SMALLEST_TILE)]
        most = free_bytes() * OF_FREE_MEMORY
        chosen = next((size_ for size_ in sizes if held * tile_bytes(network, size, size_, number) <= most), sizes[-1])
        d, h, w = (max(1, voxels // step) for voxels, step in zip(chosen, network.grid, strict=True))
        return d, h, w

    # --- priors ------------------------------------------------------------------------------------------------------

    def priors(self) -> list[str]:
        """Names of the priors that this model has, the flow first."""
        names = [path.stem.removeprefix("prior-") for path in self.folder.glob("prior-*.safetensors")]
        return sorted(names, key=lambda name: (name != "flow", name))

    @torch.no_grad()
    def draw(self, prior: str, seed: int, index: int, steps: int | None = None, asked: Sampling | None = None) -> Draw:
        """Latent number `index` of `seed` from a prior: the same whatever else is drawn.

        `steps` alone is short for Sampling(steps). Raises ModelError for an unknown prior, InputError for what it cannot do.
        """
        self._check_prior(prior)
        asked = asked or Sampling(steps)
        refuse(asked, prior, self.shape, len(self.network.latent_shape) == 4)
        random = generator(seed, index, stream=11)
        if prior == "flow":
            return self._flow.draw(self.network.latent_shape, random, asked)
        tensors, meta = self._prior_tensors(prior)
        with self._complaint_about(prior):
            fitted = CLOSED_FORM[prior].from_tensors({name: value.numpy() for name, value in tensors.items()})
            known = self._known(prior, tensors, meta)
        rng = np.random.default_rng(int(torch.randint(2**62, (), generator=random)))
        z = torch.from_numpy(np.asarray(fitted.sample(rng), np.float32))[None]
        return Draw(z, known.pick(random, known.given(self.cfg.prior.told)))

    def conditions(self, prior: str = "flow") -> Known:
        """What a prior may be told, and what it knows of its training groups. Raises ModelError for an unknown prior."""
        self._check_prior(prior)
        return self._known(prior, *self._prior_tensors(prior))

    def _known(self, prior: str, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Known:
        return Known.from_file(tensors, meta, self.shape[0], self.folder / f"prior-{prior}.safetensors")

    def prior_hash(self, prior: str) -> str:
        """The first 16 hex digits of the SHA-256 of a prior's weights."""
        self._check_prior(prior)
        return file_hash(self.folder / f"prior-{prior}.safetensors")

    def _check_prior(self, prior: str) -> None:
        if prior not in self.priors():
            known = ", ".join(self.priors()) or "none yet; train with --stage prior"
            raise ModelError(f"{self.folder}: has no prior '{prior}'{nearest(prior, self.priors())} (it has: {known})")

    def _prior_tensors(self, prior: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return load(self.folder / f"prior-{prior}.safetensors")

    @cached_property
    def _flow(self) -> FlowPrior:
        tensors, meta = self._prior_tensors("flow")
        tensors = {name: value.float() for name, value in tensors.items()}
        shape = _sizes(meta, "latent_shape", len(self.network.latent_shape), self.folder)
        with self._complaint_about("flow"):
            wiener = WienerVelocity(*(tensors[f"flow.{name}"] for name in ("mean", "factors", "rest")))
            conditioning = Conditioning(tensors["conditions.mean"], tensors["conditions.std"])
            code, known = LatentCode(_below("code.", tensors)), self._known("flow", tensors, meta)
        make = partial(build_velocity, self.cfg.prior, shape, len(known.names), wiener)
        return FlowPrior(code, self._ready(make, _below("flow.", tensors)), conditioning, known, self.cfg.prior, self.shape)

    @contextmanager
    def _complaint_about(self, prior: str) -> Iterator[None]:
        """A prior's file without the tensors that it needs is a ModelError."""
        try:
            yield
        except (KeyError, ValueError, RuntimeError) as error:
            raise ModelError(f"{self.folder}/prior-{prior}.safetensors: damaged or not a {prior} prior ({error})") from error


def _sizes(meta: dict[str, Any], key: str, axes: int, folder: Path) -> tuple[int, ...]:
    sizes = meta.get(key)
    if not isinstance(sizes, list) or len(sizes) != axes:
        raise ModelError(f"{folder}: a weights file names no {key} of {axes} axes; train or download the model again")
    return tuple(sizes)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def packaged_models() -> list[str]:
    """Names of the models that ship with this installation."""
    return sorted(path.parent.name for path in PACKAGED.glob("*/config.yaml"))


def open_model(model: Path | str) -> Model:
    """A run folder, or the name of a packaged model, loaded. Raises ModelError."""
    return Model(model_folder(model))


def model_folder(model: Path | str) -> Path:
    """Of a run, or of a packaged model by its name. Raises ModelError when it is neither or not trained yet."""
    folder = Path(model)
    if not (folder / "config.yaml").is_file() and str(model) in packaged_models():  # a folder of scans may have that name
        folder = PACKAGED / str(model)
    if not folder.exists():
        known = ", ".join(packaged_models()) or "none in this installation"
        closest = nearest(str(model), packaged_models())
        raise ModelError(f"{model}: no such run folder or packaged model{closest} (packaged: {known})")
    if not (folder / "config.yaml").is_file():
        raise ModelError(f"{model}: not a model; a run folder holds config.yaml and autoencoder.safetensors")
    if not (folder / "autoencoder.safetensors").is_file():
        raise ModelError(f"{model}: its autoencoder is not trained yet; run `ctvae train DATASET --out {model}` to the end")
    return folder
