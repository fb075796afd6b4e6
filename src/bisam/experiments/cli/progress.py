"""Progress of runs: a bar on a terminal, or one line per run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from bisam.experiments.cli.terminal import console
from bisam.experiments.tuning.trials import outcome, ranked, settings

if TYPE_CHECKING:
    from bisam.experiments.recipes.recipe import Recipe
    from bisam.experiments.training.step_metrics import StepMetrics
    from bisam.experiments.tuning.trials import Trial

_WIDE = 80
"""Columns of a terminal from which on the bar has news."""


class _Live:
    """A context in which a bar is updated; nothing is shown if the output is not a terminal."""

    def __init__(self, *columns: ProgressColumn, quiet: bool = False) -> None:
        self._bar = Progress(*columns, console=console, disable=quiet or not console.is_terminal)

    def __enter__(self) -> Self:
        try:
            self._bar.start()
        except BaseException:  # Ctrl-C once the cursor is hidden
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop updating the bar."""
        self._bar.stop()


class _News(ProgressColumn):
    """The latest result; dropped on a narrow terminal, where counts and times need the room."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["news"] if console.width >= _WIDE else "", no_wrap=True, overflow="ellipsis")


class Display(_Live):
    """A bar over all epochs (or steps) with the latest result; lines if the output is not a terminal.

    Args:
        recipes: the runs.
        analyses: number of analyses of each run, which count as epochs.
        quiet: show neither a bar nor lines.
        verbose: show lines on a terminal too, and of a study a line for each epoch.
    """

    def __init__(
        self, recipes: Sequence[Recipe], analyses: int = 0, *, quiet: bool = False, verbose: bool = False
    ) -> None:
        self._speaks, self._verbose = not quiet and (verbose or not console.is_terminal), verbose
        self._worker: dict[Recipe, int] = {}
        self.finished = 0
        self._analyses = analyses
        self._runs = len(recipes)
        self._completed: dict[Recipe, int] = {}
        units = [*dict.fromkeys(recipe.unit for recipe in recipes), *(["analyses"] if analyses else [])]
        super().__init__(
            TextColumn("{task.fields[runs]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            _News(),
            quiet=quiet,
        )
        total = sum(recipe.length + analyses for recipe in recipes)
        self._task = self._bar.add_task("", total=total, runs=self._count(), unit=" and ".join(units), news="")
        self._epoch: tuple[TaskID, int] | None = None

    def line(self, text: str) -> None:
        """Print a line, above the bar if there is one; nothing if the display is quiet or a bar suffices."""
        if self._speaks:
            console.print(text, soft_wrap=True, highlight=False)

    def starting(self, processes: int, runs: int) -> None:
        """Say that worker processes are started for so many runs."""
        self.line(f"starting {_number(processes, 'process', 'processes')} for {_number(runs, 'run', 'runs')}")

    def begins(self, recipe: Recipe, worker: int) -> None:
        """Say which worker gets a run."""
        self._worker[recipe] = worker
        self.line(f"worker {worker}: {recipe.slug} seed {recipe.seed}")

    def epoch(self, recipe: Recipe, completed: int, validation: float) -> None:
        """Show a completed epoch of a run of a study, after which so many of its epochs or steps are completed."""
        self.advanced(recipe, completed, validation)
        if self._verbose:
            place = f"worker {self._worker[recipe]}: " if recipe in self._worker else ""
            unit = recipe.unit.removesuffix("s")
            self.line(
                f"{place}{recipe.slug} seed {recipe.seed}: {unit} {completed}/{recipe.length}, "
                f"validation {100 * validation:.1f} %"
            )

    def advanced(self, recipe: Recipe, completed: int, validation: float) -> None:
        """Show a completed epoch on the bars alone."""
        if self._epoch is not None:
            task, _ = self._epoch
            self._bar.update(task, completed=self._bar.tasks[-1].total, news="")
        self._advance(recipe, completed, f"{_called(recipe)}: {100 * validation:.1f} % valid.")

    def step(self, metrics: StepMetrics) -> None:
        """Show the step metrics of the only run on a second bar, over the batches of its epoch."""
        state: dict[str, Any] = {
            "completed": metrics.batch,
            "total": metrics.batches,
            "runs": f"epoch {metrics.epoch}",
            "news": metrics.words(),
        }
        if self._epoch is None:
            self._epoch = self._bar.add_task("", unit="batches", **state), metrics.epoch
            return
        task, shown = self._epoch
        if shown != metrics.epoch:
            self._bar.reset(task)
            self._epoch = task, metrics.epoch
        self._bar.update(task, **state)

    def measuring(self, recipe: Recipe, measure: str, completed: int) -> None:
        """Show a measure of a finished run that is being computed, after so many completed analyses."""
        self._advance(recipe, recipe.length + completed, f"{_called(recipe)}: {measure}")

    def done(self, recipe: Recipe, error: str | None, elsewhere: bool = False) -> None:
        """Show that a run finished or failed and why, or that another process has it."""
        self.finished += error is None
        self._advance(recipe, recipe.length + self._analyses, None)
        state = "done" if error is None else "in use elsewhere" if elsewhere else f"failed: {error}"
        self.line(f"{self._count()}: {recipe.slug} seed {recipe.seed} {state}")

    def _advance(self, recipe: Recipe, completed: int, news: str | None) -> None:
        before = self._completed.get(recipe, 0)
        self._completed[recipe] = max(completed, before)
        fields: dict[str, Any] = {} if news is None else {"news": news}
        self._bar.update(self._task, advance=max(0, completed - before), runs=self._count(), **fields)

    def _count(self) -> str:
        return f"{self.finished}/{self._runs} runs"


class TrialsDisplay(_Live):
    """A bar over the trials of a search with the best score; lines if the output is not a terminal.

    Args:
        trials: number of trials.
        unit: epochs or steps.
        quiet: show neither a bar nor lines.
        verbose: show lines on a terminal too, and a line for each epoch.
    """

    def __init__(self, trials: int, unit: str, *, quiet: bool = False, verbose: bool = False) -> None:
        self._speaks, self._verbose = not quiet and (verbose or not console.is_terminal), verbose
        self._total, self._unit = trials, unit
        self.finished, self.best = 0, ""
        columns = (TextColumn("{task.fields[trials]}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
        super().__init__(*columns, TimeRemainingColumn(), _News(), quiet=quiet)
        self._task = self._bar.add_task("", total=trials, trials=self._count(), news="")

    def known(self, trials: Sequence[Trial]) -> None:
        """Count the trials of earlier commands, which are no part of the speed."""
        self._see(trials)
        self._bar.reset(self._task, completed=self.finished, trials=self._count(), news=self.best)

    def begins(self, trial: Trial, worker: int) -> None:
        """Say which worker gets a trial."""
        self.line(f"worker {worker}: trial {trial.number}, {settings(trial.values)}")

    def epoch(self, trial: Trial, seed: int, completed: int, validation: float) -> None:
        """Show a completed epoch of a run, if every epoch is to be shown."""
        if self._verbose:
            done = f"{self._unit.removesuffix('s')} {completed}"
            self.line(f"trial {trial.number} seed {seed}: {done}, validation {100 * validation:.1f} %")

    def ended(self, trial: Trial, trials: Sequence[Trial]) -> None:
        """Show how a trial has ended."""
        self._see(trials)
        self._bar.update(self._task, completed=self.finished, trials=self._count(), news=self.best)
        best = f"; {self.best}" if self.best else ""
        self.line(
            f"{self._count()}: trial {trial.number}, {settings(trial.values)}: {outcome(trial, self._unit)}{best}"
        )

    def _see(self, trials: Sequence[Trial]) -> None:
        self.finished = sum(trial.ended for trial in trials)
        if first := ranked(trials):
            self.best = f"best {100 * first[0].score:.2f} %, trial {first[0].number}"

    def line(self, text: str) -> None:
        """Print a line, above the bar if there is one; nothing if the display is quiet or a bar suffices."""
        if self._speaks:
            console.print(text, soft_wrap=True, highlight=False)

    def _count(self) -> str:
        return f"{self.finished}/{self._total} trials"


def _number(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"


def _called(recipe: Recipe) -> str:
    return f"{recipe.method} noise {recipe.noise:g} seed {recipe.seed}"


class _Rate(ProgressColumn):
    """Examples per second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.speed
        return Text("" if speed is None else f"{speed:,.0f} {self._unit}/s", no_wrap=True)


class MeasuringDisplay(_Live):
    """A bar over the examples of the current measure; nothing if the output is not a terminal.

    Args:
        runs: number of runs that are measured.
        unit: what is counted, whose rate is shown; "": no rate.
        quiet: show nothing.
    """

    def __init__(self, runs: int, unit: str = "", *, quiet: bool = False) -> None:
        self._runs, self._number = runs, 0
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            *([_Rate(unit)] if unit else []),
            quiet=quiet,
        )
        self._task = self._bar.add_task("", total=None)
        self._title = ""

    def run(self) -> None:
        """Begin the next run."""
        self._number, self._title = self._number + 1, ""
        self._bar.reset(self._task, description=self._described("loading"), total=None)

    def measure(self, title: str, done: int, total: int) -> None:
        """Show how many examples of a measure have passed, of an expected number."""
        if title != self._title:
            self._title = title
            self._bar.reset(self._task, description=self._described(title))
        self._bar.update(self._task, completed=done, total=total)

    def _described(self, title: str) -> str:
        return f"{self._number}/{self._runs} runs, {title}" if self._runs > 1 else title
