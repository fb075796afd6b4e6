"""Plots: figures of measures, in the colours of Okabe and Ito (2008), which colour-blind readers can tell apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, log10
from textwrap import fill
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""In this order, and again from the first one."""

_DASHES = ("-", "--", "-.", ":")  # for print in grey
_GREY = "#999999"
_SMALL = 7  # size of ticks and legends in points; labels have one more
_LINEAR = 1.0  # decades up to which a scale is linear


def trace(values: Sequence[float], label: str, axes: Any = None, last: tuple[float, float, str] | None = None) -> Any:
    """Draws one line against the steps of ascent, and at the last one a point with its deviation and name."""
    axes = traces({"": values}, label, axes)
    if last is not None:
        value, deviation, name = last
        axes.errorbar(len(values) - 1, value, deviation, fmt="o", color=COLOURS[1], markersize=4, capsize=3, label=name)
        axes.legend(frameon=False, fontsize=_SMALL, loc="lower right")
    return axes


def interval(value: float, deviation: float, across: str, name: str, axes: Any = None) -> Any:
    """Draws a value and its standard deviation on a horizontal axis that begins at 0."""
    axes = _axes(0.9) if axes is None else axes
    axes.errorbar(value, [name], xerr=deviation, fmt="o", color=COLOURS[0], markersize=5, capsize=4)
    axes.axvline(0, color=_GREY, linewidth=0.6)
    axes.set_xlabel(f"{across} (mean ± standard deviation)")
    return axes


def traces(lines: Mapping[str, Sequence[float]], label: str, axes: Any = None) -> Any:
    """Draws lines against the steps of ascent, with a legend of their names.

    Args:
        lines: values by names; an empty name has no entry in the legend.
        label: label of the vertical axis.
        axes: matplotlib axes. Default: those of a new figure.
    """
    axes = _axes() if axes is None else axes
    for i, (name, values) in enumerate(lines.items()):
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": _DASHES[i % len(_DASHES)], "linewidth": 1.5}
        axes.plot(range(len(values)), values, label=name or None, **style)
    _whole_numbers(axes)
    axes.set_xlabel("step of ascent")
    axes.set_ylabel(label)
    axes.margins(x=0.02)
    if any(lines):
        axes.legend(frameon=False, fontsize=_SMALL)
    return axes


def bars(values: Mapping[str, float], label: str, axes: Any = None) -> Any:
    """Draws a horizontal bar for each name, with its value."""
    axes = _axes() if axes is None else axes
    names = list(values)
    drawn = axes.barh(names, [values[name] for name in names], color=_colours(len(names)), height=0.6)
    axes.bar_label(drawn, padding=3, fontsize=_SMALL)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.margins(x=0.15)
    return axes


def points(values: Sequence[float], across: str, label: str, axes: Any = None) -> Any:
    """Draws values by their numbers, from 1."""
    axes = _axes() if axes is None else axes
    axes.plot(range(1, len(values) + 1), values, "o", color=COLOURS[0], markersize=4)
    _whole_numbers(axes)
    if min(values) >= 0:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(across)
    axes.set_ylabel(label)
    return axes


def profile(
    xs: Sequence[float],
    loss: Sequence[float],
    error: Sequence[float],
    across: str,
    marks: Sequence[float],
    axes: Any = None,
) -> Any:
    """Draws a loss along a line, and the error on an axis at the right.

    Args:
        xs: coordinates.
        loss: the loss at them.
        error: the error at them, in [0, 1]; empty for none.
        across: label of the horizontal axis.
        marks: coordinates of vertical lines.
        axes: matplotlib axes. Default: those of a new figure.
    """
    axes = _axes() if axes is None else axes
    finite = [value for value in loss if isfinite(value)]
    if finite and min(finite) > 0 and _decades(finite) > _LINEAR:
        axes.set_yscale("log")
        _decimal(axes.yaxis, finite)
    for at in marks:
        axes.axvline(at, color=_GREY, linewidth=0.6, zorder=0)
    axes.plot(xs, loss, color=COLOURS[0], linewidth=1.5)
    axes.set_xlabel(across)
    axes.set_ylabel("loss", color=COLOURS[0] if error else "black")
    axes.margins(x=0)
    axes.locator_params(axis="x", nbins=6)
    if error:
        right = axes.twinx()
        right.plot(xs, [100 * value for value in error], color=COLOURS[1], linewidth=1.5, linestyle="--")
        right.set_ylabel("error (%)", color=COLOURS[1])
        right.spines["top"].set_visible(False)
        right.margins(x=0)
        right.set_ylim(0, 105 * max(error) or 1)
        _in_small_print(right)
    return axes


def contours(
    xs: Sequence[float],
    ys: Sequence[float],
    loss: Sequence[Sequence[float]],
    labels: Sequence[str],
    marks: Mapping[str, tuple[float, float]],
    axes: Any = None,
) -> Any:
    """Draws contours of a loss on a plane; logarithmic ones where it spans more than a decade.

    Points whose loss is not finite stay white, and a loss below a millionth of the largest one is drawn as that.

    Args:
        xs: coordinates of the columns.
        ys: coordinates of the rows.
        loss: a row for each of `ys`.
        labels: of both axes.
        marks: points by names; an empty name is not written.
        axes: matplotlib axes. Default: those of a new figure.
    """
    axes = _axes() if axes is None else axes
    import numpy as np
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    values = np.ma.masked_invalid(np.array(loss, dtype=float))
    if not values.count():
        raise ValueError("no loss on the plane is finite: nothing can be drawn")
    low, high = float(values.min()), float(values.max())
    if low >= 0 and high > 0 and _decades((max(low, 1e-6 * high), high)) > _LINEAR:
        values = np.ma.maximum(values, low := max(low, 1e-6 * high))
        levels, norm = np.geomspace(low, high * (1 + 1e-9), 19), LogNorm(low, high)
    else:
        levels, norm = np.linspace(low, high if high > low else low + 1e-9 + abs(low) * 1e-6, 19), None
    drawn = axes.contourf(xs, ys, values, levels=levels, norm=norm, cmap="cividis")
    drawn.set_edgecolor("face")  # no white seams between the levels in a PDF
    axes.contour(xs, ys, values, levels=levels[::2], colors="white", linewidths=0.3, alpha=0.6)
    bar = axes.figure.colorbar(drawn, ax=axes, label="loss", ticks=None if norm else MaxNLocator(5))
    if norm:
        _decimal(bar.ax.yaxis, (low, high))
    _in_small_print(bar.ax)
    for name, (x, y) in marks.items():
        axes.plot(x, y, "o", color="white", markeredgecolor="black", markersize=4)
        if name:
            axes.annotate(name, (x, y), (4, 4), textcoords="offset points", color="white", fontsize=8)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(fill(labels[1], 26))
    axes.locator_params(axis="x", nbins=4)
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
    axes.set_ylim(max(values) * 1e-6, max(values) * 3)
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("density")
    return axes


def distribution(quantiles: Sequence[float], across: str, axes: Any = None) -> Any:
    """Draws a cumulative distribution, with 0 marked.

    Args:
        quantiles: values at equally spaced shares from 0 to 1.
        across: label of the values.
        axes: matplotlib axes. Default: those of a new figure.
    """
    axes = _axes() if axes is None else axes
    shares = [i / (len(quantiles) - 1) for i in range(len(quantiles))]
    axes.plot(quantiles, shares, color=COLOURS[0], linewidth=1.5)
    axes.axvline(0, color="#999999", linewidth=0.6)
    axes.set_ylim(0, 1)
    axes.set_xlabel(across)
    axes.set_ylabel("share of examples below")
    return axes


def reliability(
    confidences: Sequence[float],
    accuracies: Sequence[float],
    counts: Sequence[int],
    axes: Any = None,
) -> Any:
    """Draws a reliability diagram: accuracies of bins, their gaps to the confidences, and shares of examples above.

    Args:
        confidences: mean confidence of each bin of equal width; of an empty one it is not used.
        accuracies: accuracy of each bin.
        counts: number of examples of each bin.
        axes: matplotlib axes. Default: those of a new figure.
    """
    axes = _axes() if axes is None else axes
    width, total = 1 / len(counts), sum(counts)
    lefts = [i * width for i in range(len(counts))]
    bins = [(x, c, a) for x, c, a, n in zip(lefts, confidences, accuracies, counts, strict=True) if n]
    xs, means, heights = (list(values) for values in zip(*bins, strict=True))
    axes.bar(xs, heights, width, align="edge", color=COLOURS[0], edgecolor="white", linewidth=0.4, label="accuracy")
    gaps = [mean - height for mean, height in zip(means, heights, strict=True)]
    hatched: dict[str, Any] = {"facecolor": "none", "edgecolor": COLOURS[1], "hatch": "//////", "linewidth": 0.8}
    axes.bar(xs, gaps, width, heights, align="edge", label="gap to confidence", **hatched)
    axes.plot([0, 1], [0, 1], color="#555555", linewidth=0.8, linestyle="--")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")
    above = axes.inset_axes((0, 1.05, 1, 0.2), sharex=axes)
    shares = [count / total for count in counts]
    above.bar(lefts, shares, width, align="edge", color="#999999", linewidth=0)
    above.set_ylim(0, max(shares))
    above.set_yticks([max(shares)], [f"{max(shares):.0%}"])
    above.text(0.02, 0.5, "share of examples", fontsize="x-small", va="center", transform=above.transAxes)
    above.tick_params(labelbottom=False, bottom=False, labelsize="small")
    for side in ("top", "right"):
        above.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1.24), ncols=2, borderpad=0)
    return axes


def explained(shares: Sequence[float], components: int, share: float, axes: Any = None) -> Any:
    """Draws the explained variance against the number of components, with the number that explains `share` marked."""
    axes = _axes() if axes is None else axes
    axes.plot(range(1, len(shares) + 1), shares, ".-", color=COLOURS[0], linewidth=1.5, markersize=4)
    if components:
        axes.axvline(components, color=COLOURS[1], linewidth=1, linestyle="--", label=f"{share:g} at {components}")
        axes.legend(frameon=False, loc="lower right")
    axes.set_xlabel("principal components")
    axes.set_ylabel("explained variance")
    axes.set_ylim(0, 1.03)
    return axes


def around(
    values: Sequence[float], centre: float, across: str, label: str, name: str = "all examples", axes: Any = None
) -> Any:
    """Draws values by their numbers, from 1, and a line at another value with a name, such as that of all together."""
    axes = points(values, across, label, axes)
    axes.axhline(centre, color=COLOURS[1], linewidth=1.2, linestyle="--", label=name)
    low, high = min(*values, centre, 0), max(*values, centre, 0)
    axes.set_ylim(1.08 * low, 1.08 * high if high > low else 1)
    axes.legend(frameon=False)
    return axes


def severities(
    xs: Sequence[int], lines: Mapping[str, Sequence[float]], plain: float, label: str, axes: Any = None
) -> Any:
    """Draws a line for each corruption against the severity, and the value without corruption at severity 0."""
    axes = _axes() if axes is None else axes
    order = sorted(range(len(xs)), key=lambda i: xs[i])
    for (name, values), colour, marker in zip(lines.items(), _colours(len(lines)), _markers(len(lines)), strict=True):
        ys = [plain, *(values[i] for i in order)]
        axes.plot(
            [0, *(xs[i] for i in order)], ys, color=colour, label=name, linewidth=1.2, marker=marker, markersize=3.5
        )
    axes.axhline(plain, color="#999999", linewidth=0.6)
    axes.set_xticks([0, *sorted(xs)])
    axes.set_ylim(0, 1.08 * max(plain, *(value for values in lines.values() for value in values)) or 1)
    axes.set_xlabel("severity")
    axes.set_ylabel(label)
    place: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.45, 1.0), "ncols": 3}
    axes.legend(frameon=False, fontsize="x-small", columnspacing=1.0, handlelength=1.6, borderpad=0, **place)
    return axes


def _whole_numbers(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _decimal(axis: Any, values: Sequence[float]) -> None:
    """Labels a logarithmic axis with decimal numbers, several in each decade if there are few decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if _decades(values) < 2.5 else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _decades(values: Sequence[float]) -> float:
    return log10(max(values) / min(values))


def _markers(n: int) -> list[str]:
    return ["osD^vPX"[i % 7] for i in range(n)]


def _colours(n: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(n)]


def _axes(height: float = 2.4) -> Any:
    _, axes = _pyplot().subplots(figsize=(3.4, height), layout="constrained")  # the width of a column
    return _open(axes)


def _open(axes: Any) -> Any:
    _in_small_print(axes)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return axes


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "bisam[analysis]"') from error
    return plt


def _in_small_print(axes: Any) -> None:
    axes.tick_params(which="both", labelsize=_SMALL)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_size(_SMALL + 1)
        axis.get_offset_text().set_size(_SMALL)
