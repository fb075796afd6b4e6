"""Outcomes: how the runs of a study ended, both those that were finished before and those that are run now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from bisam.experiments.analyses.catalogue import known
from bisam.experiments.analyses.run import analyse, missing
from bisam.experiments.analyses.settings import Settings
from bisam.experiments.errors import DataError, InUseError, RunError, is_out_of_memory, reason
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Result, Row, Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.studies.study import Analyses
from bisam.experiments.training.devices import OnEpoch
from bisam.experiments.training.stacked.train import train_stack
from bisam.experiments.training.train import train


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
        if outcome.started:
            progress.done(outcome.recipe, outcome.error, outcome.elsewhere)

    left: list[Recipe] = []
    for recipe in dict.fromkeys(recipes):
        if (outcome := _known_outcome(recipe, root, analyses)) is None:
            left.append(recipe)
        else:
            done(outcome)
    if left:
        run(left, done)
    return [outcomes[recipe] for recipe in recipes]


def _known_outcome(recipe: Recipe, root: Path, analyses: Analyses | None) -> Outcome | None:
    run = Run.under(root, recipe)
    try:
        if not (run.folder / "result.json").exists():
            return None
        run.check_recipe()  # first: the result of another recipe is no damage
        if (result := run.result) is None or lacking(run, result, analyses):
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
    return missing(run.folder, result, _settings(analyses))


def _settings(analyses: Analyses) -> dict[str, Settings]:
    """The settings of each analysis, in the order in which they are computed."""
    return {name: Settings(**analyses.settings_of(name)) for name in known(analyses.what)}


def train_or_explain(
    recipe: Recipe,
    root: Path,
    machine: Machine,
    on_epoch: OnEpoch | None = None,
    analyses: Analyses | None = None,
    on_measure: OnMeasure | None = None,
) -> Outcome:
    """Train and analyse in this process; a failure becomes a message of one line, because the study continues."""
    run, result = Run.under(root, recipe), None
    try:
        result = train(run, machine, on_epoch)  # returns at once if it is finished
        if analyses is not None:
            _analyse(run, result, analyses, machine, on_measure)
        return Outcome(recipe, result)
    except (Exception, SystemExit) as error:
        message = ("" if result is None else "its analysis: ") + explanation(error)
        return Outcome(recipe, result, message, not isinstance(error, DataError), isinstance(error, InUseError))


def train_stack_or_explain(
    recipes: Sequence[Recipe],
    root: Path,
    machine: Machine,
    on_epoch: Callable[[Sequence[Recipe], Sequence[Row]], None] | None = None,
) -> list[Outcome]:
    """Train a stack in this process and return the outcomes of its runs.

    A run whose folder is in use, damaged or of another recipe is left out, and so is one that is finished by now.
    """
    outcomes: dict[Recipe, Outcome] = {}
    with ExitStack() as folders:
        opened: list[Run] = []
        for recipe in recipes:
            run = Run.under(root, recipe)
            try:
                folders.enter_context(run.open())
                if (result := run.result) is None:
                    opened.append(run)
                else:
                    outcomes[recipe] = Outcome(recipe, result)
            except (RunError, OSError) as error:
                outcomes[recipe] = Outcome(recipe, None, explanation(error), elsewhere=isinstance(error, InUseError))
        left = [run.recipe for run in opened]
        try:
            if opened:
                results = train_stack(opened, machine, None if on_epoch is None else partial(on_epoch, left))
                outcomes |= {r: Outcome(r, result) for r, result in zip(left, results, strict=True)}
        except (Exception, SystemExit) as error:
            started = not isinstance(error, DataError)
            for run in opened:  # some may be finished, if a folder of the stack cannot be written
                result = run.result
                message = None if result is not None else explanation(error)
                outcomes[run.recipe] = Outcome(run.recipe, result, message, started)
    return [outcomes[recipe] for recipe in recipes]


def explanation(error: BaseException) -> str:
    """Return the reason for a failure, in one line."""
    if isinstance(error, DataError | RunError | ValueError):
        message = str(error)
    elif is_out_of_memory(error):
        message = f"out of memory: fewer runs at a time or a smaller batch_size need less ({reason(error)})"
    elif isinstance(error, OSError):
        message = f"cannot write under {error.filename or 'its folder'}: {error.strerror or error}"
    else:  # with its type, for a bug report
        message = f"{type(error).__name__}: {str(error)[:300]}"
    return " ".join(message.split())


def _analyse(run: Run, result: Result, analyses: Analyses, machine: Machine, on_measure: OnMeasure | None) -> None:
    settings, left, last = _settings(analyses), lacking(run, result, analyses), ""
    first = replace(machine, device=machine.device.partition(",")[0], devices=1, nodes=1, strategy="auto")
    for completed, name in enumerate(settings):

        def report(measure: str, _done: int, _total: int, completed: int = completed) -> None:
            nonlocal last
            if on_measure is not None and measure != last:
                on_measure(measure, completed)
            last = measure

        if name in left:
            analyse(run.folder, [name], settings[name], first, report)
