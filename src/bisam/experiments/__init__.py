"""Experiments: recipes, runs, studies and reports on top of the library (extra `experiments`)."""

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """The command `bisam`; without the extra, one line that says what to install. Ctrl-C ends it with exit code 130."""
    before = signal.getsignal(signal.SIGINT)
    handled = before is signal.default_int_handler  # else a shell in the background ignores it, or an embedding program
    if handled:  # while the parser is imported there is nothing to save, and code in between may catch all exceptions
        signal.signal(signal.SIGINT, _end)
    try:
        from bisam.experiments.cli import main as command
    except ModuleNotFoundError as error:
        print(f"bisam: the command needs {error.name}: pip install 'bisam[experiments]'", file=sys.stderr)
        sys.exit(2)
    finally:
        if handled:
            signal.signal(signal.SIGINT, before)
    try:
        command()
    except SystemExit as end:
        if end.code == 130:
            # An interrupt inside of `exec`, which dataclasses call, is noted by CPython as one that nobody caught: it
            # would end with the signal in place of the exit code. The next `exec` takes that back.
            exec("")
        raise
    finally:
        if handled and signal.getsignal(signal.SIGINT) is before:  # the interpreter takes a while to end
            signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)
