"""Interleaved timing: the time of each contestant relative to a reference that is timed in the same seconds.

Other programs slow down all contestants of a round alike. Therefore each round runs every contestant once, in a new
order; a result is the median of the ratios over the rounds, with the quartiles as its uncertainty:

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

BLOCK = 0.02  # seconds of a contestant's turn
CPU = torch.device("cpu")

Times = dict[str, list[float]]
"""Seconds per call, one entry for each round."""


@dataclass(frozen=True)
class Ratio:
    """The ratio of a contestant's time to the reference's: median and quartiles over the rounds."""

    median: float
    low: float
    high: float
    rounds: int
    seconds: float
    """The contestant's own median time of a call."""

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def seconds(call: Callable[[], Any], number: int = 1, device: torch.device = CPU) -> float:
    """Seconds of one call, averaged over `number` calls, including all work that they queue on `device`."""
    _finish(device)
    start = perf_counter()
    for _ in range(number):
        call()
    _finish(device)
    return (perf_counter() - start) / number


def interleaved(contestants: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device = CPU) -> Times:
    """Seconds per call of each contestant in each of `repeats` rounds.

    A contestant repeats its call for about `BLOCK` seconds, so that its code is warm, as in training.

    Args:
        contestants: functions by name.
        repeats: rounds.
        device: device of the calls.
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


def turns(times: Times, length: int) -> Times:
    """The mean times of `length` calls after one another, for contestants whose calls differ in cost by turns.

    Rounds that do not fill a turn are left out, unless there is none that does.
    """
    return {
        name: [statistics.fmean(found[i : i + length]) for i in range(0, max(len(found) - length, 0) + 1, length)]
        for name, found in times.items()
    }


def conditions() -> dict[str, Any]:
    """Conditions that affect a time besides hardware and versions: threads, load and date."""
    return {
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@contextmanager
def threads(number: int) -> Generator[None]:
    """A context with this number of torch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _calls(call: Callable[[], Any], device: torch.device) -> int:
    """Number of calls per turn, after warming up; a call that takes a whole turn warms up once only."""
    call()
    if seconds(call, device=device) >= BLOCK:
        return 1
    return max(1, math.ceil(BLOCK / seconds(call, device=device)))


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
