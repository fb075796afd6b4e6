"""Work: what a process of a study does with a run, or with a stack of runs; a failure becomes an outcome."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from bisam.experiments.analyses.run import analyse, settings_by_name
from bisam.experiments.errors import (
    DataError,
    InUseError,
    OutOfTimeError,
    RunError,
    is_out_of_memory,
    missing_package,
    reason,
)
from bisam.experiments.launch.outcomes import OnMeasure, Outcome, lacking
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Result, Row, Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.studies.study import Analyses
from bisam.experiments.training.devices import OnEpoch
from bisam.experiments.training.stacked.train import train_stack
from bisam.experiments.training.train import train


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
    except OutOfTimeError:
        return Outcome(recipe, None, out_of_time=True)
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
        except OutOfTimeError:
            outcomes |= {run.recipe: Outcome(run.recipe, None, out_of_time=True) for run in opened}
        except (Exception, SystemExit) as error:
            started = not isinstance(error, DataError)
            for run in opened:  # some may be finished, if a folder of the stack cannot be written
                result = run.result
                message = None if result is not None else explanation(error)
                outcomes[run.recipe] = Outcome(run.recipe, result, message, started)
    return [outcomes[recipe] for recipe in recipes]


def explanation(error: BaseException) -> str:
    """Returns the reason for a failure, in one line."""
    if isinstance(error, DataError | RunError | ValueError):
        message = str(error)
    elif is_out_of_memory(error):
        message = f"out of memory: fewer runs at a time or a smaller batch_size need less ({reason(error)})"
    elif (missing := missing_package(error)) is not None:
        message = missing
    elif isinstance(error, OSError):
        message = f"cannot write under {error.filename or 'its folder'}: {error.strerror or error}"
    else:  # with its type, for a bug report
        message = f"{type(error).__name__}: {str(error)[:300]}"
    return " ".join(message.split())


def _analyse(run: Run, result: Result, analyses: Analyses, machine: Machine, on_measure: OnMeasure | None) -> None:
    settings, left, last = settings_by_name(analyses), lacking(run, result, analyses), ""
    first = replace(machine, device=machine.device.partition(",")[0], devices=1, nodes=1, strategy="auto")
    for completed, name in enumerate(settings):

        def report(measure: str, _done: int, _total: int, completed: int = completed) -> None:
            nonlocal last
            if on_measure is not None and measure != last:
                on_measure(measure, completed)
            last = measure

        if name in left:
            analyse(run.folder, [name], settings[name], first, report)
