"""Launch: the trials of a search in worker processes.

A trial is one run for each of its seeds, one after the other in one worker. They are trained and validated, and not
tested: no test score of a trial exists. Only the first seed can be pruned: all trials share it, and with it the split
of the data, so that their scores after an epoch can be compared.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from bisam.experiments.errors import DataError, StoppedError
from bisam.experiments.launch.work import explanation
from bisam.experiments.launch.workers import MAX_DEATHS, Killed, Worker, open_pool
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.checkpoint import PREVIOUS
from bisam.experiments.runs.folder import Row, Run
from bisam.experiments.runs.machine import Machine, threads
from bisam.experiments.runs.results import Validated
from bisam.experiments.training.train import validate
from bisam.experiments.tuning.database import Database
from bisam.experiments.tuning.search import RUNS, Search
from bisam.experiments.tuning.trials import Trial

MOST_FAILURES = 3
"""No further trial begins after so many have failed and none has not: the next would fail for the same reason."""


class Progress(Protocol):
    """Receives the progress of a search, to display it."""

    def begins(self, trial: Trial, worker: int) -> None:
        """A worker, numbered from 1, gets a trial."""
        ...

    def epoch(self, trial: Trial, seed: int, completed: int, validation: float) -> None:
        """An epoch of a run of a trial is completed; `completed` is the number of its epochs or steps until then."""
        ...

    def ended(self, trial: Trial, trials: Sequence[Trial]) -> None:
        """A trial has ended or failed; `trials` are all that have begun."""
        ...


def run_trials(
    search: Search,
    folder: Path,
    database: Database,
    trials: int,
    workers: int,
    machine: Machine,
    progress: Progress,
    timeout: float | None = None,
) -> list[Trial]:
    """Resume unfinished trials and begin new ones until there are `trials`; return all of them, by number.

    Args:
        search: what is searched.
        folder: of the search, which this process holds.
        database: its storage.
        trials: number of trials, those of earlier commands included.
        workers: trials at a time, each in a process.
        machine: where to compute.
        progress: receives what happens.
        timeout: seconds after which no further trial begins; None: no limit.

    Raises:
        ValueError: the data cannot be loaded.
        KeyboardInterrupt: the user stopped it; the workers are gone, and the same call resumes.
    """
    return _Launch(search, folder, database, trials, workers, machine, progress, timeout).run()


@dataclass(frozen=True)
class _Epoch:
    """A message of a worker: an epoch of the run with this place among the seeds of its trial."""

    place: int
    completed: int
    validation: float


@dataclass(frozen=True)
class Ended:
    """A message of a worker: how a trial ended, with the results of the seeds that reached their end."""

    results: list[Validated]
    pruned: bool = False
    seconds: float = 0.0
    error: str | None = None
    lacks_data: bool = False


class _Launch:
    """The trials in progress, and those that are known."""

    def __init__(
        self,
        search: Search,
        folder: Path,
        database: Database,
        trials: int,
        workers: int,
        machine: Machine,
        progress: Progress,
        timeout: float | None,
    ) -> None:
        self._search, self._root, self._database, self._machine = search, folder / RUNS, database, machine
        self._workers, self._progress = workers, progress
        self._most = min(trials, len(search.grid)) if search.sampler == "grid" else trials
        self._end = None if timeout is None else time.monotonic() + timeout
        self._left = deque[Trial]()  # which begin before new ones: unfinished ones, and those whose process was killed
        self._begun = self._failures = 0
        self._known: dict[Recipe, Trial] = {}  # trials that have ended, by recipe
        self._training = set[Recipe]()
        self._twins: list[Trial] = []  # trials whose recipe another one is training now
        self._killed = Counter[int]()
        self._lacking: str | None = None

    def run(self) -> list[Trial]:
        """See `run_trials`."""
        trials = self._database.trials()
        self._left.extend(self._database.unfinished())
        self._begun = len(trials)
        self._known = {self._recipe(trial): trial for trial in reversed(trials) if trial.ended}
        with open_pool(_serve, self._workers) as pool:
            while True:
                while self._more() and (worker := pool.free()) is not None:
                    self._give(worker)
                if not pool.busy:
                    break
                for worker, message in pool.messages():
                    self._receive(worker, message)
        if self._lacking is not None:
            raise ValueError(self._lacking)
        return self._database.trials()

    def _more(self) -> bool:
        """Whether another trial is to begin now."""
        if self._lacking is not None or (self._end is not None and time.monotonic() >= self._end):
            return False
        if self._failures >= MOST_FAILURES and not self._known:
            return False
        return bool(self._left) or self._begun < self._most

    def _give(self, worker: Worker[Trial]) -> None:
        """Begin a trial in a worker; one with the recipe of another needs none."""
        if self._left:
            trial = self._left.popleft()
        else:
            trial = self._database.begin()
            self._begun += 1
        recipe = self._recipe(trial)
        if (known := self._known.get(recipe)) is not None:
            self._ended(self._database.repeat(trial.number, known))
        elif recipe in self._training:
            self._twins.append(trial)
        else:
            self._training.add(recipe)
            worker.give(trial, (self._search.runs(trial.values), self._root, self._machine.at(worker.place)))
            self._progress.begins(trial, worker.place + 1)

    def _receive(self, worker: Worker[Trial], message: Any) -> None:
        trial = worker.job
        assert trial is not None
        match message:
            case Killed(reason=reason):
                self._stops(trial)
                self._killed[trial.number] += 1
                if self._killed[trial.number] < MAX_DEATHS:
                    self._left.appendleft(trial)
                else:
                    self._ended(self._database.fail(trial.number, reason))
            case _Epoch(place=place, completed=completed, validation=score):
                length = self._recipe(trial).length
                pruned = place == 0 and self._database.report(trial.number, completed, score, length)
                worker.send(pruned)
                self._progress.epoch(trial, self._search.base.seed + place, completed, score)
            case Ended(error=None, pruned=pruned, results=results, seconds=seconds):
                worker.job = None
                if pruned:
                    ended = self._database.prune(trial.number, seconds)
                else:
                    ended = self._database.complete(trial.number, results)
                self._stops(trial, ended)
                self._ended(ended)
            case Ended(error=error, lacks_data=lacks):
                worker.job = None
                self._stops(trial)
                self._ended(self._database.fail(trial.number, error or ""))
                self._lacking = error if lacks else self._lacking
            case _:
                raise TypeError(f"unknown message of a worker: {message!r}")

    def _stops(self, trial: Trial, ended: Trial | None = None) -> None:
        """A trial is in no worker any more; trials with its recipe get its scores, or are trained in its place."""
        recipe = self._recipe(trial)
        self._training.discard(recipe)
        twins = [twin for twin in self._twins if self._recipe(twin) == recipe]
        self._twins = [twin for twin in self._twins if twin not in twins]
        if ended is None:
            self._left.extend(twins)
            return
        self._known[recipe] = ended
        for twin in twins:
            self._ended(self._database.repeat(twin.number, ended))

    def _ended(self, trial: Trial) -> None:
        self._failures += trial.state == "failed"
        self._progress.ended(trial, self._database.trials())

    def _recipe(self, trial: Trial) -> Recipe:
        return self._search.recipe(trial.values)


def _serve(connection: Connection, share: int) -> None:
    """Run the loop of a worker process: receive the runs of a trial, train them, send epochs and the end."""
    while True:
        try:
            recipes, root, machine = connection.recv()
        except EOFError:
            return
        threads(share)
        connection.send(train_trial(recipes, root, machine, connection))


def train_trial(recipes: Sequence[Recipe], root: Path, machine: Machine, connection: Connection) -> Ended:
    """Train the runs of a trial until one is stopped or fails, send their epochs, and return how it ended.

    Args:
        recipes: one for each seed.
        root: folder of the run folders.
        machine: where to compute.
        connection: to the process of the command, which answers to each epoch whether the run is pruned.
    """
    results: list[Validated] = []
    for place, recipe in enumerate(recipes):
        run, course = Run.under(root, recipe), _Course(recipe, place, connection)
        try:
            for row in run.metrics():  # of an earlier process, which may have reported fewer
                course.epoch(row)
            results.append(validate(run, machine, course.epoch))
            (run.folder / PREVIOUS).unlink(missing_ok=True)  # as at the end of a run that is tested
        except StoppedError:
            return Ended(results, pruned=True, seconds=sum(row["seconds"] for row in course.rows))
        except (Exception, SystemExit) as error:
            return Ended(results, error=explanation(error), lacks_data=isinstance(error, DataError))
        if results[-1].diverged is not None:
            break
    return Ended(results)


class _Course:
    """The epochs of a run, which are sent to the process of the command; its answer says whether the run is pruned."""

    def __init__(self, recipe: Recipe, place: int, connection: Connection) -> None:
        self._recipe, self._place, self._connection = recipe, place, connection
        self.rows: list[Row] = []

    def epoch(self, row: Row) -> None:
        """Send an epoch, unless it was sent before.

        Raises:
            StoppedError: the run is pruned.
        """
        if row["epoch"] <= len(self.rows):
            return
        self.rows.append(row)
        self._connection.send(_Epoch(self._place, self._recipe.completed(row), row["validation"]))
        if self._connection.recv():
            raise StoppedError("pruned: its validation score is below the median")
