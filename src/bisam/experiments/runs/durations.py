"""Durations: seconds as text."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Return a duration in a readable unit."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
