"""What one scan leaves behind: a few thousand numbers, from which every measure is taken.

So a hundred scans fit in little memory, resampling over patients is cheap, and an interrupted evaluation goes on from
the summaries it has written.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ctvae.checkpoint import write
from ctvae.evaluation.features import FULL_HU, SOFT_HU, layout, texture, tissue_fractions
from ctvae.evaluation.grid import Grid, Triple, about_body, body_mask, middle_of
from ctvae.evaluation.medicalnet import MedicalNet
from ctvae.evaluation.network import learned, weights_digest
from ctvae.preprocess import cut
from ctvae.volume import Volume

VERSION = 4  # of what is measured: older files in a cache are not read
HISTOGRAM_EDGES_HU = np.arange(-1000, 1501, 10)
CELLS = (24, 48, 48)
PATCH = 8
SPECTRUM_BINS = 32
NOISE_BINS = 4
MOST_PATCHES = 400
Array = NDArray[np.floating]


@dataclass(frozen=True)
class Summary:
    """Arrays of one scan. NaN in `noise` means that no homogeneous soft tissue was found."""

    digest: str
    histogram: Array  # [250] share of body voxels per 10 HU
    tissue: Array  # [5] shares of the body
    step_hu: Array  # [] mean |difference| of neighbouring slices in the body
    noise: Array  # [NOISE_BINS] radial noise power spectrum, HU^2 mm^2
    noise_hu: Array  # [] standard deviation of the noise patches
    spectrum: Array  # [SPECTRUM_BINS] radial power spectrum of axial slices, HU^2 per cycle^2 voxel^-2
    texture: Array  # [65]
    layout: Array  # [56]
    learned: Array  # [2 64] the network's features of the scan and of its mirror image
    cells: NDArray[np.int16]  # [24 48 48] the common box around the body's middle, HU
    medicalnet: Array = field(default_factory=lambda: np.empty(0))  # [F], empty without its weights


def summarise(volume: Volume, grid: Grid, cache: Path | None = None, medicalnet: MedicalNet | None = None) -> Summary:
    """Measure one scan; with `cache`, a folder, keep the result there and take it from there next time."""
    name = digest(volume)
    networks = f"{weights_digest()} {medicalnet.digest if medicalnet else ''}"
    asked = f"{VERSION} {grid} {volume.spacing_mm} {name} {networks}"
    key = hashlib.sha256(asked.encode()).hexdigest()[:24]
    kept = cache / f"{key}.safetensors" if cache else None
    if kept is not None and kept.exists():
        with suppress(SafetensorError):  # damaged by something other than us: it is measured again
            return Summary(digest=name, **load_file(kept))
    summary = _measure(volume, grid, name, medicalnet)
    if kept is not None:
        arrays = {f.name: np.array(getattr(summary, f.name), order="C") for f in fields(Summary) if f.name != "digest"}
        write(kept, {name: torch.from_numpy(array) for name, array in arrays.items()})
    return summary


def digest(volume: Volume) -> str:
    """SHA-256 of the HU values and their shape: equal for the same scan whatever its file is called."""
    hu = np.ascontiguousarray(np.rint(volume.hu), dtype=np.int16)
    return hashlib.sha256(repr(hu.shape).encode() + hu.tobytes()).hexdigest()


def noise_power_spectrum(patches: Array, spacing_mm: tuple[float, float]) -> Array:
    """Two-dimensional noise power spectrum of patches [n p p], in HU^2 mm^2 on the frequencies of `np.fft.fft2`: [p p].

    NPS(f) = (dx dy / p^2) <|FFT(patch - its mean)|^2> (Samei et al. 2019, AAPM TG-233). Summed over frequency, each
    cell 1 / (p dx) by 1 / (p dy), it gives the mean variance of the patches.
    """
    size = patches.shape[-1]
    detrended = patches - patches.mean(axis=(1, 2), keepdims=True)
    return (np.abs(np.fft.fft2(detrended)) ** 2).mean(axis=0) * spacing_mm[0] * spacing_mm[1] / size**2


def power_spectrum(slices: Array) -> Array:
    """Radially averaged power spectrum of slices [n H W] under a Hann window, 0 to 0.5 cycles per voxel:
    [SPECTRUM_BINS]."""
    _, height, width = slices.shape
    hann = np.outer(np.hanning(height), np.hanning(width)).astype(np.float32)
    centred = slices - slices.mean(axis=(1, 2), keepdims=True)
    power = (np.abs(np.fft.fft2(centred * hann)) ** 2).mean(axis=0) / (hann**2).sum()
    return radial_mean(power, SPECTRUM_BINS)


def radial_mean(power: Array, bins: int) -> Array:
    """Mean of a 2D spectrum over rings of equal width from 0 to 0.5 cycles per voxel, zero frequency left out: [bins].

    A small picture has no frequency in some of the rings; they take their neighbours' interpolated mean.
    """
    f = np.hypot(np.fft.fftfreq(power.shape[0])[:, None], np.fft.fftfreq(power.shape[1])[None])
    ring = np.ceil(f * 2 * bins - 1e-9).astype(int) - 1  # (0, 1 / 2 bins] is ring 0
    inside = (ring >= 0) & (ring < bins)
    count = np.bincount(ring[inside], minlength=bins)
    total = np.bincount(ring[inside], weights=power[inside], minlength=bins)
    filled = np.flatnonzero(count)
    return np.interp(np.arange(bins), filled, total[filled] / count[filled])


def soft_patches(hu: Array) -> Array:
    """Patches of homogeneous soft tissue in axial slices, for the noise spectrum: [n PATCH PATCH].

    Half of each overlaps with the next along both axes, so that small bodies have some wherever the first begins. A patch counts
    when its median is -30 to 120 HU and no voxel is further than 150 HU from that.
    """
    found = [_homogeneous(hu[:, row:, column:]) for row in (0, PATCH // 2) for column in (0, PATCH // 2)]
    patches = np.concatenate(found)
    return patches[:: max(1, len(patches) // MOST_PATCHES)]


def _homogeneous(hu: Array) -> Array:
    """Those of the patches side by side in slices [D H W]: [n PATCH PATCH]."""
    d, h, w = hu.shape
    rows, columns = h // PATCH, w // PATCH
    tiles = hu[:, : rows * PATCH, : columns * PATCH].reshape(d, rows, PATCH, columns, PATCH)
    tiles = tiles.transpose(0, 1, 3, 2, 4).reshape(-1, PATCH, PATCH)
    tiles = tiles[(tiles.min(axis=(1, 2)) > -180) & (tiles.max(axis=(1, 2)) < 270)]  # cheap, before the medians
    if len(tiles) == 0:
        return tiles
    median = np.median(tiles, axis=(1, 2))
    furthest = np.abs(tiles - median[:, None, None]).max(axis=(1, 2))
    return tiles[(median > -30) & (median < 120) & (furthest < 150)]


def _measure(volume: Volume, grid: Grid, name: str, medicalnet: MedicalNet | None) -> Summary:
    body = body_mask(volume.hu)
    box = about_body(body)
    hu, body = cut(volume, box).hu.astype(np.float32), cut(Volume(body, volume.affine), box, fill=False).hu
    spacing_mm = volume.spacing_mm
    seen = learned(hu, spacing_mm)
    known = medicalnet.features(hu, spacing_mm) if medicalnet else np.empty(0)
    cells = grid.cells(hu, spacing_mm, middle_of(body), CELLS)
    if grid.resample_texture:
        hu, spacing_mm = grid.at_common_spacing(hu, spacing_mm), grid.spacing_mm
        body = body_mask(hu)
    values = hu[body]
    counts = np.histogram(np.clip(values, -1000, 1499), HISTOGRAM_EDGES_HU)[0]
    noise, noise_hu = _noise(hu, spacing_mm)
    return Summary(
        digest=name,
        histogram=counts / counts.sum(),
        tissue=tissue_fractions(values),
        step_hu=np.array(_slice_step(np.clip(hu, *FULL_HU), body)),
        noise=noise,
        noise_hu=np.array(noise_hu),
        spectrum=power_spectrum(np.clip(hu, *SOFT_HU)[:: max(1, len(hu) // 32)]),
        texture=np.array(list(texture(hu, body, spacing_mm).values())),
        layout=layout(cells),
        learned=seen,
        cells=np.rint(cells).astype(np.int16, order="C"),
        medicalnet=known,
    )


def _slice_step(hu: Array, body: NDArray[np.bool_]) -> float:
    both = body[1:] & body[:-1]
    return float(np.abs(np.diff(hu, axis=0))[both].mean()) if both.any() else 0.0


def _noise(hu: Array, spacing_mm: Triple) -> tuple[Array, float]:
    patches = soft_patches(hu)
    if len(patches) < 8:
        return np.full(NOISE_BINS, np.nan), float("nan")
    spectrum = noise_power_spectrum(patches.astype(np.float64), spacing_mm[:2])
    return radial_mean(spectrum, NOISE_BINS), float(np.sqrt(patches.var(axis=(1, 2)).mean()))
