"""Table of flips: training samples that are classified correctly at w and incorrectly at w + e (Xie et al., 2024).

Every run of a method that perturbs the weights records them for each epoch. The table has the first, the middle and the
last epoch, with paired differences from the baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, nan
from statistics import mean, stdev
from typing import Any

from bisam.experiments.markdown import table
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.reports.cells import cells_of, spread
from bisam.experiments.reports.differences import Baselines, Comparison, columns, compare
from bisam.experiments.reports.groups import Groups, names, place, places, title
from bisam.experiments.reports.significance import adjusted
from bisam.experiments.runs.folder import Finished
from bisam.experiments.runs.results import training_labels

Row = dict[str, Any]

MARKS = ("first", "middle", "last")
MANY = 10
"""The number of methods in a place above which the table has the last epoch only."""


@dataclass(frozen=True)
class Flips:
    """The flips of a recipe at a mark.

    Attributes:
        recipe: of the runs.
        mark: one of `MARKS`.
        epoch: its number, or 0 if the runs differ in their number of epochs.
        counts: samples in that epoch, for each run; nan where the weights were not finite.
        shares: the same as shares of the training set; nan where its size is unknown.
        comparison: with the baseline, or None.
    """

    recipe: Recipe
    mark: str
    epoch: int
    counts: tuple[float, ...]
    shares: tuple[float, ...]
    comparison: Comparison | None

    @property
    def finite(self) -> list[float]:
        """The counts that are known."""
        return [count for count in self.counts if isfinite(count)]


def at(run: Finished, mark: str) -> int:
    """The epoch of a mark in a run; the middle of an even number is the epoch before the half is over."""
    last = len(run.metrics)
    return {"first": 1, "middle": (last + 1) // 2, "last": last}[mark]


def flips(groups: Groups, baselines: Baselines) -> list[Flips]:
    """The flips wherever they were recorded, place by place, in each place mark by mark.

    Methods that descend on a part of the batch record none. All comparisons are one family, also over the marks.

    Args:
        groups: runs by recipe.
        baselines: methods to compare with.
    """
    recorded = {recipe: runs for recipe, runs in groups.items() if not recipe.is_plain and any(map(_recorded, runs))}
    most = max((sum(place(r) == here for r in recorded) for here in places(recorded)), default=0)
    wanted = [mark for mark in MARKS if mark == "last" or most <= MANY]
    marked = {mark: {r: runs for r, runs in recorded.items() if _apart(runs, mark)} for mark in wanted}
    pairs = [
        (mark, one)
        for mark, some in marked.items()
        for one in compare(some, baselines, lambda run, mark=mark: _count(run, mark)).values()
    ]
    tested = adjusted([one for _, one in pairs])
    found = {(one.recipe, mark): one for (mark, _), one in zip(pairs, tested, strict=True)}
    order = [(here, mark) for here in places(recorded) for mark in wanted]
    return [
        _flips(recipe, runs, mark, found.get((recipe, mark)))
        for here, mark in order
        for recipe, runs in marked[mark].items()
        if place(recipe) == here
    ]


def rows(found: Sequence[Flips]) -> list[Row]:
    """One row of numbers for each recipe and mark, nan where there is none.

    Args:
        found: as `flips` returns them.
    """
    called = names(dict.fromkeys(one.recipe for one in found))
    imbalanced = any(one.recipe.imbalance > 1 for one in found)
    made: list[Row] = []
    for one in found:
        recipe = one.recipe
        row: Row = {"name": called[recipe], "method": title(recipe), "dataset": recipe.dataset, "model": recipe.model}
        row |= {"noise": recipe.noise, **({"imbalance": recipe.imbalance} if imbalanced else {})}
        row |= {"mark": one.mark, "epoch": one.epoch or ""}
        for name, values in (("flipped", one.finite), ("share", [share for share in one.shares if isfinite(share)])):
            row[f"{name}_mean"] = mean(values) if values else nan
            row[f"{name}_std"] = stdev(values) if len(values) > 1 else nan
        row |= {"n": len(one.counts), "finite": len(one.finite)}
        row["baseline"] = called[one.comparison.baseline] if one.comparison else ""
        made.append(row | columns(one.comparison) | {"recipe": recipe.slug})
    return made


def section(found: Sequence[Flips]) -> str:
    """The section of a report in Markdown; empty without flips.

    Args:
        found: as `flips` returns them.
    """
    if not found:
        return ""
    recipes = dict.fromkeys(one.recipe for one in found)
    called, titles = names(recipes), places(recipes)
    comparisons = [one.comparison for one in found if one.comparison and one.comparison.difference.pairs > 1]
    heads = ["epoch", "method", "flipped", "% of samples", "n"]
    said = [
        "Training samples that are classified correctly at w and incorrectly at w + e, in an epoch: mean ± standard "
        "deviation over n seeds. Each method is counted on the weights that it has trained and at its own radius: the "
        "counts compare methods, and not adversaries on the same weights."
    ]
    if comparisons:
        heads += ["difference", "p (Holm)", "detectable"]
        decided = sum(one.decided for one in comparisons)
        said += [
            "Difference: from the baseline, paired by seed; p is adjusted over the "
            f"{comparisons[0].family} comparisons of this table. Decided: {decided or 'none'} of {len(comparisons)}."
        ]
    lines: list[tuple[str, ...]] = []
    for one in found:
        n = f"{len(one.counts)}" if len(one.finite) == len(one.counts) else f"{len(one.finite)} of {len(one.counts)}"
        share = spread([share for share in one.shares if isfinite(share)], 100)
        epoch = f"{one.epoch} ({one.mark})" if one.epoch else one.mark
        compared = cells_of(one.comparison, 1) if comparisons else ()
        cells = (epoch, called[one.recipe], spread(one.finite, 1), share, n, *compared)
        lines.append((titles[place(one.recipe)], *cells) if len(titles) > 1 else cells)
    shown = table(("", *heads) if len(titles) > 1 else heads, lines)
    return f"## Samples flipped by the perturbation\n\n{' '.join(said)}\n\n{shown}"


def _recorded(run: Finished) -> bool:
    return any(isfinite(row["flipped"]) for row in run.metrics)


def _apart(runs: Sequence[Finished], mark: str) -> bool:
    """Whether a mark is an epoch of its own in all runs; of marks in one epoch the last and then the first is shown."""
    others = {"last": (), "first": ("last",), "middle": ("last", "first")}[mark]
    return all(at(run, mark) not in {at(run, other) for other in others} for run in runs)


def _count(run: Finished, mark: str) -> float:
    return run.metrics[at(run, mark) - 1]["flipped"]


def _flips(recipe: Recipe, runs: Sequence[Finished], mark: str, comparison: Comparison | None) -> Flips:
    epochs = {at(run, mark) for run in runs}
    counts = tuple(_count(run, mark) for run in runs)
    sizes = [training_labels(run.result) for run in runs]
    shares = tuple(count / size for count, size in zip(counts, sizes, strict=True))
    return Flips(recipe, mark, epochs.pop() if len(epochs) == 1 else 0, counts, shares, comparison)
