"""FSDP: models whose parameters are sharded over the devices of a run (FSDP2), and their unsharded state.

    shard(model, fabric)                        # before the optimizer is made, in all processes
    state = whole(model.state_dict())           # in all processes: ordinary tensors on the CPU
    model.load_state_dict(divided(state, model.state_dict()))

If nothing is sharded, these functions change nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from bisam.distributed.layout import ShardedLayout, dtensor_type, local
from bisam.experiments.runs.strategies import FullySharded

Averaging = Callable[[Sequence[Tensor], Sequence[Tensor], Any], None]


def is_sharded(fabric: Fabric) -> bool:
    """Whether models are sharded over the devices."""
    return isinstance(fabric.strategy, FullySharded)


def shard(model: nn.Module, fabric: Fabric) -> None:
    """Shard a model over the devices, block by block, if that is the strategy.

    Raises:
        ValueError: the model has a parameter without dimensions.
    """
    if not is_sharded(fabric):
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model.to(memory_format=torch.contiguous_format)  # FSDP2 shards no others; inputs may still be channels_last
    mesh = init_device_mesh(fabric.device.type, (fabric.world_size,))
    for block in list(blocks(model)):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that FSDP gathers one at a time: the outermost blocks in an `nn.Sequential` or `nn.ModuleList`.

    The layers of a transformer are such blocks. A single layer is not one, nor is a block outside of these containers:
    its owner may use its weights without calling it, and FSDP gathers weights when a module is called.
    """
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    todo: list[tuple[nn.Module, bool]] = [(model, False)]
    while todo:
        module, member = todo.pop()
        container = isinstance(module, nn.Sequential | nn.ModuleList) and type(module).forward in _CALLS_MEMBERS
        own = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
        if member and not container and own and any(True for _ in module.children()):
            if all(uses[p] == count for p, count in own.items()):  # no weight is tied to one outside
                yield module
            continue
        todo += [(child, container) for child in module.children()]


_CALLS_MEMBERS = (nn.Sequential.forward, nn.ModuleList.forward)
"""Forward passes that call each member, or none: an owner of a ModuleList calls the members itself."""


def share_buffers(model: nn.Module, fabric: Fabric) -> None:
    """Copy the buffers (running statistics) of the first device to all, as DistributedDataParallel does."""
    if is_sharded(fabric):
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def whole(state: Any, keep: bool = True) -> Any:
    """Return `state` with its sharded tensors gathered on the CPU.

    All processes must call it; one without `keep` takes part in the collectives and gets None for each tensor.
    """
    if not any(isinstance(leaf, dtensor_type()) for leaf in tree_flatten(state)[0]):
        return state

    def gathered(tensor: Any) -> Any:
        full = tensor.full_tensor()
        return full.cpu() if keep else None

    return tree_map_only(cast(Any, dtensor_type()), gathered, state)


def divided(state: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Return this process's shards of the result of `whole`, for the tensors that are sharded in `like`."""
    return {name: _part(value, like.get(name)) for name, value in state.items()}


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load the result of `whole` for the state of an optimizer."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries = {
        i: {name: _part(value, parameters[i]) for name, value in entry.items()} for i, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": entries})


def gathered_memories(own: Any, fabric: Fabric) -> list[Any]:
    """Return the state of a method in each process, unsharded; all processes must call it.

    Args:
        own: the state in this process.
        fabric: the processes.

    Returns:
        One state for each process. They share the gathered tensors, so that a file has these once; the rest, such as a
        kept batch, differs between processes.
    """
    if fabric.world_size == 1:
        return [own]
    (leaves, structure), unsharded = tree_flatten(own), tree_flatten(whole(own))[0]
    sharded = [isinstance(leaf, dtensor_type()) for leaf in leaves]
    every: list[Any] = [None] * fabric.world_size
    mine = [None if is_shard else leaf for leaf, is_shard in zip(leaves, sharded, strict=True)]
    dist.all_gather_object(every, tree_unflatten(mine, structure))  # the keys of a rank's own values differ
    return [_with_shards(theirs, unsharded, sharded) for theirs in every]


def _with_shards(state: Any, unsharded: Sequence[Any], sharded: Sequence[bool]) -> Any:
    leaves, structure = tree_flatten(state)
    whole = [full if is_shard else leaf for full, leaf, is_shard in zip(unsharded, leaves, sharded, strict=True)]
    return tree_unflatten(whole, structure)


def averaging(decay: float) -> Averaging:
    """Return the update of an `AveragedModel`: an exponential moving average of this process's shards."""
    average = get_ema_multi_avg_fn(decay)

    def update(averaged: Sequence[Tensor], current: Sequence[Tensor], count: Any) -> None:
        average([local(t) for t in averaged], [local(t) for t in current], count)  # pyright: ignore[reportArgumentType]

    return update


def _part(value: Any, like: Any) -> Any:
    if not (isinstance(value, Tensor) and isinstance(like, dtensor_type())):
        return value
    if value.shape != like.shape:
        return value  # such as the step count of an optimizer
    shards = ShardedLayout([like])
    return shards.wrapped(0, shards.part(0, value.to(like.device)))
