"""What a decoder does to outlines, lungs and fine detail, put right in closed form: one curve for all places cannot.

A decoded value of -850 HU may be a dark lung, a sinus, or a voxel on the outline of the body, half in air. The curve of
`models/tone.py` takes all the same way: outlines come out stippled, and lungs with black borders. So volumes are cut into
places, by what is around each voxel:

* empty: nothing but air within two voxels; left to the decoder;
* rim: within four voxels of that. Decoded values are smoothed by a Gaussian of `sigma` voxels, then pass a curve that is as steep
  as outlines of scans are: what came out as dots becomes a line;
* lung: darker than soft tissue, and within three voxels of where all is so that lies within two voxels. Where neighbours
  differ by a tenth more than in scans, by the lattice of a decoder that was trained least there, they are smoothed among
  themselves; then they pass a curve of their own;
* cavity: darker than soft tissue and none of these, such as airways; has a curve too.

Curves of all scans together take each scan's soft tissue towards the mean of all. So the volume's own `level`, the median of its
soft tissue, is moved away from the mean one again, and soft tissue with it.

Then, in all but empty air, what a Gaussian takes away of soft tissue and its edges grows by `gain`: decoders blur. And what one
along D takes away of what is brighter, bone, by `slice_gain`: they blur that most, and from slice to slice. What lies between two
wider Gaussians grows or shrinks by `plane_gain` in plane and by `depth_gain` along D. The noise that soft tissue and lungs still
lack is measured too, and drawn for what is generated (`grain.py`).

All that moves values of rims, lungs and cavities away from those of scans again, so at the end they pass a second curve each.
That of cavities is for those that hold air and what is next to it: decoders make small ones smaller, and some air as dark as fat.
Last, single voxels that stand out of all around them stand out as far as those of scans do (`dots.py`), in rims and in what is
inside: lungs have vessels.

Curves are monotone maps of one distribution to another (histogram matching; Gonzalez and Woods 2018, section 3.3). `sigma` is the
one with which neighbours in outlines differ as much as in scans, the gains those with which detail has as much power, and levels
are moved by the line of least squares. All are fitted to reconstructions of training groups and their originals.
(`training/calibration.py`).

Shapes:  D H W voxels in -1..1   K knots
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ctvae.blur import blurred, blurred_within
from ctvae.checkpoint import load, save
from ctvae.dots import KINDS, dotless
from ctvae.errors import ModelError
from ctvae.grain import Grain
from ctvae.models.tone import KNOTS, curve

FILE = "calibration.safetensors"
EMPTY = -0.95  # the highest value of air
AROUND = 2  # voxels about one of empty air that are air too
BODY = -0.5  # what is no air
AIR = -0.7  # what is air in a cavity, and no dark spot of fat
REACH = 4  # voxels from empty air to the other side of a rim: AROUND outside, as many inside
BORDER = 3  # voxels from open lung to the tissue about it
LUNG_SIGMA = 0.8  # voxels: a lattice of two to four is gone, and what is left of lungs is as wide in HU as in scans
FINE_SIGMA = 0.6  # voxels: fine detail is what this takes away
BAND = ((0.8, 3), (1.8, 5))  # voxels: two Gaussians, and how far they reach
BANDS = {"plane_gain": (1, 2), "depth_gain": (0,)}  # axes of D H W that they are along
CURVES, AFTER = ("rim", "lung", "cavity"), ("rim", "lung", "hollow")
DOTTED = ("rim", "inside")
GRAIN = ("soft", "lung", "strengths")
MIDDLE = 0.375  # of the soft tissue window, about its middle: muscle and organs
MOST_LEVELS = 2**20  # voxels that a level is taken from
NEWER_CURVES = {"after": len(AFTER), "dots": KINDS * len(DOTTED)}  # nor these, how many of each
NEWER = ("lung_sigma", "slice_gain", "level", "level_gain", *BANDS)  # numbers that files of before do not have
NUMBERS = ("sigma", "gain", *NEWER)
BLUR = 2  # voxels that a Gaussian reaches
FAR = max(reach for _, reach in BAND)
# Voxels that one can depend on, along each axis: those of lungs' smoothing, of detail, and one for dots of each place in turn.
HALO = AROUND + REACH + BORDER + BLUR + FAR + len(DOTTED)
Window = tuple[float, float]


@dataclass(frozen=True)
class Calibration:
    rim: Tensor  # [K] values of what is decoded at knots from -1 to 1
    lung: Tensor  # [K]
    cavity: Tensor  # [K]
    sigma: float  # voxels
    gain: float
    soft: Window  # the soft tissue window in -1..1
    lung_sigma: float = 0.0  # voxels; calibrations of before smooth no lungs
    slice_gain: float = 0.0  # nor have they this
    level: float = 0.0  # the mean one, -1..1
    level_gain: float = 0.0
    plane_gain: float = 0.0
    depth_gain: float = 0.0
    grain: Grain | None = None
    after: Tensor | None = None  # [3 K] of rim, lung and hollow, at the end
    dots: Tensor | None = None  # [8 K] how far they stand out: the four kinds in rims, then in what is inside

    def __call__(self, raw: Tensor, toned: Tensor, level: float | None = None, noise: Tensor | None = None) -> Tensor:
        """What a decoder made, before and after its own curve, as it is to be: [B 1 D H W] each.

        `level`: of the whole volume (`level_of`, of what is toned); none, as of a patch: soft tissue stays where it is. `noise`:
        white noise times its strength, which grain is made of; none: without grain.
        """
        return self.applied(raw, toned, Places.of(toned, self.soft), level, noise)

    def applied(
        self, raw: Tensor, toned: Tensor, where: Places, level: float | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """The same where the places are known."""
        return self.finished(self.levelled(raw, toned, where, level), where, noise)

    def finished(self, x: Tensor, where: Places, noise: Tensor | None = None) -> Tensor:
        """What is `levelled`, with all that follows."""
        return self.dotless(self.settled(self.with_grain(self.sharpened(x, where), where, noise), where), where)

    def levelled(self, raw: Tensor, toned: Tensor, where: Places, level: float | None = None) -> Tensor:
        """As far as curves and levels go."""
        out = torch.where(where.rim, curve(smoothed(raw, self.sigma, self.soft), self.rim), toned)
        out = torch.where(where.lung, curve(smoothed_within(raw, where.lung, self.lung_sigma), self.lung), out)
        out = torch.where(where.cavity, curve(raw, self.cavity), out)
        if level is not None and self.level_gain:
            out = out + self.level_gain * (level - self.level) * softness(out, self.soft)
        return out

    def sharpened(self, x: Tensor, where: Places) -> Tensor:
        """What is `levelled`, with more of its detail."""
        finer = self.gain * detail(x, self.soft) + self.slice_gain * between_slices(x, self.soft)
        for name, axes in BANDS.items():
            if gain := getattr(self, name):
                finer = finer + gain * band(x, self.soft, axes)
        return torch.where(where.empty, x, x + finer)

    def with_grain(self, x: Tensor, where: Places, noise: Tensor | None) -> Tensor:
        """What is `sharpened`, with grain of white noise times its strength: [B 1 D H W] each."""
        if self.grain is None or noise is None:
            return x
        return x + self.grain(noise, softness(x, self.soft) * ~where.empty, where.lung)

    def settled(self, x: Tensor, where: Places) -> Tensor:
        """The same at the end, under the curves of their places."""
        if self.after is None:
            return x
        for values, place in zip(self.after, AFTER, strict=True):
            x = torch.where(getattr(where, place), curve(x, values), x)
        return x

    def dotless(self, x: Tensor, where: Places) -> Tensor:
        """What is `settled`, with as many dots as scans have."""
        if self.dots is None:
            return x
        for place, curves in zip(DOTTED, self.dots.split(KINDS), strict=True):
            x = dotless(x, getattr(where, place), self.soft, curves)
        return x

    @classmethod
    def nothing(cls, soft: Window) -> Calibration:
        """One that changes nothing."""
        same = torch.linspace(-1, 1, KNOTS)
        return cls(same, same, same, 0.0, 0.0, soft)

    def sees_to(self, toned: Tensor, where: Places) -> Tensor:
        """Where it has a curve of its own, smooths, or sharpens bone; and empty air, so all but soft tissue: bool [B 1 D H W]."""
        return where.empty | where.rim | where.lung | where.cavity | where.hollow | (toned > self.soft[1])

    def save(self, path: Path) -> None:
        numbers = {name: getattr(self, name) for name in NUMBERS}
        curves = {name: getattr(self, name) for name in CURVES}
        grain = {f"grain.{name}": getattr(self.grain, name) for name in GRAIN} if self.grain else {}
        newer = {name: getattr(self, name) for name in NEWER_CURVES if getattr(self, name) is not None}
        save(path, {**curves, **grain, **newer}, {**numbers, "soft": list(self.soft)})

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Raises ModelError where the file is damaged."""
        tensors, meta = load(path)
        try:
            low, high = (float(value) for value in meta["soft"])
            curves = {name: tensors[name].float() for name in CURVES}
            grain = None
            if any(name.startswith("grain.") for name in tensors):
                grain = Grain(*(tensors[f"grain.{name}"].float() for name in GRAIN))
            numbers = {name: float({**dict.fromkeys(NEWER, 0.0), **meta}[name]) for name in NUMBERS}
            newer = {name: tensors[name].float() for name in NEWER_CURVES if name in tensors}
            rows = {name: (NEWER_CURVES[name], KNOTS) for name in newer} | dict.fromkeys(curves, (KNOTS,))
            wrong = any(x.shape != rows[name] or not x.isfinite().all() for name, x in {**curves, **newer}.items())
            wrong = wrong or not low < high or not (grain is None or grain.sound)
            least = {"level": -1.0, **dict.fromkeys(BANDS, -1.0)}
            if wrong or not all(math.isfinite(value) and least.get(name, 0) <= value <= 10 for name, value in numbers.items()):
                raise ValueError("its numbers make no sense")
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{path}: damaged ({error}); run `ctvae train` with --stage calibration again") from error
        return cls(**curves, **numbers, soft=(low, high), grain=grain, **newer)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Places:
    """Of each voxel whether it is in that place: bool [1 1 D H W] each."""

    empty: Tensor
    rim: Tensor
    lung: Tensor
    cavity: Tensor
    hollow: Tensor  # cavities that hold air and what is next to it, unless it is in another place

    @property
    def inside(self) -> Tensor:
        """None of the first three."""
        return ~(self.empty | self.rim | self.lung)

    @classmethod
    def of(cls, x: Tensor, soft: Window) -> Places:
        """Of a volume [1 1 D H W]."""
        empty = highest(x, AROUND) < EMPTY
        rim = highest(empty, REACH) & ~empty
        inside = ~(empty | rim)
        open_ = inside & (highest(x, AROUND) < soft[0])
        dark = inside & (x < soft[0])
        lung = dark & highest(open_, BORDER)
        cavity = dark & ~lung
        return cls(empty, rim, lung, cavity, highest(cavity & (x < AIR), 1) & inside & ~lung)


def level_of(x: Tensor, soft: Window) -> float | None:
    """The median of a volume's values in the middle of the soft tissue window; none where it has none."""
    level = float(levels(thinned(x)[None], soft))
    return None if math.isnan(level) else level


def levels(x: Tensor, soft: Window) -> Tensor:
    """The same of each of several volumes [B ...]: [B], not a number where one has none."""
    middle, reach = (soft[0] + soft[1]) / 2, MIDDLE * (soft[1] - soft[0]) / 2
    return torch.where((x - middle).abs() < reach, x, math.nan).flatten(1).nanmedian(1).values


def thinned(x: Tensor) -> Tensor:
    """MOST_LEVELS of a volume's values at most, evenly spaced in memory: [n]"""
    return x.flatten()[:: math.ceil(x.numel() / MOST_LEVELS)]


def softness(x: Tensor, soft: Window) -> Tensor:
    """1 in the soft tissue window, and from half its width beyond it on 0: like x."""
    beyond = (soft[0] - x).clamp_min(0) + (x - soft[1]).clamp_min(0)
    return (1 - 2 * beyond / (soft[1] - soft[0])).clamp_min(0)


def body(x: Tensor) -> Tensor:
    """Where x [1 1 D H W] is no air, holes that two voxels fill included: bool [1 1 D H W]."""
    return ~highest(~highest(x > BODY, 1), 1)


@torch.no_grad()
def highest(x: Tensor, reach: int) -> Tensor:
    """The highest value within `reach` voxels along D, H and W, of bool whether any is true: like x [1 1 D H W]."""
    larger = torch.logical_or if x.dtype == torch.bool else torch.maximum
    for axis in (2, 3, 4):
        size, most = x.shape[axis], x.clone()
        for shift in range(1, min(reach, size - 1) + 1):
            rest = size - shift
            for to, of in ((0, shift), (shift, 0)):
                into = most.narrow(axis, to, rest)
                larger(into, x.narrow(axis, of, rest), out=into)
        x = most
    return x


def smoothed(x: Tensor, sigma: float, soft: Window) -> Tensor:
    """x [1 1 D H W] under a Gaussian of `sigma` voxels. Values brighter than soft tissue count as its upper end: bone under the
    skin stays where it is."""
    dark = x.clamp(max=soft[1])
    return x + blurred(dark, sigma, BLUR) - dark


def smoothed_within(x: Tensor, where: Tensor, sigma: float) -> Tensor:
    """x [1 1 D H W] under a Gaussian of `sigma` voxels that sees nothing but what lies in a place; means nothing outside."""
    return blurred_within(x, where, sigma, BLUR)


def detail(x: Tensor, soft: Window) -> Tensor:
    """What a Gaussian takes away of x [B 1 D H W] in the soft tissue window."""
    window = x.clamp(*soft)
    return window - blurred(window, FINE_SIGMA, BLUR)


def between_slices(x: Tensor, soft: Window) -> Tensor:
    """What a Gaussian along D takes away of what is brighter than soft tissue in x [B 1 D H W]."""
    bright = x.clamp(soft[1], 1.0)
    return bright - blurred(bright, FINE_SIGMA, BLUR, axes=(0,))


def band(x: Tensor, soft: Window, axes: Sequence[int]) -> Tensor:
    """What lies between two Gaussians along `axes` of x [B 1 D H W], in the soft tissue window."""
    window = x.clamp(*soft)
    near, far = (blurred(window, sigma, reach, axes) for sigma, reach in BAND)
    return near - far
