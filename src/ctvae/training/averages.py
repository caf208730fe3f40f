"""How long the flow's weights are averaged, chosen after training (Karras et al. 2024, "Analyzing and improving the training
dynamics of diffusion models", section 3).

A moving average's best length is known only when training is over. So its weights are kept at a few moments, and in the end they
are averaged again under power profiles of several lengths,

    w = sum_i w(t_i) (t_i^(g+1) - t_(i-1)^(g+1)) / T^(g+1),   the integral of the profile t^g over what moment i stands for,

of which the one with the least held-out loss is taken, or none. Unlike there, one short average is kept rather than two
power ones: what is between two moments is lost, and lengths below their distance cannot be told apart.

    run/averages/00001600.safetensors    the averaged weights of step 1600
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import safe_open
from torch import Tensor

from ctvae.checkpoint import save
from ctvae.ranks import is_first

MOST = 12  # moments that are kept
LENGTHS = (0.05, 0.1, 0.15, 0.2, 0.25)  # relative to the whole training: standard deviation of the profile


def exponent(length: float) -> float:
    """Of the power profile whose standard deviation is `length` of the training (equation 126 there)."""
    square = length**-2
    return float(np.roots([1, 7, 16 - square, 12 - square]).real.max())


def shares(steps: Sequence[int], length: float) -> np.ndarray:
    """What each of the moments `steps`, ascending, counts in the average at the last of them; they add up to 1."""
    edges = (np.array([0, *steps]) / steps[-1]) ** (exponent(length) + 1)
    return np.diff(edges)


class Moments:
    """Weights at steps that lie `every` apart, or where these are more than MOST, twice as far, and so on."""

    def __init__(self, folder: Path, every: int):
        self.folder, self.every = folder, every

    def keep(self, step: int, weights: dict[str, Tensor]) -> None:
        """The weights of `step`, if it is one of those moments. A step that is taken again gives the same."""
        stride = self._stride(step)
        if step % stride:
            return
        save(self._path(step), weights, {"step": step})
        for old in self._steps() if is_first() else []:
            if old % stride:
                self._path(old).unlink(missing_ok=True)

    def kept(self, last: int) -> list[int]:
        """Steps up to `last`, ascending; later ones are of a run that was killed further on."""
        stride = self._stride(last)
        return [step for step in self._steps() if step <= last and step % stride == 0]

    def average(self, last: int, weights: dict[str, Tensor], length: float) -> dict[str, Tensor]:
        """Of what was kept and the `weights` of step `last`. One tensor at a time is read."""
        steps = [step for step in self.kept(last) if step < last]
        *counts, own = (float(share) for share in shares([*steps, last], length))
        averaged = {name: own * value if value.is_floating_point() else value for name, value in weights.items()}
        for step, count in zip(steps, counts, strict=True):
            with safe_open(self._path(step), framework="pt") as held:
                for name, value in averaged.items():
                    if value.is_floating_point():
                        value.add_(held.get_tensor(name).to(value), alpha=count)
        return averaged

    def clear(self) -> None:
        if is_first():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _stride(self, step: int) -> int:
        stride = self.every
        while step > MOST * stride:
            stride *= 2
        return stride

    def _steps(self) -> list[int]:
        return sorted(int(path.stem) for path in self.folder.glob("[0-9]*.safetensors"))

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08d}.safetensors"
