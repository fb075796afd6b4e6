"""Errors that the command shows in one line."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that is none of `known`, with the nearest of them."""
    names = list(known)
    near = get_close_matches(name, names, 1) or [n for n in names if n.lower() == name.lower()]
    hint = f"did you mean {near[0]!r}? There is: " if near else "there is: "
    return ValueError(f"unknown {kind} {name!r}, {hint}{', '.join(names)}")


class DataError(ValueError):
    """A data set is missing, damaged or unknown; the message says what to put where."""


class RunError(Exception):
    """Something is wrong with a run folder; the message says what and what to do."""
