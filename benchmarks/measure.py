"""Interleaved timing: how long contestants take relative to a reference that runs in the same seconds.

Other programs slow a machine down for a while, and all contestants of a round alike. So a round runs each contestant
once, in a new order, a result is the median of the rounds' ratios, and the quartiles say how far to trust it:

    times = interleaved({"sum": a.sum, "norm": a.norm}, repeats=31)
    ratio(times, "norm", "sum")                      # Ratio(median=1.31, low=1.28, high=1.35, ...)
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.table import Table

from bisam.experiments import runs

BLOCK = 0.02  # seconds that a contestant runs before the next one has its turn

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

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def seconds(call: Callable[[], Any], number: int = 1) -> float:
    """Of one call, on average over `number` calls in a row."""
    start = perf_counter()
    for _ in range(number):
        call()
    return (perf_counter() - start) / number


def interleaved(contestants: Mapping[str, Callable[[], Any]], repeats: int) -> Times:
    """Seconds per call of each contestant in each of `repeats` rounds.

    A contestant repeats its call until about `BLOCK` seconds are over, so that its code is warm, as in training.
    """
    number = {}
    for name, call in contestants.items():
        call()
        call()
        number[name] = max(1, math.ceil(BLOCK / seconds(call)))
    times: Times = {name: [] for name in contestants}
    order, shuffle = list(contestants), random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(repeats):
            shuffle(order)
            for name in order:
                times[name].append(seconds(contestants[name], number[name]))
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


def environment() -> dict[str, Any]:
    """What a number depends on: hardware, versions, threads and the commit."""
    return {
        **runs.environment(),
        "pytorch_optimizer": version("pytorch_optimizer"),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def report(
    title: str,
    columns: Mapping[str, Callable[[Mapping[str, Any]], str]],
    rows: Sequence[Mapping[str, Any]],
    notes: Sequence[str] = (),
) -> None:
    """A table on the terminal; a column is a heading and a function from the row to the cell."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table(title=title, title_justify="left")
    for i, heading in enumerate(columns):
        table.add_column(heading, justify="left" if i < 2 else "right")
    for row in rows:
        table.add_row(*[cell(row) for cell in columns.values()])
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)


def verdict(row: Mapping[str, Any]) -> str:
    """Of a row against its bar, as a cell."""
    if row.get("passed") is None:
        return ""
    return f"{'[green]pass' if row['passed'] else '[red]fail'}[/] (bar {row['bar']:g})"


def write(path: Path, benchmark: str, settings: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """The results as JSON, whole or not at all."""
    content = {"benchmark": benchmark, "environment": environment(), "settings": dict(settings), **results}
    runs.write(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


class Parser(argparse.ArgumentParser):
    """Command line of a benchmark: a mistake is one line and exit code 2."""

    def __init__(self, module: str, description: str, examples: str, repeats: int) -> None:
        super().__init__(
            prog=f"python -m {module}",
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--repeats", type=at_least(1), default=repeats, help="rounds (default: %(default)s)")
        # One: with more, each small operation waits for a core that another program may hold, and cross-entropy, which
        # splits 128 rows, then takes a hundred times as long as what does not.
        self.add_argument("--threads", type=at_least(1), default=1, help="threads of torch (default: %(default)s)")
        self.add_argument("--json", type=json_path, metavar="PATH", help="write the numbers there")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def at_least(least: int) -> Callable[[str], int]:
    """A type for a flag: a whole number that is not smaller."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
        return number

    return parse


def json_path(text: str) -> Path:
    """A type for a flag: a file that can be written, which is better known before the minutes of measuring."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no file in an existing folder")
    return path
