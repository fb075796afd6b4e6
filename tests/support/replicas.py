"""A model on several ranks: its shards or replicas, its loss in both nestings, and what is compared between ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from bisam import SharpnessAware, cross_entropy
from tests.support import cases


def network() -> nn.Sequential:
    """With layers that two ranks share unevenly: 7 rows, 5 rows, and 1."""
    torch.manual_seed(1)
    head = nn.Sequential(nn.Linear(7, 1), nn.Tanh(), nn.Linear(1, cases.CLASSES))
    return nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7), nn.Tanh(), head).double()


def sharded(model: nn.Sequential) -> nn.Sequential:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model[3], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole_weights(model: nn.Module) -> list[Tensor]:
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def identical(tensors: list[Tensor]) -> bool:
    """Whether all ranks have the same bits."""
    mine = torch.cat([t.detach().flatten() for t in tensors])
    all_of_them = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(all_of_them, mine)
    return all(torch.equal(mine, other) for other in all_of_them)


def nested(order: str, model: nn.Module, method: Any, **arguments: Any) -> nn.Module:
    if order == "inside":
        return SharpnessAware(DDP(model), method, cross_entropy, **arguments)
    return DDP(SharpnessAware(model, method, cross_entropy, **arguments))
