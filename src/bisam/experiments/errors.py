"""Errors that the command line prints in one line, and their parts."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from textwrap import shorten


def unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """Return the error for a name that is not in `known`, with the most similar one."""
    names = list(known)
    near = get_close_matches(name, names, 1) or [n for n in names if n.lower() == name.lower()]
    hint = f"did you mean {near[0]!r}? Available: " if near else "available: "
    return ValueError(f"unknown {kind} {name!r}, {hint}{', '.join(names)}")


def reason(error: Exception) -> str:
    """Return why a file could not be read or fetched, in at most 200 characters."""
    return shorten(getattr(error, "strerror", None) or str(error) or type(error).__name__, 200)


class DataError(ValueError):
    """A data set is missing, damaged or unknown; the message names the files to provide."""


class RunError(Exception):
    """A run folder cannot be used; the message says why and gives the remedy."""
