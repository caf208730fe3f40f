"""A feature space for those who have the weights: MedicalNet (Chen et al. 2019), through MONAI's 3D ResNets.

The weights are trained on other people's CT and MR and do not come with this package. Where a file of them is named, each
scan is brought to 5 mm, standardised within its body as MedicalNet does it, and the last feature map is averaged. They are
published as pickles, which are not read here: docs/evaluation.md says how they become safetensors.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ctvae.errors import InputError
from ctvae.evaluation.grid import Triple
from ctvae.evaluation.network import prepared

BLOCKS: dict[tuple[int, ...], str] = {  # how many in each layer
    (1, 1, 1, 1): "resnet10",
    (2, 2, 2, 2): "resnet18",
    (3, 4, 6, 3): "resnet34",
}
BOTTLENECKS: dict[tuple[int, ...], str] = {(3, 4, 6, 3): "resnet50"}


@dataclass(frozen=True, eq=False)
class MedicalNet:
    """The network, and the digest of its weights, for what is kept of each scan."""

    network: nn.Module
    digest: str

    def features(self, hu: NDArray[np.floating], spacing_mm: Triple) -> NDArray[np.float64]:
        """The features of one scan [D H W] in HU: [F]"""
        x, body = prepared(hu, spacing_mm)
        inside = x[body > 0] if (body > 0).any() else x.flatten()
        x = (x - inside.mean()) / (inside.std() + 1e-6)
        with torch.inference_mode():
            return self.network(x[None, None])[0].double().numpy()


def load(path: Path) -> MedicalNet:
    """The network whose weights are in `path`: safetensors, with the published names. Raises InputError for any other file."""
    from monai.networks import nets

    try:
        content = load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; name MedicalNet weights such as resnet_10_23dataset.safetensors") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not safetensors; docs/evaluation.md says how published weights become that") from error
    state = {key.removeprefix("module."): value for key, value in content.items()}
    state = {key: value for key, value in state.items() if not key.startswith(("fc.", "conv_seg."))}
    name, shortcut = _architecture(state)
    if name is None:
        raise InputError(f"{path}: not the weights of a MedicalNet ResNet of 10, 18, 34 or 50 layers")
    network = getattr(nets, name)(
        spatial_dims=3, n_input_channels=1, feed_forward=False, shortcut_type=shortcut, bias_downsample=False
    )
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{path}: not the weights of MedicalNet's {name} ({str(error).splitlines()[-1].strip()})") from error
    return MedicalNet(network.eval(), hashlib.sha256(path.read_bytes()).hexdigest()[:16])


def _architecture(state: dict[str, Tensor]) -> tuple[str | None, str]:
    """The name of MONAI's function and its kind of shortcut: B projects with weights, A has none."""
    depth = tuple(len({key.split(".")[1] for key in state if key.startswith(f"layer{i}.")}) for i in range(1, 5))
    known = BOTTLENECKS if "layer1.0.conv3.weight" in state else BLOCKS
    return known.get(depth), "B" if any(".downsample." in key for key in state) else "A"
