"""Figures of a search: its history, the scores against each setting, and the importances of the settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from bisam.experiments.reports.drawing import BLACK, BLUE, GREY, ORANGE, RED, legend, plain, sheet, spread
from bisam.experiments.reports.svg import spot
from bisam.experiments.runs.results import TITLES
from bisam.experiments.tuning.search import Search
from bisam.experiments.tuning.space import Choices, Range
from bisam.experiments.tuning.trials import Trial, ranked, settings, written

_FAR = 25.0
"""Scores so far below the best, times 100, are failures: showing how far below would compress the rest."""
CAPTIONS = {
    "history": "Validation scores in the order of the trials, and the best so far",
    "settings": "Validation scores against each setting",
    "importances": "Share of each setting in what tells the best trials from the others",
}
"""Captions of the figures, by name."""


def drawn(search: Search, trials: Sequence[Trial], importances: Mapping[str, float]) -> dict[str, Figure]:
    """The figures for which there are enough trials, by name.

    Args:
        search: what was searched.
        trials: all trials.
        importances: see `Database.importances`.
    """
    if not ranked(trials):
        return {}
    found = {"history": history(trials), "settings": against_settings(search, trials)}
    return found | ({"importances": importance(importances, len(ranked(trials)))} if importances else {})


def history(trials: Sequence[Trial]) -> Figure:
    """Score of each trial by its number, and the best score so far.

    Raises:
        ValueError: no trial is complete.
    """
    best, floor = _best(trials), _floor(trials)
    figure, (ax,) = sheet(1, (7.5, 3.6))
    _points(ax, trials, {trial.number: trial.number for trial in trials}, floor)
    so_far: dict[int, float] = {}
    for trial in trials:
        if trial.state == "complete":
            so_far[trial.number] = max(100 * trial.score, *so_far.values(), -np.inf)
    so_far[trials[-1].number] = 100 * best.score
    ax.plot(list(so_far), list(so_far.values()), color=BLACK, lw=1.2, drawstyle="steps-post", label="best so far")
    ax.set_xlabel("trial")
    ax.set_ylabel(_axis(best))
    ax.grid(alpha=0.3)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(
        f"Best validation {_metric(best)} {100 * best.score:.2f} in trial {best.number} of {len(trials)}", fontsize=10.5
    )
    legend(figure, [ax])
    return figure


def against_settings(search: Search, trials: Sequence[Trial]) -> Figure:
    """Score against each setting, a panel for each; the best trial is marked.

    Raises:
        ValueError: no trial is complete.
    """
    best, floor = _best(trials), _floor(trials)
    figure, axes = sheet(len(search.space), (4.2, 3.4), sharey=True)
    for (name, dimension), ax in zip(search.space.items(), axes, strict=True):
        _points(ax, trials, {trial.number: _place(dimension, trial.values[name]) for trial in trials}, floor)
        at = _place(dimension, best.values[name])
        own: dict[str, Any] = {"color": ORANGE, "ms": 13, "mec": BLACK, "mew": 0.8, "zorder": 5}
        ax.plot(at, 100 * best.score, "*", label="best", **own)
        if isinstance(dimension, Range):
            if dimension.log:
                ax.set_xscale("log")
                ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                ax.xaxis.set_major_formatter("{x:g}")
                ax.xaxis.set_minor_formatter(NullFormatter())
        else:
            ax.set_xticks(range(len(dimension.values)), [plain(written(value), 12) for value in dimension.values])
        ax.set_xlabel(name)
        ax.grid(alpha=0.3)
    for ax in axes[:: min(3, len(axes))]:
        ax.set_ylabel(_axis(best))
    figure.suptitle(f"Best at {settings(best.values)}", fontsize=10.5)
    legend(figure, axes)
    return figure


def importance(importances: Mapping[str, float], trials: int) -> Figure:
    """A bar for each setting.

    Args:
        importances: shares by name.
        trials: number of trials that they are computed from.
    """
    figure, (ax,) = sheet(1, (6.4, 0.4 * len(importances) + 0.9))
    names = sorted(importances, key=lambda name: importances[name])
    ax.barh(range(len(names)), [100 * importances[name] for name in names], color=BLUE, height=0.6)
    ax.set_yticks(range(len(names)), names)
    ax.set_xlabel("share (%)")
    ax.set_xlim(0, 100)
    ax.grid(alpha=0.3, axis="x")
    ax.set_axisbelow(True)
    largest = f"{names[-1]} {100 * importances[names[-1]]:.0f} %"
    figure.suptitle(f"Importance of the settings: {largest} (PED-ANOVA of {trials} trials)", fontsize=10.5)
    return figure


def _points(ax: Axes, trials: Sequence[Trial], xs: Mapping[int, float], floor: float) -> None:
    """Points of all trials: complete ones with the standard deviation over seeds, pruned and diverged ones."""
    shown: dict[str, list[tuple[float, float]]] = {name: [] for name in ("pruned", "diverged", "below", "pruned below")}
    for trial in trials:
        x = xs[trial.number]
        if trial.state == "complete":
            score = 100 * trial.score
            if score < floor:
                shown["below"].append((x, floor))
                continue
            width = spread([100 * one for one in trial.scores]) or 0.0
            style: dict[str, Any] = {"color": BLUE, "ms": 5, "elinewidth": 0.8}
            ax.errorbar(x, score, width, fmt="o", label=_label(trial), **style)
            scores = ", ".join(f"{100 * one:.2f}" for one in trial.scores)
            spot(ax, x, score, f"trial {trial.number}: {settings(trial.values)}\nvalidation {scores}")
        elif trial.state == "pruned" and trial.reported:
            last = 100 * trial.reported[max(trial.reported)]
            shown["pruned" if last >= floor else "pruned below"].append((x, max(last, floor)))
        elif trial.state == "diverged":
            shown["diverged"].append((x, floor))
    looks: dict[str, tuple[str, str, str]] = {
        "pruned": ("x", GREY, "pruned, at its last epoch"),
        "diverged": ("v", RED, "diverged"),
        "below": ("v", BLUE, f"below {floor:.0f}"),
        "pruned below": ("v", GREY, f"pruned below {floor:.0f}"),
    }
    for state, points in shown.items():
        marker, colour, label = looks[state]
        if points:
            ax.plot(*zip(*points, strict=True), marker, color=colour, ms=6, mfc="none", label=label)


def _label(trial: Trial) -> str:
    seeds = len(trial.scores)
    return "complete" if seeds == 1 else f"mean ± standard deviation of {seeds} seeds"


def _place(dimension: Range | Choices, value: Any) -> float:
    return float(value) if isinstance(dimension, Range) else float(dimension.values.index(value))


def _floor(trials: Sequence[Trial]) -> float:
    """The lowest score that is shown at its place."""
    scores = [100 * trial.score for trial in ranked(trials)]
    near = [score for score in scores if score >= scores[0] - _FAR]
    return min(near) - 1 if len(near) < len(trials) else min(near)


def _best(trials: Sequence[Trial]) -> Trial:
    if not (found := ranked(trials)):
        raise ValueError("no trial is complete: there is no score to draw")
    return found[0]


def _metric(trial: Trial) -> str:
    return TITLES.get(trial.metric, trial.metric)


def _axis(trial: Trial) -> str:
    return "validation accuracy (%)" if trial.metric == "accuracy" else f"validation {_metric(trial)} × 100"
