"""Differences between a recipe and its baseline, paired by seed, and which of them are decided.

Runs of one seed share the initial weights, the label noise and the order of the batches, so that their difference
varies less than either.

    found = differences(grouped(runs), ("sam",))          # of the headline score, in the order of the recipes
    found[recipe].difference.mean, found[recipe].adjusted, found[recipe].decided

All comparisons of one quantity on a page are a family: their p values are adjusted together (Holm), whatever their
setting. A comparison that a study has registered as its primary one is a family of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import nan
from typing import Any

from bisam.experiments.recipes.entries import SETTINGS
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.reports.groups import Groups
from bisam.experiments.reports.significance import Difference as Difference, Tested, adjusted, student as student
from bisam.experiments.runs.folder import Finished
from bisam.experiments.runs.results import headline_score
from bisam.experiments.studies.study import Primary

Baselines = Sequence[str] | Mapping[str, str]
"""Methods to compare with, in order of preference; or a mapping from each method to its baseline."""


@dataclass(frozen=True, kw_only=True)
class Comparison(Tested):
    """A recipe against its baseline: the method's value minus the baseline's, by seed.

    Attributes:
        recipe: of the method.
        baseline: the recipe that it is compared with.
    """

    recipe: Recipe
    baseline: Recipe


def score(run: Finished) -> float:
    """The headline test score of a run, as a share of 1."""
    return headline_score(run.result)


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


def compare(
    groups: Groups, baselines: Baselines, value: Callable[[Finished], float] = score
) -> dict[Recipe, Comparison]:
    """The difference of each recipe that shares a seed with its baseline; p values are not adjusted yet.

    Args:
        groups: runs by recipe.
        baselines: methods to compare with, see `baseline`.
        value: the quantity, of a run.
    """
    found: dict[Recipe, Comparison] = {}
    for recipe, runs in groups.items():
        other = baseline(recipe, groups, baselines)
        values = paired(runs, groups[other], lambda a, b: value(a) - value(b)) if other else []
        if other and values:
            found[recipe] = Comparison(recipe=recipe, baseline=other, difference=student(values))
    return found


def differences(groups: Groups, baselines: Baselines, primary: Primary | None = None) -> dict[Recipe, Comparison]:
    """Comparison of the headline score, for each recipe that shares a seed with its baseline.

    A row that is the registered comparison is tested with the registered seeds, among those alone.

    Args:
        groups: runs by recipe.
        baselines: methods to compare with, see `baseline`.
        primary: the registered comparison of the study.
    """
    registered = {(one.recipe, one.baseline): one for one in primary_comparisons(groups, primary)}
    rows = compare(groups, baselines)
    others = adjusted([one for one in rows.values() if (one.recipe, one.baseline) not in registered])
    tested = {one.recipe: one for one in others}
    return {recipe: tested.get(recipe) or registered[recipe, one.baseline] for recipe, one in rows.items()}


def primary_comparisons(groups: Groups, primary: Primary | None) -> list[Comparison]:
    """The registered comparison of a study in each setting, with its registered seeds.

    Args:
        groups: runs by recipe.
        primary: None, or one without a method, has none.
    """
    if primary is None or not primary.method:
        return []
    seeds = primary.seeds
    some = {r: [run for run in runs if seeds is None or run.recipe.seed in seeds] for r, runs in groups.items()}
    found = [
        replace(one, primary=True, registered=len(seeds or ()))
        for recipe, one in compare(some, (primary.against,)).items()
        if recipe.method == primary.method and all(recipe.setting(k) == v for k, v in primary.where.items())
    ]
    return adjusted(found)


def columns(one: Comparison | None) -> dict[str, Any]:
    """The numbers of a comparison as columns of a CSV file; without one they are nan, and the counts 0."""
    known = Difference(nan, nan, nan, 0) if one is None else one.difference
    alone, corrected = (nan, nan) if one is None else one.detectable
    return {
        **{f"difference_{name}": getattr(known, name) for name in ("mean", "low", "high")},
        "pairs": known.pairs,
        "difference_std": known.spread,
        "p": known.p,
        "p_holm": nan if one is None else one.adjusted,
        "comparisons": 0 if one is None else one.family,
        "primary": one is not None and one.primary,
        "detectable": alone,
        "detectable_holm": corrected,
    }


def _unlike(a: Recipe, b: Recipe) -> set[str]:
    return {field.name for field in fields(Recipe) if getattr(a, field.name) != getattr(b, field.name)}


def _free(a: Recipe, b: Recipe) -> set[str]:
    return {"method", *SETTINGS, *a.own_fields, *b.own_fields, *a.tuned, *b.tuned}
