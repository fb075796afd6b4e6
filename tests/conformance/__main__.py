"""Command: run the cases on implementations, print the results, and write the page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import torch

from bisam.experiments.runs.environment import environment
from bisam.experiments.runs.files import write

from .behaviours import CASES
from .runner import OURS, PYTORCH_OPTIMIZER, load, run
from .table import page


class Parser(argparse.ArgumentParser):
    """A wrong argument gives one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        prog="python -m tests.conformance",
        description="Tests implementations of sharpness-aware training for behaviour that users rely on.",
        epilog="examples:\n"
        "  python -m tests.conformance\n"
        "  python -m tests.conformance --adapter mypackage.conformance:adapter\n"
        "  python -m tests.conformance --to docs/conformance.md",
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
    arguments = parser.parse_args(argv)
    if arguments.to and (arguments.to.is_dir() or not arguments.to.parent.is_dir()):
        parser.error(f"argument --to: {str(arguments.to)!r} is no file in an existing folder")
    installed = [OURS, *([PYTORCH_OPTIMIZER] if find_spec("pytorch_optimizer") else [])]
    try:
        adapters = {spec: load(spec) for spec in arguments.adapter or installed}
    except ValueError as error:
        parser.error(f"argument --adapter: {error}")
    torch.set_num_threads(1)
    results = run(list(adapters))
    print(" | ".join(f"{a.name} {a.version}" for a in adapters.values()))
    for case in CASES:
        print(*(f"{results[spec][case.name].verdict:4}" for spec in adapters), f"{case.group}: {case.statement}")
        for spec, adapter in adapters.items():
            if (result := results[spec][case.name]).verdict == "fail":
                print(f"     {adapter.name}: {result.reason}")
    if arguments.to:
        where = {k: v for k, v in environment().items() if k != "bisam"} | {"date": datetime.now(UTC).date()}
        write(arguments.to, page(adapters, results, ", ".join(f"{k} {v}" for k, v in where.items()) + ", CPU"))


if __name__ == "__main__":
    main()
