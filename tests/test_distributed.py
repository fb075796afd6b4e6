"""Many ranks: DistributedDataParallel in both nestings, FSDP2, and a perturbation that is local or global.

`BISAM_STEPS=50 pytest tests/test_distributed.py` takes as many steps as the documentation speaks of.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import cases
import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from bisam import ESAM, KSAM, MSAM, SAM, SharpnessAware, cross_entropy
from bisam.evaluation import take
from bisam.masks import RandomMask
from bisam.methods import saving, wrappers
from bisam.perturbations import L2

STEPS, PART = int(os.environ.get("BISAM_STEPS", "12")), 4
DRAWING = [
    "RandomMask-friendly",
    "SSAMD",
    "ESAM",
    "EBiSAM",
    "BSAM",
    "RSAM",
]  # from a stream of random numbers of their own
METHODS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    name: cases.FAMILY[name][0]
    for name in [
        "ERM",
        "SAM",
        "BiSAM",
        "MultiStepSAM-adaptive",
        "FSAM",
        "VaSSO",
        "ZSharp",
        "SAMON",
        "LESAM",
        "FisherSAM",
        "LookSAM",
        "AESAM",
        "MomentumSAM",
        "SAMPa",
        "GSAM",
        "WSAM",
        "CRSAM",
        "XSAM",
        "FunctionalSAM",
        "RAPP",
        "Every-LookSAM",
        "During",
    ]
    + DRAWING
}
METHODS["MSAM"] = lambda o: MSAM(2, SAM(L2(0.1)))
OF_A_PART = {"ESAM", "EBiSAM", "MSAM"}  # they choose or split the examples of a rank
ALONE = {"SSAMF": cases.FAMILY["SSAMF"][0], "KSAM": lambda o: KSAM(3, SAM(L2(0.1)))}


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


def part(step: int, rank: int | None = None) -> tuple[Tensor, ...]:
    """A rank's examples of a batch that all ranks have together."""
    first = (dist.get_rank() if rank is None else rank) * PART
    return tuple(t[first : first + PART] for t in whole(step))


def whole(step: int) -> tuple[Tensor, ...]:
    return cases.batch(step, PART * dist.get_world_size())


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return cases.OPTIMIZERS["sgd"](model.parameters())


def trained(
    model: nn.Module,
    loss: Callable[[torch.optim.Optimizer], Callable[..., Tensor]],
    batch: Callable[[int], Any],
    seed: int = 5,
) -> tuple[list[Tensor], Tensor]:
    """Whole weights after some steps, and the losses on the way."""
    optimizer, losses = sgd(model), []
    sharp = loss(optimizer)
    torch.manual_seed(seed)
    for step in range(STEPS):
        optimizer.zero_grad()
        value = sharp(*batch(step))
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    return whole_weights(model), torch.stack(losses)


def whole_weights(model: nn.Module) -> list[Tensor]:
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]


def replicas(make: Callable[[torch.optim.Optimizer], Any], world: int) -> list[Tensor]:
    """Data-parallel training by hand: each replica its own loss on its part, with its own stream; gradients averaged."""
    models = [network() for _ in range(world)]
    optimizers = [sgd(model) for model in models]
    sharps = [
        SharpnessAware(model, make(optimizer), cross_entropy)
        for model, optimizer in zip(models, optimizers, strict=True)
    ]
    streams = [torch.Generator().manual_seed(5 + rank).get_state() for rank in range(world)]
    for step in range(STEPS):
        for rank, sharp in enumerate(sharps):
            torch.set_rng_state(streams[rank])
            optimizers[rank].zero_grad()
            sharp(*part(step, rank)).backward()
            streams[rank] = torch.get_rng_state()
        for same in zip(*[model.parameters() for model in models], strict=True):
            mean = sum(p.grad for p in same) / world
            for p in same:
                p.grad.copy_(mean)
        for optimizer in optimizers:
            optimizer.step()
    return whole_weights(models[0])


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


def far(ours: tuple[list[Tensor], Tensor], theirs: tuple[list[Tensor], Tensor]) -> dict[str, float]:
    """What is wrong with our weights and losses, if anything."""
    found = {"weights": distance(ours[0], theirs[0]), "losses": (ours[1] - theirs[1]).abs().max().item()}
    found = {name: value for name, value in found.items() if not value < 1e-12}
    return found if identical(ours[0]) else {**found, "replicas differ": 1.0}


def wrong(findings: dict[str, Any]) -> dict[str, Any]:
    return {name: found for name, found in findings.items() if found}


# FSDP2.


def fsdp2_against_one_process() -> dict[str, Any]:
    findings = {}
    for name, make in METHODS.items():
        if name not in OF_A_PART:
            one, many = network(), sharded(network())
            findings[name] = far(
                trained(many, lambda o, m=many, make=make: SharpnessAware(m, make(o), cross_entropy), part),
                trained(one, lambda o, m=one, make=make: SharpnessAware(m, make(o), cross_entropy), whole),
            )
    return wrong(findings)


def test_fsdp2_is_one_process_with_the_whole_batch():
    assert ranks.run(2, fsdp2_against_one_process) == [{}, {}]


def of_each_part(scores: Tensor, k: int, batch: Any) -> Any:
    """The largest scores of each rank's examples, as a rank finds them."""
    world = dist.get_world_size()
    index = scores.view(world, -1).topk(k // world).indices + torch.arange(world)[:, None] * (len(scores) // world)
    return take(batch, index.flatten().sort().values)


def in_turn(step: int) -> tuple[Tensor, ...]:
    """The whole batch, first the first micro-batch of each rank, then the second."""
    parts = [part(step, rank) for rank in range(dist.get_world_size())]
    return tuple(torch.cat([t[i : i + 2] for i in (0, 2) for t in same]) for same in zip(*parts, strict=True))


def choosing_under_fsdp2() -> dict[str, Any]:
    mask = RandomMask(L2(0.1), beta=0.6)
    rows = {
        "ESAM": (ESAM(mask), ESAM(mask), whole),
        "KSAM": (KSAM(2, SAM(L2(0.1))), KSAM(4, SAM(L2(0.1))), whole),
        "MSAM": (MSAM(2, SAM(L2(0.1))), MSAM(4, SAM(L2(0.1))), in_turn),
    }
    findings = {}
    for name, (ours, theirs, batch) in rows.items():
        one, many = network(), sharded(network())
        sharded_run = trained(many, lambda o, m=many, ours=ours: SharpnessAware(m, ours, cross_entropy), part)
        with pytest.MonkeyPatch.context() as patch:
            for module in (saving, wrappers):
                patch.setattr(module, "largest", of_each_part)
            plain = trained(one, lambda o, m=one, theirs=theirs: SharpnessAware(m, theirs, cross_entropy), batch)
        findings[name] = far(sharded_run, plain)
    return wrong(findings)


def test_under_fsdp2_each_rank_chooses_and_splits_its_own_examples():
    assert ranks.run(2, choosing_under_fsdp2) == [{}, {}]


# DistributedDataParallel.


def ddp_against_msam(order: str) -> dict[str, Any]:
    findings, rank = {}, dist.get_rank()
    for name, make in {**METHODS, **ALONE}.items():
        model = network()
        weights, _ = trained(model, lambda o, m=model, make=make: nested(order, m, make(o)), part, seed=5 + rank)
        findings[name] = {} if identical(weights) else {"replicas differ": 1.0}
        if name in DRAWING:
            expected = replicas(make, dist.get_world_size())
        else:
            one = network()
            expected, _ = trained(
                one,
                lambda o, m=one, make=make: SharpnessAware(m, MSAM(PART, make(o), separate=True), cross_entropy),
                whole,
            )
        if not (off := distance(weights, expected)) < 1e-12:
            findings[name]["weights"] = off
    return wrong(findings)


@pytest.mark.parametrize("order", ["inside", "outside"])
def test_ddp_is_msam_with_a_memory_for_each_part(order):
    assert ranks.run(2, ddp_against_msam, order) == [{}, {}]


def global_against_one_process() -> dict[str, Any]:
    findings, rank = {}, dist.get_rank()
    for i, (name, make) in enumerate(METHODS.items()):
        if name not in OF_A_PART:
            order = ("inside", "outside")[i % 2]
            one, many = network(), network()
            findings[name] = far(
                trained(
                    many,
                    lambda o, m=many, make=make, order=order: nested(order, m, make(o), perturbation="global"),
                    part,
                    seed=5 + rank,  # the first rank's stream is the one that counts
                ),
                trained(one, lambda o, m=one, make=make: SharpnessAware(m, make(o), cross_entropy), whole),
            )
    return wrong(findings)


def test_a_global_perturbation_under_ddp_is_that_of_the_whole_batch():
    assert ranks.run(2, global_against_one_process) == [{}, {}]
