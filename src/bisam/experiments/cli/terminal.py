"""The terminal: where the command prints its output and its errors."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console

console = Console()
errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)


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
