"""The terminal: where the command prints its output and its errors."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from io import TextIOWrapper

from rich.console import Console

# A name or a path is printed as it is: it may have brackets, or what rich reads as an emoji (rho=a:b:c).
console = Console(markup=False, emoji=False)
errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


def escape_what_cannot_be_shown() -> None:
    """Print a character that the encoding of the output does not have as an escape: no reason to end a command.

    Tables have lines, ± and ×, and paths any letter; ASCII and the code pages of Windows do not have all of them. A
    file name that is no text in UTF-8 has characters that no encoding has.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def silent(when: bool) -> Generator[None]:
    """Print nothing in the block if `when` is true; an error that leaves the block is printed."""
    consoles = (console, errors) if when else ()
    for one in consoles:
        one.quiet = True
    try:
        yield
    finally:
        for one in consoles:
            one.quiet = False
