"""Differences between a recipe and its baseline, paired by seed, with Student's interval of the mean.

Runs of one seed share the initial weights, the label noise and the order of the batches, so that their difference
varies less than either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from math import sqrt
from statistics import mean, stdev

from scipy.special import stdtrit

from bisam.experiments.recipes.entries import SETTINGS
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.reports.groups import Groups
from bisam.experiments.runs.folder import Finished

Baselines = Sequence[str] | Mapping[str, str]
"""Methods to compare with, in order of preference; or a mapping from each method to its baseline."""


@dataclass(frozen=True)
class Difference:
    """A mean over pairs with its 95 % interval; `low` and `high` are nan if there are fewer than two pairs."""

    mean: float
    low: float
    high: float
    pairs: int

    @property
    def decided(self) -> bool:
        """Whether 0 is outside the interval."""
        return self.low > 0 or self.high < 0


def student(values: Sequence[float], level: float = 0.95) -> Difference:
    """The mean of one or more values, and Student's interval for it."""
    centre, n = mean(values), len(values)
    reach = float(stdtrit(n - 1, (1 + level) / 2)) * stdev(values) / sqrt(n) if n > 1 else float("nan")
    return Difference(centre, centre - reach, centre + reach, n)


def paired(
    runs: Iterable[Finished], others: Iterable[Finished], value: Callable[[Finished, Finished], float]
) -> list[float]:
    """`value(run, other)` for each seed that both groups have."""
    by_seed = {other.recipe.seed: other for other in others}
    return [value(run, by_seed[run.recipe.seed]) for run in runs if run.recipe.seed in by_seed]


def baseline(recipe: Recipe, recipes: Iterable[Recipe], baselines: Baselines) -> Recipe | None:
    """The baseline of `recipe`: among the recipes with its setting, the one that differs least.

    None if there is no such recipe, if two differ equally little, or if the first baseline is the method of `recipe`.
    """
    if isinstance(baselines, Mapping):
        baselines = [baselines[recipe.method]] if recipe.method in baselines else []
    shared = [other for other in recipes if _unlike(recipe, other) <= _free(recipe, other)]
    for method in baselines:
        if method == recipe.method:
            return None
        if found := [other for other in shared if other.method == method]:
            unlike = [len(_unlike(recipe, other)) for other in found]
            return found[unlike.index(min(unlike))] if unlike.count(min(unlike)) == 1 else None
    return None


def differences(
    groups: Groups, baselines: Baselines, key: str = "test_best"
) -> dict[Recipe, tuple[Recipe, Difference]]:
    """Baseline and mean difference of a result, for each recipe that shares a seed with its baseline."""
    found: dict[Recipe, tuple[Recipe, Difference]] = {}
    for recipe, runs in groups.items():
        other = baseline(recipe, groups, baselines)
        values = paired(runs, groups[other], lambda a, b: a.result[key] - b.result[key]) if other else []
        if other and values:
            found[recipe] = other, student(values)
    return found


def _unlike(a: Recipe, b: Recipe) -> set[str]:
    return {field.name for field in fields(Recipe) if getattr(a, field.name) != getattr(b, field.name)}


def _free(a: Recipe, b: Recipe) -> set[str]:
    return {"method", *SETTINGS, *a.own_fields, *b.own_fields, *a.tuned, *b.tuned}
