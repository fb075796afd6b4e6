"""Memory: thousands of steps of every method, after which a process must need no more memory than after the first ones.

Two measures, after a warm-up: the number of live tensors, which must not grow at all, and the resident memory of the
process, whose growth must stop. The resident memory also sees what Python does not, such as graphs in C++.
"""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bisam import SharpnessAware, cross_entropy
from tests.support import cases as family

from .attack import Attack, Finding, Options

LEAST = 120
"""The smallest number of steps: the warm-up, and enough to see a growth."""
SLOPE = 100.0
"""Bytes of resident memory for each step: a leak of one small tensor is several times as much."""
NOISE = 2**18
"""Bytes of resident memory that come and go with the allocator."""


def resident() -> int:
    """Returns the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def live_tensors() -> int:
    """Returns the number of tensors that Python objects refer to."""
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())  # not isinstance: it may run an object's code


def attacked(name: str, make: Any, steps: int) -> Finding:
    """Trains for a number of steps and measures memory at the thirds of what follows the warm-up."""
    torch.manual_seed(0)
    model = family.A_MODEL()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    sharp = SharpnessAware(model, make(optimizer), cross_entropy)
    batches = [family.batch(i) for i in range(8)]

    def train(count: int) -> tuple[int, int]:
        for i in range(count):
            optimizer.zero_grad()
            sharp(*batches[i % 8]).backward()
            optimizer.step()
        return live_tensors(), resident()

    warm = max(steps // 6, LEAST // 2)
    train(warm)
    third = (steps - warm) // 3
    measured = [train(0), *(train(third) for _ in range(3))]
    tensors = measured[-1][0] - measured[0][0]
    growth = [b[1] - a[1] for a, b in pairwise(measured)]
    slope = min(growth) / max(third, 1)  # of the third with the least: memory that a leak needs grows in all of them
    wrong = []
    if tensors > 0:
        wrong.append(f"{tensors} more live tensors after {3 * third} steps")
    if slope > SLOPE and sum(growth) > NOISE:
        wrong.append(f"{slope:.0f} bytes more resident memory for each of {3 * third} steps")
    facts = {"tensors": tensors, "bytes per step": round(slope, 1), "growth in bytes": sum(growth), "steps": 3 * third}
    return Finding(name, "; ".join(wrong), Counter({"steps": warm + 3 * third}), facts)


def run(
    names: Sequence[str], options: Options, methods: Mapping[str, tuple[Any, Any]] = family.FAMILY
) -> Iterator[Finding]:
    """Attacks each method in turn, in this process."""
    gc.collect()
    gc.freeze()  # the objects of imported modules, which would make each count slow
    try:
        for name in names:
            yield attacked(name, methods[name][0], options.steps)
    finally:
        gc.unfreeze()


ATTACK = Attack("memory", "memory is flat over thousands of steps", tuple(family.FAMILY), run)
