"""Experiments: recipes, runs, studies and reports on top of the library (extra `experiments`)."""

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """The command `bisam`; without the extra, one line that says what to install."""
    # An import of the parser has nothing to save. An exception in it could be lost in code that catches all of them.
    before = signal.signal(signal.SIGINT, _end)
    try:
        from bisam.experiments.cli import main as command
    except ModuleNotFoundError as error:
        print(f"bisam: the command needs {error.name}: pip install 'bisam[experiments]'", file=sys.stderr)
        sys.exit(2)
    finally:
        signal.signal(signal.SIGINT, before)
    command()


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)
