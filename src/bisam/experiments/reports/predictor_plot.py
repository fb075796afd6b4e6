"""Scatter plot of the test error against measures of the trained network: a row for each level, a column for each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import Locator, LogLocator, MaxNLocator, NullFormatter

from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.reports.drawing import Style, plain, styles
from bisam.experiments.reports.groups import names, title
from bisam.experiments.reports.predictors import Comparison, Level, written
from bisam.experiments.reports.scales import share
from bisam.experiments.reports.svg import spot

NAME = "predictors"
"""Name of the figure."""
CAPTION = (
    "Test error against measures of the trained network: runs (small) and means of a configuration (large), with "
    "Spearman's correlation and its 95 % interval; each panel has its own scale of the measure"
)
_WIDTH, _ROW = 6.9, 1.75  # inches: the width of the text of a paper
_SMALL = 7
_RATIO, _DECADES = 4.0, 50.0  # factors from which an axis is logarithmic, and from which its ticks are powers of 10


def predictors(comparisons: Sequence[Comparison], shown: Sequence[str]) -> Figure:
    """Return the figure.

    A small point is a run, and a large one the mean of a configuration; lines join the configurations of a method in
    the order of the study.

    Args:
        comparisons: as `compare` returns them.
        shown: titles of the measures, in the order of the columns; those that were not measured are left out.

    Raises:
        ValueError: there is nothing to show.
    """
    levels = {one.level.title: one.level for one in comparisons}
    measures = [key for key in shown if any(one.measure == key for one in comparisons)]
    if not levels or not measures:
        raise ValueError("predictors shows measured runs of all configurations, and there are none")
    by_place = {(one.level.title, one.measure): one for one in comparisons}
    styled = _styles([recipe for level in levels.values() for recipe in level.recipes])
    figure = Figure(figsize=(_WIDTH, _ROW * len(levels) + 0.45), layout="constrained")
    grid = figure.subplots(len(levels), len(measures), squeeze=False, sharey="row")
    for axes, level in zip(grid, levels.values(), strict=True):
        for ax, key in zip(axes, measures, strict=True):
            ax.set_axis_off()
            if (one := by_place.get((level.title, key))) is not None:
                ax.set_axis_on()
                _panel(ax, level, key, styled)
                ax.set_title(f"{plain(key, 28)}\n{written(one.found.spearman)}", fontsize=_SMALL)
        axes[0].set_ylabel(f"test error (%){f', {plain(level.title)}' if level.title else ''}", fontsize=_SMALL)
    share([axes[0] for axes in grid], "y")
    handles, labels = grid[0][0].get_legend_handles_labels()
    style: dict[str, Any] = {"loc": "outside lower center", "ncols": len(labels), "frameon": False}
    figure.legend(handles, labels, fontsize=_SMALL, handletextpad=0.4, columnspacing=1.2, **style)
    return figure


def _panel(ax: Axes, level: Level, key: str, styled: dict[str, Style]) -> None:
    x, y, called = level.measures[key], 100 * level.error, names(level.recipes)
    for name, columns in groupby(range(len(level.recipes)), key=lambda i: level.methods[i]):
        own, style = list(columns), styled[name]
        ax.plot(x[:, own].ravel(), y[:, own].ravel(), ".", color=style.colour, ms=2.5, mew=0, alpha=0.45, zorder=1)
        line: dict[str, Any] = {**style.line, "markersize": 4, "linewidth": 0.9, "mec": "white", "mew": 0.4}
        ax.plot(x[:, own].mean(0), y[:, own].mean(0), label=plain(name), zorder=2, **line)
    for i, recipe in enumerate(level.recipes):
        measures, errors = ({s: float(v[k, i]) for k, s in enumerate(level.seeds)} for v in (x, y))
        lines = [f"seed {seed}: {measures[seed]:.3g}, error {errors[seed]:.3g} %" for seed in level.seeds]
        spot(ax, float(x[:, i].mean()), float(y[:, i].mean()), "\n".join([called[recipe], *lines]))
    _scale(ax, "x", x, MaxNLocator(4))
    _scale(ax, "y", y, MaxNLocator(5))
    ax.tick_params(labelsize=_SMALL - 0.5, length=2)
    ax.grid(alpha=0.3, linewidth=0.5)


def _scale(ax: Axes, which: Literal["x", "y"], values: np.ndarray, linear: Locator) -> None:
    """Make an axis logarithmic if the means of the configurations differ by a large factor."""
    axis, means = (ax.xaxis if which == "x" else ax.yaxis), values.mean(0)
    if values.min() <= 0 or means.max() < _RATIO * means.min():
        axis.set_major_locator(linear)
        return
    ax.set(**{f"{which}scale": "log"})
    if means.max() < _DECADES * means.min():
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axis.set_major_locator(LogLocator(numticks=4))
    axis.set_minor_formatter(NullFormatter())


def _styles(recipes: Sequence[Recipe]) -> dict[str, Style]:
    return styles({recipe: title(recipe) for recipe in recipes})
