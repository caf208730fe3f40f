"""The steps of one stage: which were taken, which were left out, and the mean losses of the former since the last report.

A step whose loss or gradient is not finite, on any of the processes, changes nothing: no update, no average. The step counts
all the same, so the next one draws other noise and other groups. After `max_skipped` of them in a row it is no accident.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctvae.checkpoint import Checkpoints
from ctvae.config import Training
from ctvae.errors import TrainingDiverged
from ctvae.ranks import Ranks


class Tally:
    """`meta`: what a checkpoint says, to count on from."""

    def __init__(self, settings: Training, ranks: Ranks, meta: dict[str, Any]):
        self.most, self.ranks = settings.max_skipped, ranks
        self.skipped = int(meta.get("skipped_steps", 0))
        self.in_a_row = 0
        self._sums: dict[str, Tensor] = {}
        self._taken = 0

    def take(self, losses: dict[str, Tensor], *gradient_norms: Tensor) -> bool:
        """Whether to take the step with these losses and gradient norms, on all processes alike. Waits for the device once."""
        total = torch.stack([*losses.values(), *gradient_norms]).sum()
        finite = not self.ranks.any(~total.isfinite())
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.skipped += not finite
        self._taken += finite
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + (value if finite else torch.zeros_like(value))
        return finite

    def means(self) -> dict[str, float]:
        """Mean losses, over all processes, of the steps taken since the last call; NaN where none was."""
        means = self.ranks.mean(torch.stack(list(self._sums.values())) / self._taken)
        named = dict(zip(self._sums, means.tolist(), strict=True))
        self._sums, self._taken = {}, 0
        return named

    def check(self, step: int, folder: Path, checkpoints: Checkpoints, advice: str) -> None:
        """Raises TrainingDiverged, naming the last checkpoint that a finite step has started from since, once none will be."""
        if self.in_a_row < self.most:
            return
        good = checkpoints.last_before(step - self.in_a_row)
        kept = f"the last good checkpoint is {good}" if good else "there is no good checkpoint yet"
        raise TrainingDiverged(
            f"{folder}: loss or gradient is not finite in {self.in_a_row} steps in a row, by step {step}; {kept}; train again "
            f"with another --out and --set {advice}"
        )
