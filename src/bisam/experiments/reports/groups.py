"""Groups: finished runs by recipe, in the order of tables and figures, with names that distinguish recipes."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

from bisam.experiments.data import NAMES
from bisam.experiments.recipes.base_optimizers import ADAMW, SGD
from bisam.experiments.recipes.catalogue import METHODS
from bisam.experiments.recipes.entries import SETTINGS
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.recipes.versions import VERSION
from bisam.experiments.runs.folder import Finished
from bisam.experiments.studies import LABELS

Groups = Mapping[Recipe, Sequence[Finished]]
"""The runs of each recipe, by seed; as keys recipes have seed 0."""

_FIELDS = [field.name for field in fields(Recipe) if field.name not in ("method", "seed")]


class Place(NamedTuple):
    """A setting in which methods are compared: a column of the side-by-side table, a panel of a figure."""

    dataset: str
    model: str
    noise: float
    imbalance: float


def place(recipe: Recipe) -> Place:
    """The place of a recipe."""
    return Place(recipe.dataset, recipe.model, recipe.noise, recipe.imbalance)


def places(recipes: Iterable[Recipe]) -> dict[Place, str]:
    """The places in order, each with a title that distinguishes it: empty if there is only one."""
    found = list(dict.fromkeys(place(recipe) for recipe in recipes))
    several = [len(set(column)) > 1 for column in zip(*found, strict=True)]
    parts = {
        at: (at.dataset, at.model, f"label noise {100 * at.noise:g} %", f"imbalance {at.imbalance:g}") for at in found
    }
    return {at: ", ".join(p for p, shown in zip(parts[at], several, strict=True) if shown) for at in found}


def arranged(
    runs: Iterable[Finished], recipes: Sequence[Recipe] = (), baselines: Collection[str] = ()
) -> list[Finished]:
    """Runs in the order of tables and figures: place by place, in each place the baseline first.

    The others, and the places, are in the order of `recipes`. Runs of earlier versions of the recipes are below all of
    later ones in their place, in the same order. Runs of other recipes follow those of the same method. Where that
    decides nothing, the order is that of the data sets, models and methods in `bisam list`.

    Args:
        runs: in any order.
        recipes: of the study, in its own order, with seed 0.
        baselines: methods that others are compared with, in order of preference: the first that a place has is its
            baseline.
    """
    runs, last = list(runs), len(recipes)
    at, methods, own = dict[Place, int](), dict[str, int](), dict[Recipe, int]()
    for i, recipe in enumerate(_latest(recipe) for recipe in recipes):
        at.setdefault(place(recipe), i)
        methods.setdefault(recipe.method, i)
        own.setdefault(recipe, i)
    present = {(place(run.recipe), run.recipe.method) for run in runs}
    first = {here: next((one for one in baselines if (here, one) in present), None) for here, _ in present}

    def key(run: Finished) -> tuple[Any, ...]:
        recipe = replace(run.recipe, seed=0)
        here, method = place(recipe), recipe.method
        mine = own.get(_latest(recipe), methods.get(method, last))
        here_first = (at.get(here, last), _natural_place(here), -recipe.version, method != first[here])
        return *here_first, mine, _latest(recipe) not in own, *_order(recipe), run.recipe.seed

    return sorted(runs, key=key)


def grouped(runs: Iterable[Finished]) -> dict[Recipe, list[Finished]]:
    """Runs by recipe, whatever their seed, in the order in which the recipes appear; see `arranged`."""
    groups: dict[Recipe, list[Finished]] = {}
    for run in runs:
        groups.setdefault(replace(run.recipe, seed=0), []).append(run)
    return {recipe: sorted(group, key=lambda run: run.recipe.seed) for recipe, group in groups.items()}


def perturbed(runs: Iterable[Finished]) -> list[Finished]:
    """The runs whose method perturbs the weights."""
    return [run for run in runs if not run.recipe.is_plain]


def measured(runs: Iterable[Finished]) -> list[Finished]:
    """The runs that measured the largest error in a ball."""
    return [run for run in runs if run.recipe.measured_epochs and run.recipe.measured == "ball"]


def title(recipe: Recipe) -> str:
    """The name of a method: of the catalogue, the label that a study gives to an expression, or the expression."""
    if recipe.is_plain and recipe.optimizer != SGD:
        return "AdamW" if recipe.optimizer == ADAMW else recipe.optimizer
    return METHODS[recipe.method].name if recipe.method in METHODS else LABELS.get(recipe.method, recipe.method)


def names(recipes: Iterable[Recipe]) -> dict[Recipe, str]:
    """Short names: the method, and the fields that distinguish a recipe from others of its kind in its place."""
    recipes = list(recipes)
    kin: dict[tuple[str, Place], list[Recipe]] = defaultdict(list)
    lengths: dict[Place, Counter[tuple[str, int]]] = defaultdict(Counter)
    for recipe in recipes:
        kin[title(recipe), place(recipe)].append(recipe)
        lengths[place(recipe)][recipe.unit, recipe.length] += not recipe.is_plain
    latest = max((recipe.version for recipe in recipes), default=VERSION)
    telling: dict[str, set[str]] = defaultdict(set)
    for (kind, _), group in kin.items():
        telling[kind] |= {name for name in _FIELDS if len({recipe.setting(name) for recipe in group}) > 1}

    def words(recipe: Recipe) -> str:
        others, told = lengths[place(recipe)], telling[title(recipe)]
        unit, length = others.most_common(1)[0][0] if others.total() else ("", 0)
        times = recipe.length / length if recipe.is_plain and recipe.unit == unit else None
        told = told | {"version"} if recipe.version != latest else told
        shown = [name for name in _FIELDS if name in told and not (name == recipe.unit and times)]
        shown = [name for name in shown if name not in ("epochs", "steps") or name == recipe.unit]
        more = [f"{name.replace('_', ' ')} {recipe.setting(name)}" for name in shown]
        more += [f"{times:g}× {recipe.unit}"] if times not in (None, 1) else []
        return f"{title(recipe)} ({', '.join(more)})" if more else title(recipe)

    called = {recipe: words(recipe) for recipe in recipes}
    shared = Counter((name, place(recipe)) for recipe, name in called.items())  # by methods with the same title
    return {r: f"{name}: {r.method}" if shared[name, place(r)] > 1 else name for r, name in called.items()}


def varying(recipes: Iterable[Recipe]) -> list[str]:
    """The fields in which recipes differ, except the method, the seed and the fields that belong to a method."""
    recipes = list(recipes)
    values = {f: {getattr(r, f) for r in recipes if f not in r.own_fields} for f in _FIELDS}
    return [name for name, found in values.items() if len(found) > 1]


def metric(run: Finished) -> str:
    """The name of the metric that `test_best` and `validation_best` are."""
    return run.result.get("metric", "accuracy")


def _latest(recipe: Recipe) -> Recipe:
    """The recipe with these fields that is trained now."""
    return replace(recipe, version=VERSION)


def _order(recipe: Recipe) -> tuple[Any, ...]:
    methods = list(METHODS)
    method = methods.index(recipe.method) if recipe.method in METHODS else len(methods)
    settings = [recipe.setting(name) or 0.0 for name in SETTINGS]
    return method, _natural(recipe.method), recipe.unit, recipe.length, *settings, recipe.version, recipe.slug


def _natural_place(at: Place) -> tuple[Any, ...]:
    datasets = list(NAMES)
    known = datasets.index(at.dataset) if at.dataset in NAMES else len(datasets)
    return known, _natural(at.dataset), _natural(at.model), at.noise, at.imbalance


def _natural(text: str) -> list[tuple[int, str]]:
    """A key by which resnet20 is before resnet110."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split("([0-9]+)", text)]
