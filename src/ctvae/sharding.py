"""A network cut up over several processes: each holds its rows of every weight, and of all that goes with one.

    shard       cut it up (PyTorch's FSDP2). A part's weights are gathered where it computes, forward and backward, and let go
    whole       a tensor as one process would have it       called by all processes together, as a sharded network is
    own_part    this process's rows of a tensor that each has whole

Tensors that are not cut up go through all of these as they are.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from ctvae.ranks import is_first

if TYPE_CHECKING:  # takes a second, and one process alone needs none of it
    from torch.distributed.device_mesh import DeviceMesh

Network = TypeVar("Network", bound=nn.Module)


def shard(network: Network, mesh: DeviceMesh) -> Network:
    """Cut up in place, over the processes of `mesh`; each module in a list of modules is a part, gathered by itself."""
    from torch.distributed.fsdp import fully_shard

    listed = {id(part) for module in network.modules() if isinstance(module, nn.ModuleList) for part in module}
    for module in reversed(list(network.modules())):  # inner parts before those that contain them
        if id(module) in listed:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
    return network


def whole(tensor: Tensor) -> Tensor:
    """All rows of it, gathered from the processes."""
    held: Any = tensor
    return held.full_tensor() if _is_part(tensor) else tensor  # type: ignore[no-any-return]


def own_part(tensor: Tensor, like: Tensor | None) -> Tensor:
    """What this process holds of `tensor` where it is cut up as `like` is."""
    if not _is_part(like) or _is_part(tensor):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(like, DTensor)
    held = DTensor.from_local(tensor.to(like.device), like.device_mesh, [Replicate()], run_check=False)
    return held.redistribute(placements=like.placements)


def _is_part(tensor: Tensor | None) -> bool:
    """Whether a tensor is cut up: none is where nothing has loaded what cuts."""
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """All of them whole, in the first process's main memory. The others take part, a tensor at a time, and keep nothing."""
    kept = {}
    for name, tensor in tensors.items():
        complete = whole(tensor.detach())
        if is_first():
            kept[name] = complete.cpu()
    return kept


def load_into(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Whole tensors, which every process has, as the state of a module that may be cut up."""
    held = module.state_dict()
    module.load_state_dict({name: own_part(tensor, held.get(name)) for name, tensor in tensors.items()})
