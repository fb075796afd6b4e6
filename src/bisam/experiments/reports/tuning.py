"""Figures of the validation score against tuned settings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bisam.experiments.reports.choice import validation_score
from bisam.experiments.reports.drawing import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    Panel,
    Style,
    family_colour,
    heading,
    legend,
    panels,
    plain,
    sheet,
    spread,
    with_unit,
)
from bisam.experiments.reports.groups import Place, grouped, metric, perturbed, place, places, title
from bisam.experiments.reports.scales import share
from bisam.experiments.reports.svg import point
from bisam.experiments.runs.folder import Finished

_LINES = (
    Style(BLUE, "-", "o"),
    Style(RED, "--", "s"),
    Style(GREEN, "-.", "D"),
    Style(ORANGE, ":", "P"),
    Style(SKY, "-", "v"),
    Style(PURPLE, "--", "X"),
    Style(BLACK, "-.", "^"),
)


def radius(runs: Sequence[Finished]) -> Figure:
    """Validation score against the radius: a small panel for each method, in a row for each metric.

    Triangles mark scores far below the others.

    Raises:
        ValueError: no run has a radius.
    """
    groups = grouped(with_radius(runs))
    if not groups:
        raise ValueError("radius shows runs that have one, and there is none")
    titles, rows = places(groups), defaultdict[str, _Points](lambda: defaultdict(list))
    for recipe, group in groups.items():
        values = [100 * validation_score(run) for run in group]
        seeds = {run.recipe.seed: value for run, value in zip(group, values, strict=True)}
        one = recipe, recipe.setting("rho"), np.mean(values), spread(values) or 0, seeds
        rows[metric(group[0])][title(recipe)].append(one)
    methods = list(dict.fromkeys(title(recipe) for recipe in groups))
    columns, share = (6, "all") if len(rows) == 1 else (len(methods), "row")
    figure, found = sheet(len(rows) * len(methods), (2.2, 1.8), columns=columns, sharey=share)
    for i, (name, points) in enumerate(rows.items()):
        axes = found[i * len(methods) :][: len(methods)]
        if len(rows) > 1:
            axes[0].set_ylabel(with_unit(name), fontsize=8)
        _radii(dict(zip(methods, axes, strict=True)), points, titles)
    for ax in found[-min(columns, len(methods)) :]:
        ax.set_xlabel("rho", fontsize=8)
    figure.supylabel("validation score" + (" × 100" if len(rows) == 1 else ""), fontsize=9)
    heading(figure, "Validation score of each method against rho, or the setting in its place", groups)
    if len(titles) > 1:
        legend(figure, found)
    return figure


_Points = dict[str, list[Any]]
"""Maps each method to its points: recipe, radius, mean and standard deviation of the scores, the score of each seed."""


def _radii(axes: Mapping[str, Axes], points: _Points, titles: Mapping[Place, str]) -> None:
    """Draw the scores of one metric, each method on its axes, with a line for each place."""
    lines = [(method, at, [p for p in each if place(p[0]) == at]) for method, each in points.items() for at in titles]
    lines = [(method, at, line) for method, at, line in lines if line]
    scores = defaultdict[Place, list[float]](list)
    for _, at, line in lines:
        scores[at] += [centre for _, _, centre, *_ in line]
    high, floor = max(map(max, scores.values())), min(map(_least_shown, scores.values()))
    ends = [centre - width for _, _, line in lines for _, _, centre, width, _ in line if centre >= floor]
    floor = min(floor, *ends)  # what lies within the error bars of others is shown where it is
    for method, at, line in lines:
        ax, i = axes[method], list(titles).index(at)
        style = _LINES[i % len(_LINES)] if len(titles) > 1 else Style(family_colour(line[0][0]))
        rhos, centres, widths = (np.array(column) for column in list(zip(*line, strict=True))[1:4])
        seen = centres >= floor
        ax.plot(rhos, np.maximum(centres, floor), color=style.colour, ls=style.dashes, lw=1, label=plain(titles[at]))
        ax.errorbar(rhos[seen], centres[seen], widths[seen], fmt=style.marker, color=style.colour, ms=3.5, capsize=2)
        for _, rho, centre, _, seeds in line:
            name = f"{method}, rho {rho:g}" + (f", {titles[at]}" if titles[at] else "")
            point(ax, rho, max(centre, floor), name, seeds)
        ax.plot(rhos[~seen], np.full((~seen).sum(), floor), "v", color=style.colour, ms=5, mfc="white")
    for method, ax in axes.items():
        if method not in points:
            ax.axis("off")
            continue
        _ticks(ax, sorted({rho for _, rho, *_ in points[method]}), 7)
        ax.set_ylim(floor - 2, high + 3)
        ax.set_title(plain(method, 24), fontsize=8)


def _least_shown(scores: Sequence[float]) -> float:
    """The end of the axis: scores more than 25 below the best are failures, if most are not.

    Showing how far below they are would compress the rest.
    """
    best, least = max(scores), min(scores)
    return least if np.median(scores) < best - 25 else max(best - 25, least)


def grid(runs: Sequence[Finished]) -> Figure:
    """Validation score against each of rho, mu and alpha that varies, one line for each value of the others.

    Raises:
        ValueError: none of them varies.
    """
    groups = grouped(varied(runs))
    shown = [(panel, name, lines) for panel in panels(groups) for name in _TUNED if (lines := _lines(panel, name))]
    if not shown:
        raise ValueError("grid shows runs that differ in rho, mu or alpha, and there are none")
    several, each = len(places(groups)), len({name for _, name, _ in shown})
    columns = each if len(shown) == several * each else 3  # a row for each place, if all have the same settings
    figure, axes = sheet(len(shown), (5.6, 3.6), columns=columns, sharey=several == 1)
    for (panel, name, lines), ax in zip(shown, axes, strict=True):
        for i, (label, points) in enumerate(lines.items()):
            xs, centres, widths = (np.array(column) for column in list(zip(*points, strict=True))[:3])
            style: dict[str, Any] = {**_LINES[i % len(_LINES)].line, "capsize": 2, "linewidth": 1.2}
            ax.errorbar(xs, centres, widths, label=plain(label, 40), **style)
            for x, centre, _, seeds in points:
                point(ax, x, centre, f"{label}, {name} {x:g}", seeds)
        _ticks(ax, sorted({x for points in lines.values() for x, *_ in points}), 8)
        ax.set_xlabel(name)
        ax.set_ylabel(f"validation {panel.metric}")
        ax.set_title(plain(panel.title, 60), fontsize=10)
    if several > 1:
        for each_name in dict.fromkeys(name for _, name, _ in shown):
            share([ax for (_, name, _), ax in zip(shown, axes, strict=True) if name == each_name], "y")
    heading(figure, f"Validation score against {_and(dict.fromkeys(name for _, name, _ in shown))}", groups)
    for ax in axes:
        ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False)
    return figure


def _and(names: Iterable[str]) -> str:
    *before, last = names
    return f"{', '.join(before)} and {last}" if before else last


def varied(runs: Sequence[Finished]) -> list[Finished]:
    """The runs of methods whose runs differ in rho, mu or alpha."""
    values: dict[str, set[Any]] = defaultdict(set)
    for run in perturbed(runs):
        values[title(run.recipe)].add(tuple(run.recipe.setting(name) for name in _TUNED))
    return [run for run in perturbed(runs) if len(values[title(run.recipe)]) > 1]


_TUNED = ("rho", "mu", "alpha")
_LEVEL = 33
"""Characters of labels, all as wide as the widest two neighbours, above which some would overlap in a small panel."""


def _lines(panel: Panel, name: str) -> dict[str, list[tuple[float, float, float, dict[int, float]]]]:
    """Values of a setting with mean and standard deviation of the score, by method and values of the other settings."""
    found: dict[str, list[tuple[float, float, float, dict[int, float]]]] = defaultdict(list)
    for recipe, _, group in panel.shown:
        if recipe.setting(name) is None:
            continue
        kin = [other for other, *_ in panel.shown if title(other) == title(recipe)]
        others = [o for o in _TUNED if o != name and len({other.setting(o) for other in kin}) > 1]
        values = [100 * validation_score(run) for run in group]
        label = ", ".join([title(recipe), *(f"{other} {recipe.setting(other):g}" for other in others)])
        seeds = {run.recipe.seed: value for run, value in zip(group, values, strict=True)}
        found[label].append((recipe.setting(name), float(np.mean(values)), spread(values) or 0.0, seeds))
    return {label: sorted(points, key=lambda point: point[:3]) for label, points in found.items() if len(points) > 1}


def _ticks(ax: Axes, values: Sequence[float], size: float) -> None:
    """Make the axis logarithmic with a tick at each value, 0 included."""
    least = min([value for value in values if value] or [1.0])
    ax.set_xscale("symlog", base=2, linthresh=least)
    ax.set_xlim(-0.2 * least if 0 in values else 0.8 * least, 1.3 * max(values[-1], least))
    labels = [f"{value:g}" for value in values]
    widest = max([(len(a) + len(b)) / 2 for a, b in pairwise(labels)], default=0)
    ax.set_xticks(values, labels, fontsize=size, rotation=90 if len(labels) * widest > _LEVEL else 0)
    ax.minorticks_off()
    ax.grid(alpha=0.3)


def with_radius(runs: Sequence[Finished]) -> list[Finished]:
    """The runs whose method has a radius as its setting."""
    return [run for run in perturbed(runs) if run.recipe.setting("rho") is not None]
