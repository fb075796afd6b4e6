"""The decoupled term of WSAM is averaged over ranks as the gradient is: with plain SGD it is coupled WSAM there too."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim import SGD

from bisam import WSAM, Decoupled, Every, SharpnessAware, cross_entropy
from tests.support import cases, ranks
from tests.support.replicas import distance, identical, network, sharded, whole_weights

STEPS, PART = 4, 4


def part(step: int) -> tuple[Tensor, ...]:
    first = PART * dist.get_rank()
    return tuple(t[first : first + PART] for t in cases.batch(step, PART * dist.get_world_size()))


def whole(step: int) -> tuple[Tensor, ...]:
    return cases.batch(step, PART * dist.get_world_size())


def trained(way: str, decouple: bool, max_norm: float | None = None, batch: Any = part) -> list[Tensor]:
    """Weights after steps of two micro-batches each, the first of which is not reduced under DDP."""
    model = sharded(network()) if way == "FSDP2" else network()
    inside: nn.Module = DDP(model) if way == "DDP inside" else model
    scope: Any = "global" if way == "global" else None
    sharp = SharpnessAware(inside, WSAM(0.1, gamma=0.8, decouple=decouple), cross_entropy, scope=scope)
    outer: Any = DDP(sharp) if way in ("DDP outside", "global") else sharp
    optimizer: Any = SGD(model.parameters(), lr=0.2)
    optimizer = Decoupled(optimizer, sharp, max_norm) if decouple else optimizer
    ddp: Any = outer if isinstance(outer, DDP) else inside if isinstance(inside, DDP) else None
    for step in range(STEPS):
        for k in (0, 1):
            with nullcontext() if ddp is None or k else ddp.no_sync():
                (outer(*batch(2 * step + k)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole_weights(model)


def without_a_term_at_the_end(outer: str, plain: bool, decouple: bool) -> list[Tensor]:
    """Weights after steps of which only the first micro-batch, which is not reduced, has a term."""
    model = network()
    inside: Any = DDP(model) if outer == "" else model
    method = WSAM(0.1, gamma=0.8, decouple=decouple)
    sharp = SharpnessAware(inside, method if plain else Every(2, method), cross_entropy)
    ddp: Any = inside if outer == "" else DDP(sharp)
    optimizer: Any = SGD(model.parameters(), lr=0.2)
    optimizer = Decoupled(optimizer, sharp) if decouple else optimizer
    loss: Any = sharp if outer == "" else ddp
    for step in range(STEPS):
        with ddp.no_sync():
            loss(*part(2 * step)).backward()
        x, y = part(2 * step + 1)
        (cross_entropy(ddp(x), y).mean() if plain else loss(x, y)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole_weights(model)


def differences() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for outer, plain in (("", False), ("", True), ("outside", False)):
        ours, theirs = (without_a_term_at_the_end(outer, plain, decouple) for decouple in (True, False))
        if not (distance(ours, theirs) < 1e-12 and identical(ours)):
            found[f"{outer} {plain}"] = distance(ours, theirs), identical(ours)
    return found


def test_a_term_is_averaged_with_the_gradients_of_a_later_micro_batch_without_one():
    assert ranks.run(2, differences) == [{}, {}]


def decoupled_and_coupled() -> dict[str, Any]:
    found: dict[str, Any] = {}
    start = whole_weights(network())
    for way in ("DDP inside", "DDP outside", "global", "FSDP2"):
        ours, theirs = trained(way, True), trained(way, False)
        if not (distance(ours, theirs) < 1e-12 < 1e-2 < distance(ours, start) and identical(ours)):
            found[way] = distance(ours, theirs), distance(ours, start), identical(ours)
    one, many = trained("one process", True, 0.05, whole), trained("FSDP2", True, 0.05)
    if not (distance(one, many) < 1e-12 < 1e-3 < distance(one, trained("one process", True, None, whole))):
        found["max_norm"] = distance(one, many)
    model = network()
    sharp = SharpnessAware(model, WSAM(0.1, decouple=True), cross_entropy)
    optimizer, outer = Decoupled(SGD(model.parameters(), lr=0.1), sharp), DDP(sharp)
    with outer.join():
        try:
            outer(*part(0))
            found["join"] = repr(optimizer)
        except ValueError as error:
            if "in the context `with model.join():`" not in str(error):
                found["join"] = str(error)
    return found


def test_with_plain_sgd_it_is_coupled_wsam_on_all_ranks():
    assert ranks.run(2, decoupled_and_coupled) == [{}, {}]
