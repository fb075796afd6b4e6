"""Regret: what a radius that is too large costs, for each method, and whether one method forgives it more than another.

The regret of a factor is the test score at a method's optimum minus the test score at so many times the optimum, of
the same seed. A comparison is the regret of a method minus that of the control, paired by seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan
from statistics import mean
from typing import Any

from bisam.experiments.markdown import table
from bisam.experiments.reports.answer import shown
from bisam.experiments.reports.cells import NOTHING, probability, signed
from bisam.experiments.reports.groups import Groups, Place, places
from bisam.experiments.reports.radii import Line, lines
from bisam.experiments.reports.significance import Difference, Tested, adjusted, student
from bisam.experiments.studies.study import Regret

TITLE = "The regret of a radius that is too large"


@dataclass(frozen=True)
class Cost:
    """The regret of a method in a place.

    Attributes:
        line: the method's runs.
        optimum: its radius.
        found: whether it was found among the same runs, and not given by a study before.
        factor: how much too large the radius is; below 1, how much too small.
        regrets: by seed, in points.
    """

    line: Line
    optimum: float
    found: bool
    factor: float
    regrets: Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class Compared(Tested):
    """The regret of a method minus that of the control, in points.

    Attributes:
        cost: of the method.
        control: of the control.
    """

    cost: Cost
    control: Cost


def costs(groups: Groups, regret: Regret) -> list[Cost]:
    """The regrets of all methods, places and factors for which there are runs."""
    found: list[Cost] = []
    for line in lines(groups):
        given = regret.optima.get((line.key, line.place.noise))
        optimum = line.optimum if given is None else line.times(1, given)
        for factor in regret.factors if optimum is not None else ():
            assert optimum is not None
            if (other := line.times(factor, optimum)) is None:
                continue
            best, far = line.scores(optimum), line.scores(other)
            each = {seed: best[seed] - far[seed] for seed in sorted(best.keys() & far.keys())}
            if each:
                found.append(Cost(line, optimum, given is None, factor, each))
    return found


def compare(found: Sequence[Cost], regret: Regret, registered: range) -> list[Compared]:
    """The comparisons of all methods with the control.

    Args:
        found: the regrets.
        regret: what is compared.
        registered: the seeds that test the primary comparison.
    """
    controls = {(one.line.place, one.factor): one for one in found if one.line.key == regret.control}
    pairs: list[Compared] = []
    for one in found:
        control = controls.get((one.line.place, one.factor))
        if control is None or one is control:
            continue
        primary = one.line.key == regret.method and one.factor == regret.factor and not (one.found or control.found)
        seeds = [s for s in one.regrets if s in control.regrets and (s in registered or not primary)]
        if not seeds:
            continue
        difference = student([one.regrets[seed] - control.regrets[seed] for seed in seeds])
        count = len(registered) if primary else 0
        pairs.append(Compared(cost=one, control=control, difference=difference, primary=primary, registered=count))
    return sorted(adjusted(pairs), key=lambda one: not one.primary)


HEADER = ("label noise", "method", "optimum", "at the optimum", "factor", "regret", "n")
COMPARED = ("label noise", "factor", "regret of", "minus that of", "difference", "p", "p (Holm)", "detectable", "n")


def section(groups: Groups, regret: Regret, registered: range) -> str:
    """Return the tables and sentences of a report, in Markdown.

    Args:
        groups: runs by recipe.
        regret: what is compared.
        registered: the seeds that test the primary comparison; with fewer of them nothing is decided.
    """
    found = costs(groups, regret)
    if not found:
        return f"## {TITLE}\n\nNo method has runs at an optimum and at a multiple of it yet."
    called = _places(found)
    compared = compare(found, regret, registered)
    blocks = [
        f"## {TITLE}",
        _EXPLANATION,
        table(HEADER, [_cost_cells(one, called) for one in found]),
        _ends(found, called),
    ]
    if compared:
        blocks += [
            table(COMPARED, [_cells(one, called) for one in compared]),
            *_sentences(compared, called, len(registered)),
        ]
    return "\n\n".join(block for block in blocks if block)


def answer(groups: Groups, regret: Regret, registered: range) -> str:
    """The sentence of a report on the primary comparison, in Markdown; "" if nothing is compared.

    Args:
        groups: runs by recipe.
        regret: what is compared.
        registered: the seeds that test the primary comparison.
    """
    compared = compare(costs(groups, regret), regret, registered)
    if not compared:
        return ""
    called = _places([one.cost for one in compared])
    primary = [one for one in compared if one.primary]
    if not primary:
        decided = sum(one.decided for one in compared)
        return f"Of {len(compared)} exploratory comparisons of regrets {decided or 'none'} {_are(decided)} decided."
    what = f"the regret of {regret.factor:g} times the optimum"
    if any(one.interim for one in primary):
        n = min(one.difference.pairs for one in primary)
        return f"**Interim:** {what} has {n} of its {len(registered)} registered seeds, so nothing is decided."
    said = [f"label noise {called[one.cost.line.place]}, {_answered(one)}" for one in primary]
    return f"The registered comparison, {what}: {'; '.join(said)}."


def _are(count: int) -> str:
    return "is" if count < 2 else "are"


def _answered(one: Compared) -> str:
    numbers = f"{one.cost.line.method} minus {one.control.line.method} is {_interval(one.difference)} points"
    if isnan(one.difference.p):
        return f"{numbers}, **no test**"
    verdict = "decided" if one.decided else "undecided"
    power = "" if one.decided else f" ({one.difference.pairs} pairs: {shown(one.difference.detectable())})"
    return f"{numbers}, **{verdict}**{power}"


def rows(groups: Groups, regret: Regret, registered: range) -> list[dict[str, Any]]:
    """One row for each regret and one for each comparison, for a CSV file; see `section`."""
    found = costs(groups, regret)
    alone = [_row(one, "", student(list(one.regrets.values())), nan, primary=False) for one in found]
    return alone + [
        _row(one.cost, one.control.line.method, one.difference, one.adjusted, primary=one.primary)
        for one in compare(found, regret, registered)
    ]


def _row(one: Cost, against: str, difference: Difference, adjusted: float, *, primary: bool) -> dict[str, Any]:
    return {
        "dataset": one.line.place.dataset,
        "model": one.line.place.model,
        "noise": one.line.place.noise,
        "method": one.line.method,
        "optimum": one.optimum,
        "factor": one.factor,
        "minus": against,
        "mean": difference.mean,
        "low": difference.low,
        "high": difference.high,
        "p": difference.p,
        "p_holm": adjusted,
        "detectable": difference.detectable(),
        "primary": primary,
        "n": difference.pairs,
    }


_EXPLANATION = (
    "The regret is the headline test score at a method's optimum minus the one at `factor` times the optimum, of the "
    "same seed, in points: 0 means that the wrong radius costs nothing. Factors below 1 are radii that are too small. "
    "In brackets: Student's 95 % interval over the seeds. A method with a *smaller* regret forgives more; the second "
    "table compares regrets, and a negative difference says that the method forgives more than the control. Read it "
    "with the score at the optimum, as a method that is worse everywhere has little to lose, and with the regret of "
    "half the optimum: where a method loses more at small radii and less at large ones, its curve is shifted, which is "
    "a question of the unit of its radius. Holm: p adjusted over the primary comparisons, and over all others "
    "together; below 0.05 a comparison is decided. Detectable: the true difference that this n would have shown with a "
    "probability of 80 %, in a test by itself."
)


def _places(found: Sequence[Cost]) -> dict[Place, str]:
    """The label noise of each place, with data set and network where they vary."""
    titles = places([next(iter(one.line.recipes.values())) for one in found])
    several = len({(at.dataset, at.model) for at in titles}) > 1
    return {at: words if several else f"{100 * at.noise:g} %" for at, words in titles.items()}


def _interval(one: Difference) -> str:
    if isnan(one.mean):
        return NOTHING
    return signed(one.mean) + ("" if isnan(one.low) else f" [{signed(one.low)}, {signed(one.high)}]")


def _cost_cells(one: Cost, called: Mapping[Place, str]) -> tuple[str, ...]:
    at = mean(one.line.scores(one.optimum).values())
    end = " (at an end)" if one.found and one.line.at_end else ""
    return (
        called[one.line.place],
        one.line.method,
        f"{one.optimum:g}{end}",
        f"{at:.2f}",
        f"{one.factor:g}",
        _interval(student(list(one.regrets.values()))),
        f"{len(one.regrets)}",
    )


def _cells(one: Compared, called: Mapping[Place, str]) -> tuple[str, ...]:
    alone = one.difference.detectable()
    return (
        called[one.cost.line.place],
        f"{one.cost.factor:g}{' (primary)' if one.primary else ''}",
        one.cost.line.method,
        one.control.line.method,
        _interval(one.difference),
        probability(one.difference.p),
        probability(one.adjusted),
        NOTHING if isnan(alone) else f"{alone:.2f}",
        f"{one.difference.pairs}",
    )


def _ends(found: Sequence[Cost], called: Mapping[Place, str]) -> str:
    here = dict.fromkeys(
        f"{one.line.method} ({called[one.line.place]})" for one in found if one.found and one.line.at_end
    )
    same = (
        "The optima were found among these runs, and so the scores at them are a little too good, and the regrets too "
        "large. "
        if any(one.found for one in found)
        else ""
    )
    if not here:
        return same.strip()
    return f"{same}The optimum is at an end of the grid for {', '.join(here)}: the best radius may be beyond it."


def _sentences(compared: Sequence[Compared], called: Mapping[Place, str], seeds: int) -> list[str]:
    primary = [one for one in compared if one.primary]
    if not primary:
        return ["All comparisons on this page are exploratory."]
    if interim := [one.difference.pairs for one in primary if one.interim]:
        n = min(interim)
        return [f"The primary comparison has {n} of its {seeds} seeds, and nothing is decided before the last one."]
    said = [f"With label noise {called[one.cost.line.place]} {_said(one)}." for one in primary]
    return [f"**Primary comparison.** {' '.join(said)}"]


def _said(one: Compared) -> str:
    name, control = one.cost.line.method, one.control.line.method
    ours, theirs = (round(mean(cost.regrets.values()), 2) + 0.0 for cost in (one.cost, one.control))  # no -0.00
    both = f"the regret is {ours:.2f} for {name} and {theirs:.2f} for {control}"
    if not one.decided:
        return f"{both}; the difference is not decided"
    return f"{both}; {name} forgives {'more' if one.difference.mean < 0 else 'less'}"
