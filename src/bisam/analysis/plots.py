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


def density(grid: Sequence[float], values: Sequence[float], axes: Any = None) -> Any:
    """Draws a density of eigenvalues on a logarithmic scale, down to a millionth of its maximum."""
    axes = _axes() if axes is None else axes
    axes.semilogy(grid, values, color=COLOURS[0], linewidth=1.2)
    axes.set_ylim(bottom=max(values) * 1e-6)
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


def around(values: Sequence[float], centre: float, across: str, label: str, axes: Any = None) -> Any:
    """Draws values by their numbers, from 1, and a line at the value of all together."""
    axes = points(values, across, label, axes)
    axes.axhline(centre, color=COLOURS[1], linewidth=1.2, linestyle="--", label="all examples")
    axes.set_ylim(0, 1.08 * max(*values, centre) or 1)
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


def _markers(n: int) -> list[str]:
    return ["osD^vPX"[i % 7] for i in range(n)]


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
