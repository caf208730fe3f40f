"""The last stage: what the decoder does to outlines, lungs and fine detail, measured on training groups.

`calibration.py` says what is done about it. What is fitted: curves by histogram matching, widths and gains by bisection or in
closed form, so that reconstructions have what scans have.

Shapes:  D H W voxels in -1..1   K knots
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ctvae import intensity, preprocess
from ctvae.calibration import (
    AFTER,
    AROUND,
    BANDS,
    BODY,
    DOTTED,
    LUNG_SIGMA,
    MIDDLE,
    NUMBERS,
    Calibration,
    Places,
    Window,
    band,
    between_slices,
    body,
    detail,
    highest,
    level_of,
    smoothed,
    smoothed_within,
)
from ctvae.calibration import FILE as CALIBRATION
from ctvae.dataset import Dataset
from ctvae.device import generator
from ctvae.dots import KINDS, dots
from ctvae.grain import Covariance, Grain, missing, strengths
from ctvae.model import Model
from ctvae.models.tone import KNOTS, RANGE, counts, matched
from ctvae.progress import Progress
from ctvae.runlog import Run
from ctvae.training.autoencoder import Reconstruction

MOST_GROUPS, FEWEST_GROUPS = 64, 4
MOST_VOXELS = 2**25  # of all groups: each takes 20 bytes while the calibration is fitted
MOST_SIGMA, MOST_LEVEL_GAIN = 1.0, 2.0
MOST_BAND_GAIN = 0.3  # and as much again for each 1 of gain, which strengthens wider bands than it is for
FIRST_GAIN, MOST_GAIN = 1.0, 4.0  # before there is grain, and with it: a decoder that no adversary has sharpened takes 2
MOST_SLICE_GAIN = 1.0  # or as much as soft tissue takes
ROUGHER = 1.1  # times as much as in scans neighbours in lungs differ where they are smoothed
TRIED_GAIN = 0.1  # of a band, from which what it needs is told
HALVINGS = 8  # of the range in which sigma and gain are looked for
FEWEST_LEVELS = 8  # examples of which a line can be drawn
Detail = Callable[[Tensor, Window], Tensor]
Shown = Sequence[tuple["Example", Tensor]]  # each under curves and levels


def calibrate(run: Run, data: Dataset) -> None:
    """Reconstruct some training groups and fit run/calibration.safetensors to them; all else stays as it is."""
    model = Model(run.folder)
    soft = Reconstruction(model.cfg.autoencoder, model.cfg.data.window_hu).soft
    soft = soft if soft[0] < soft[1] else (-1.0, 1.0)
    examples = list(_examples(model, data, soft))
    calibration = fit(examples, soft)
    calibration.save(run.folder / CALIBRATION)
    numbers = {name: round(getattr(calibration, name), 4) for name in NUMBERS}
    if calibration.grain is not None:
        low, high = model.cfg.data.window_hu
        for name in ("soft", "lung"):
            taps = getattr(calibration.grain, name)
            numbers[f"grain_{name}_hu"] = round(float(taps.square().sum().sqrt()) * (high - low) / 2, 2)  # standard deviation
    run.finish_stage("calibration", groups=len(examples), **numbers)


def _examples(model: Model, data: Dataset, soft: Window) -> Iterator[Example]:
    model.calibration = None
    groups = data.groups("train")
    order = torch.randperm(len(groups), generator=generator(model.cfg.seed, 0, stream=53)).tolist()[:MOST_GROUPS]
    voxels = 0
    with Progress("calibration", total=len(order)) as bar:
        for number, index in enumerate(order):
            volume = data.volume(groups[index])
            posterior = model.encode(volume)
            hu = preprocess.cut(volume, posterior.box).hu
            voxels += hu.size
            if number >= FEWEST_GROUPS and voxels > MOST_VOXELS:
                return
            raw = model.raw(posterior.mean)
            real = torch.from_numpy(intensity.from_hu(hu, model.cfg.data.window_hu))[None, None]
            yield Example(raw, model.toned(raw), real, soft)
            bar.update(number + 1)


class Example:
    """A training group and its reconstruction, before and after the decoder's own curve: [1 1 D H W] each."""

    def __init__(self, raw: Tensor, toned: Tensor, real: Tensor, soft: Window):
        self.raw, self.toned, self.real = raw, toned, real
        self.places, self.real_places = Places.of(toned, soft), Places.of(real, soft)
        self.level, self.real_level = level_of(toned, soft), level_of(real, soft)
        self.real_noise = noise_of(real, self.real_places, soft)

    def under(self, calibration: Calibration) -> Tensor:
        """As far as curves and levels go."""
        return calibration.levelled(self.raw, self.toned, self.places, self.level)


def fit(examples: Sequence[Example], soft: Window) -> Calibration:
    """The calibration with which reconstructions have what scans have: HU by place, smooth outlines, power of fine detail."""
    made = replace(_lungs(examples, soft), cavity=_curve((e.raw, e.real, e.places.cavity) for e in examples))

    def smoother(sigma: float) -> Calibration:
        rim = _curve((smoothed(e.raw, sigma, soft), e.real, e.places.rim) for e in examples)
        return replace(made, rim=rim, sigma=sigma)

    rims = _mean_step([(e.real, e.real_places.rim & body(e.real)) for e in examples], soft)
    made = smoother(_least(lambda sigma: _mean_step(_rims(examples, smoother(sigma)), soft) > rims, MOST_SIGMA))
    level, level_gain = _levels(examples)
    made = replace(made, level=level, level_gain=level_gain)
    return _detailed([(e, e.under(made)) for e in examples], made)


def _levels(examples: Sequence[Example]) -> tuple[float, float]:
    """The mean level, and how much further from it those of scans are: never nearer, by twice their distance at most."""
    pairs = [(e.level, e.real_level) for e in examples if e.level is not None and e.real_level is not None]
    if len(pairs) < FEWEST_LEVELS:
        return 0.0, 0.0
    made, real = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    off = made - made.mean()
    slope = float(off @ real / (off @ off).clamp_min(1e-12))
    return float(made.mean()), min(max(slope - 1, 0.0), MOST_LEVEL_GAIN)


def _detailed(shown: Shown, made: Calibration) -> Calibration:
    """With gains, and the grain that is missing then."""
    for most in (FIRST_GAIN, MOST_GAIN):  # grain is detail too: what it brings is not for the gain to bring
        made = _with(made, "gain", _strong_enough(shown, made, "gain", detail, most))
        made = _grained(shown, made)
    most = max(MOST_SLICE_GAIN, made.gain)
    made = _with(made, "slice_gain", _strong_enough(shown, made, "slice_gain", between_slices, most))
    made = _dotless(shown, _settled(shown, made))
    return _dotless(shown, _settled(shown, _balanced(shown, made)))


def _balanced(shown: Shown, made: Calibration) -> Calibration:
    """With gains of bands with which each has the power that it has in scans: what they do to its root is taken for linear."""

    def amplitudes(calibration: Calibration | None) -> Tensor:
        each = ((e.real if calibration is None else _finished(calibration, e, x)) for e, x in shown)
        return torch.tensor([_powers(x, made.soft) for x in each], dtype=torch.float64).mean(0).sqrt()

    found = amplitudes(made)
    tried = [(amplitudes(_with(made, name, TRIED_GAIN)) - found) / TRIED_GAIN for name in BANDS]
    gains = torch.linalg.lstsq(torch.stack(tried, 1), (amplitudes(None) - found)[:, None], driver="gelsd").solution[:, 0]
    if not bool((gains.abs() <= MOST_BAND_GAIN * (1 + made.gain)).all()):
        return made  # what takes more is no matter of bands
    for name, gain in zip(BANDS, gains.tolist(), strict=True):
        made = _with(made, name, gain)
    return made


def _powers(x: Tensor, soft: Window) -> list[float]:
    """Mean square of each band within the body."""
    return [_power([(x, body(x))], partial(band, axes=axes), soft) for axes in BANDS.values()]


def _settled(shown: Shown, made: Calibration) -> Calibration:
    """With the curves of places at the end, grain included."""
    made = replace(made, after=None, dots=None)
    sides = torch.zeros(len(AFTER), 2, RANGE, dtype=torch.float64)
    for e, x in shown:
        finished = _finished(made, e, x)
        for side, place in zip(sides, AFTER, strict=True):
            where = getattr(e.places, place)
            side += torch.stack((counts(finished[where]), counts(e.real[where])))
    return replace(made, after=torch.stack([_from(*side) for side in sides]))


def _dotless(shown: Shown, made: Calibration) -> Calibration:
    """With dots that stand out as far as those of scans."""
    made = replace(made, dots=None)
    sides = torch.zeros(len(DOTTED), KINDS, 2, RANGE, dtype=torch.float64)
    for e, x in shown:
        for volume, places, side in ((_finished(made, e, x), e.places, 0), (e.real, e.real_places, 1)):
            for row, (_, far, kind) in enumerate(dots(volume, made.soft)):
                for place, name in enumerate(DOTTED):
                    sides[place, row, side] += counts(far[getattr(places, name) & kind])
    return replace(made, dots=torch.stack([_from(*side) for side in sides.flatten(0, 1)]))


def _finished(made: Calibration, example: Example, x: Tensor) -> Tensor:
    """What is under curves and levels, as it comes out in the end."""
    return made.finished(x, example.places, _white(x))


def _with(calibration: Calibration, name: str, value: float) -> Calibration:
    return replace(calibration, **{name: value})  # type: ignore[arg-type]


def _strong_enough(shown: Shown, made: Calibration, name: str, of: Detail, most: float) -> float:
    """The gain of that name with which a kind of detail has the power that it has in scans, or the most."""
    fine = _power(((e.real, body(e.real)) for e, _ in shown), of, made.soft)
    grain = [made.with_grain(x, e.places, _white(x)) - x for e, x in shown]

    def weak(gain: float) -> bool:
        each = (_with(made, name, gain).sharpened(x, e.places) + g for g, (e, x) in zip(grain, shown, strict=True))
        return _power(((x, body(x)) for x in each), of, made.soft) < fine

    return _least(weak, most)


def _white(x: Tensor) -> Tensor:
    """Noise for grain as strong as scans have on average; always the same."""
    return torch.randn(x.shape, generator=generator(0, 0, stream=59))


def _grained(shown: Shown, made: Calibration) -> Calibration:
    """With the grain that is missing under its gains, in soft tissue and in lungs."""
    real = [e.real_noise for e, _ in shown]
    ours = [noise_of(made.sharpened(x, e.places), e.places, made.soft) for e, x in shown]
    soft, lung = (tuple([pair[place] for pair in side] for side in (real, ours)) for place in (0, 1))
    in_soft, in_lung = (missing(*(Covariance.total(side) for side in place)) for place in (soft, lung))
    return replace(made, grain=Grain(in_soft, in_lung, strengths(*soft)) if in_soft.any() or in_lung.any() else None)


def noise_of(x: Tensor, places: Places, soft: Window) -> tuple[Covariance, Covariance]:
    """In soft tissue and in lungs."""
    return Covariance.of(x, _even(x, soft)), Covariance.of(x, _even_lung(x, places))


def _even(x: Tensor, soft: Window) -> Tensor:
    """Muscle and organs with nothing else within AROUND voxels: bool [1 1 D H W]."""
    middle, reach = (soft[0] + soft[1]) / 2, MIDDLE * (soft[1] - soft[0]) / 2
    return (highest(x, AROUND) < middle + reach) & (-highest(-x, AROUND) > middle - reach)


def _even_lung(x: Tensor, places: Places) -> Tensor:
    """Lungs with nothing else next to them, nor large vessels: bool [1 1 D H W]."""
    return ~highest(~places.lung | (x > BODY), 1)


def _lungs(examples: Sequence[Example], soft: Window) -> Calibration:
    """What nothing is done with but lungs. They are smoothed where they are rougher than those of scans.

    Scans' lungs are then smoothed as well before their values are taken: the noise that this takes away is for grain to bring.
    """

    def made(sigma: float) -> Calibration:
        def even(x: Tensor, places: Places) -> Tensor:
            return smoothed_within(x, places.lung, sigma)

        values = _curve((even(e.raw, e.places), even(e.real, e.places), e.places.lung) for e in examples)
        return replace(Calibration.nothing(soft), lung=values, lung_sigma=sigma)

    plain, dark = made(0.0), (-1.0, soft[0])
    rough = _mean_step(((e.under(plain), e.places.lung) for e in examples), dark)
    return made(LUNG_SIGMA) if rough > ROUGHER * _mean_step(((e.real, e.real_places.lung) for e in examples), dark) else plain


def _curve(places: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """From decoded values to real ones, of volumes of both and where in them: the values at the knots, [K]."""
    sides = [torch.stack((counts(decoded[where]), counts(real[where]))) for decoded, real, where in places]
    return _from(*torch.stack(sides).sum(0))


def _from(decoded: Tensor, real: Tensor) -> Tensor:
    """The same from counts; of nothing, what changes nothing."""
    return matched(decoded, real).float() if decoded.any() else torch.linspace(-1, 1, KNOTS)


def _rims(examples: Sequence[Example], calibration: Calibration) -> Iterator[tuple[Tensor, Tensor]]:
    """Each reconstruction under curves and levels, and where the rims of its body are."""
    for example in examples:
        x = example.under(calibration)
        yield x, example.places.rim & body(x)


def _power(volumes: Iterable[tuple[Tensor, Tensor]], of: Detail, soft: Window) -> float:
    """Mean square of a kind of detail in the given places."""
    total, voxels = 0.0, 0
    for x, chosen in volumes:
        total += float(of(x, soft)[chosen].square().sum(dtype=torch.float64))
        voxels += int(chosen.sum())
    return total / max(1, voxels)


def _mean_step(volumes: Iterable[tuple[Tensor, Tensor]], soft: Window) -> float:
    """Mean |difference| of neighbours in a window along D, H and W, of pairs that are both in the given place."""
    total, pairs = 0.0, 0
    for x, chosen in volumes:
        window = x.clamp(*soft)
        for axis in (2, 3, 4):
            size = x.shape[axis] - 1
            both = chosen.narrow(axis, 0, size) & chosen.narrow(axis, 1, size)
            total += float(window.diff(dim=axis).abs()[both].sum(dtype=torch.float64))
            pairs += int(both.sum())
    return total / max(1, pairs)


def _least(more: Callable[[float], bool], most: float) -> float:
    """The least number from 0 to `most` of which there is enough, if `more` says whether a number is too little."""
    if not more(0.0):
        return 0.0
    low, high = 0.0, most
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if more(middle) else (low, middle)
    return high
