"""Command: run the cases on implementations, print the results, and write the page."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

import torch

from bisam.experiments.runs.environment import environment
from bisam.experiments.runs.files import write
from tests.support.commands import Parser

from .behaviours import CASES
from .runner import LIMIT, OURS, PYTORCH_OPTIMIZER, TROUBLE, load, run
from .table import page


def seconds(text: str) -> float:
    """A positive number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number of seconds")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if a case failed, or 130 if it was interrupted; a wrong argument exits with 2."""
    parser = Parser(
        prog="python -m tests.conformance",
        description="Tests implementations of sharpness-aware training for behaviour that users rely on.",
        epilog="examples:\n"
        "  python -m tests.conformance\n"
        "  python -m tests.conformance --adapter mypackage.conformance:adapter\n"
        "  python -m tests.conformance --adapter mypackage.conformance:adapter --limit 20\n"
        "  python -m tests.conformance --to docs/conformance.md\n\n"
        "verdicts:\n"
        "  pass     the implementation behaves as stated\n"
        "  fail     it does not, or it raised an error\n"
        "  timeout  the case was not done within the limit\n"
        "  crash    the process of the case died\n"
        "  n/a      the implementation does not offer what the case needs\n\n"
        "exit codes:\n"
        "  0    all cases pass or are not applicable\n"
        "  1    a case failed, timed out or crashed\n"
        "  2    an argument is wrong, or an adapter cannot be imported\n"
        "  130  interrupted",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--adapter",
        metavar="MODULE:OBJECT",
        action="extend",
        nargs="+",
        help="adapters to test (default: bisam, and pytorch_optimizer if it is installed)",
    )
    parser.add_argument("--to", type=Path, metavar="PATH", help="write the table as Markdown to this file")
    parser.add_argument(
        "--limit",
        type=seconds,
        default=LIMIT,
        metavar="SECONDS",
        help="time for each case, without the start of its processes (default: %(default)g)",
    )
    arguments = parser.parse_args(argv)
    if arguments.to and (arguments.to.is_dir() or not arguments.to.parent.is_dir()):
        parser.error(f"argument --to: {str(arguments.to)!r} is no file in an existing folder")
    installed = [OURS, *([PYTORCH_OPTIMIZER] if find_spec("pytorch_optimizer") else [])]
    try:
        adapters = {spec: load(spec) for spec in arguments.adapter or installed}
    except ValueError as error:
        parser.error(f"argument --adapter: {error}")
    torch.set_num_threads(1)
    try:
        results = run(list(adapters), limit=arguments.limit)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    print(" | ".join(f"{a.name} {a.version}" for a in adapters.values()))
    found = {result.verdict for of_one in results.values() for result in of_one.values()}
    width = max(len(verdict) for verdict in found)
    for case in CASES:
        verdicts = [f"{results[spec][case.name].verdict:{width}}" for spec in adapters]
        print(*verdicts, f"{case.group}: {case.statement}")
        for spec, adapter in adapters.items():
            if (result := results[spec][case.name]).verdict in TROUBLE:
                print(f"     {adapter.name}: {result.reason}")
    if arguments.to:
        where = {k: v for k, v in environment().items() if k != "bisam"} | {"date": datetime.now(UTC).date()}
        text = page(adapters, results, ", ".join(f"{k} {v}" for k, v in where.items()) + ", CPU")
        try:
            write(arguments.to, text)
        except OSError as error:
            parser.error(f"argument --to: cannot write {str(arguments.to)!r}: {error.strerror or error}")
    return int(not found.isdisjoint(TROUBLE))


if __name__ == "__main__":
    sys.exit(main())
