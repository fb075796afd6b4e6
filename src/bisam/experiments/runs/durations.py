"""Durations: seconds as text, and text as seconds."""

from __future__ import annotations

import re
from math import isfinite

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def duration(seconds: float) -> str:
    """Return a duration in a readable unit."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def seconds(text: str) -> float:
    """Return the seconds of a duration: 5400, 1h30m, 90m, 45s, 1.5h or 2d, or hours, minutes and seconds as 1:30:00.

    Raises:
        ValueError: it is no duration above 0.
    """
    found: float | None = None
    if parts := re.fullmatch(r"(?:(\d+):)?(\d+):(\d\d)", text):
        hours, minutes, rest = (int(part or 0) for part in parts.groups())
        found = 3600 * hours + 60 * minutes + rest
    elif re.fullmatch(r"(\d+\.?\d*[dhms])+", text):
        found = sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"([\d.]+)([dhms])", text))
    elif re.fullmatch(r"\d+\.?\d*", text):
        found = float(text)
    if found is None or not isfinite(found) or found <= 0:
        raise ValueError(f"{text!r} is no duration above 0: write seconds, or as in 1h30m, 90m or 45s")
    return found
