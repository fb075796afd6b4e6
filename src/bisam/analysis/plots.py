"""Plots: figures of measures, in the colours of Okabe and Ito (2008), which colour-blind readers can tell apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""In this order, and again from the first one."""


def trace(values: Sequence[float], label: str, axes: Any = None) -> Any:
    """Draws one line against the steps of ascent."""
    return traces({"": values}, label, axes)


def traces(lines: Mapping[str, Sequence[float]], label: str, axes: Any = None) -> Any:
    """Draws lines against the steps of ascent, with a legend of their names.

    Args:
        lines: values by names; an empty name has no entry in the legend.
        label: label of the vertical axis.
        axes: matplotlib axes. Default: those of a new figure.
    """
    axes = _axes() if axes is None else axes
    for (name, values), colour in zip(lines.items(), _colours(len(lines)), strict=True):
        axes.plot(range(len(values)), values, color=colour, label=name or None, linewidth=1.5)
    axes.set_xlabel("step of ascent")
    axes.set_ylabel(label)
    axes.margins(x=0.02)
    if any(lines):
        axes.legend(frameon=False)
    return axes


def bars(values: Mapping[str, float], label: str, axes: Any = None) -> Any:
    """Draws a horizontal bar for each name, with its value."""
    axes = _axes() if axes is None else axes
    names = list(values)
    drawn = axes.barh(names, [values[name] for name in names], color=_colours(len(names)), height=0.6)
    axes.bar_label(drawn, padding=3)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.margins(x=0.15)
    return axes


def _colours(n: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(n)]


def _axes() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "bisam[analysis]"') from error
    _, axes = plt.subplots(figsize=(3.4, 2.4), layout="constrained")  # the width of a column
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return axes
