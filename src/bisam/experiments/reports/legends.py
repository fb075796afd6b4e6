"""Legends: the sentences of a report that explain its tables, and those that say what is decided."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from statistics import mean

from bisam.experiments.markdown import escaped
from bisam.experiments.recipes.expressions import names_called
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.recipes.versions import VERSION, changed_since
from bisam.experiments.reports.cells import detectable, interval, probability, signed
from bisam.experiments.reports.differences import Comparison
from bisam.experiments.reports.groups import Groups, Place, place
from bisam.experiments.runs.folder import Finished
from bisam.experiments.runs.results import ENOUGH, headline
from bisam.experiments.studies.study import Primary

WEIGHTS = {"best": "best val.", "last": "last"}
"""The headlines, as columns."""
_WEIGHTS = {"best": "the epoch with the best validation score", "last": "the last epoch"}
_LISTED = 12  # longer lists are given as counts only
_SPLITS = 3  # the version of recipes from which on the seed decides the split, where the data set leaves it open


def caption(runs: Collection[Finished]) -> str:
    """What the numbers of the table are.

    Args:
        runs: of the report.
    """
    drawn = {run.recipe.version >= _SPLITS for run in runs}
    if len(drawn) > 1:
        seeds = (
            "the initial weights, the noise and the order of the batches, and from recipe version "
            f"{_SPLITS} on the split, where the data set leaves it open"
        )
    elif drawn == {True}:
        seeds = (
            "the initial weights, the noise, the order of the batches and, where the data set leaves it open, the split"
        )
    else:
        seeds = "the initial weights, the noise and the order of the batches, not the split"
    if any(run.recipe.imbalance != 1 for run in runs):
        seeds += " and, of a long tail, the examples that are left"
    return (
        "Test scores times 100 (accuracies in per cent): mean ± standard deviation over n seeds. The test set was "
        "evaluated once, at the end of each run. Label noise is in the training labels, and in the validation labels "
        f"of runs with validation noise only. Seeds vary {seeds}. Gradients: batch gradients per step, as counted, "
        "plus forward passes (f). Time: duration of an epoch relative to plain training, which was measured between "
        f"the epochs of the same run{_stacked(runs)}. Runs that diverged, with a loss that is not finite, are part of "
        "all means."
    )


def _stacked(runs: Collection[Finished]) -> str:
    """Which times are those of stacks; empty if none are."""
    sizes = sorted({run.result["stacked"] for run in runs if "stacked" in run.result})
    if not sizes:
        return ""
    several = " or ".join(map(str, sizes))
    part = "" if all("stacked" in run.result for run in runs) else "some of "
    return f"; {part}the runs were trained in stacks of {several} seeds at once, and both times are those of the stack"


def older(groups: Groups) -> str:
    """The paragraph on runs of earlier versions of the recipes; empty if there are none."""
    old = [recipe for recipe in groups if recipe.version != VERSION]
    if not old:
        return ""
    numbers = sorted({recipe.version for recipe in old})
    which = " and ".join(map(str, numbers))
    since = "; ".join(dict.fromkeys(changed_since(one.version, names_called(one.expression)) for one in old))
    count, everything = (sum(len(groups[recipe]) for recipe in some) for some in (old, groups))
    shown = (
        f"rows with that version in their name, below the rows of version {VERSION}; they are compared with rows of "
        "their own version only"
    )
    if len({recipe.version for recipe in groups}) == 1:
        shown = "all rows"
    return (
        f"**Old results:** {count} of {everything} runs have recipe version {which} ({shown}). Their results are not "
        f"those of version {VERSION}: since then {since}."
    )


def of_weights(runs: Collection[Finished]) -> str:
    """The epoch whose weights the headline scores of runs are of, in words."""
    which = {headline(run.result) for run in runs}
    if len(which) == 1:
        return _WEIGHTS[which.pop()]
    ruled = {headline(run.result) for run in runs if "headline" in run.result}
    if ruled == {"last"}:
        return f"{_WEIGHTS['last']}, and in runs of earlier versions of {_WEIGHTS['best']}"
    said = f"{_WEIGHTS['last']} where validation has fewer than {ENOUGH:,} examples, else of {_WEIGHTS['best']}"
    return said if all("headline" in run.result for run in runs) else f"{said}, as in all runs of earlier versions"


def reading(runs: Collection[Finished], compared: Collection[Comparison]) -> str:
    """The paragraph on how to read a page.

    Args:
        runs: of the report.
        compared: the comparisons of its table; without an interval only the score is explained.
    """
    said = list[str]()
    if any(one.difference.pairs > 1 for one in compared):
        said += [
            "A 95 % interval contains the true mean difference in 95 of 100 studies like this one.",
            "If nothing differs, a Holm-adjusted p below 0.05, which alone is called decided, occurs anywhere in a "
            "table in at most 5 of 100.",
            "Detectable is the true difference that this n and this spread of the pairs decide in 80 of 100, for one "
            "test alone and at the strictest step of Holm: a smaller one can be there and stay undecided.",
        ]
    return " ".join([*said, _headline(runs)])


def _headline(runs: Collection[Finished]) -> str:
    which = {headline(run.result) for run in runs}
    sizes = sorted({run.result["validation_examples"] for run in runs if "validation_examples" in run.result})
    ties = [run.result["validation_ties"] for run in runs if "validation_ties" in run.result]
    said = f"The headline score, which the tables show, is that of {of_weights(runs)}"
    if sizes and len(which) == 1 and all("headline" in run.result for run in runs):
        ends = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
        said += (
            ", because no example is held out: the validation score is that of the training examples"
            if sizes == [0]
            else f", because validation has {ends} examples "
            f"({'fewer than' if which == {'last'} else 'at least'} {ENOUGH:,})"
        )
    if ties:
        said += f"; {mean(ties):.1f} epochs have the best validation score, mean over runs, and the latest is taken"
    if older := sum("headline" not in run.result for run in runs):
        said += f"; {'these' if older == len(runs) else 'the older'} runs took the first of several such epochs"
    return f"{said}. The other score is in report.csv."


def primary(
    registered: Primary | None, found: Sequence[Comparison], called: Mapping[Recipe, str], titles: Mapping[Place, str]
) -> str:
    """The paragraph on the comparison that was fixed before the first run; empty if there is none.

    Args:
        registered: the study's.
        found: its comparisons, see `differences.primary_comparisons`.
        called: names of the recipes.
        titles: names of the places.
    """
    if registered is None:
        return ""
    said = f"**Primary comparison**, fixed before the first run: {registered.words}."
    if not registered.method:
        return f"{said} It has a section of its own. All comparisons of the table below are exploratory."
    if not found:
        return f"{said} No registered seed has both of its runs yet."
    parts: list[str] = []
    for one in found:
        where, n = titles[place(one.recipe)], one.difference.pairs
        what = f"{called[one.recipe]} minus {called[one.baseline]}"
        if one.interim:
            verdict = f"interim, {n} of {one.registered} registered pairs: nothing is decided until all are there"
        else:
            verdict = "decided" if one.decided else "undecided"
        parts.append(
            f"{escaped(f'{where}: {what}' if where else what)}: {interval(one.difference, 100)}, "
            f"p {escaped(probability(one.difference.p))}, p (Holm) {escaped(probability(one.adjusted))}, "
            f"detectable {detectable(one.detectable, 100)} (**{verdict}**)"
        )
    return f"{said} {'; '.join(parts)}. All other comparisons are exploratory."


def words(compared: Mapping[Recipe, Comparison], called: Mapping[Recipe, str], titles: Mapping[Place, str]) -> str:
    """The paragraph on the column of differences: what they are, and which are decided; empty without pairs.

    Args:
        compared: the comparisons of the table, by recipe.
        called: names of the recipes.
        titles: names of the places.
    """
    found = [one for one in compared.values() if one.difference.pairs > 1 and not one.primary]
    if not found:
        return ""
    against = sorted({called[one.baseline] for one in found})
    to = escaped(against[0]) if len(against) == 1 else "the baseline"
    decided = [one for one in found if one.decided]
    undecided = [one for one in found if not one.decided]
    alone = [one for one in undecided if one.difference.excludes_zero]
    family, other = found[0].family, " other" if any(one.primary for one in compared.values()) else ""

    def listed(some: Sequence[Comparison]) -> str:
        by_place: dict[Place, list[str]] = defaultdict(list)
        for one in some:
            sign = f" ({signed(100 * one.difference.mean)})" if one.difference.excludes_zero else ""
            by_place[place(one.recipe)].append(escaped(called[one.recipe]) + sign)
        parts = [(escaped(titles[at]), ", ".join(by_place[at])) for at in titles if at in by_place]
        return "; ".join(f"{at}: {which}" if at else which for at, which in parts)

    said = [
        f"Difference: headline score minus that of {to}, paired by seed: mean, 95 % Student interval and number of "
        f"pairs. p (Holm): paired t test, adjusted over the {family}{other} comparisons of this table.",
        f"Decided ({len(decided)} of {len(found)}): {listed(decided)}."
        if decided
        else f"Decided: none of {len(found)}.",
    ]
    if undecided:
        which = f": {listed(undecided)}" if len(undecided) <= _LISTED else ""
        said += [f"Undecided ({len(undecided)} of {len(found)}){which}."]
    if alone:
        said += [f"For {len(alone)} of these the interval, which stands for one comparison by itself, excludes 0."]
    return " ".join(said)
