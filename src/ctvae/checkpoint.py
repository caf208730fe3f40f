"""Weights and training state at rest: safetensors with JSON in its metadata, never pickles.

A file is written beside its place and renamed, so a kill at any moment leaves the previous one whole.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ctvae.errors import ModelError
from ctvae.files import atomic
from ctvae.ranks import is_first
from ctvae.sharding import gathered, load_into, own_part

KEPT = 2
MOST_VOXELS = 2**31


class EMA:
    """Exponential moving average of a module's parameters, warmed up so that early steps do not linger."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.weights = {name: p.detach().clone() for name, p in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                self.weights[name].lerp_(value, 1 - decay)
            else:
                self.weights[name].copy_(value)

    def take(self, weights: Mapping[str, Tensor]) -> None:
        """`weights` in place of the averaged ones."""
        for name, value in self.weights.items():
            value.copy_(weights[name])

    @contextmanager
    def applied_to(self, module: nn.Module) -> Iterator[None]:
        """The module has the averaged weights, and is in evaluation mode, inside the block."""
        own = {name: value.clone() for name, value in module.state_dict().items()}
        module.load_state_dict(self.weights)
        module.eval()
        try:
            yield
        finally:
            module.load_state_dict(own)
            module.train()


def save(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write tensors and a JSON-able description; of several processes the first does. Raises InputError where it cannot.

    Sharded tensors are written whole, and then all processes take part.
    """
    plain = {name: value.contiguous() for name, value in gathered(tensors).items()}
    if not is_first():
        return
    write(path, plain, {"ctvae": json.dumps(meta)})


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Tensors of this process as safetensors, whole or not at all. Raises InputError where it cannot."""
    with atomic(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # as any other file here: safetensors would let nobody else read it
        try:
            save_file(tensors, temporary, metadata)
            temporary.chmod(mode)
        except SafetensorError as error:  # safetensors wraps the disk's own error
            raise OSError(str(error)) from error


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and description that `save` wrote. Raises ModelError where the file is missing or damaged.

    safetensors refuses a header that claims more than the file holds, so no more memory is taken than the file is long.
    """
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})["ctvae"])
            _check_meta(meta)
            return {name: file.get_tensor(name) for name in file.keys()}, meta  # noqa: SIM118 (safe_open is no dict)
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError, MemoryError) as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"{path}: not a ctvae weights file or damaged ({said}); train again or copy it again") from error


def _check_meta(meta: Any) -> None:
    """Raises ValueError where shapes that decide what is allocated are not such."""
    if not isinstance(meta, dict):
        raise ValueError("its description is no mapping")
    for key in ("shape", "latent_shape"):
        sizes = meta.get(key, [1])
        if not isinstance(sizes, list) or not sizes or not all(type(n) is int and n >= 1 for n in sizes):
            raise ValueError(f"{key} {str(sizes)[:50]} is not a shape")
        if math.prod(sizes) > MOST_VOXELS:
            raise ValueError(f"{key} {str(sizes)[:50]} is beyond {MOST_VOXELS} voxels")


def built(make: Callable[[], nn.Module], tensors: dict[str, Tensor], source: Path) -> nn.Module:
    """The network that `make` builds, with `tensors` as its weights in float32.

    It is built without memory first and compared with the tensors, so that a config which claims enormous widths is refused
    before anything is allocated. Raises ModelError, naming `source`.
    """
    try:
        with torch.device("meta"):
            claimed = {name: tuple(value.shape) for name, value in make().state_dict().items()}
    except (RuntimeError, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise ModelError(f"{source}: config.yaml describes no network ({' '.join(str(error).split())[:200]})") from error
    held = {name: tuple(value.shape) for name, value in tensors.items()}
    wrong = sorted(name for name in {*claimed, *held} if claimed.get(name) != held.get(name))
    if wrong:
        name = wrong[0]
        raise ModelError(
            f"{source}: weights do not fit config.yaml ({name}: {_sizes(held.get(name))} there, {_sizes(claimed.get(name))} "
            f"by the config; {len(wrong)} differ)"
        )
    network = make()
    network.load_state_dict({name: v.float() if v.is_floating_point() else v for name, v in tensors.items()})
    return network


def _sizes(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else "x".join(map(str, shape)) or "one number"


def file_hash(path: Path) -> str:
    """The first 16 hex digits of the file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str = "optimizer") -> dict[str, Tensor]:
    """The optimiser's state as flat tensors, named by parameter number and quantity."""
    return {
        f"{prefix}.{number}.{name}": value
        for number, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], prefix: str = "optimizer") -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(f"{prefix}."):
            _, number, name = key.split(".")
            owner = parameters[int(number)] if value.ndim else None  # a count of steps is each process's own
            state.setdefault(int(number), {})[name] = own_part(value, owner)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class Best:
    """The weights with the best score so far, in a file, so that a resumed run knows them.

    Later weights are taken as long as their score is within `slack` of the best one's: what differs by less is noise.
    """

    def __init__(self, path: Path, slack: float = 0.0):
        self.path, self.slack = path, slack

    def offer(self, score: float, weights: dict[str, Tensor], meta: dict[str, Any]) -> bool:
        """Whether these weights, described by `meta`, are now the kept ones. A score that is not finite never is."""
        highest = self.meta().get("highest", -math.inf)
        if not math.isfinite(score) or score < highest - self.slack:
            return False
        save(self.path, weights, {**meta, "score": score, "highest": max(score, highest)})
        return True

    def meta(self) -> dict[str, Any]:
        """Of the kept weights; nothing where there are none."""
        return load(self.path)[1] if self.path.exists() else {}

    def load_into(self, module: nn.Module, otherwise: dict[str, Tensor]) -> dict[str, Any]:
        """Gives `module` the kept weights, or `otherwise`, and returns their meta."""
        tensors, meta = load(self.path) if self.path.exists() else (otherwise, {})
        load_into(module, tensors)
        return meta

    def clear(self) -> None:
        if is_first():
            self.path.unlink(missing_ok=True)


class Checkpoints:
    """The training state of one network: model, EMA and optimiser (with an adversary, both optimisers); the last two are kept."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name

    def paths(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.name}-[0-9]*.safetensors"))

    def save(
        self, step: int, module: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer, meta: dict[str, Any],
        adversary: torch.optim.Optimizer | None = None,
    ) -> None:  # fmt: skip
        """Of a sharded network all processes call it; the first one writes the whole."""
        tensors = {f"model.{k}": v for k, v in module.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in ema.weights.items()}
        tensors |= optimizer_tensors(optimizer)
        if adversary is not None:
            tensors |= optimizer_tensors(adversary, "adversary")
        save(self.folder / f"{self.name}-{step:08d}.safetensors", tensors, {"step": step, **meta})
        for old in self.paths()[:-KEPT] if is_first() else []:
            old.unlink(missing_ok=True)

    def resume(
        self, module: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer, adversary: torch.optim.Optimizer | None = None
    ) -> dict[str, Any]:
        """Restore the newest readable state in place; {"step": 0} where there is none.

        Raises ModelError for one of another network.
        """
        parts = {"model": module.state_dict(), "ema": ema.weights}
        wanted = {f"{part}.{name}": tuple(value.shape) for part, values in parts.items() for name, value in values.items()}
        for path in reversed(self.paths()):
            try:
                tensors, meta = load(path)
            except ModelError:
                continue  # damaged by something other than us: the one before it is whole
            held = {name: tuple(value.shape) for name, value in tensors.items() if name.startswith(("model.", "ema."))}
            if held != wanted or type(meta.get("step")) is not int:
                raise ModelError(f"{path}: is of another network than config.yaml describes; choose another --out")
            load_into(module, {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
            for name, value in ema.weights.items():
                value.copy_(own_part(tensors[f"ema.{name}"], value))
            restore_optimizer(optimizer, tensors)
            if adversary is not None:
                restore_optimizer(adversary, tensors, "adversary")
            return meta
        return {"step": 0}

    def last_before(self, step: int) -> Path | None:
        """The newest one of an earlier step."""
        found = [path for path in self.paths() if int(path.stem.rpartition("-")[2]) < step]
        return found[-1] if found else None

    def clear(self) -> None:
        if is_first():
            for path in self.paths():
                path.unlink(missing_ok=True)
