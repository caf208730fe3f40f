"""Several synthetic folders, nearest to real first.

A folder's score is how far it is from real scans, in half-widths of the floors: each measure's distance, 0 within the better
half of its floor and 10 at most (so that no single one decides), averaged within each family of measures and then over the
families. Only measures count that every folder has enough scans for. Intervals come from the random halves that the
measures' own intervals come from; the halves of the real side are the same for all folders, so two folders are compared
in pairs: where the interval of the difference holds 0, they are not told apart. A folder with copies comes last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctvae.evaluation.realism import INTERVAL, Judged, widths

FURTHEST = 10.0
Array = NDArray[np.floating]


@dataclass(frozen=True, eq=False)
class Entrant:
    name: str
    judged: Sequence[Judged]  # the same measures in the same order for all
    copies: int


def rank(entrants: Sequence[Entrant]) -> list[dict[str, Any]]:
    """Rank, score and interval of each, best first; `not_told_from` names the folders that may be as good."""
    shared = [i for i, _ in enumerate(entrants[0].judged) if all(len(e.judged[i].halves) for e in entrants)]
    if not shared:
        return [{"name": e.name, "rank": None, "score": None, "interval": None, "not_told_from": []} for e in entrants]
    scored = {e.name: _score(e, shared) for e in entrants}
    order = sorted(entrants, key=lambda e: (e.copies > 0, scored[e.name][0]))
    return [
        {
            "name": e.name,
            "rank": place + 1,
            "score": scored[e.name][0],
            "interval": [float(q) for q in np.quantile(scored[e.name][1], INTERVAL)],
            "copies": e.copies,
            "measures": len(shared),
            "not_told_from": [o.name for o in order if o is not e and _alike(scored[e.name][1], scored[o.name][1])],
        }
        for place, e in enumerate(order)
    ]


def _score(entrant: Entrant, shared: Sequence[int]) -> tuple[float, Array]:
    """The score, and the scores of the random halves [repeats]."""
    families: dict[str, list[tuple[float, Array]]] = {}
    repeats = min(len(entrant.judged[i].halves) for i in shared)
    for i in shared:
        entry, halves = entrant.judged[i].entry, entrant.judged[i].halves[:repeats]
        floor, direction = entry["floor"], entry["direction"]
        spread = widths(direction, halves, floor["low"], floor["median"], floor["high"])
        value = float(np.clip(entry["floor_widths"], 0, FURTHEST))
        families.setdefault(entry["family"], []).append((value, np.clip(spread, 0, FURTHEST)))
    score = float(np.mean([np.mean([value for value, _ in family]) for family in families.values()]))
    drawn = np.mean([np.mean([half for _, half in family], axis=0) for family in families.values()], axis=0)
    return score, score + drawn - drawn.mean()


def _alike(a: Array, b: Array) -> bool:
    low, high = np.quantile(a - b, INTERVAL)
    return bool(low <= 0 <= high)
