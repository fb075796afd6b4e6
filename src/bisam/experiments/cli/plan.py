"""The plan of a study: its runs at once, and then the times that they will take, each as soon as it is measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from bisam.experiments.cli.terminal import console, errors
from bisam.experiments.errors import RunError
from bisam.experiments.launch.outcomes import lacking
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.reports.groups import names, place, places
from bisam.experiments.runs.durations import duration
from bisam.experiments.runs.folder import Result, Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.studies.study import Analyses


def show_runs(recipes: Sequence[Recipe], root: Path, analyses: Analyses | None = None) -> tuple[dict[Recipe, int], int]:
    """Print a table of the runs.

    Nothing is built, loaded or measured.

    Args:
        recipes: with all seeds.
        root: folder of the run folders.
        analyses: of each run.

    Returns:
        How many runs are left of each recipe, which has seed 0; and the number of runs whose analyses are left, those
        that are not finished included.
    """
    seeds = Counter(replace(recipe, seed=0) for recipe in recipes)
    results = {recipe: _result(Run.under(root, recipe)) for recipe in recipes}
    done = Counter(replace(recipe, seed=0) for recipe, result in results.items() if result is not None)
    measured = Counter[Recipe]()
    if analyses is not None:
        measured = Counter(
            replace(recipe, seed=0)
            for recipe, result in results.items()
            if result is not None and _is_analysed(Run.under(root, recipe), result, analyses)
        )
    left, called = {recipe: count - done[recipe] for recipe, count in seeds.items()}, names(seeds)
    head = ("dataset", "model", "method", "rho", "noise", "epochs", "runs left")
    table = Table(*head, *(["analyses left"] if analyses is not None else []), box=None)
    for recipe, count in left.items():
        rho = recipe.setting("rho")
        length = f"{recipe.length}" if recipe.steps is None else f"{recipe.steps} steps"
        cells = (recipe.dataset, recipe.model, called[recipe], "–" if rho is None else f"{rho:g}")
        counts = [f"{count} of {seeds[recipe]}"]
        counts += [f"{seeds[recipe] - measured[recipe]} of {seeds[recipe]}"] if analyses is not None else []
        table.add_row(*cells, f"{100 * recipe.noise:g} %", length, *counts)
    console.print(table)
    return left, 0 if analyses is None else len(recipes) - measured.total()


def show_times(left: Mapping[Recipe, int], machine: Machine, stack: int | None = None) -> float | None:
    """Measure and print the time of the runs that are left of each recipe.

    Args:
        left: number of runs that are left of each recipe.
        machine: where they are to be run.
        stack: largest number of runs that are trained at once, if they are.

    Returns:
        Seconds of all of them, one after the other; None if there is no estimate for some.
    """
    from bisam.experiments.launch.estimate import Estimate, estimate, queries
    from bisam.experiments.launch.stacks import seconds as stacked_seconds

    called, titles = names(left), places(left)
    problems, seconds = dict[str, None](), 0.0
    for recipe, count in left.items():
        if not count:
            continue
        with console.status(f"a few steps of {recipe.model} on {recipe.dataset}"):
            if stack is None:
                cost = estimate(recipe, machine)
            else:
                gradients, _ = queries(recipe.expression, recipe.batch_size)
                try:
                    cost = Estimate(gradients, stacked_seconds(recipe, machine, count, stack) / count)
                except ValueError as error:
                    cost = Estimate(gradients, None, str(error))
        if cost.problem and cost.problem not in problems:
            problems[cost.problem] = None
            errors.print(f"bisam: no estimate: {cost.problem}")
        seconds += count * (cost.seconds or 0.0)
        what = ", ".join(part for part in (titles[place(recipe)], called[recipe]) if part)
        time = "?" if cost.seconds is None else duration(count * cost.seconds)
        runs = "1 run" if count == 1 else f"{count} runs"
        runs += "" if stack is None else f" in stacks of {min(stack, count)} at most"
        gradients = f"{cost.gradients:.3g} gradient{'s' if cost.gradients != 1 else ''} per step"
        line = f"{what}: {gradients}, {runs}: {time}"
        console.print(line, soft_wrap=True, highlight=False)
    return None if problems else seconds


def _result(run: Run) -> Result | None:
    """The result of a run; a damaged one has none, and is reported."""
    try:
        return run.result
    except RunError as error:
        errors.print(f"bisam: {error}")
        return None


def _is_analysed(run: Run, result: Result, analyses: Analyses) -> bool:
    """Whether nothing is left to measure of a finished run; a damaged file is reported."""
    try:
        return not lacking(run, result, analyses)
    except RunError as error:
        errors.print(f"bisam: {error}")
        return False
