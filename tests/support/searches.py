"""Searches in this process: workers are threads, and a formula stands for the training of a run."""

from __future__ import annotations

import math
import multiprocessing as mp
import threading
from contextlib import contextmanager
from typing import Any

from sqlalchemy import event
from sqlalchemy.pool import Pool

from bisam.experiments.launch import workers
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.files import to_csv, write
from bisam.experiments.runs.machine import Machine
from bisam.experiments.runs.results import Validated
from bisam.experiments.tuning import launch
from bisam.experiments.tuning.database import opened
from bisam.experiments.tuning.search import claimed


class Watch:
    """Records the progress of a search; `stop` is called when a trial has ended."""

    def __init__(self, stop=lambda number: None):
        self.begun, self.epochs, self.finished, self._stop = [], [], [], stop

    def begins(self, trial, worker):
        self.begun.append(trial.number)

    def epoch(self, trial, seed, completed, validation):
        self.epochs.append((trial.number, seed, completed))

    def ended(self, trial, trials):
        self.finished.append((trial.number, trial.state))
        self._stop(trial.number)


def score(recipe: Recipe, epoch: int = 10**6) -> float:
    """Best at rho 0.1, rises with the epochs, and depends a little on the seed."""
    distance = abs(math.log10((recipe.rho or 1e-9) / 0.1))
    return max(0.0, 0.9 - 0.2 * distance + 0.001 * recipe.seed) * epoch / (epoch + 1)


def formula(run, machine, on_epoch, trained: list[Any] | None = None) -> Validated:
    """In place of `validate`: writes the metrics of a run, which resumes after those that are there."""
    recipe, rows = run.recipe, []
    if trained is not None:
        trained.append((recipe.rho, recipe.seed))
    for epoch in range(1, recipe.length + 1):
        loss = math.nan if recipe.rho > 1.5 and epoch == 2 else 1.0
        row = {"epoch": epoch, "validation": score(recipe, epoch), "train_loss": loss, "flipped": 0.0, "seconds": 1.0}
        rows.append(row)
        diverged = None if math.isfinite(loss) else epoch
        write(run.folder / "metrics.csv", to_csv(rows))
        on_epoch(row)
        if diverged:
            break
    return Validated(rows[-1]["validation"], epoch, "last", diverged, "accuracy", 100, float(len(rows)))


@contextmanager
def without_waiting_for_the_disk(monkeypatch):
    """Files and storages are not synchronised, which would take most of the time of a test."""

    def fast(connection, record):
        connection.execute("PRAGMA synchronous=OFF")

    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    event.listen(Pool, "connect", fast)
    try:
        yield
    finally:
        event.remove(Pool, "connect", fast)


class _Thread:
    """A worker whose process is a thread."""

    exitcode = 0

    def __init__(self, place: int) -> None:
        self.place, self.job, self.process = place, None, self
        self.connection, theirs = mp.Pipe()
        self._thread = threading.Thread(target=self._serve, args=(theirs,), daemon=True)
        self._thread.start()

    def _serve(self, connection) -> None:
        while True:
            try:
                connection.send(launch.train_trial(*connection.recv(), connection))
            except (EOFError, OSError):
                return

    def give(self, job, message) -> None:
        self.job = job
        self.send(message)

    def send(self, message) -> None:
        self.connection.send(message)

    def gone(self) -> bool:
        return False


class Threads(workers.Pool):
    """A pool of threads."""

    def free(self):
        for worker in self.workers:
            if worker.job is None:
                return worker
        if len(self.workers) == self._count:
            return None
        self.workers.append(_Thread(len(self.workers)))
        return self.workers[-1]


@contextmanager
def threads(serve, count):
    """In place of `open_pool`."""
    pool = Threads(serve, count)
    try:
        yield pool
    finally:
        for worker in pool.workers:
            worker.connection.close()


def searched(search, folder, trials, watch=None, workers=1, timeout=None, machine=None):
    """The trials of a search, as `bisam tune` runs it."""
    with claimed(folder), opened(folder, search) as database:
        return launch.run_trials(
            search, folder, database, trials, workers, machine or Machine(log=()), watch or Watch(), timeout
        )
