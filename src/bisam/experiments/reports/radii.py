"""Radii: the headline test score against the radius, a line for each method.

    for line in lines(grouped(runs)):
        line.optimum, line.scores(line.optimum)        # the radius with the largest mean score; scores by seed

A band is Student's 95 % interval of the mean over the seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isclose, log2, log10
from statistics import mean, median
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.reports.differences import score
from bisam.experiments.reports.drawing import Panel, Style, heading, legend, panels, plain, sheet, styles, titled
from bisam.experiments.reports.groups import Groups, Place, grouped, place, title
from bisam.experiments.reports.scales import ERROR_SCALE, fit_scores, share, widen_scores
from bisam.experiments.reports.significance import student
from bisam.experiments.reports.svg import point
from bisam.experiments.runs.folder import Finished

_SAME = 0.03  # relative difference of two radii that stand for the same multiple: grids by sqrt(2) are rounded
_NEAR = 4.0  # points below the best mean score that the lower panels show


@dataclass(frozen=True)
class Line:
    """The runs of a method in a place, by the setting that is varied: the radius, or the weight decay of SGD.

    Attributes:
        place: data set, network and label noise.
        method: name of the method.
        recipes: by the value of the setting, in ascending order.
        groups: the runs of each recipe.
    """

    place: Place
    method: str
    recipes: dict[float, Recipe]
    groups: Groups

    @property
    def key(self) -> str:
        """The method as recipes name it."""
        return next(iter(self.recipes.values())).method

    def scores(self, value: float) -> dict[int, float]:
        """Headline test scores times 100 with a value of the setting, by seed."""
        runs = self.groups[self.recipes[value]]
        return {run.recipe.seed: 100 * score(run) for run in runs}

    @property
    def seeds(self) -> set[int]:
        """The seeds that all values have."""
        return set.intersection(*(set(self.scores(value)) for value in self.recipes))

    @property
    def optimum(self) -> float:
        """The value with the largest mean score over the seeds that all values have; of equal ones the smallest.

        If no seed has all values, as in a study that has just begun, it is that of each value's own seeds.
        """
        common = self.seeds

        def average(value: float) -> float:
            return mean(s for seed, s in self.scores(value).items() if seed in common or not common)

        return max(self.recipes, key=lambda value: (round(average(value), 9), -value))

    def marked(self, optima: Mapping[tuple[str, float], float]) -> float:
        """The optimum that other runs have found, or else that of these."""
        given = optima.get((self.key, self.place.noise))
        found = None if given is None else self.times(1, given)
        return self.optimum if found is None else found

    @property
    def at_end(self) -> bool:
        """Whether the optimum is the smallest or the largest value."""
        return self.optimum in (min(self.recipes), max(self.recipes))

    def times(self, factor: float, value: float) -> float | None:
        """The value that is `factor` times another one, or None if there is none."""
        return next((v for v in self.recipes if isclose(v, factor * value, rel_tol=_SAME)), None)


def lines(groups: Groups) -> list[Line]:
    """The lines of methods that have a radius, in the order of the groups."""
    return _lines(groups, lambda recipe: None if recipe.is_plain else recipe.setting("rho"))


def plain_lines(groups: Groups) -> list[Line]:
    """The lines of plain training, by the weight decay."""
    return _lines(groups, lambda recipe: recipe.weight_decay if recipe.is_plain else None)


def _lines(groups: Groups, setting: Any) -> list[Line]:
    found: dict[tuple[Place, str], dict[float, Recipe]] = {}
    for recipe in groups:
        if (value := setting(recipe)) is not None:
            found.setdefault((place(recipe), title(recipe)), {}).setdefault(value, recipe)
    return [Line(at, method, dict(sorted(recipes.items())), groups) for (at, method), recipes in found.items()]


def varied(runs: Iterable[Finished]) -> list[Finished]:
    """The runs of methods with several radii in a place, and of plain training in these places."""
    groups = grouped(runs)
    several = [line for line in lines(groups) if len(line.recipes) > 1]
    some = {recipe for line in several for recipe in line.recipes.values()}
    at = {line.place for line in several}
    some |= {recipe for line in plain_lines(groups) if line.place in at for recipe in line.recipes.values()}
    return [run for run in runs if replace(run.recipe, seed=0) in some]


def radii(runs: Sequence[Finished], optima: Mapping[tuple[str, float], float] = MappingProxyType({})) -> Figure:
    """Headline test score against the radius: above the whole range, below the scores near the best one.

    Where scores come near 100 %, the upper panels are logarithmic in the error.

    Filled markers are the optimum, open ones twice the optimum. Plain training is a horizontal line, at the weight
    decay that is best by the same rule.

    Args:
        runs: finished runs.
        optima: the optimum of a method, as recipes name it, at a level of label noise, where other runs have found it.

    Raises:
        ValueError: no method has several radii.
    """
    groups = grouped(varied(runs))
    if not groups:
        raise ValueError("radii shows methods that were trained with several radii, and there is none")
    shown, drawn = panels(groups), lines(groups)
    called = styles({recipe: title(recipe) for recipe in groups})
    scales = _scales(drawn)
    at_each = dict.fromkeys(line.place for line in drawn)
    together = _overlap([line for line in drawn if line.place == at] for at in at_each)
    figure, axes = sheet(2 * len(shown), (5.4, 3.2), columns=len(shown))
    for panel, whole, near in zip(shown, axes[: len(shown)], axes[len(shown) :], strict=True):
        at = place(panel.shown[0][0])
        mine = [line for line in drawn if line.place == at]
        best = max(mean(line.scores(line.optimum).values()) for line in mine)
        for ax in (whole, near):
            for line in mine:
                _draw(ax, line, line.marked(optima), called[line.method], scales[line.method])
            for line in plain_lines(groups):
                if line.place == at:
                    _draw_plain(ax, line, called[line.method])
            _finish(ax, panel, drawn if together else mine, scales)
            if len(shown) > 1 and not together:
                ax.set_xlabel("radius rho (each panel has its own scale)")
        whole.set_title(titled(panel.title, _optima(mine, optima, scales)), fontsize=10)
        near.set_ylim(best - _NEAR, best + 0.25 * _NEAR)
        own = " (each panel has its own scale)" if len(shown) > 1 else ""
        near.set_title(titled(panel.title, f"near the best score{own}"), fontsize=10)
    whole = axes[: len(shown)]
    means = [np.asarray(line.get_ydata(), float) for ax in whole for line in ax.get_lines()]
    if all(panel.metric.startswith("accuracy") for panel in shown) and widen_scores(whole, "y", means):
        fit_scores(whole, "y", means)
        for ax in whole:
            ax.set_ylabel(ax.get_ylabel() + ERROR_SCALE)
    else:
        share(whole, "y")
    axes[0].plot([], [], "o", color="black", ms=7, label="optimum")
    axes[0].plot([], [], "o", color="black", ms=7, mfc="white", label="twice the optimum")
    heading(
        figure, "Test score of each method with radii from too small to too large", groups, "mean and 95 % interval"
    )
    legend(figure, axes)
    return figure


def _draw(ax: Axes, line: Line, optimum: float, style: Style, scale: float) -> None:
    rhos = list(line.recipes)
    found = [student(list(line.scores(rho).values())) for rho in rhos]
    xs, centres = [rho / scale for rho in rhos], [one.mean for one in found]
    label = line.method if scale == 1 else f"{line.method} (rho / {scale:g})"
    drawn: dict[str, Any] = {**style.line, "markersize": 3, "linewidth": 1.3}
    ax.plot(xs, centres, **drawn, label=plain(label))
    ax.fill_between(xs, [one.low for one in found], [one.high for one in found], color=style.colour, alpha=0.13, lw=0)
    for rho, x, centre in zip(rhos, xs, centres, strict=True):
        point(ax, x, centre, f"{line.method}, rho {rho:g}", line.scores(rho))
    ax.plot(optimum / scale, centres[rhos.index(optimum)], style.marker, color=style.colour, ms=8, zorder=3)
    if (twice := line.times(2, optimum)) is not None:
        own: dict[str, Any] = {"color": style.colour, "ms": 8, "mfc": "white", "zorder": 3}
        ax.plot(twice / scale, centres[rhos.index(twice)], style.marker, **own)


def _optima(mine: Sequence[Line], optima: Mapping[tuple[str, float], float], scales: dict[str, float]) -> str:
    """The words on the best radii of a panel, as its axis shows them."""
    found = sorted(line.marked(optima) / scales[line.method] for line in mine)
    return f"optima at {found[0]:g}" + (f" to {found[-1]:g}" if found[-1] > found[0] else "")


def _draw_plain(ax: Axes, line: Line, style: Style) -> None:
    one = student(list(line.scores(line.optimum).values()))
    label = line.method if len(line.recipes) == 1 else f"{line.method} (weight decay {line.optimum:g})"
    ax.axhline(one.mean, color=style.colour, ls=style.dashes, lw=1.3, label=plain(label, 40))
    ax.axhspan(one.low, one.high, color=style.colour, alpha=0.13, lw=0)


def _overlap(panels: Iterable[Sequence[Line]]) -> bool:
    """Whether the radii of each panel have at least half of the range of all, on a logarithmic axis."""
    ends = [[log2(rho) for line in lines for rho in line.recipes if rho > 0] for lines in panels]
    known = [(min(each), max(each)) for each in ends if each]
    total = max((high for _, high in known), default=0.0) - min((low for low, _ in known), default=0.0)
    return all(high - low >= total / 2 for low, high in known)


def _scales(drawn: Sequence[Line]) -> dict[str, float]:
    """By method, the power of ten that its radii are divided by, so that they lie next to those of the first method."""
    middles = {line.method: median(line.recipes) for line in drawn}
    first = next(iter(middles.values()))
    return {method: 10.0 ** round(log10(middle / first)) for method, middle in middles.items()}


def _finish(ax: Axes, panel: Panel, drawn: Sequence[Line], scales: dict[str, float]) -> None:
    """Ticks at the radii of lines, and labels."""
    values = sorted({round(rho / scales[line.method], 6) for line in drawn for rho in line.recipes})
    ax.set_xscale("log", base=2)
    shown = [v for i, v in enumerate(values) if i == 0 or v > 1.1 * values[i - 1]]
    ax.set_xticks(shown, [f"{value:g}" for value in shown], fontsize=8)
    ax.minorticks_off()
    ax.set_xlim(values[0] / 1.15, values[-1] * 1.15)
    ax.set_xlabel("radius rho")
    ax.set_ylabel(f"test {panel.metric}")
    ax.grid(alpha=0.3)
