"""The radius that follows flips is the same on all ranks that train the same weights, by the flips of all ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from bisam import SAM, SharpnessAware, cross_entropy
from bisam.schedules import FlipRate
from tests.support import cases, ranks
from tests.support.replicas import identical, nested, network, sharded

RATE, PART = FlipRate(0.2, start=0.5, gain=0.4), 16


def part(step: int, rank: int) -> tuple[Tensor, Tensor]:
    x, y = cases.batch(step, 2 * PART)
    return x[rank * PART : (rank + 1) * PART], y[rank * PART : (rank + 1) * PART]


def mine(step: int) -> tuple[Tensor, Tensor]:
    return part(step, dist.get_rank())


def radius(sharp: nn.Module) -> Tensor:
    loss = sharp.module if isinstance(sharp, DDP) else sharp
    return loss.get_extra_state()["state"]["perturb"]["rho"]


def flips(rho: float, x: Tensor, y: Tensor) -> int:
    """Flips of SAM's step on a batch, by hand."""
    model, moved = network(), network()
    g = torch.autograd.grad(cross_entropy(model(x), y).mean(), [*model.parameters()])
    norm = math.sqrt(sum(float((t**2).sum()) for t in g))
    for p, t in zip(moved.parameters(), g, strict=True):
        p.data += rho * t / norm
    return int(((model(x).argmax(1) == y) & (moved(x).argmax(1) != y)).sum())


def moved(rho: float, flipped: int, examples: int) -> float:
    return rho * math.exp(0.4 * (1 - flipped / examples / 0.2))


def following(steps: int = 4) -> dict[str, str]:
    """The weights stay, and the radius moves as it does by hand."""
    found: dict[str, str] = {}
    for order in ("inside", "around"):
        sharp, expected = nested(order, network(), SAM(RATE)), 0.5  # each replica climbs for its own examples
        for step in range(steps):
            sharp(*mine(step)).backward()
            expected = moved(expected, sum(flips(expected, *part(step, rank)) for rank in range(2)), 2 * PART)
            if not (identical([radius(sharp)]) and math.isclose(float(radius(sharp)), expected, rel_tol=1e-9)):
                found[f"local, {order}, {step}"] = f"{float(radius(sharp))}, not {expected}"
    whole = SharpnessAware(network(), SAM(RATE), cross_entropy)
    together = {
        "global": SharpnessAware(network(), SAM(RATE), cross_entropy, scope="global"),
        "fsdp": SharpnessAware(sharded(network()), SAM(RATE), cross_entropy),
    }
    for step in range(steps):
        whole(*cases.batch(step, 2 * PART))
        for name, sharp in together.items():
            sharp(*mine(step)).backward()
            same = math.isclose(float(radius(sharp)), float(radius(whole)), rel_tol=1e-9)
            if not (identical([radius(sharp)]) and same):
                found[f"{name}, {step}"] = f"{float(radius(sharp))}, not {float(radius(whole))}"
    return found


def accumulating() -> dict[str, str]:
    """Under no_sync ranks may make different numbers of calls; the next call counts the flips of all of them."""
    found: dict[str, str] = {}
    for order in ("inside", "around"):
        sharp, seen = nested(order, network(), SAM(RATE)), 0
        wrapper = sharp if isinstance(sharp, DDP) else sharp.model
        calls = 1 + dist.get_rank()
        with wrapper.no_sync():
            for step in range(calls):
                sharp(*mine(step)).backward()
                if float(radius(sharp)) != 0.5:
                    found[f"no_sync, {order}"] = f"the radius moved to {float(radius(sharp))}"
        for rank in range(2):
            seen += sum(flips(0.5, *part(step, rank)) for step in [*range(1 + rank), 9])
        sharp(*mine(9)).backward()
        expected = moved(0.5, seen, 5 * PART)
        if not (identical([radius(sharp)]) and math.isclose(float(radius(sharp)), expected, rel_tol=1e-9)):
            found[f"after no_sync, {order}"] = f"{float(radius(sharp))}, not {expected}"
    sharp = DDP(SharpnessAware(network(), SAM(RATE), cross_entropy))
    with sharp.join():
        for step in range(1 + dist.get_rank()):
            sharp(*mine(step)).backward()
    if float(radius(sharp)) != 0.5:
        found["join"] = f"the radius moved to {float(radius(sharp))}"
    return found


def overflowing() -> dict[str, Any]:
    """A gradient that overflows on one rank leaves the radius of both."""
    model, scale = network(), [1.0]
    sharp = DDP(SharpnessAware(model, SAM(RATE), cross_entropy, scaler=lambda: scale[0]))
    radii = []
    for step in range(3):
        scale[0] = math.inf if step == 1 and dist.get_rank() else 1.0
        sharp(*mine(step)).backward()
        radii.append(float(radius(sharp)))
    fine = identical([radius(sharp)]) and radii[1] == radii[0] != radii[2]
    return {} if fine else {"radii": radii}


@pytest.mark.parametrize("check", [following, accumulating, overflowing], ids=lambda check: check.__name__)
def test_ranks_have_one_radius(check):
    assert ranks.run(2, check) == [{}, {}]
