"""Provenance: where and when results were made, as lines of a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

RESULT = ("hardware", "device", "torch", "python", "bisam", "commit")
"""Entries of a run's result that tell where it was made."""
MEASURED = ("hardware", "device", "threads", "torch", "python", "bisam", "commit")
"""The same for a part of a measurement."""


def where(made: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Hardware and versions in words."""
    return ", ".join(f"{key} {made.get(key, 'unknown')}" for key in keys)


def line(place: str, dates: Iterable[str], more: str = "") -> str:
    """A sentence with the first and the last of the dates, and the place.

    Args:
        place: see `where`.
        dates: dates or times that begin with a date; at least one.
        more: text after the place.
    """
    days = sorted(date[:10] for date in dates)
    return f"Made {' to '.join(dict.fromkeys((days[0], days[-1])))} on {place}{more}."
