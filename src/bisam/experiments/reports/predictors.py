"""Predictors: which measures of a trained network rank configurations as their test error does.

    found = compare(levels(measured), primary="20-step sharpness", control="training loss")
    print(section(found))                       # table and sentences, in Markdown

A level is a setting, such as a share of label noise, in which runs are compared. The statistics are those of
correlations.py. All weights are the last ones: they are what training converges to, whereas the weights of the best
validation epoch are chosen by clean labels, often early.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, isnan

import numpy as np

from bisam.experiments.analyses.catalogue import ANALYSES
from bisam.experiments.analyses.file import Entry, with_settings
from bisam.experiments.analyses.settings import Settings
from bisam.experiments.markdown import escaped, table
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.reports.cells import probability, signed
from bisam.experiments.reports.correlations import Correlation, Estimate, correlate, stronger
from bisam.experiments.reports.groups import grouped, names, place, places, title
from bisam.experiments.reports.significance import ALPHA, holm
from bisam.experiments.runs.folder import Finished, Result
from bisam.experiments.studies.study import Analyses


@dataclass(frozen=True)
class Measured:
    """A finished run with what was measured of it.

    Attributes:
        run: the run.
        values: the measures by their titles; nan where one is undefined.
    """

    run: Finished
    values: Mapping[str, float]


@dataclass(frozen=True)
class Level:
    """The runs of a setting: all configurations with the same seeds.

    Attributes:
        title: of the setting.
        recipes: the configurations, with seed 0.
        seeds: the seeds.
        error: test error of the last weights, as a share of 1, (seeds, configurations).
        measures: by title, of the same shape.
        left_out: configurations and seeds that are left out, with the reason.
    """

    title: str
    recipes: tuple[Recipe, ...]
    seeds: tuple[int, ...]
    error: np.ndarray
    measures: Mapping[str, np.ndarray]
    left_out: tuple[str, ...]

    @property
    def methods(self) -> list[str]:
        """The method of each configuration."""
        return [title(recipe) for recipe in self.recipes]


@dataclass(frozen=True)
class Comparison:
    """A measure at a level.

    Attributes:
        level: the runs.
        measure: title of the measure.
        found: its correlations with the test error.
        stronger: by how much Spearman's correlation is stronger than that of the control; nan for the control itself.
        adjusted: p, adjusted for the number of comparisons of its kind (Holm).
        primary: whether it was fixed before the first run; all others are exploratory.
        control: whether it is the control.
    """

    level: Level
    measure: str
    found: Correlation
    stronger: Estimate
    adjusted: float
    primary: bool
    control: bool

    @property
    def decided(self) -> bool:
        """Whether the adjusted p is below `ALPHA`."""
        return self.adjusted < ALPHA

    @property
    def predicts(self) -> bool:
        """Whether it is decided, holds within the methods too, and is stronger than the control."""
        within = self.found.within
        same_sign = within.mean * self.found.spearman.mean > 0
        return self.decided and within.excludes_zero and same_sign and self.stronger.low > 0


def measured(
    runs: Iterable[Finished], entries: Mapping[Recipe, Sequence[Entry]], analyses: Analyses
) -> tuple[list[Measured], list[str]]:
    """Return the runs with the measures of a study, and the names of those that have not all of them.

    A diverged run, whose weights are not analysed, is returned without measures.

    Args:
        runs: finished runs.
        entries: what `bisam analyse` found, by recipe and seed.
        analyses: of the study.
    """
    found, lacking = list[Measured](), list[str]()
    for run in runs:
        values = _numbers(entries.get(run.recipe, ()), run.result, analyses)
        named = {name: values[column] for column, name in analyses.measures.items() if column in values}
        if len(named) == len(analyses.measures) or run.diverged is not None:
            found.append(Measured(run, named))
        else:
            lacking.append(f"{run.recipe.slug}, seed {run.recipe.seed}")
    return found, lacking


def _numbers(entries: Sequence[Entry], result: Result, analyses: Analyses) -> dict[str, float]:
    """The numbers of the study's analyses, with the study's settings, by the titles of their columns."""
    values = dict[str, float]()
    for name in analyses.what:
        settings = Settings(**analyses.settings_of(name)).of(result).relevant(ANALYSES[name].settings)
        if (entry := with_settings(entries, name, settings)) is not None:
            values |= ANALYSES[name].numbers(entry["results"])
    return values


def levels(measured: Iterable[Measured]) -> list[Level]:
    """Return the runs by setting, in their order, each with the configurations and seeds that are complete.

    A configuration is left out if a run of it has diverged or has a measure that is not finite. Of the others, a seed
    is left out if a run of it is missing.
    """
    measured = list(measured)
    values = {one.run.recipe: one.values for one in measured}
    groups = grouped(one.run for one in measured)
    called, titles = names(groups), places(groups)
    found: list[Level] = []
    for at, name in titles.items():
        here = {recipe: runs for recipe, runs in groups.items() if place(recipe) == at}
        measures = list(dict.fromkeys(key for runs in here.values() for run in runs for key in values[run.recipe]))
        left_out: list[str] = []
        for recipe, runs in list(here.items()):
            if fault := _fault(runs, values, measures):
                left_out.append(f"{called[recipe]} ({fault})")
                del here[recipe]
        by_seed = {recipe: {run.recipe.seed: run for run in runs} for recipe, runs in here.items()}
        seeds = sorted(set[int]().union(*by_seed.values()))
        whole = [seed for seed in seeds if all(seed in runs for runs in by_seed.values())]
        left_out += [f"seed {seed} (not all of its runs are finished)" for seed in seeds if seed not in whole]
        if not here or not whole:
            continue

        runs = [[by_seed[recipe][seed] for recipe in here] for seed in whole]
        error = np.array([[1 - run.result["test_last"] for run in row] for row in runs])
        arrays = {key: np.array([[values[run.recipe][key] for run in row] for row in runs]) for key in measures}
        found.append(Level(name, tuple(here), tuple(whole), error, arrays, tuple(left_out)))
    return found


def _fault(runs: Sequence[Finished], values: Mapping[Recipe, Mapping[str, float]], measures: Sequence[str]) -> str:
    """Return why a configuration is left out, or ""."""
    diverged = [run.recipe.seed for run in runs if run.diverged is not None]
    if diverged:
        return f"diverged with seed {', '.join(map(str, diverged))}"
    for key in measures:
        if odd := [run.recipe.seed for run in runs if not isfinite(values[run.recipe].get(key, np.nan))]:
            return f"no {key} with seed {', '.join(map(str, odd))}"
    return ""


def compare(found: Sequence[Level], primary: str, control: str) -> list[Comparison]:
    """Return a comparison for each level and measure, the primary measure first.

    Args:
        found: the runs.
        primary: title of the measure that was fixed before the first run.
        control: title of a measure that others must beat.
    """
    comparisons: list[Comparison] = []
    for level in found:
        correlations = {key: correlate(array, level.error, level.methods) for key, array in level.measures.items()}
        nothing = np.full(len(level.seeds), np.nan)
        theirs = correlations[control].each if control in correlations else nothing
        for key in sorted(correlations, key=lambda key: key != primary):
            ours = nothing if key == control else correlations[key].each
            found_here = correlations[key]
            comparisons.append(
                Comparison(level, key, found_here, stronger(ours, theirs), found_here.p, key == primary, key == control)
            )
    for primary_ones in (True, False):  # two families
        family = [i for i, one in enumerate(comparisons) if one.primary == primary_ones]
        for i, p in zip(family, holm([comparisons[i].found.p for i in family]), strict=True):
            comparisons[i] = replace(comparisons[i], adjusted=p)
    return comparisons


def rows(comparisons: Sequence[Comparison]) -> list[dict[str, object]]:
    """Return the comparisons as rows of numbers, nan where one is undefined."""
    found: list[dict[str, object]] = []
    for one in comparisons:
        row: dict[str, object] = {
            "level": one.level.title,
            "noise": one.level.recipes[0].noise,
            "measure": one.measure,
            "kind": "primary" if one.primary else "control" if one.control else "exploratory",
        }
        for name in ("spearman", "kendall", "within"):
            estimate: Estimate = getattr(one.found, name)
            row |= {f"{name}_{part}": getattr(estimate, part) for part in ("mean", "low", "high")}
        row |= {f"stronger_{part}": getattr(one.stronger, part) for part in ("mean", "low", "high")}
        row |= {"p": one.found.p, "p_holm": one.adjusted, "seeds": one.found.spearman.seeds}
        found.append(row | {"configurations": len(one.level.recipes)})
    return found


def run_rows(measured: Iterable[Measured]) -> list[dict[str, object]]:
    """Return a row of numbers for each run: its recipe, its test error and all its measures."""
    measured = list(measured)
    groups = grouped(one.run for one in measured)
    called = names(groups)
    keys = list(dict.fromkeys(key for one in measured for key in one.values))
    return [
        {
            "dataset": one.run.recipe.dataset,
            "noise": one.run.recipe.noise,
            "method": title(one.run.recipe),
            "configuration": called[replace(one.run.recipe, seed=0)],
            "seed": one.run.recipe.seed,
            "test_error": 1 - one.run.result["test_last"],
            **{key: one.values.get(key, np.nan) for key in keys},
            "recipe": one.run.recipe.slug,
        }
        for one in measured
    ]


_LISTED = 12  # longer lists are given as counts only
HEADER = (
    "measure",
    "Spearman",
    "p",
    "p (Holm)",
    "Kendall",
    "within methods",
    "stronger than the control",
    "n",
)


def brief(one: Comparison) -> tuple[str, ...]:
    """Return the cells of a comparison for a terminal."""
    cells = dict(zip(HEADER, _cells(one), strict=True))
    return one.level.title, *(cells[name] for name in BRIEF[1:])


def section(comparisons: Sequence[Comparison], unmeasured: Sequence[str] = (), seeds: int = 1) -> str:
    """Return the table and the sentences of a report, in Markdown.

    Args:
        comparisons: as `compare` returns them.
        unmeasured: names of runs without measures.
        seeds: number of seeds that was fixed before the first run. With fewer of them nothing is called decided,
            because a study that stops when a comparison looks decided is wrong more often than its p values say.
    """
    if not comparisons:
        nothing = "No seed has a finished and measured run of every configuration, so there is nothing to correlate."
        return "\n\n".join(block for block in (f"## {TITLE}", nothing, _unmeasured(unmeasured)) if block)
    several = len({one.level.title for one in comparisons}) > 1
    lines = [(one.level.title, *_cells(one)) if several else _cells(one) for one in comparisons]
    written_table = table(("", *HEADER) if several else HEADER, lines)
    out = [_left_out(comparisons), _unmeasured(unmeasured)]
    interim = _interim(comparisons, seeds)
    sentences = [interim] if interim else _sentences(comparisons)
    blocks = [f"## {TITLE}", _EXPLANATION, written_table, *sentences, *out]
    return "\n\n".join(block for block in blocks if block)


def answer(comparisons: Sequence[Comparison], seeds: int = 1) -> str:
    """The sentences of a report on the primary measure and on those that predict the error; "" without comparisons.

    Args:
        comparisons: as `compare` returns them.
        seeds: number of seeds that was fixed before the first run.
    """
    if not comparisons:
        return ""
    main = [one for one in comparisons if one.primary]
    return _interim(comparisons, seeds) or " ".join([_primary(main) if main else "", _predicting(comparisons)]).strip()


TITLE = "Which measures rank the runs as their test error does"
BRIEF = ("", "measure", "Spearman", "p (Holm)", "within methods")
"""Columns for a terminal."""
_EXPLANATION = (
    "Rank correlations of a measure of the last weights with the test error of the same weights, over the "
    "configurations (method and setting) of a seed, averaged over the seeds. Positive: the larger the measure, the "
    "larger the error. In brackets: 95 % intervals by a BCa bootstrap over the seeds; with ten seeds they contain the "
    "true mean in about 90 % of cases. p: permutation test of Spearman's correlation in which the configurations, "
    "with all their seeds, exchange their test errors; it takes configurations as unrelated to each other, although "
    "those of one method are alike. Holm: adjusted over the primary comparisons, and over all others together; below "
    "0.05 a comparison is decided. Kendall: tau-b. Within methods: mean of Kendall's tau-b among the configurations "
    "of one method, which a difference between methods cannot cause. Stronger than the control: difference of the "
    "absolute Spearman correlations, paired by seed. n: seeds × configurations. A dash: undefined, because a quantity "
    "is constant or there is one seed."
)


def _cells(one: Comparison) -> tuple[str, ...]:
    kind = " (primary)" if one.primary else " (control)" if one.control else ""
    return (
        f"{one.measure}{kind}",
        written(one.found.spearman),
        probability(one.found.p),
        probability(one.adjusted),
        written(one.found.kendall),
        written(one.found.within),
        "–" if one.control else written(one.stronger),
        f"{one.found.spearman.seeds} × {len(one.level.recipes)}",
    )


def written(one: Estimate) -> str:
    """Return an estimate as text, with its interval if it has one, or a dash."""
    if isnan(one.mean):
        return "–"
    interval = "" if isnan(one.low) else f" [{signed(one.low)}, {signed(one.high)}]"
    return f"{signed(one.mean)}{interval}"


def _equation(p: float) -> str:
    return probability(p) if p < 0.001 else f"= {probability(p)}"


def _left_out(comparisons: Sequence[Comparison]) -> str:
    of = dict.fromkeys((one.level.title, reason) for one in comparisons for reason in one.level.left_out)
    said = [escaped(f"{level}: {reason}" if level else reason) for level, reason in of]
    return f"Left out: {'; '.join(said)}." if said else ""


def _unmeasured(names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f"; and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"Not measured, or not completely: {'; '.join(map(escaped, names[:_LISTED]))}{more}."


def _interim(comparisons: Sequence[Comparison], seeds: int) -> str:
    least = min(len(one.level.seeds) for one in comparisons)
    if least >= seeds:
        return ""
    return (
        f"*Interim*: {least} of the {seeds} seeds that were fixed before the first run. Nothing is decided until all "
        "of them are there; the same command runs the others."
    )


def _sentences(comparisons: Sequence[Comparison]) -> list[str]:
    main = [one for one in comparisons if one.primary]
    others = [one for one in comparisons if not one.primary]
    paragraphs = [_primary(main)] if main else []
    if others:
        paragraphs.append(_exploratory(others))
    return [*paragraphs, _simpson(comparisons), _verdict(comparisons)]


def _primary(main: Sequence[Comparison]) -> str:
    parts: list[str] = []
    for one in main:
        where = f"{escaped(one.level.title)}: " if one.level.title else ""
        if isnan(one.found.p):
            parts.append(f"{where}undefined")
            continue
        verdict = f"decided: {_direction(one)}" if one.decided else "undecided"
        p, adjusted = (escaped(_equation(value)) for value in (one.found.p, one.adjusted))
        parts.append(f"{where}{written(one.found.spearman)}, p {p}, adjusted p {adjusted} ({verdict})")
    return f"The registered comparison, {escaped(main[0].measure)}: {'; '.join(parts)}."


def _exploratory(others: Sequence[Comparison]) -> str:
    decided = [one for one in others if one.decided]
    undecided = [one for one in others if not one.decided]
    count = f"{len(decided) or 'none'} of {len(others)}"
    said = f"Exploratory comparisons, adjusted together: {count} {'is' if len(decided) < 2 else 'are'} decided"
    said += f" ({_listed(decided, signs=True)})." if decided else "."
    return f"{said} Undecided: {_listed(undecided)}." if undecided else said


def _simpson(comparisons: Sequence[Comparison]) -> str:
    known = [one for one in comparisons if one.decided and not isnan(one.found.within.mean)]
    clear = [one for one in known if one.found.within.excludes_zero]
    opposite = [one for one in clear if one.found.within.mean * one.found.spearman.mean < 0]
    unclear = [one for one in known if not one.found.within.excludes_zero]
    parts = [f"have the opposite sign within methods: {_listed(opposite)}"] if opposite else []
    if unclear:
        parts.append(f"are undecided within methods, where the interval contains 0: {_listed(unclear)}")
    return f"Decided correlations that {'. Decided correlations that '.join(parts)}." if parts else ""


def _verdict(comparisons: Sequence[Comparison]) -> str:
    rule = (
        "decided after Holm, of the same sign within methods with an interval that excludes 0, and stronger than the "
        "control with an interval that excludes 0"
    )
    return f"{_predicting(comparisons)} The criteria: {rule}."


def _predicting(comparisons: Sequence[Comparison]) -> str:
    """The sentence on the measures that meet all criteria."""
    found = [one for one in comparisons if one.predicts]
    if not found:
        return "No measure predicts the test error by all three criteria."
    return f"Measures that predict the test error by all three criteria: {_listed(found, signs=True)}."


def _listed(some: Sequence[Comparison], signs: bool = False) -> str:
    """The measures by level, with their correlations if `signs`."""
    parts: list[str] = []
    for level in dict.fromkeys(one.level.title for one in some):
        here = [one for one in some if one.level.title == level]
        said = [escaped(one.measure) + (f" ({signed(one.found.spearman.mean)})" if signs else "") for one in here]
        parts.append(f"{escaped(level)}: {', '.join(said)}" if level else ", ".join(said))
    return "; ".join(parts)


def _direction(one: Comparison) -> str:
    return f"the larger it is, the {'larger' if one.found.spearman.mean > 0 else 'smaller'} the test error"
