"""Figures: what a study shows, from run folders and nothing else.

figures.save(figures.draw("accuracy", runs), Path("accuracy.svg"))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from bisam.experiments.errors import unknown
from bisam.experiments.reports.curves import curves as curves, flips as flips, gradients as gradients
from bisam.experiments.reports.drawing import (
    BLACK,
    BLUE,
    MANY,
    ORANGE,
    RED,
    SKY,
    Style,
    families,
    family_colour,
    heading,
    legend,
    panels,
    plain,
    rendered as rendered,
    save as save,
    sheet,
    spread,
    styles,
    tested,
)
from bisam.experiments.reports.groups import grouped, names, perturbed
from bisam.experiments.reports.scatter import time as time
from bisam.experiments.reports.tuning import grid as grid, radius as radius, varied, with_radius
from bisam.experiments.runs.folder import Finished
from bisam.objectives import NegLog, Tanh


def accuracy(runs: Sequence[Finished]) -> Figure:
    """Test score by method, with the best-validation and with the last weights; many methods from best to worst."""
    groups = grouped(runs)
    shown, styled = panels(groups), styles(names(groups))
    many = len(styled) > MANY
    height = max(len(panel.shown) for panel in shown) * (0.24 if many else 0.42) + 0.9
    figure, axes = sheet(len(shown), (5.6 if many else 4.8, height))
    for panel, ax in zip(shown, axes, strict=True):
        rows = sorted(panel.shown, key=lambda row: np.mean(tested(row[2], "last"))) if many else panel.shown[::-1]
        for i, (recipe, name, group) in enumerate(rows):
            colour = family_colour(recipe) if many else styled[name].colour
            for when, marker, at in (("best", "o", i + 0.15), ("last", "D", i - 0.15)):
                values = tested(group, when)
                style: dict[str, Any] = {"color": colour, "mfc": colour if when == "last" else "white", "ms": 5}
                ax.errorbar(np.mean(values), at, xerr=spread(values), fmt=marker, lw=1.6, **style)
                if len(values) > 1:
                    ax.plot(values, np.full(len(values), at), "|", color=colour, alpha=0.7, ms=7, zorder=1)
        ax.set_yticks(range(len(rows)), [plain(name) for _, name, _ in rows], fontsize=8 if many else 9)
        ax.set_ylim(-0.6, len(rows) - 0.4)
        ax.set_xlabel(f"test {panel.metric}")
        ax.set_title(plain(panel.title, 60), fontsize=10)
        ax.grid(alpha=0.3)
    axes[0].plot([], [], "o", color=BLACK, mfc="white", ms=5, label="best validation epoch")
    axes[0].plot([], [], "D", color=BLACK, ms=5, label="last epoch")
    if any(len(group) > 1 for group in groups.values()):
        axes[0].plot([], [], "|", color=BLACK, alpha=0.7, ms=7, label="single seeds")
    if many:
        families(axes[0], groups)
    heading(figure, "Test score", groups)
    legend(figure, axes)
    return figure


def figure1(runs: Sequence[Finished] = ()) -> Figure:
    """BiSAM's two lower bounds of the 0-1 loss as functions of a margin, and two upper bounds (Xie et al., 2024).

    No runs are needed.
    """
    x = torch.linspace(-3, 3, 601, dtype=torch.float64)
    drawn = {
        "BiSAM (-log): 1 − log(1 + exp(γ − F))": (NegLog().phi(x), Style(BLUE, "-")),
        "BiSAM (tanh): tanh(αF), α = 1": (Tanh(alpha=1.0).phi(x), Style(SKY, "--")),
        "hinge: max(0, 1 + F)": (F.relu(1 + x), Style(ORANGE, "-.")),
        "cross-entropy: log(1 + exp F) / log 2": (F.softplus(x) / log(2), Style(RED, (0, (1, 1)))),
    }
    figure, (ax,) = sheet(1, (6.4, 4.4))
    ax.plot([-3, 0, 0, 3], [0, 0, 1, 1], color=BLACK, lw=2, label="0-1 loss: 1 where F > 0")
    for name, (y, style) in drawn.items():
        ax.plot(x, y, color=style.colour, ls=style.dashes, lw=1.8, label=name)
    ax.set_xlim(-3, 3)
    ax.set_xlabel("margin F of a wrong class over the label")
    ax.set_ylabel("loss")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=9)
    ax.set_title("Lower bounds of the 0-1 loss, for the ascent, and upper bounds", fontsize=11)
    return figure


figure2 = flips


_FIGURES: dict[
    str, tuple[str, Callable[[Sequence[Finished]], Figure], Callable[[Sequence[Finished]], list[Finished]]]
] = {
    "accuracy": ("Test score by method", accuracy, list),
    "curves": ("Validation score and training loss by epoch", curves, list),
    "figure1": ("BiSAM's lower bounds of the 0-1 loss, and upper bounds", figure1, list),
    "figure2": ("Training samples that the perturbation flips", flips, perturbed),
    "flips": ("Training samples that the perturbation flips", flips, perturbed),
    "gradients": ("Validation score against gradients and against time", gradients, list),
    "grid": ("Validation score against rho, mu and alpha", grid, varied),
    "radius": ("Validation score against the radius", radius, with_radius),
    "time": ("Test score against the time of a step", time, list),
}
WHAT = {name: what for name, (what, _, _) in _FIGURES.items()}
"""What the figures show, by their names."""
RUNLESS = frozenset({"figure1"})
"""Those that need no runs."""


def usable(name: str, runs: Sequence[Finished]) -> list[Finished]:
    """The runs that a figure shows; where there are none it cannot be drawn, unless it is one of `RUNLESS`."""
    return _FIGURES[name][2](runs)


def draw(name: str, runs: Sequence[Finished] = ()) -> Figure:
    """A figure by its name.

    Raises:
        ValueError: the name is unknown, or there is no run that the figure shows.
    """
    if name not in _FIGURES:
        raise unknown("figure", name, _FIGURES)
    what, function, _ = _FIGURES[name]
    if name not in RUNLESS and not usable(name, runs):
        raise ValueError(f"there is no run for {name}: {what}")
    return function(runs)
