"""Processes: independent runs, or stacks of runs, in worker processes of one machine, with live progress.

A run that fails is reported and does not stop the others. The same call resumes runs that were interrupted, and begins
stacks anew in which some runs were not finished, with these runs.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bisam.experiments.data import source
from bisam.experiments.launch.outcomes import Done, Outcome, Progress, collect_outcomes
from bisam.experiments.launch.stacks import STACK_THREADS, Job, jobs
from bisam.experiments.launch.work import train_or_explain, train_stack_or_explain
from bisam.experiments.launch.workers import MAX_DEATHS, Killed, Worker, open_pool
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Row
from bisam.experiments.runs.machine import Machine, threads
from bisam.experiments.studies.study import Analyses


def run_all(
    recipes: Sequence[Recipe],
    root: Path,
    workers: int,
    machine: Machine,
    progress: Progress,
    analyses: Analyses | None = None,
    stack: int | None = None,
) -> list[Outcome]:
    """Run what is not finished yet in `workers` processes; return the outcomes in the order of `recipes`.

    With `stack`, each process trains up to so many seeds of a recipe at once, see `training.stacked`.

    With `analyses`, each run is analysed in the same process after it is trained, and runs that lack them are too.

    If a process is killed, its run is resumed once in a new process; other runs are not affected.

    No run is begun once `machine.max_time` is over, and those that are trained end after the epoch that fits.

    Raises:
        KeyboardInterrupt: the user or the system stopped it; the workers are gone and finished runs are on disk.
    """
    share = min(
        workers, len(recipes)
    )  # of all recipes, not of the remaining ones: results depend on the number of threads

    def run(left: Sequence[Recipe], done: Done) -> None:
        _in_processes(jobs(left, root, stack), root, share, machine, progress, done, analyses)

    return collect_outcomes(recipes, root, progress, run, analyses)


@dataclass(frozen=True)
class _Completed:
    """A message of a worker: for each run of its job, the number of completed epochs or steps and the last score."""

    runs: list[tuple[Recipe, int, float]]


@dataclass(frozen=True)
class _Measuring:
    """A message of a worker: what it computes of a finished run, and the number of completed analyses."""

    recipe: Recipe
    measure: str
    completed: int


def _in_processes(
    todo: Sequence[Job],
    root: Path,
    workers: int,
    machine: Machine,
    progress: Progress,
    done: Done,
    analyses: Analyses | None,
) -> None:
    left, killed = deque(todo), Counter[Job]()
    start = time.time()  # the clock that processes share

    def give(worker: Worker[Job]) -> None:
        job = left.popleft()
        worker.give(job, (job, root, machine.at(worker.place), analyses, start))
        for recipe in job.recipes:
            progress.begins(recipe, worker.place + 1)

    progress.starting(min(workers, len(todo)), sum(len(job.recipes) for job in todo))
    with open_pool(_serve, workers) as pool:
        while True:
            if machine.max_time is not None and time.time() - start > machine.max_time:
                for job in left:
                    for recipe in job.recipes:
                        done(Outcome(recipe, None, out_of_time=True))
                left.clear()
            while left and (worker := pool.free()) is not None:
                give(worker)
            if not pool.busy:
                return
            for worker, message in pool.messages():
                job = worker.job
                assert job is not None
                match message:
                    case Killed(reason=reason):
                        killed[job] += 1
                        if killed[job] < MAX_DEATHS:
                            left.appendleft(job)
                        else:
                            for recipe in job.recipes:
                                done(Outcome(recipe, None, reason))
                    case _Completed(runs=runs):
                        for recipe, completed, score in runs:
                            progress.epoch(recipe, completed, score)
                    case _Measuring(recipe=recipe, measure=measure, completed=completed):
                        progress.measuring(recipe, measure, completed)
                    case _:
                        worker.job = None
                        for outcome in message:
                            done(outcome)
                            if not outcome.started:
                                left = _without(left, outcome, done)


def _without(left: deque[Job], lacking: Outcome, done: Done) -> deque[Job]:
    """Return the jobs that do not need the missing data of `lacking`; the runs of the others get its outcome."""
    same = [source(job.recipes[0]) == source(lacking.recipe) for job in left]
    for job in compress(left, same):
        for recipe in job.recipes:
            done(replace(lacking, recipe=recipe))
    return deque(job for job, lacks in zip(left, same, strict=True) if not lacks)


def _serve(connection: Connection, share: int) -> None:
    """Run the loop of a worker process: receive a job, train and analyse its runs, send the outcomes."""
    one_at_a_time = threading.Lock()  # with several devices, epochs are reported by a thread

    def send(message: Any) -> None:
        with one_at_a_time:
            connection.send(message)

    while True:
        try:
            job, root, machine, analyses, start = connection.recv()
        except EOFError:
            return
        machine = machine.later(time.time() - start)
        last = 0.0

        def report(recipes: Sequence[Recipe], rows: Sequence[Row]) -> None:
            nonlocal last
            runs = [(r, r.completed(row), row["validation"]) for r, row in zip(recipes, rows, strict=True)]
            if time.monotonic() - last > 0.1 or runs[0][1] == recipes[0].length:
                last = time.monotonic()
                send(_Completed(runs))

        if job.stacked:
            torch.set_num_threads(STACK_THREADS)
            send(train_stack_or_explain(job.recipes, root, machine, report))
            continue
        threads(share)
        (recipe,) = job.recipes

        def report_one(row: Row, recipe: Recipe = recipe) -> None:
            report([recipe], [row])

        def measuring(measure: str, completed: int, recipe: Recipe = recipe) -> None:
            send(_Measuring(recipe, measure, completed))

        send([train_or_explain(recipe, root, machine, report_one, analyses, measuring)])
