"""The terminal: where the command prints its output and its errors."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console

# A name or a path is printed as it is: it may have brackets, or what rich reads as an emoji (rho=a:b:c).
console = Console(markup=False, emoji=False)
errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


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
