"""FSDP: a model whose parameters are divided among the devices of a run (FSDP2), and its state in one piece.

    shard(model, fabric)                        # before its optimizer is made, on all devices together
    state = whole(model.state_dict())           # on all together: ordinary tensors on the CPU
    model.load_state_dict(divided(state, model.state_dict()))

Where nothing is sharded, all of it leaves things as they are.
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
from bisam.experiments.runs.machine import FullySharded

Averaging = Callable[[Sequence[Tensor], Sequence[Tensor], Any], None]


def is_sharded(fabric: Fabric) -> bool:
    """Whether models are divided among its devices."""
    return isinstance(fabric.strategy, FullySharded)


def shard(model: nn.Module, fabric: Fabric) -> None:
    """Divide a model among the devices, block by block, if that is the strategy.

    Raises:
        ValueError: it has a parameter without dimensions.
    """
    if not is_sharded(fabric):
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model.to(memory_format=torch.contiguous_format)  # others are not divided; inputs may have their channels last
    mesh = init_device_mesh(fabric.device.type, (fabric.world_size,))
    for block in list(blocks(model)):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """What is gathered at a time: the outermost blocks in lists and sequences, as the layers of a transformer.

    Single layers are not, nor blocks that are no members: who owns them may take their weights without calling them.
    """
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    todo: list[tuple[nn.Module, bool]] = [(model, False)]
    while todo:
        module, member = todo.pop()
        container = isinstance(module, nn.Sequential | nn.ModuleList) and type(module).forward in _IN_TURN
        own = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
        if member and not container and own and any(True for _ in module.children()):
            if all(uses[p] == count for p, count in own.items()):  # weights that are tied stay in one piece
                yield module
            continue
        todo += [(child, container) for child in module.children()]


_IN_TURN = (nn.Sequential.forward, nn.ModuleList.forward)
"""The forward passes that call each member, or leave that to the owner."""


def share_buffers(model: nn.Module, fabric: Fabric) -> None:
    """Give all devices the first one's running statistics, as DistributedDataParallel does."""
    if is_sharded(fabric):
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def whole(state: Any, keep: bool = True) -> Any:
    """`state` with tensors in one piece, on the CPU; where not `keep`, only to help the others to theirs."""
    if not any(isinstance(leaf, dtensor_type()) for leaf in tree_flatten(state)[0]):
        return state

    def gathered(tensor: Any) -> Any:
        full = tensor.full_tensor()
        return full.cpu() if keep else None

    return tree_map_only(cast(Any, dtensor_type()), gathered, state)


def divided(state: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """The parts here of what `whole` made, for tensors that are divided in `like`."""
    return {name: _part(value, like.get(name)) for name, value in state.items()}


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Continue from what `whole` made of an optimizer's state."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries = {
        i: {name: _part(value, parameters[i]) for name, value in entry.items()} for i, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": entries})


def memories(own: Any, fabric: Fabric) -> list[Any]:
    """What a method remembers on each device, in one piece; all devices must ask.

    What is divided is the same whole for all of them, so that a file has it once; the rest, such as a batch, is each
    device's own.
    """
    if fabric.world_size == 1:
        return [own]
    (leaves, structure), wholes = tree_flatten(own), tree_flatten(whole(own))[0]
    shared = [isinstance(leaf, dtensor_type()) for leaf in leaves]
    every: list[Any] = [None] * fabric.world_size
    mine = [None if of_all else leaf for leaf, of_all in zip(leaves, shared, strict=True)]
    dist.all_gather_object(every, mine)
    return [
        tree_unflatten(
            [w if of_all else leaf for w, leaf, of_all in zip(wholes, theirs, shared, strict=True)], structure
        )
        for theirs in every
    ]


def averaging(decay: float) -> Averaging:
    """How an AveragedModel follows its model: an exponential average of the parts that are here."""
    average = get_ema_multi_avg_fn(decay)

    def update(averaged: Sequence[Tensor], current: Sequence[Tensor], count: Any) -> None:
        average([local(t) for t in averaged], [local(t) for t in current], count)  # pyright: ignore[reportArgumentType]

    return update


def _part(value: Any, like: Any) -> Any:
    if not (isinstance(value, Tensor) and isinstance(like, dtensor_type())):
        return value
    if value.shape != like.shape:
        return value  # an optimizer's step count, say
    shards = ShardedLayout([like])
    return shards.wrapped(0, shards.part(0, value.to(like.device)))
