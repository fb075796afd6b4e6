"""Interleaved timing: the time of each contestant relative to a reference that is timed in the same seconds.

Other programs slow down all contestants of a round alike. Therefore each round runs every contestant once, in a new
order, and each round gives one ratio. A result is the median of the ratios, with an interval for it:

    times = interleaved({"sum": a.sum, "norm": a.norm}, repeats=31)
    found = ratio(times, "norm", "sum")
    print(found, found.verdict(1.5))                 # 1.310 [1.290, 1.340] met

The interval consists of two of the ordered ratios (the sign test, inverted): it needs no distribution of the ratios,
whose tails are long, and keeps the pairs. It tells how exact this run is; another process, with another layout of its
memory, can differ by more (`benchmarks.versions` measures in several). A bar is met if the whole interval meets it, and
missed if no part of it does.

What other programs do to caches and memory does not cancel in a ratio: if their load was above `LIMIT` per core at any
moment, there is no verdict. The ratios are measured and shown all the same: a measurement of an hour is not lost to a
minute of load.
"""

from __future__ import annotations

import gc
import math
import os
import random
import statistics
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from time import perf_counter
from typing import Any, Literal

import torch

BLOCK = 0.02  # seconds of a contestant's turn
CPU = torch.device("cpu")

LIMIT = 1.5
"""Load of other programs per core above which there is no verdict."""
CONFIDENCE = 0.95
"""Confidence level of the intervals of medians."""
MINUTE = 60.0

_STARTED = perf_counter()

Verdict = Literal["met", "missed", "undecided", "no verdict under load"]


@dataclass(frozen=True)
class Load:
    """The load of other programs while something is timed.

    The load average is the number of threads that run or wait for a core, averaged over about a minute. Within a
    container too it is that of the whole machine, and so is the number of cores here: those that the container may use
    are fewer, but so are not the threads that are counted.

    Attributes:
        highest: the highest load average that was seen, without the part of this program; None where the system has no
            load average.
        cores: of the machine.
    """

    highest: float | None
    cores: int

    @classmethod
    def now(cls, busy: int = 0) -> Load:
        """The load at this moment.

        Args:
            busy: threads of this program, and of processes that it has started, that have run since it began.
        """
        try:
            average = os.getloadavg()[0]
        except (AttributeError, OSError):  # Windows, and sandboxes
            return cls(None, os.cpu_count() or 1)
        return cls(max(0.0, average - own_load(busy, perf_counter() - _STARTED)), os.cpu_count() or 1)

    def and_now(self, busy: int) -> Load:
        """The higher one of this load and that at this moment; see `now`."""
        seen = [one for one in (self.highest, Load.now(busy).highest) if one is not None]
        return Load(max(seen, default=None), self.cores)

    @property
    def limit(self) -> float:
        """The highest load with a verdict."""
        return LIMIT * self.cores

    @property
    def too_high(self) -> bool:
        """Whether there is no verdict."""
        return self.highest is not None and self.highest > self.limit

    @property
    def warning(self) -> str:
        """The warning to print before measuring; empty if the load permits a verdict."""
        if not self.too_high:
            return ""
        return (
            f"the load of other programs is {self.highest:.1f} on {self.cores} cores: the ratios are measured, and "
            f"there is no verdict while it is above {self.limit:g}"
        )


def highest(loads: Iterable[Load]) -> str:
    """The highest of the loads of one machine, in words."""
    loads = list(loads)
    if not (known := [one.highest for one in loads if one.highest is not None]):
        return "load of other programs unknown"
    return f"load of other programs at most {max(known):.1f} (verdicts up to {loads[0].limit:g})"


def own_load(busy: int, elapsed: float) -> float:
    """Returns what busy threads add to the load average of a minute.

    Args:
        busy: number of threads.
        elapsed: seconds.
    """
    return busy * (1 - math.exp(-elapsed / MINUTE))


@dataclass(frozen=True)
class Times:
    """Measured times.

    Attributes:
        seconds: per call, one entry for each round, by contestant.
        load: of other programs.
    """

    seconds: Mapping[str, Sequence[float]]
    load: Load

    def to_dict(self) -> dict[str, Any]:
        """The content as JSON values, for another process."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Times:
        """Restore what `to_dict` returned."""
        return cls(values["seconds"], Load(**values["load"]))


@dataclass(frozen=True)
class Ratio:
    """The ratio of a contestant's time to the reference's, over the rounds.

    Attributes:
        median: the median.
        low: the lower quartile.
        high: the upper quartile.
        rounds: their number.
        seconds: the contestant's own median time of a call.
        median_low: lower end of the 95 % interval of the median; None with fewer than six rounds.
        median_high: its upper end.
        load: the highest load of other programs, see `Load`.
        cores: of the machine.
    """

    median: float
    low: float
    high: float
    rounds: int
    seconds: float
    median_low: float | None
    median_high: float | None
    load: float | None
    cores: int

    def __str__(self) -> str:
        return f"{self.median:.3f} {bracketed(self.median_low, self.median_high)}"

    def verdict(self, bar: float, *, at_least: bool = False) -> Verdict:
        """Whether the ratio meets a bar; see `verdict`."""
        return verdict(self.median_low, self.median_high, Load(self.load, self.cores), bar, at_least=at_least)


def verdict(low: float | None, high: float | None, load: Load, bar: float, *, at_least: bool = False) -> Verdict:
    """Whether a value meets its bar: all of its interval does, or no part of it, or else that is undecided.

    Args:
        low: lower end of the interval; None if there is no interval.
        high: its upper end.
        load: of other programs while it was measured; if it was too high there is no verdict.
        bar: the largest value that meets it.
        at_least: whether it is the smallest one instead.
    """
    if load.too_high:
        return "no verdict under load"
    if low is None or high is None:
        return "undecided"
    if at_least:
        low, high, bar = -high, -low, -bar
    return "met" if high <= bar else "missed" if low > bar else "undecided"


def interval(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """The 95 % interval of the median of independent values, from two of them; None for fewer than six values.

    It is the exact one of the sign test, for any distribution (Conover, 1999, Practical Nonparametric Statistics).
    """
    from scipy.stats import quantile_test  # not at the top: it takes long to import

    found = quantile_test(list(values), q=0, p=0.5).confidence_interval(CONFIDENCE)
    low, high = float(found.low), float(found.high)
    return (None, None) if math.isnan(low) or math.isnan(high) else (low, high)


def bracketed(low: float | None, high: float | None, digits: int = 3) -> str:
    """An interval in brackets, with a dash if there is none."""
    return "[–]" if low is None or high is None else f"[{low:.{digits}f}, {high:.{digits}f}]"


def seconds(call: Callable[[], Any], number: int = 1, device: torch.device = CPU) -> float:
    """Seconds of one call, averaged over `number` calls, including all work that they queue on `device`."""
    _finish(device)
    start = perf_counter()
    for _ in range(number):
        call()
    _finish(device)
    return (perf_counter() - start) / number


def interleaved(
    contestants: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device = CPU, processes: int = 1
) -> Times:
    """Seconds per call of each contestant in each of `repeats` rounds, and the load of other programs meanwhile.

    A contestant repeats its call for about `BLOCK` seconds, so that its code is warm, as in training.

    Args:
        contestants: functions by name.
        repeats: rounds.
        device: device of the calls.
        processes: number of processes that compute, each with as many threads as this one.
    """
    busy = processes * torch.get_num_threads()
    load = Load.now(busy)
    number = {name: _calls(call, device) for name, call in contestants.items()}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    order, shuffle = list(contestants), random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(repeats):
            shuffle(order)
            for name in order:
                times[name].append(seconds(contestants[name], number[name], device))
            load = load.and_now(busy)
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return Times(times, load)


def ratio(times: Times, name: str, reference: str) -> Ratio:
    """The time of `name` relative to that of `reference`."""
    own, others = times.seconds[name], times.seconds[reference]
    ratios = [a / b for a, b in zip(own, others, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    load = times.load
    return Ratio(median, low, high, len(ratios), statistics.median(own), *interval(ratios), load.highest, load.cores)


def turns(times: Times, length: int) -> Times:
    """The mean times of `length` calls after one another, for contestants whose calls differ in cost by turns.

    Rounds that do not fill a turn are left out, unless there is none that does.
    """
    means = {
        name: [statistics.fmean(found[i : i + length]) for i in range(0, max(len(found) - length, 0) + 1, length)]
        for name, found in times.seconds.items()
    }
    return Times(means, times.load)


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
