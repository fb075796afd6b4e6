"""`bisam tables`: the page of the tables and figures of the papers, with commands and costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bisam.experiments.cli.folders import check_file
from bisam.experiments.cli.terminal import console
from bisam.experiments.runs.files import write

if TYPE_CHECKING:
    from bisam.experiments.launch.flops import Counts
    from bisam.experiments.recipes.recipe import Recipe

EXAMPLES = ("bisam tables --to docs/tables.md",)


def tables(*, to: Path) -> int:
    """Write the page that lists the tables and figures of the papers: command, data, cost, results.

    Costs that were not counted before are counted now, which takes seconds to minutes each, and kept in a JSON file
    beside the page.

    Args:
        to: Markdown file to write. Pages of results are looked for in its folder.
    """
    from bisam.experiments.launch.flops import Counts, missing

    check_file(to, "tables.md")
    path, recipes = to.with_suffix(".json"), needed()
    counts = Counts.read(path)
    left = missing(recipes, counts)
    for i, recipe in enumerate(left):
        console.print(f"{i + 1}/{len(left)}: counting {recipe.method} with {recipe.model}", soft_wrap=True)
        counts = counts.having(recipe)
        counts.write(path)
    if (kept := counts.of(recipes)) != Counts.read(path):
        kept.write(path)
    write(to, written(to.parent, kept))
    console.print(f"{to}", soft_wrap=True)
    return 0


def needed() -> list[Recipe]:
    """The recipes of all studies, and those of the networks whose published times give a throughput."""
    from bisam.experiments.studies import STUDIES
    from bisam.experiments.studies.paper import MODELS

    timed = [replace(_timed(), model=model) for model in MODELS]
    return list(dict.fromkeys([*(recipe for study in STUDIES.values() for recipe in study.recipes(None)), *timed]))


def written(docs: Path, counts: Counts) -> str:
    """The page, from counts.

    Args:
        docs: folder of the page.
        counts: of the operations of `needed()`.
    """
    from bisam.experiments.launch.flops import operations
    from bisam.experiments.measurements import MEASUREMENTS
    from bisam.experiments.reports.overview import Throughput, page
    from bisam.experiments.studies import STUDIES

    def cost(recipe: Recipe) -> float:
        return operations(recipe, counts)

    throughput = Throughput.published(cost, _timed())
    return page(STUDIES.values(), MEASUREMENTS.values(), cost, throughput, counts.versions, docs)


def _timed() -> Recipe:
    from bisam.experiments.recipes.catalogue import BASELINE
    from bisam.experiments.recipes.presets import CIFAR

    return replace(CIFAR, method=BASELINE)
