"""Cells: numbers as the text of tables and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, isnan
from statistics import mean, stdev

from bisam.experiments.reports.significance import Difference, Tested

NOTHING = "–"


def signed(value: float) -> str:
    """A number with its sign and two digits."""
    return f"{value:+.2f}".replace("-", "−")


def probability(p: float) -> str:
    """A p value; a dash if it is nan."""
    return NOTHING if isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def spread(values: Sequence[float], unit: float) -> str:
    """Mean ± standard deviation; a dash without values, or if one is not finite.

    Args:
        values: numbers.
        unit: factor, as 100 for per cent.
    """
    if not values or not all(map(isfinite, values)):
        return NOTHING
    centre = f"{unit * mean(values):.2f}"
    return f"{centre} ± {unit * stdev(values):.2f}" if len(values) > 1 else centre


def interval(one: Difference, unit: float) -> str:
    """A difference with its interval and number of pairs; the reason in place of the interval if there is none.

    A dash if there are fewer than two pairs.

    Args:
        one: the difference.
        unit: factor, as 100 for per cent.
    """
    if one.pairs < 2:
        return NOTHING
    if isnan(one.mean):
        return f"not finite ({one.pairs})"
    ends = "all equal" if isnan(one.low) else f"[{signed(unit * one.low)}, {signed(unit * one.high)}]"
    return f"{signed(unit * one.mean)} {ends} ({one.pairs})"


def detectable(ends: tuple[float, float], unit: float) -> str:
    """The detectable differences alone and after Holm's adjustment, as a range; one number if they are equal.

    Args:
        ends: both of them; nan if there is no test.
        unit: factor, as 100 for per cent.
    """
    low, high = (f"{unit * value:.2f}" for value in ends)
    return NOTHING if isnan(ends[0]) else low if low == high else f"{low} to {high}"


def cells_of(one: Tested | None, unit: float) -> tuple[str, str, str]:
    """Difference with its interval, adjusted p and detectable difference as cells of a table; dashes without one.

    Args:
        one: the comparison.
        unit: factor of the values, as 100 for per cent.
    """
    if one is None:
        return NOTHING, NOTHING, NOTHING
    marks = "" if isnan(one.adjusted) else " (primary)" * one.primary + " (interim)" * one.interim
    return interval(one.difference, unit), probability(one.adjusted) + marks, detectable(one.detectable, unit)
