"""Scatter plot of score against step time, from runs or from the rows of a report.csv, with names at the points."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bisam.experiments.recipes.catalogue import BASELINE, METHODS
from bisam.experiments.recipes.entries import FAMILIES
from bisam.experiments.reports import labels
from bisam.experiments.reports.drawing import (
    EPOCHS,
    FAMILY_COLOURS,
    GREY,
    MANY,
    described,
    heading,
    legend,
    panels,
    plain,
    sheet,
    spread,
    styles,
    tested,
)
from bisam.experiments.reports.groups import grouped, names, title
from bisam.experiments.reports.scales import ERROR_SCALE, fit_scores, limit, share, widen_scores
from bisam.experiments.reports.svg import point, spot
from bisam.experiments.runs.folder import Finished


@dataclass(frozen=True)
class Point:
    """A method in the plot.

    Attributes:
        name: of the recipe.
        method: name of the method, which decides the family.
        time: of a step, relative to plain training.
        score: times 100.
        time_spread: standard deviation; None for one run.
        score_spread: standard deviation; None for one run.
        seeds: scores by seed, if they are known.
    """

    name: str
    method: str
    time: float
    score: float
    time_spread: float | None = None
    score_spread: float | None = None
    seeds: Mapping[int, float] = field(default_factory=dict[int, float])

    @property
    def family(self) -> str:
        """The family of the method, "" for an expression."""
        return next((entry.family for entry in METHODS.values() if entry.name == self.method), "")

    @property
    def colour(self) -> str:
        """The colour of the family."""
        return FAMILY_COLOURS.get(self.family, GREY)


@dataclass(frozen=True)
class _Panel:
    title: str
    label: str
    points: Sequence[Point]


def time(runs: Sequence[Finished]) -> Figure:
    """Test score against step time; many methods have their names at the points, and a crowd is enlarged below."""
    groups = grouped(runs)
    shown, called = panels(groups), names(groups)
    found: list[_Panel] = []
    for panel in shown:
        points: list[Point] = []
        for recipe, name, group in panel.shown:
            times, scores = [run.result["relative_time"] for run in group], tested(group, panel.headline)
            seeds = {run.recipe.seed: score for run, score in zip(group, scores, strict=True)}
            centre = float(np.mean(times)), float(np.mean(scores))
            points.append(Point(name, title(recipe), *centre, spread(times), spread(scores), seeds))
        found.append(_Panel(panel.title, f"test {panel.metric}, {EPOCHS[panel.headline]}", points))
    if len(set(called.values())) > MANY:
        return _many(found, described(_seen(found), groups))
    figure, axes = sheet(len(found), (4.8, 3.6), columns=3)
    styled = styles(called)
    for panel, ax in zip(found, axes, strict=True):
        for one in panel.points:
            style: dict[str, Any] = {"fmt": styled[one.name].marker, "color": styled[one.name].colour, "ms": 6, "lw": 1}
            ax.errorbar(one.time, one.score, one.score_spread, one.time_spread, label=plain(one.name), **style)
            _hover(ax, one)
        _finish(ax, panel)
    _scale(axes, found)
    heading(figure, _seen(found), groups)
    legend(figure, axes)
    return figure


def of_rows(path: Path, when: str = "last") -> Figure:
    """The plot from a report.csv, whose runs are not at hand: means and standard deviations without the seeds.

    Args:
        path: the file, of this version or of 0.1.
        when: the weights of the scores in a file that has several.

    Raises:
        ValueError: it is no such file, has no row, or has rows of several settings.
    """
    points, settings = list[Point](), set[tuple[str, ...]]()
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        columns = ["headline", f"test_{when}", f"test_accuracy_{when}"]
        key = next(name for name in columns if rows and f"{name}_mean" in rows[0])
        alike = Counter(row["method"] for row in rows)
        for row in rows:
            name = row["method"] if alike[row["method"]] == 1 else f"{row['method']}, {row['epochs']} epochs"
            moments = (_number(row[f"{k}_{m}"]) for m in ("mean", "std") for k in ("relative_time", key))
            relative, score, relative_spread, score_spread = moments
            wide, high = (v if isfinite(v) else None for v in (relative_spread, 100 * score_spread))
            points.append(Point(row.get("name") or name, row["method"], relative, 100 * score, wide, high))
            settings.add(tuple(row.get(name, "") for name in ("dataset", "model", "noise", "imbalance")))
        seeds = sorted({int(row["n"]) for row in rows})
        epoch = rows[0].get("headline", when)
    except (KeyError, StopIteration, UnicodeDecodeError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is no report.csv of a study with times: give one that bisam report wrote") from error
    if len(settings) > 1:
        raise ValueError(f"{path} has rows of {len(settings)} settings; from a file the figure shows a single one")
    accuracy = key.startswith("test_accuracy") or all(row.get("metric") == "accuracy" for row in rows)
    panel = _Panel("", f"test {'accuracy (%)' if accuracy else 'score × 100'}, {EPOCHS.get(epoch, epoch)}", points)
    data, model, noise, imbalance = settings.pop()
    about = [data, model, f"label noise {100 * float(noise):g} %" if noise and float(noise) else ""]
    about += [f"imbalance {imbalance}"] if imbalance else []
    n = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    said = ", ".join([*(plain(word) for word in about if word), f"mean ± standard deviation of {n} seeds"])
    return _many([panel], f"{_seen([panel])}\n{said}")


def _number(text: str) -> float:
    return float(text) if text else float("nan")


def _seen(found: Sequence[_Panel]) -> str:
    """The title: how many methods have the mean of SAM or a larger one in less time, if SAM is there."""
    said = "Test score against the time of a step"
    name, faster, others = METHODS[BASELINE].name, 0, 0
    for panel in found:
        sam = [one for one in panel.points if one.name == name]
        if len(sam) != 1:
            return said
        others += len(panel.points) - 1
        faster += sum(one.score >= sam[0].score and one.time < sam[0].time for one in panel.points if one is not sam[0])
    if not others:
        return said
    are = "is" if faster < 2 else "are"
    return f"{said}: {faster or 'none'} of {others} points {are} faster than SAM and not below its mean"


def _hover(ax: Axes, one: Point) -> None:
    name = f"{one.name}: time {one.time:.2f}"
    if one.seeds:
        point(ax, one.time, one.score, name, one.seeds)
    else:
        width = "" if one.score_spread is None else f" ± {one.score_spread:.2f}"
        spot(ax, one.time, one.score, f"{name}, score {one.score:.2f}{width}")


def _finish(ax: Axes, panel: _Panel) -> None:
    ax.set_xlabel("time of a step, relative to plain training")
    ax.set_ylabel(panel.label)
    ax.set_title(plain(panel.title, 60), fontsize=10)
    ax.grid(alpha=0.3)


def _scale(axes: Sequence[Axes], found: Sequence[_Panel]) -> None:
    means = [[one.score for one in panel.points] for panel in found]
    share(axes, "x")
    if all(panel.label.startswith("test accuracy") for panel in found) and widen_scores(axes, "y", means):
        fit_scores(axes, "y", means)
        for ax in axes:
            ax.set_ylabel(f"{ax.get_ylabel()}{ERROR_SCALE}")
    else:
        share(axes, "y")


def _many(found: Sequence[_Panel], title: str) -> Figure:
    """The panels of many methods in one column with the names at the points; a crowd is enlarged below its panel."""
    crowds = [_crowd(panel.points) for panel in found]
    count = sum(1 + bool(crowd) for crowd in crowds)
    figure = Figure(figsize=(10.0, 5.2 * count + 0.9), layout="constrained")
    axes, wholes, nears = iter(figure.subplots(count, 1, squeeze=False).flat), list[Axes](), list[Axes]()
    named: list[tuple[Axes, Sequence[Point]]] = []
    for panel, crowd in zip(found, crowds, strict=True):
        wholes.append(whole := next(axes))
        _points(whole, panel.points)
        _finish(whole, panel)
        named.append((whole, [one for one in panel.points if one not in crowd]))
        if crowd:
            nears.append(near := next(axes))
            _points(near, crowd)
            _finish(near, panel)
            near.set_title(f"{f'{panel.title}, ' if panel.title else ''}the frame enlarged", fontsize=10)
            named.append((near, crowd))
    _scale(wholes, found)
    for near, crowd in zip(nears, filter(None, crowds), strict=True):
        times, scores = [one.time for one in crowd], [one.score for one in crowd]
        limit(near, "x", *_around(times))
        limit(near, "y", *_around(scores))
    _scale(nears, [replace(panel, points=crowd) for panel, crowd in zip(found, crowds, strict=True) if crowd])
    for whole, panel, crowd in zip(wholes, found, crowds, strict=True):
        if crowd:
            near = named[next(i for i, (ax, _) in enumerate(named) if ax is whole) + 1][0]
            (left, right), (low, high) = near.get_xlim(), near.get_ylim()
            whole.plot([left, right, right, left, left], [low, low, high, high, low], color="#777777", lw=0.8)
        for family in dict.fromkeys(one.family for one in panel.points):
            label = FAMILIES.get(family, "expressions")
            if label not in wholes[0].get_legend_handles_labels()[1]:
                wholes[0].plot([], [], "s", color=FAMILY_COLOURS.get(family, GREY), ms=7, label=label)
    figure.suptitle(title, fontsize=10.5)
    legend(figure, wholes)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for ax, points in named:
        some = [one for one in points if isfinite(one.time) and isfinite(one.score)]
        if some:
            at = np.array([(one.time, one.score) for one in some])
            labels.place(ax, at, [plain(one.name, 40) for one in some], [one.colour for one in some])
    return figure


def _crowd(points: Sequence[Point]) -> list[Point]:
    """The points near the median, if there are many of them and others too; else none."""
    time, score = (float(np.nanmedian([getattr(one, name) for one in points])) for name in ("time", "score"))
    near = [one for one in points if abs(one.time / time - 1) < 0.15 and abs(one.score / score - 1) < 0.05]
    return near if MANY < len(near) < len(points) else []


def _points(ax: Axes, points: Sequence[Point]) -> None:
    for one in points:
        style: dict[str, Any] = {"fmt": "o", "ms": 4, "lw": 0.8, "alpha": 0.25, "zorder": 2}
        ax.errorbar(one.time, one.score, one.score_spread, one.time_spread, color=one.colour, **style)
        ax.plot(one.time, one.score, "o", color=one.colour, ms=4, zorder=3)
        _hover(ax, one)


def _around(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis for values, with a margin."""
    margin = 0.1 * (max(values) - min(values)) or 1.0
    return min(values) - margin, max(values) + margin
