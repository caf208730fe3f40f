"""Small charts as inline SVG. Colours come from the page's style, so that they follow light, dark and print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 40
STRIP_WIDTH, STRIP_HEIGHT = 180, 26


@dataclass(frozen=True, eq=False)
class Series:
    """One curve and the band that most scans' curves lie in."""

    name: str
    kind: str  # class in the page's style: real or synthetic
    y: NDArray[np.floating]
    low: NDArray[np.floating]
    high: NDArray[np.floating]


def curves(x: NDArray[np.floating], series: Sequence[Series], x_label: str, y_label: str) -> str:
    """Curves over x with a logarithmic y axis."""
    bottom = min(float(np.min(s.y[s.y > 0])) for s in series if np.any(s.y > 0))
    top = max(float(np.max(s.high)) for s in series)
    low, high = math.floor(math.log10(max(bottom, top * 1e-6))), math.ceil(math.log10(top))

    def px(value: float) -> float:
        return LEFT + (value - x[0]) / (x[-1] - x[0]) * (WIDTH - LEFT - RIGHT)

    def py(value: float) -> float:
        log = math.log10(max(value, 10.0**low))
        return TOP + (high - log) / max(high - low, 1) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} over {escape(x_label)}">'
    ]
    for decade in range(low, high + 1):
        y = py(10.0**decade)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_power(decade)}</text>')
    for tick in _ticks(float(x[0]), float(x[-1])):
        parts.append(f'<text x="{px(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    for s in series:
        edge = [*zip(x, s.high, strict=True), *zip(x[::-1], s.low[::-1], strict=True)]
        parts.append(f'<polygon class="band {s.kind}" points="{" ".join(f"{px(a):.1f},{py(b):.1f}" for a, b in edge)}"/>')
    for s in series:
        line = " ".join(f"{px(a):.1f},{py(b):.1f}" for a, b in zip(x, s.y, strict=True))
        parts.append(f'<polyline class="line {s.kind}" points="{line}"/>')
    for index, s in enumerate(series):
        y = TOP + 12 + 16 * index
        parts.append(f'<line class="line {s.kind}" x1="{WIDTH - 112}" x2="{WIDTH - 90}" y1="{y - 4}" y2="{y - 4}"/>')
        parts.append(f'<text x="{WIDTH - 84}" y="{y}">{escape(s.name)}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text></svg>')
    return "".join(parts)


def strip(entry: dict[str, Any]) -> str:
    """The floor as a bar, the value as a dot with its interval, on the measure's own scale."""
    floor, value = entry["floor"], entry["value"]
    interval = entry["interval"] or [value, value]
    low, high = min(floor["low"], value, interval[0]), max(floor["high"], value, interval[1])
    span = max(high - low, 1e-12)

    def px(at: float) -> float:
        return 8 + (at - low) / span * (STRIP_WIDTH - 16)

    middle = STRIP_HEIGHT / 2
    width = max(px(floor["high"]) - px(floor["low"]), 2.0)
    kind = "within" if entry["within_floor"] else "outside"
    return (
        f'<svg class="strip" viewBox="0 0 {STRIP_WIDTH} {STRIP_HEIGHT}" aria-hidden="true">'
        f'<line class="grid" x1="2" x2="{STRIP_WIDTH - 2}" y1="{middle}" y2="{middle}"/>'
        f'<rect class="floor" x="{px(floor["low"]):.1f}" y="{middle - 7}" width="{width:.1f}" height="14" rx="2"/>'
        f'<line class="interval {kind}" x1="{px(interval[0]):.1f}" x2="{px(interval[1]):.1f}" y1="{middle}" '
        f'y2="{middle}"/>'
        f'<circle class="{kind}" cx="{px(value):.1f}" cy="{middle}" r="4.5"/></svg>'
    )


def _ticks(low: float, high: float) -> list[float]:
    raw = (high - low) / 5
    step = 10 ** math.floor(math.log10(raw))
    step *= next(m for m in (1, 2, 5, 10) if m * step >= raw)
    return [round(k * step, 10) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _power(decade: int) -> str:
    if -3 <= decade <= 3:
        return f"{10.0**decade:g}"
    return f'10<tspan dy="-5" font-size="8">{decade}</tspan>'
