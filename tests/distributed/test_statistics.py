"""Statistics of a step on several ranks: whose they are, and that no rank waits for another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from bisam import CRSAM, GSAM, SAM, BiSAM, LookSAM, NegLog, SAMPa, SharpnessAware, Tanh, cross_entropy, next_step
from bisam.integrations.pairs import InPairs
from bisam.masks import RandomMask
from bisam.perturbations import L2
from tests.support import cases, ranks
from tests.support.replicas import network, sharded

Make = Callable[[torch.optim.Optimizer], Any]
METHODS: dict[str, Make] = {
    "SAM": lambda o: SAM(L2(0.1)),
    "BiSAM": lambda o: BiSAM(0.1),
    "BiSAM-descent": lambda o: SAM(L2(0.1), Tanh(), NegLog()),
    "RandomMask": lambda o: SAM(RandomMask(L2(0.1), beta=0.4)),
    "GSAM": lambda o: GSAM(L2(0.1), NegLog()),
    "LookSAM": lambda o: LookSAM(L2(0.1), k=2),
    "SAMPa": lambda o: SAMPa(L2(0.1), ahead=next_step(o)),
}
STEPS, PART = 3, 4
Found = list[dict[str, float]]


def whole(step: int) -> tuple[Tensor, ...]:
    return cases.batch(step, 2 * PART)


def part(step: int) -> tuple[Tensor, ...]:
    first = dist.get_rank() * PART
    return tuple(t[first : first + PART] for t in whole(step))


def found(model: nn.Module, make: Make, batch: Callable[[int], Any], around: Any = None, **options: Any) -> Found:
    """The statistics of some steps of training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sharp = SharpnessAware(model, make(optimizer), cross_entropy, stats=True, **options)
    outer = sharp if around is None else around(sharp)
    torch.manual_seed(5)
    each: Found = []
    for step in range(STEPS):
        optimizer.zero_grad()
        outer(*batch(step)).backward()
        each.append(sharp.stats.to_dict())
        optimizer.step()
    return each


def far(ours: Found, theirs: Found) -> Any:
    """What differs, empty if nothing does."""
    return [(a, b) for a, b in zip(ours, theirs, strict=True) if a != pytest.approx(b, rel=1e-11, abs=1e-13)]


PAIRED: dict[str, Make] = {
    "SAM": METHODS["SAM"],
    "SAMPa": METHODS["SAMPa"],
    "CRSAM": lambda o: CRSAM(L2(0.1), NegLog()),
}


def of_all_placements(methods: list[str], paired: list[str]) -> dict[str, Any]:
    wrong: dict[str, Any] = {}
    for name in methods:
        make = METHODS[name]
        expected = found(network(), make, whole)
        wrong[f"{name}, global"] = far(found(DDP(network()), make, part, scope="global"), expected)
        wrong[f"{name}, FSDP2"] = far(found(sharded(network()), make, part), expected)
        # The first step: later ones begin at weights that both ranks have trained.
        own = found(network(), make, part)[:1]
        wrong[f"{name}, inside"] = far(found(DDP(network()), make, part)[:1], own)
        wrong[f"{name}, outside"] = far(found(network(), make, part, around=DDP)[:1], own)
    for name in paired:
        make = PAIRED[name]
        expected = found(network(), make, whole)
        wrong[f"{name}, pair"] = far(found(network(), lambda o, make=make: InPairs(make(o)), whole), expected)
    return {name: values for name, values in wrong.items() if values}


@pytest.mark.slow
def test_they_are_those_of_the_whole_batch_or_of_the_own_part():
    assert ranks.run(2, of_all_placements, list(METHODS), list(PAIRED)) == [{}, {}]


class Sometimes(nn.Module):
    """A model whose second layer one rank uses in the ascent pass alone, and the other in the descent pass alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4).double(), nn.Linear(4, 4).double()
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        x = self.first(x)
        return x + self.second(x) if (self.passes + dist.get_rank()) % 2 else x


def of_different_holes() -> Found:
    torch.manual_seed(0)
    return found(Sometimes(), lambda o: SAM(L2(0.1)), part, scope="global")


def that_fail() -> list[str]:
    """A rank whose loss fails in the second step keeps the statistics of the first."""
    sharp = SharpnessAware(DDP(network()), SAM(L2(0.1)), cross_entropy, stats=True)
    sharp(*part(0)).backward()
    before = sharp.stats
    if dist.get_rank():
        sharp.loss = lambda outputs, targets: 1 / 0
    try:
        sharp(*part(1))
        return []
    except ZeroDivisionError:
        return ["error", str(sharp.stats is before)]


def of_two_ranks() -> tuple[dict[str, Any], Found, list[str]]:
    return of_all_placements(["BiSAM"], ["SAMPa"]), of_different_holes(), that_fail()


def test_on_two_ranks():
    """Those of the whole batch or of the own part; with different parameters on the ranks; and after a failure."""
    (wrong, ours, none), (wrong_too, theirs, failed) = ranks.run(2, of_two_ranks)
    assert (wrong, wrong_too) == ({}, {})
    assert ours == theirs
    assert all(step.keys() >= {"cosine", "rise"} for step in ours)
    assert (none, failed) == ([], ["error", "True"])
