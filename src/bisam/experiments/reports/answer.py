"""Answer: the paragraph that opens a report. It says which differences are decided, or what n could have shown.

The registered comparison of a study comes first, and then all others, which are adjusted together (Holm).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from statistics import mean

from bisam.experiments.markdown import escaped
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.reports.cells import interval, probability, signed, spread
from bisam.experiments.reports.differences import Comparison, score
from bisam.experiments.reports.groups import Groups, Place, place, title
from bisam.experiments.studies.study import Primary

_LISTED = 6  # of more decided differences the largest are named


@dataclass(frozen=True)
class Wanted:
    """The runs of a finished study.

    Attributes:
        recipes: number of recipes.
        seeds: number of runs of each.
    """

    recipes: int
    seeds: int


def answer(
    groups: Groups,
    called: Mapping[Recipe, str],
    titles: Mapping[Place, str],
    registered: Primary | None,
    found: Sequence[Comparison],
    compared: Mapping[Recipe, Comparison],
    own: Sequence[str] = (),
    wanted: Wanted | None = None,
) -> str:
    """The first paragraph of a study's report, in Markdown.

    Args:
        groups: runs by recipe.
        called: names of the recipes.
        titles: names of the places.
        registered: the study's primary comparison.
        found: its comparisons, see `differences.primary_comparisons`.
        compared: the comparisons of the table, by recipe.
        own: the answers of the report's sections of their own, which come first.
        wanted: the runs of the finished study; None: not known.
    """
    said = [*own]
    if registered is not None and registered.method:
        said.append(_primary(registered, found, called, titles))
    others = [one for one in compared.values() if not one.primary]
    if others or not said:
        said.append(_others(groups, others, called, titles, other=any(one.primary for one in compared.values())))
    return " ".join([_unfinished(groups, wanted), *said]).strip()


def unmarked(markdown: str) -> str:
    """The paragraph as plain text, for a terminal."""
    return re.sub(r"\\(.)", r"\1", markdown.replace("**", ""))


def shown(detectable: float, unit: str = "points") -> str:
    """The clause on the difference that a test by itself could have shown; empty if there is no test."""
    if isnan(detectable):
        return ""
    return f"this n would show a true difference of {detectable:.2f} {unit} with 80 % power"


def _unfinished(groups: Groups, wanted: Wanted | None) -> str:
    if wanted is None:
        return ""
    latest = max(recipe.version for recipe in groups)
    runs = sum(min(len(group), wanted.seeds) for recipe, group in groups.items() if recipe.version == latest)
    total = wanted.recipes * wanted.seeds
    return f"**Unfinished:** {runs} of the study's {total} runs are there." if runs < total else ""


def _primary(
    registered: Primary, found: Sequence[Comparison], called: Mapping[Recipe, str], titles: Mapping[Place, str]
) -> str:
    if not found:
        return f"**No answer yet** to the registered comparison, {registered.words}: no seed has both of its runs."
    parts: list[str] = []
    for one in found:
        where = titles[place(one.recipe)]
        names = escaped(called[one.recipe]), escaped(called[one.baseline])
        what = f"{f'{escaped(where)}: ' if where else ''}{names[0]} minus {names[1]}"
        if one.interim:
            state = f"{one.difference.pairs} of {one.registered} registered pairs are there, so nothing is decided"
            parts.append(f"**interim** ({what}): {state}")
            continue
        numbers = f"{what} is {interval(one.difference, 100)} points"
        if isnan(one.difference.p):
            parts.append(f"{numbers}: **no test**")
        elif one.decided:
            parts.append(f"{numbers}: **decided**, p {_equals(one.adjusted)}")
        else:
            power = shown(100 * one.difference.detectable())
            parts.append(f"{numbers}: **undecided**, p {_equals(one.adjusted)}; {power}")
    return f"The registered comparison: {'; '.join(parts)}."


def _others(
    groups: Groups,
    others: Sequence[Comparison],
    called: Mapping[Recipe, str],
    titles: Mapping[Place, str],
    *,
    other: bool,
) -> str:
    if not others:
        return _alone(groups, called)
    against = sorted({title(one.baseline) for one in others})
    to = escaped(against[0]) if len(against) == 1 else "the baselines"
    count = len(others)
    which = (
        f"the {count}{' other' if other else ''} differences from {to}" if count > 1 else f"the difference from {to}"
    )
    tested = [one for one in others if not isnan(one.difference.p)]
    if not tested:
        most = max(one.difference.pairs for one in others)
        why = "a test needs at least two seeds" if most < 2 else "the pairs do not differ, or are not finite"
        return f"**No test** of {which}: {why}."
    decided = sorted((one for one in others if one.decided), key=lambda one: -abs(one.difference.mean))
    if not decided:
        none = f"none of {which} is" if count > 1 else f"{which} is not"
        return f"**Undecided:** {none} decided after Holm; {_power(tested)}."
    listed = _listed(decided[:_LISTED], called, titles)
    more = f", and {len(decided) - _LISTED} smaller ones" if len(decided) > _LISTED else ""
    if count == 1:
        return f"**Decided:** {which}, {listed}."
    are = "is" if len(decided) == 1 else "are"
    return f"**Decided** after Holm {are} {len(decided)} of {which}, in points: {listed}{more}."


def _listed(some: Sequence[Comparison], called: Mapping[Recipe, str], titles: Mapping[Place, str]) -> str:
    by_place: dict[Place, list[str]] = defaultdict(list)
    for one in some:
        by_place[place(one.recipe)].append(f"{escaped(called[one.recipe])} {signed(100 * one.difference.mean)}")
    parts = [(escaped(titles[at]), ", ".join(by_place[at])) for at in titles if at in by_place]
    return "; ".join(f"{at}: {which}" if at else which for at, which in parts)


def _power(tested: Sequence[Comparison]) -> str:
    """Which true differences the comparisons could have decided: alone, and at the strictest step of Holm."""
    alone, strict = zip(*(one.detectable for one in tested), strict=True)

    def points(values: Sequence[float]) -> str:
        low, high = (f"{100 * value:.2f}" for value in (min(values), max(values)))
        return low if low == high else f"{low} to {high}"

    pairs = sorted({one.difference.pairs for one in tested})
    n = f"{pairs[0]}" if len(pairs) == 1 else f"{pairs[0]} to {pairs[-1]}"
    more = "" if tested[0].family == 1 else f", and of {points(strict)} at Holm's strictest step"
    return f"{n} pairs would show true differences of {points(alone)} points with 80 % power, one test alone{more}"


def _alone(groups: Groups, called: Mapping[Recipe, str]) -> str:
    """The sentence of a report without comparisons."""
    methods = {title(recipe) for recipe in groups}
    best = max(groups, key=lambda recipe: _score(groups, recipe))
    written = spread([score(run) for run in groups[best]], 100)
    if len(groups) == 1:
        return f"**No comparison:** {escaped(called[best])} alone, with a test score of {written}."
    if len(methods) == 1:
        what = f"{len(groups)} settings of {escaped(methods.pop())}"
    else:
        what = "no method shares a setting and a seed with a baseline"
    return f"**No comparison:** {what}; the highest mean test score, untested, is {written} ({escaped(called[best])})."


def _score(groups: Groups, recipe: Recipe) -> float:
    value = mean(score(run) for run in groups[recipe])
    return float("-inf") if isnan(value) else value


def _equals(p: float) -> str:
    written = probability(p)
    return escaped(written) if written.startswith("<") else f"= {written}"
