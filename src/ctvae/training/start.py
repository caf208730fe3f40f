"""Where a training starts from: another model's weights instead of random ones (`ctvae train --from MODEL`).

They are copied into the run folder, so that it resumes without the model:

    run/from/config.yaml, autoencoder.safetensors, calibration.safetensors, prior-flow.safetensors, prior-normal.safetensors

The autoencoder is taken over and, unless the prior alone is trained, goes on learning. The flow's network is taken over where its
sizes are the same; what is fitted in closed form (scales, the Wiener filter) is fitted to the new latents.

Shapes:  K conditions   E embedding
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctvae import files
from ctvae.calibration import FILE as CALIBRATION
from ctvae.checkpoint import built, file_hash, load, save
from ctvae.conditions import BEFORE_NAMES
from ctvae.config import Config, load_config
from ctvae.errors import ConfigError, ModelError
from ctvae.models import build
from ctvae.models.wavelet3d import Wavelet3DVAE
from ctvae.runlog import Run

AUTOENCODER, FLOW, NORMAL = "autoencoder.safetensors", "prior-flow.safetensors", "prior-normal.safetensors"
FILES = ("config.yaml", AUTOENCODER, CALIBRATION, FLOW, NORMAL)
LEARNED = ("correction.", "detail.")  # of the flow's network: the rest of it is fitted in closed form
TOLD = "condition.0.weight"  # of the flow's networks: the first layer that the conditions meet
WEIGHTS_DECIDE = {  # settings that the weights fix
    "model": None,  # all but how they are computed with
    "data": ("window_hu",),
    "prior": ("widths", "blocks", "fold", "mlp_width", "detail_width", "detail_blocks"),
}
NOT_OF_THE_WEIGHTS = {"checkpointing"}
DEEPER = "model.decoder_blocks"  # may be more than those of the weights: new ones begin as the identity
ADDED = {  # of parts that weights may lack and be given; after each, the setting that says if they have it
    "model.tone": "tone",
    "prior.detail_width": "detail_width",
    "prior.detail_blocks": "detail_width",
}


def settings_of(model: Path, pinned: Sequence[str]) -> tuple[str, list[str]]:
    """The method of the model in folder `model`, and what its weights decide, as `key=value`.

    `pinned` are settings that a person gave. Raises ConfigError where they say otherwise.
    """
    cfg = load_config(model / "config.yaml")
    tree = cfg.model_dump(mode="json")
    given = dict(text.split("=", 1) for text in pinned)
    overrides = []
    for section, names in WEIGHTS_DECIDE.items():
        for name in names or tree[section]:
            key, value = f"{section}.{name}", tree[section][name]
            if name in NOT_OF_THE_WEIGHTS or name == "kind":
                continue
            if key == DEEPER and key in given:
                _refuse_shallower(cfg.model, given[key])
                continue
            if key in ADDED and key in given and not tree[section][ADDED[key]]:
                continue
            if key in given and files.parsed_yaml(given[key]) != value:
                raise ConfigError(f"{key}={given[key]}: the weights to start from have {value}; leave it out, or --from")
            overrides.append(f"{key}={'null' if value is None else value}")
    return cfg.method, overrides


def _refuse_shallower(model: Any, given: str) -> None:
    """Raises ConfigError where the decoder asked for has fewer blocks somewhere than the weights of `model`."""
    asked, held = files.parsed_yaml(given), list(model.decoding_blocks)
    asked = list(model.blocks) if asked is None else asked
    as_many = isinstance(asked, list) and len(asked) == len(held) and all(isinstance(number, int) for number in asked)
    if not as_many or any(a < b for a, b in zip(asked, held, strict=True)):
        raise ConfigError(f"{DEEPER}={given}: the weights to start from have {held}; as many or more, or leave out --from")


def begin(run: Run, model: Path) -> None:
    """Copy the weights to start from into the run folder. Raises ConfigError where it has begun from others."""
    folder = run.folder / "from"
    begun = run.state.get("from")
    ours = file_hash(model / AUTOENCODER)
    if begun is not None and begun != ours:
        raise ConfigError(f"{run.folder}: was begun from another model; choose another --out")
    if begun is None and (run.state["stages"] or any((run.folder / "checkpoints").glob("*.safetensors"))):
        raise ConfigError(f"{run.folder}: has been trained already; --from begins a new run, choose another --out")
    for name in FILES:
        if (model / name).is_file() and not (folder / name).is_file():
            with files.atomic(folder / name) as temporary:
                shutil.copyfile(model / name, temporary)
    run.note(**{"from": ours})


def started(run: Run) -> bool:
    return "from" in run.state


def load_network(run: Run, network: nn.Module) -> None:
    """Gives a new autoencoder the weights to start from, if the run has any. Raises ModelError where they do not fit."""
    if started(run):
        tensors, _ = load(run.folder / "from" / AUTOENCODER)
        tensors = _deepened(tensors, network, run)
        network.load_state_dict(built(lambda: network, tensors, run.folder / "from").state_dict())


def take_autoencoder(run: Run, cfg: Config, stage: str) -> None:
    """The autoencoder to start from as the run's own, finished; to finish or calibrate its decoder, the priors as well.

    Where the prior alone is trained the decoder stays what it was, and so does its calibration.
    """
    priors = [name for name in (FLOW, NORMAL) if (run.folder / "from" / name).is_file()]
    if stage in ("finish", "calibration") and priors:
        for name in priors:
            save(run.folder / name, *load(run.folder / "from" / name))
        run.finish_stage("prior", taken_from=run.state["from"])
    tensors, meta = load(run.folder / "from" / AUTOENCODER)
    assert cfg.data.shape is not None
    shape = cfg.data.shape
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(cfg.seed)
        tensors = _deepened(tensors, build(cfg.model, shape), run)
    network = built(lambda: build(cfg.model, shape), tensors, run.folder / "from")
    meta = {**meta, "config": cfg.model_dump(mode="json"), "shape": shape}
    save(run.folder / AUTOENCODER, network.state_dict(), meta)
    run.finish_stage("autoencoder", taken_from=run.state["from"])
    if stage == "prior" and (run.folder / "from" / CALIBRATION).is_file():
        with files.atomic(run.folder / CALIBRATION) as temporary:
            shutil.copyfile(run.folder / "from" / CALIBRATION, temporary)
        run.finish_stage("calibration", taken_from=run.state["from"])


def _deepened(tensors: dict[str, Tensor], network: nn.Module, run: Run) -> dict[str, Tensor]:
    """With the blocks and the curve that the decoder of `network` has besides those it begins from; as they begin, they change
    nothing."""
    if not isinstance(network, Wavelet3DVAE):
        return tensors
    model: Any = load_config(run.folder / "from" / "config.yaml").model
    new: dict[str, Tensor] = {}
    for level, blocks in enumerate(model.decoding_blocks[::-1]):  # the decoder's levels are from coarse to fine
        for block in range(blocks, len(network.decoder.levels[level])):  # type: ignore[arg-type]
            name = f"decoder.levels.{level}.{block}."
            new |= {key: value for key, value in network.state_dict().items() if key.startswith(name)}
    if network.decoder.tone is not None and not model.tone:
        new["decoder.tone.offset"] = network.decoder.tone.offset.detach()
    return {**tensors, **new}


def load_flow(run: Run, network: nn.Module, names: Sequence[str]) -> bool:
    """Gives the flow's network, told the conditions `names`, the weights to start from; False where there are none that fit.

    A condition that the other model was not told begins without effect, and so does a local network that it lacked.
    """
    path = run.folder / "from" / FLOW
    if not started(run) or not path.is_file():
        return False
    tensors, meta = load(path)
    flow = {name.removeprefix("flow."): value.float() for name, value in tensors.items()}
    learned = {name: value for name, value in flow.items() if name.startswith(LEARNED)}
    parts = LEARNED if any(name.startswith("detail.") for name in learned) else ("correction.",)
    for name in [name for name in learned if name.endswith(TOLD)]:
        learned[name] = _told(learned[name], list(meta.get("conditions", BEFORE_NAMES)), list(names))
    own = {name: value for name, value in network.state_dict().items() if name.startswith(parts)}
    if {name: v.shape for name, v in learned.items()} != {name: v.shape for name, v in own.items()}:
        return False
    network.load_state_dict(learned, strict=False)
    return True


def _told(weight: Tensor, before: list[str], names: list[str]) -> Tensor:
    """The first layer's weights [E 2K] (K values, then whether each is given) for other conditions, by name."""
    if weight.shape[1] != 2 * len(before):
        raise ModelError("the flow to start from does not match the names of its conditions; train it again")
    columns = weight.unflatten(1, (2, len(before)))  # [E 2 K]
    none = torch.zeros_like(columns[..., :1])
    chosen = [columns[..., [before.index(name)]] if name in before else none for name in names]
    return torch.cat(chosen, dim=2).flatten(1)
