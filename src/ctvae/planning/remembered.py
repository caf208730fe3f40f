"""Dry runs that this process has made before: trainings one after the other, and searches, ask for the same ones again."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any, TypeVar

from ctvae.config import Config

MOST_REMEMBERED = 256  # costs are small: dictionaries of a few numbers
SECTIONS = ("autoencoder", "polish", "finish", "prior")
OF_NO_WEIGHT: dict[str, Any] = {"steps": 1, "minutes": None, "log_every": 1, "save_every": 1}  # how long, and when it is told of
T = TypeVar("T")


def remembered(dry: Callable[..., T], cfg: Config, *rest: Hashable) -> T:
    """`dry(cfg, *rest)`, which is not to be changed; `rest` can be hashed. How long a stage trains makes no difference to it."""
    sections = {name: getattr(cfg, name).model_copy(update=OF_NO_WEIGHT) for name in SECTIONS}
    return _run(dry, cfg.model_copy(update={"seed": 0, **sections}).model_dump_json(), *rest)  # type: ignore[no-any-return]


@lru_cache(MOST_REMEMBERED)
def _run(dry: Callable[..., Any], settings: str, *rest: Hashable) -> Any:
    return dry(Config.model_validate_json(settings), *rest)
