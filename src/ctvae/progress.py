"""How far long work has come: a live bar on a terminal, a plain line every ten seconds anywhere else.

Both go to stderr, so that what a command prints on stdout can be piped. Of several processes the first one tells.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

from ctvae.ranks import is_first

Callback = Callable[[int, int, str], None]  # (done, total, what) after each piece of work
SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A bar for `total` steps; use it as a context manager.

        with Progress("autoencoder", total=6000) as bar:
            bar.update(step, loss=0.03, seconds_left=90)

    `total` may be None until `report` or `update` knows it. `clock` returns seconds and is there for tests.
    """

    def __init__(self, what: str, total: int | None = None, clock: Callable[[], float] = time.monotonic):
        self.what, self.total, self._clock = what, total, clock
        self._console = Console(stderr=True)
        self._told = is_first()
        self._live = self._console.is_terminal and self._told
        self._bar = RichProgress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[facts]}"), console=self._console
        )
        self._task = self._bar.add_task(what, total=1.0, facts="")
        self._start = self._last_line = clock()
        self._first: int | None = None  # the step this process began at, for the speed
        self._facts = ""

    def __enter__(self) -> Progress:
        self._start = self._last_line = self._clock()
        if self._live:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._bar.stop()
        elif self._facts:
            self._line()

    def update(
        self, step: int, *, loss: float | None = None, seconds_left: float | None = None, note: str = ""
    ) -> None:
        """`step` steps are done. `seconds_left` overrides the estimate, where the clock ends the work."""
        if self._first is None:
            self._first = step
        elapsed = self._clock() - self._start
        done = step - self._first
        speed = done / elapsed if done > 0 and elapsed > 0 else None  # steps per second
        if seconds_left is not None and not math.isfinite(seconds_left):
            seconds_left = None
        if seconds_left is None and speed and self.total:
            seconds_left = max(self.total - step, 0) / speed
        self._facts = facts(
            step, self.total, loss=loss, speed=speed, elapsed=elapsed, seconds_left=seconds_left, note=note
        )
        if self._live:
            self._bar.update(
                self._task, completed=share_done(step, self.total, elapsed, seconds_left), facts=self._facts
            )
        elif self._clock() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._line()

    def report(self, done: int, total: int, text: str = "") -> None:
        """The same as a callback, for functions that take `progress=`: `prepare(..., progress=bar.report)`."""
        self.total = total
        if self._first is None:
            self._first = 0
        self.update(done, note=text)

    def _line(self) -> None:
        if self._told:
            print(f"{self.what}: {self._facts}", file=sys.stderr, flush=True)
        self._last_line = self._clock()
        self._facts = ""


def facts(
    step: int,
    total: int | None,
    *,
    loss: float | None,
    speed: float | None,
    elapsed: float,
    seconds_left: float | None,
    note: str = "",
) -> str:
    """`120/6000  loss 0.0312  4.1/s  0:29 gone  23:54 left`; what is not known is left out."""
    parts = [f"{step}/{total}" if total else str(step)]
    if loss is not None:
        parts.append(f"loss {loss:.4g}")
    if speed is not None:
        parts.append(f"{speed:.3g}/s")
    parts.append(f"{clock_time(elapsed)} gone")
    if seconds_left is not None:
        parts.append(f"{clock_time(seconds_left)} left")
    if note:
        parts.append(note)
    return "  ".join(parts)


def share_done(step: int, total: int | None, elapsed: float, seconds_left: float | None) -> float:
    """0..1 by steps or by the clock, whichever is further."""
    by_steps = step / total if total else 0.0
    by_clock = elapsed / (elapsed + seconds_left) if seconds_left is not None and elapsed > 0 else 0.0
    return min(1.0, max(by_steps, by_clock))


def clock_time(seconds: float) -> str:
    """0:29, 23:54 or 1:02:03."""
    minutes, second = divmod(round(max(0.0, seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
