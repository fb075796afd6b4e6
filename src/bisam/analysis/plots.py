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


def points(values: Sequence[float], across: str, label: str, axes: Any = None) -> Any:
    """Draws values by their numbers, from 1."""
    axes = _axes() if axes is None else axes
    axes.plot(range(1, len(values) + 1), values, "o", color=COLOURS[0], markersize=4)
    axes.set_xlabel(across)
    axes.set_ylabel(label)
    return axes


def line(xs: Sequence[float], ys: Sequence[float], across: str, label: str, axes: Any = None) -> Any:
    """Draws one line, with the weights themselves at 0 marked."""
    axes = _axes() if axes is None else axes
    axes.plot(xs, ys, color=COLOURS[0], linewidth=1.5)
    axes.axvline(0, color="#999999", linewidth=0.6)
    axes.set_xlabel(across)
    axes.set_ylabel(label)
    axes.margins(x=0)
    return axes


def contours(
    xs: Sequence[float], ys: Sequence[float], loss: Sequence[Sequence[float]], labels: Sequence[str], axes: Any = None
) -> Any:
    """Draws contours of a loss on a plane, with the weights themselves at (0, 0) marked.

    Args:
        xs: coordinates of the columns.
        ys: coordinates of the rows.
        loss: a row for each of `ys`.
        labels: of both axes.
        axes: matplotlib axes. Default: those of a new figure.
    """
    axes = _axes() if axes is None else axes
    drawn = axes.contourf(xs, ys, loss, levels=20, cmap="cividis")
    axes.figure.colorbar(drawn, ax=axes, label="loss")
    axes.plot(0, 0, "o", color="white", markeredgecolor="black", markersize=4)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    return axes


def panels(series: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], across: str) -> list[Any]:
    """Draws several quantities below each other in a new figure, and returns the axes.

    Args:
        series: for each quantity the points of its lines by names; an empty name has no entry in the legend.
        across: label of the common horizontal axis.
    """
    plt = _pyplot()
    figure, grid = plt.subplots(
        len(series), 1, sharex=True, squeeze=False, layout="constrained", figsize=(3.4, 0.5 + 1.2 * len(series))
    )
    axes = list(grid[:, 0])
    for one, (label, lines) in zip(axes, series.items(), strict=True):
        _open(one)
        for (name, found), colour in zip(lines.items(), _colours(len(lines)), strict=True):
            xs, ys = zip(*found, strict=True)
            one.plot(xs, ys, ".-", color=colour, label=name or None, linewidth=1.2, markersize=4)
        one.set_ylabel(label)
        if any(lines):
            one.legend(frameon=False, fontsize="small")
    axes[-1].set_xlabel(across)
    figure.align_ylabels(axes)
    return axes


def density(grid: Sequence[float], values: Sequence[float], axes: Any = None) -> Any:
    """Draws a density of eigenvalues on a logarithmic scale, down to a millionth of its maximum."""
    axes = _axes() if axes is None else axes
    axes.semilogy(grid, values, color=COLOURS[0], linewidth=1.2)
    axes.set_ylim(bottom=max(values) * 1e-6)
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("density")
    return axes


def _colours(n: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(n)]


def _axes() -> Any:
    _, axes = _pyplot().subplots(figsize=(3.4, 2.4), layout="constrained")  # the width of a column
    return _open(axes)


def _open(axes: Any) -> Any:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return axes


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "bisam[analysis]"') from error
    return plt
