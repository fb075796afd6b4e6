"""Command line, terminal table and JSON output, shared by the benchmarks."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bisam.experiments.measurements.timing import (
    Load as Load,
    Ratio as Ratio,
    Times as Times,
    bracketed as bracketed,
    conditions,
    highest,
    interleaved as interleaved,
    ratio as ratio,
    seconds as seconds,
)
from bisam.experiments.runs import environment as own, files


def environment() -> dict[str, Any]:
    """Hardware, versions, threads and commit of a measurement."""
    return {**own.environment(), "pytorch_optimizer": version("pytorch_optimizer"), **conditions()}


def report(
    title: str,
    columns: Mapping[str, Callable[[Mapping[str, Any]], str]],
    rows: Sequence[Mapping[str, Any]],
    notes: Sequence[str] = (),
) -> None:
    """Print a table; each column is a heading and a function from a row to a cell."""
    console = Console(width=None if sys.stdout.isatty() else 170)
    table = Table(title=title, title_justify="left")
    for i, heading in enumerate(columns):
        table.add_column(heading, justify="left" if i < 2 else "right")
    for row in rows:
        table.add_row(*[_cell(cell(row)) for cell in columns.values()])
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)


def _cell(text: str) -> Text:
    """A cell with its colours; an interval in brackets is no colour."""
    return Text.from_markup(text) if "[/]" in text else Text(text)


def judged(r: Ratio, bar: float | None, *, at_least: bool = False) -> dict[str, Any]:
    """The entries of a row for a ratio and its verdict.

    Args:
        r: the ratio.
        bar: the largest ratio that meets it; None if there is none.
        at_least: whether it is the smallest one instead.
    """
    return {**vars(r), "bar": bar, "verdict": None if bar is None else r.verdict(bar, at_least=at_least)}


def verdict(row: Mapping[str, Any]) -> str:
    """Cell that says whether a row meets its bar."""
    if (found := row["verdict"]) is None:
        return ""
    colour = {"met": "green", "missed": "red"}.get(found, "yellow")
    return f"[{colour}]{found}[/] (bar {row['bar']:g})"


def interval(row: Mapping[str, Any], digits: int = 3) -> str:
    """Cell of the 95 % interval of a row's ratio."""
    return bracketed(row["median_low"], row["median_high"], digits)


def load(rows: Iterable[Mapping[str, Any]]) -> str:
    """The load of other programs while some rows were measured, in words."""
    return highest(Load(row["load"], row["cores"]) for row in rows if "load" in row)


def write(path: Path, benchmark: str, settings: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Write the results as JSON, atomically."""
    content = {"benchmark": benchmark, "environment": environment(), "settings": dict(settings), **results}
    files.write(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


class Parser(argparse.ArgumentParser):
    """Command line of a benchmark; a wrong argument gives one line and exit code 2."""

    def __init__(self, module: str, description: str, examples: str, repeats: int) -> None:
        super().__init__(
            prog=f"python -m {module}",
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--repeats", type=at_least(1), default=repeats, help="rounds (default: %(default)s)")
        # One thread by default: with more, small operations wait for a core that another program may hold, and
        # cross-entropy, which splits 128 rows over threads, becomes a hundred times slower than unsplit operations.
        self.add_argument("--threads", type=at_least(1), default=1, help="threads of torch (default: %(default)s)")
        self.add_argument("--json", type=json_path, metavar="PATH", help="write the results to this file")

    def begin(self, threads: int) -> None:
        """Set the number of threads, and warn if the load of other programs permits no verdict."""
        torch.set_num_threads(threads)
        if warning := Load.now().warning:
            print(f"{self.prog}: {warning}", file=sys.stderr)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def at_least(least: int) -> Callable[[str], int]:
    """Argument type: a whole number of at least `least`."""

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
    """Argument type: a file that can be written, checked before the measurement starts."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no file in an existing folder")
    return path
