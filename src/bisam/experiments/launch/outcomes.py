"""Outcomes: how the runs of a study ended, both those that were finished before and those that are run now.

What trains is in work.py: a study whose runs are all finished needs neither Fabric nor the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bisam.experiments.errors import RunError
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Result, Run
from bisam.experiments.studies.study import Analyses


class Progress(Protocol):
    """Receives the progress of a study, to display it."""

    def starting(self, processes: int, runs: int) -> None:
        """Worker processes are started for so many runs."""
        ...

    def begins(self, recipe: Recipe, worker: int) -> None:
        """A worker, numbered from 1, gets a run."""
        ...

    def epoch(self, recipe: Recipe, completed: int, validation: float) -> None:
        """An epoch of a run is completed; `completed` is the number of its epochs, or of its steps, until then."""
        ...

    def measuring(self, recipe: Recipe, measure: str, completed: int) -> None:
        """A measure of a finished run is being computed; `completed` is the number of analyses until then."""
        ...

    def done(self, recipe: Recipe, error: str | None, elsewhere: bool = False) -> None:
        """A run is finished and analysed, or failed with `error`, or another process has it (`elsewhere`)."""
        ...


@dataclass(frozen=True)
class Outcome:
    """How a run of a study ended."""

    recipe: Recipe
    result: Result | None
    error: str | None = None
    started: bool = True
    """False if its data cannot be loaded."""
    elsewhere: bool = False
    """Whether another process has its folder."""
    out_of_time: bool = False
    """Whether it is unfinished because `Machine.max_time` is over."""


Done = Callable[[Outcome], None]
OnMeasure = Callable[[str, int], None]
"""Called with a measure that is being computed, and the number of completed analyses."""


def collect_outcomes(
    recipes: Sequence[Recipe],
    root: Path,
    progress: Progress,
    run: Callable[[Sequence[Recipe], Done], None],
    analyses: Analyses | None = None,
) -> list[Outcome]:
    """Return the outcomes in the order of `recipes`: of finished runs as they are, of the rest from `run`.

    With `analyses`, a run is finished if they are.
    """
    outcomes: dict[Recipe, Outcome] = {}

    def done(outcome: Outcome) -> None:
        outcomes[outcome.recipe] = outcome
        if outcome.started and not outcome.out_of_time:
            progress.done(outcome.recipe, outcome.error, outcome.elsewhere)

    left: list[Recipe] = []
    for recipe in dict.fromkeys(recipes):
        if (outcome := known_outcome(recipe, root, analyses)) is None:
            left.append(recipe)
        else:
            done(outcome)
    if left:
        run(left, done)
    return [outcomes[recipe] for recipe in recipes]


def known_outcome(recipe: Recipe, root: Path, analyses: Analyses | None = None) -> Outcome | None:
    """Return the outcome of a run that is finished and analysed, or damaged; None if it is to be run."""
    run = Run.under(root, recipe)
    try:
        if (result := run.known_result()) is None or lacking(run, result, analyses):
            return None
        return Outcome(recipe, result)
    except RunError as error:
        return Outcome(recipe, None, str(error))


def lacking(run: Run, result: Result, analyses: Analyses | None) -> list[str]:
    """Return the names of the analyses that are missing in the folder of a finished run; a diverged run needs none.

    Raises:
        RunError: the file of the analyses is damaged.
    """
    if analyses is None or result.get("diverged") is not None:
        return []
    from bisam.experiments.analyses.run import missing, settings_by_name  # not at the top: it imports what trains

    return missing(run.folder, result, settings_by_name(analyses))
