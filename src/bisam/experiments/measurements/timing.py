"""Interleaved timing: how long contestants take relative to a reference that runs in the same seconds.

Other programs slow a machine down for a while, and all contestants of a round alike. So a round runs each contestant
once, in a new order, a result is the median of the rounds' ratios, and the quartiles say how far to trust it:

    times = interleaved({"sum": a.sum, "norm": a.norm}, repeats=31)
    ratio(times, "norm", "sum")                      # Ratio(median=1.31, low=1.28, high=1.35, ...)
"""

from __future__ import annotations

import gc
import math
import os
import random
import statistics
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from time import perf_counter
from typing import Any

import torch

BLOCK = 0.02  # seconds that a contestant runs before the next one has its turn
CPU = torch.device("cpu")

Times = dict[str, list[float]]
"""Seconds per call, one entry a round."""


@dataclass(frozen=True)
class Ratio:
    """A contestant's time over the reference's, round by round: the median and the quartiles."""

    median: float
    low: float
    high: float
    rounds: int
    seconds: float
    """The contestant's own median time of a call."""

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def seconds(call: Callable[[], Any], number: int = 1, device: torch.device = CPU) -> float:
    """Of one call, on average over `number` calls in a row, until `device` has done all that they ask of it."""
    _finish(device)
    start = perf_counter()
    for _ in range(number):
        call()
    _finish(device)
    return (perf_counter() - start) / number


def interleaved(contestants: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device = CPU) -> Times:
    """Seconds per call of each contestant in each of `repeats` rounds.

    A contestant repeats its call until about `BLOCK` seconds are over, so that its code is warm, as in training.

    Args:
        contestants: by name, what to call.
        repeats: rounds.
        device: where the calls compute.
    """
    number = {name: _calls(call, device) for name, call in contestants.items()}
    times: Times = {name: [] for name in contestants}
    order, shuffle = list(contestants), random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(repeats):
            shuffle(order)
            for name in order:
                times[name].append(seconds(contestants[name], number[name], device))
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return times


def ratio(times: Times, name: str, reference: str) -> Ratio:
    """The time of `name` relative to that of `reference`."""
    ratios = [a / b for a, b in zip(times[name], times[reference], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return Ratio(median, low, high, len(ratios), statistics.median(times[name]))


def conditions() -> dict[str, Any]:
    """What a time depends on beside the hardware and the versions: threads, what else runs, and when it was."""
    return {
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@contextmanager
def threads(number: int) -> Generator[None]:
    """So many threads of torch inside, as many as before after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _calls(call: Callable[[], Any], device: torch.device) -> int:
    """Calls in a turn, after two or three to get warm: one that takes a whole turn is not waited for again."""
    call()
    if seconds(call, device=device) >= BLOCK:
        return 1
    return max(1, math.ceil(BLOCK / seconds(call, device=device)))


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
