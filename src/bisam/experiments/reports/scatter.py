"""Scatter plot of score against step time; with many methods the points are numbered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bisam.experiments.reports.drawing import (
    EPOCHS,
    MANY,
    Panel,
    Style,
    families,
    family_colour,
    heading,
    legend,
    panels,
    plain,
    sheet,
    spread,
    styles,
    tested,
)
from bisam.experiments.reports.groups import grouped, names
from bisam.experiments.runs.folder import Finished


def time(runs: Sequence[Finished]) -> Figure:
    """Test score against step time, with crowded regions enlarged."""
    groups = grouped(runs)
    shown, called = panels(groups), names(groups)
    by_time = dict.fromkeys(called[recipe] for recipe in sorted(groups, key=lambda r: np.mean(_times(groups[r]))))
    numbers = {name: i for i, name in enumerate(by_time, 1)}
    many = len(numbers) > MANY
    figure, axes = sheet(len(shown), (9.6, 7.0) if many else (4.8, 3.6), columns=2 if many else 3)
    for panel, ax in zip(shown, axes, strict=True):
        if many:
            _numbered(ax, panel, numbers, enlarge=len(shown) == 1)
        else:
            _named(ax, panel, styles(called))
        ax.set_xlabel("time of a step, relative to plain training")
        ax.set_ylabel(f"test {panel.metric}, {EPOCHS[panel.headline]}")
        ax.set_title(plain(panel.title, 60), fontsize=10)
        ax.grid(alpha=0.3)
    heading(figure, "Score against time", groups)
    if many:
        families(axes[0], groups)
        _names(figure, numbers, {called[recipe]: family_colour(recipe) for recipe in groups})
    legend(figure, axes)
    return figure


def _times(group: Sequence[Finished]) -> list[float]:
    return [run.result["relative_time"] for run in group]


def _named(ax: Axes, panel: Panel, styled: dict[str, Style]) -> None:
    for _, name, group in panel.shown:
        times, scores = _times(group), tested(group, panel.headline)
        style: dict[str, Any] = {"fmt": styled[name].marker, "color": styled[name].colour, "ms": 6, "lw": 1}
        ax.errorbar(np.mean(times), np.mean(scores), spread(scores), spread(times), label=plain(name), **style)


def _names(figure: Figure, numbers: dict[str, int], colours: dict[str, str]) -> None:
    """The names to the right of the figure, with their numbers."""
    lines = [Line2D([], [], marker="o", linestyle="none", color=colours[name], markersize=5) for name in numbers]
    labels = [f"{i:\u2007>2}  {plain(name, 60)}" for name, i in numbers.items()]  # a space as wide as a figure
    style: dict[str, Any] = {"handletextpad": 0, "frameon": False, "fontsize": 8.5}
    figure.legend(lines, labels, loc="outside right upper", **style)


def _numbered(ax: Axes, panel: Panel, numbers: dict[str, int], enlarge: bool) -> None:
    points = np.array([(np.mean(_times(group)), np.mean(tested(group, panel.headline))) for *_, group in panel.shown])
    spreads = np.array([(spread(_times(g)) or 0, spread(tested(g, panel.headline)) or 0) for *_, g in panel.shown])
    colours = [family_colour(recipe) for recipe, *_ in panel.shown]
    cloud = _Cloud(points, spreads, colours, [numbers[name] for _, name, _ in panel.shown])
    everywhere, crowded = np.arange(len(points)), (np.abs(points / np.median(points, 0) - 1) < [0.15, 0.05]).all(1)
    if not enlarge or crowded.sum() <= MANY:
        cloud.draw(ax, everywhere, everywhere)
        return
    inset = ax.inset_axes((0.17, 0.05, 0.8, 0.47))
    cloud.draw(inset, np.flatnonzero(crowded), np.flatnonzero(crowded), reach=0.065)
    ax.indicate_inset_zoom(inset, edgecolor="#777777")
    inset.tick_params(labelsize=8)
    inset.grid(alpha=0.3)
    cloud.draw(ax, everywhere, np.flatnonzero(~crowded))


@dataclass(frozen=True)
class _Cloud:
    """Points with standard deviation, colour and number."""

    points: np.ndarray
    spreads: np.ndarray
    colours: list[str]
    numbers: list[int]

    def draw(self, ax: Axes, shown: np.ndarray, numbered: np.ndarray, reach: float = 0.036) -> None:
        """Draw the points `shown`; those in `numbered` get their number, at least `reach` (in axes units) apart."""
        for i in shown:
            (x, y), (dx, dy), colour = self.points[i], self.spreads[i], self.colours[i]
            ax.errorbar(x, y, dy, dx, fmt="o", color=colour, ms=4, lw=0.8, alpha=0.3, zorder=2)
            ax.plot(x, y, "o", color=colour, ms=4, zorder=3)
        line = {"arrowstyle": "-", "color": "#999999", "lw": 0.5}
        for i, at in zip(numbered, _apart(ax, self.points[numbered], reach), strict=True):
            style: dict[str, Any] = {"fontsize": 9, "weight": "bold", "ha": "center", "va": "center", "zorder": 4}
            style["color"] = self.colours[i]
            ax.annotate(f"{self.numbers[i]}", tuple(self.points[i]), tuple(at), arrowprops=line, **style)


def _apart(ax: Axes, points: np.ndarray, reach: float) -> np.ndarray:
    """Places for labels near the points, in the axes' units: each pushes the others and the points away."""
    ax.autoscale_view()
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    size = np.array([right - left, top - bottom])
    anchors = (points - [left, bottom]) / size
    random = np.random.default_rng(0)
    places = anchors + random.normal(0, 0.004, anchors.shape) + [0, 0.02]
    for _ in range(300):
        push = np.zeros_like(places)
        for others, apart in ((places, reach), (anchors, 0.72 * reach)):
            gap = places[:, None] - others[None]
            distance = np.linalg.norm(gap * [1.4, 1.0], axis=-1)  # the axes are wider than high
            near = (distance < apart) & (distance > 0)
            push += (gap / np.maximum(distance, 1e-6)[..., None] * ((apart - distance) * near)[..., None]).sum(1)
        places = np.clip(places + 0.5 * push - 0.02 * (places - anchors), 0.012, 0.985)
    return places * size + [left, bottom]
