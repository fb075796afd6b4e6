"""Scales: axes on which no line is flat, and panels of one measure that can be compared.

widen_scores([ax], "y", scores)     # accuracies near 100 %: logarithmic in the error, labelled with the accuracy
widen_values([ax], "y", losses)     # logarithmic if the values differ by a factor of 10
share(axes, "y")                    # one scale for all axes, or a mark on each that it has its own
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

Which = Literal["x", "y"]

ERROR_SCALE = ",\nlog scale of the error"
"""The end of the label of an axis that `widen_scores` has changed."""

_RATIO = 4.0  # of the errors, from which scores have a logarithmic scale
_DECADE = 10.0  # of other values
_PERFECT = 0.05  # the error that stands for none, in points
_COARSE = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 90)  # errors at ticks
_FINE = tuple(sorted({*_COARSE, 0.15, 0.3, 0.7, 1.5, 3, 4, 6, 7, 8, 15, 30, 40, 70}))
_FILLED = 0.3  # the share of a common scale that each panel must fill, or else it has its own


def widen_scores(axes: Sequence[Axes], which: Which, scores: Any) -> bool:
    """Make axes of scores in per cent logarithmic in 100 minus the score, if the errors differ by a large factor.

    Larger scores stay further up or to the right, and the ticks show scores.

    Args:
        axes: of one measure.
        which: axis.
        scores: all means that they show, from 0 to 100; nan does not count.

    Returns:
        Whether it did so.
    """
    errors = 100 - _finite(scores)
    if not len(errors) or errors.min() < 0 or errors.max() > 100:
        return False
    if errors.max() < _RATIO * max(errors.min(), _PERFECT):
        return False
    for ax in axes:
        getattr(ax, f"set_{which}scale")("function", functions=(_depth, _score))
        _mark_scores(ax, which)
    return True


def widen_values(axes: Sequence[Axes], which: Which, values: Any) -> bool:
    """Make axes logarithmic if the values are positive and differ by a factor of 10.

    Args:
        axes: of one measure.
        which: axis.
        values: all means that they show; nan does not count.

    Returns:
        Whether it did so.
    """
    known = _finite(values)
    if not len(known) or known.min() <= 0 or known.max() < _DECADE * known.min():
        return False
    for ax in axes:
        getattr(ax, f"set_{which}scale")("log")
        _axis(ax, which).set_minor_formatter(NullFormatter())
        if known.max() < _DECADE**2 * known.min():
            _axis(ax, which).set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            _axis(ax, which).set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return True


def share(axes: Sequence[Axes], which: Which) -> None:
    """Give axes of one measure the same limits; or, if a panel would then be flat, mark each as having its own.

    Args:
        axes: with all that they show.
        which: axis.
    """
    if len(axes) < 2:
        return
    limits = np.array([getattr(ax, f"get_{which}lim")() for ax in axes])
    spans = np.array([_axis(ax, which).get_transform().transform(ends) for ax, ends in zip(axes, limits, strict=True)])
    alike = len({getattr(ax, f"get_{which}scale")() for ax in axes}) == 1
    if alike and (spans[:, 1] - spans[:, 0]).min() >= _FILLED * (spans.max() - spans.min()):
        for ax in axes:
            limit(ax, which, limits.min(), limits.max())
        return
    for ax in axes:
        label = _axis(ax, which).label
        label.set_text(f"{label.get_text()}\n(each panel has its own scale)")


def limit(ax: Axes, which: Which, low: float, high: float) -> None:
    """Set the limits of an axis, with ticks for them where `widen_scores` has changed it."""
    getattr(ax, f"set_{which}lim")(low, high)
    if getattr(ax, f"get_{which}scale")() == "function":
        _mark_scores(ax, which)


def fit_scores(axes: Sequence[Axes], which: Which, scores: Any) -> None:
    """Set the limits of axes that `widen_scores` has changed to those of scores, with a margin.

    Args:
        axes: of one measure.
        which: axis.
        scores: all that they should show, bands included.
    """
    depths = _depth(np.clip(_finite(scores), 0, 100))
    margin = 0.06 * (depths.max() - depths.min())
    low, high = _score(depths.min() - margin), _score(depths.max() + margin)
    for ax in axes:
        limit(ax, which, max(float(low), 0.0), float(high))


def _depth(score: Any) -> np.ndarray:
    """How far up a score is: minus the logarithm of its error."""
    return -np.log10(np.maximum(100 - np.asarray(score, float), _PERFECT))


def _score(depth: Any) -> np.ndarray:
    return 100 - 10.0 ** -np.asarray(depth, float)


def _mark_scores(ax: Axes, which: Which) -> None:
    low, high = getattr(ax, f"get_{which}lim")()
    at = [[100 - e for e in errors if low <= 100 - e <= high] for errors in (_COARSE, _FINE)]
    axis = _axis(ax, which)
    axis.set_major_locator(FixedLocator(sorted(at[0] if len(at[0]) > 3 else at[1])))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _finite(values: Any) -> np.ndarray:
    known = np.concatenate([np.ravel(np.asarray(one, float)) for one in values]) if len(values) else np.empty(0)
    return known[np.isfinite(known)]


def _axis(ax: Axes, which: Which) -> Axis:
    return ax.xaxis if which == "x" else ax.yaxis
