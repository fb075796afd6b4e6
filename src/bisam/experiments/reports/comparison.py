"""Comparison of our results with published numbers for the same quantity."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isnan, nan
from statistics import mean, stdev
from typing import Any

from bisam.experiments.recipes.catalogue import BASELINE
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.reports.differences import baseline, paired
from bisam.experiments.reports.groups import Groups
from bisam.experiments.studies.published import PUBLISHED, QUANTITIES, Published, Quantity


@dataclass(frozen=True)
class Beside:
    """A published number and our values, one for each seed."""

    recipe: Recipe
    published: Published
    ours: tuple[float, ...]

    @property
    def title(self) -> str:
        """The quantity that was measured."""
        quantity = QUANTITIES[self.published.quantity]
        return f"{quantity.title}, relative to SAM's" if quantity.relative else quantity.title

    @property
    def text(self) -> str:
        """Our values as mean ± standard deviation (n)."""
        digits = QUANTITIES[self.published.quantity].digits
        spread = f" ± {stdev(self.ours):.{digits}f}" if len(self.ours) > 1 else ""
        return f"{mean(self.ours):.{digits}f}{spread} ({len(self.ours)})"


def beside(groups: Groups) -> list[Beside]:
    """The published numbers that apply to the recipes of `groups`, each with our values."""
    found: list[Beside] = []
    for recipe, runs in groups.items():
        for number in PUBLISHED:
            if number.where and re.fullmatch(number.method, recipe.method) and _fits(recipe, number.where):
                ours = _ours(QUANTITIES[number.quantity], recipe, runs, groups)
                found += [Beside(recipe, number, ours)] if ours else []
    return found


def _fits(recipe: Recipe, where: Mapping[str, Any]) -> bool:
    return all(recipe.setting(name) == value for name, value in where.items())


def _ours(quantity: Quantity, recipe: Recipe, runs: Any, groups: Groups) -> tuple[float, ...]:
    if (of := quantity.of) is None:
        return ()
    if not quantity.relative:
        values = tuple(of(run) for run in runs)
        return () if any(map(isnan, values)) else values
    sam = baseline(recipe, groups, (BASELINE,))
    if not sam:
        return ()
    quotients = paired(runs, groups[sam], lambda run, other: of(run) / of(other) if of(other) else nan)
    return () if any(map(isnan, quotients)) else tuple(quotients)
