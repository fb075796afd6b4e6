"""Figures of a study, drawn from run folders only.

runs = arranged(run for run in finished(Path("runs/digits")) if isinstance(run, Finished))
figures.save(figures.draw("accuracy", runs), Path("accuracy.svg"))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bisam.experiments.errors import unknown
from bisam.experiments.reports.ascents import ascents as ascents, usable as with_ascents
from bisam.experiments.reports.curves import ball as ball, curves as curves, flips as flips, gradients as gradients
from bisam.experiments.reports.drawing import (
    BLACK,
    EPOCHS,
    MANY,
    Panel,
    extreme,
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
    titled,
)
from bisam.experiments.reports.groups import grouped, measured, names, perturbed
from bisam.experiments.reports.radii import radii as radii, varied as with_several_radii
from bisam.experiments.reports.scales import ERROR_SCALE, fit_scores, share, widen_scores
from bisam.experiments.reports.scatter import time as time
from bisam.experiments.reports.svg import point
from bisam.experiments.reports.tuning import grid as grid, radius as radius, varied, with_radius
from bisam.experiments.runs.folder import Finished
from bisam.experiments.studies.study import Regret


def accuracy(runs: Sequence[Finished]) -> Figure:
    """Test score by method: the headline with its seeds, and paler the other one; many methods are sorted."""
    groups = grouped(runs)
    shown, styled = panels(groups), styles(names(groups))
    many = len(styled) > MANY
    height = max(len(panel.shown) for panel in shown) * (0.24 if many else 0.42) + 0.9
    figure, axes = sheet(len(shown), (5.6 if many else 4.8, height))
    means, ends = list[float](), list[float]()
    for panel, ax in zip(shown, axes, strict=True):
        rows = panel.shown[::-1]
        if many:
            rows = sorted(panel.shown, key=lambda row: np.mean(tested(row[2], panel.headline)))
        for i, (recipe, name, group) in enumerate(rows):
            colour = family_colour(recipe) if many else styled[name].colour
            for when, at in ((panel.headline, i + 0.15), (_OTHER[panel.headline], i - 0.15)):
                values, first = tested(group, when), when == panel.headline
                style: dict[str, Any] = {
                    "color": colour,
                    "mfc": colour if first else "white",
                    "ms": 5 if first else 3.5,
                }
                style |= {"lw": 1.6 if first else 0.8, "alpha": 1.0 if first else 0.55}
                centre, width = float(np.mean(values)), spread(values)
                ax.errorbar(centre, at, xerr=width, fmt=_MARKERS[when], **style)
                if len(values) > 1 and first:
                    ax.plot(values, np.full(len(values), at), "|", color=colour, alpha=0.7, ms=7, zorder=1)
                seeds = [run.recipe.seed for run in group]
                point(ax, centre, at, f"{name}, {EPOCHS[when]}", dict(zip(seeds, values, strict=True)))
                means.append(centre)
                ends += [*values, centre - (width or 0), centre + (width or 0)]
        width, size = (48, 8) if many else (30, 9)
        ax.set_yticks(range(len(rows)), [plain(name, width) for _, name, _ in rows], fontsize=size)
        ax.set_ylim(-0.6, len(rows) - 0.4)
        ax.set_xlabel(f"test {panel.metric}")
        ax.set_title(_highest(panel), fontsize=10)
        ax.grid(alpha=0.3)
    if all(panel.metric.startswith("accuracy") for panel in shown) and widen_scores(axes, "x", means):
        fit_scores(axes, "x", ends)
        for ax in axes:
            ax.set_xlabel(ax.get_xlabel() + ERROR_SCALE.replace("\n", " "))
    else:
        share(axes, "x")
    for which in dict.fromkeys(panel.headline for panel in shown):
        axes[0].plot([], [], _MARKERS[which], color=BLACK, ms=5, label=f"{EPOCHS[which]} (headline)")
        other = _OTHER[which]
        style = {"color": BLACK, "mfc": "white", "ms": 3.5, "alpha": 0.55}
        axes[0].plot([], [], _MARKERS[other], label=EPOCHS[other], **style)
    if any(len(group) > 1 for group in groups.values()):
        axes[0].plot([], [], "|", color=BLACK, alpha=0.7, ms=7, label="single seeds")
    if many:
        families(axes[0], groups)
    heading(figure, "Test score of each method" + (", sorted by its mean" if many else ""), groups)
    legend(figure, axes)
    return figure


def _highest(panel: Panel) -> str:
    """The title of a panel, and the method with the highest mean, if there are several."""
    means = {name: float(np.mean(tested(group, panel.headline))) for _, name, group in panel.shown}
    return titled(panel.title, extreme("highest mean", means, max), 36)  # beside a panel stand the methods' names


_MARKERS = {"best": "o", "last": "D"}
_OTHER = {"best": "last", "last": "best"}


figure2 = flips


_FIGURES: dict[
    str, tuple[str, Callable[[Sequence[Finished]], Figure], Callable[[Sequence[Finished]], list[Finished]]]
] = {
    "accuracy": ("Test score by method", accuracy, list),
    "ascents": ("Flips, cosines and rise of the error of five ascents on the same networks", ascents, with_ascents),
    "ball": ("Error at the weights, and the largest error in a ball around them", ball, measured),
    "curves": ("Validation score and training loss by epoch", curves, list),
    "figure2": ("Training samples that the perturbation flips", flips, perturbed),
    "flips": ("Training samples that the perturbation flips", flips, perturbed),
    "gradients": ("Validation score against gradients and against time", gradients, list),
    "grid": ("Validation score against rho, mu and alpha", grid, varied),
    "radii": ("Test score against the radius, with 95 % intervals", radii, with_several_radii),
    "radius": ("Validation score against the radius", radius, with_radius),
    "time": ("Test score against step time", time, list),
}
CAPTIONS = {name: caption for name, (caption, _, _) in _FIGURES.items()}
"""Captions of the figures, by name."""


def usable(name: str, runs: Sequence[Finished]) -> list[Finished]:
    """The runs that a figure shows; it cannot be drawn without any."""
    return _FIGURES[name][2](runs)


def draw(name: str, runs: Sequence[Finished], regret: Regret | None = None) -> Figure:
    """A figure by its name.

    Args:
        name: of the figure.
        runs: finished runs.
        regret: of the study, whose optima the figure of all radii marks.

    Raises:
        ValueError: the name is unknown, or there is no run that the figure shows.
    """
    if name not in _FIGURES:
        raise unknown("figure", name, _FIGURES)
    caption, function, _ = _FIGURES[name]
    if not usable(name, runs):
        raise ValueError(f"there is no run for {name}: {caption}")
    return radii(runs, {} if regret is None else regret.optima) if name == "radii" else function(runs)
