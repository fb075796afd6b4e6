"""Processes: independent runs on the cores of one machine, with live progress.

A run that fails is reported and does not stop the others; what is interrupted goes on where it was, by the same call.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import Any, Protocol

from bisam.experiments.machine import Machine, threads
from bisam.experiments.recipes import Recipe
from bisam.experiments.runs import Run, RunError
from bisam.experiments.train import train


class Progress(Protocol):
    """What a display must do."""

    def epoch(self, recipe: Recipe, epoch: int, validation: float) -> None:
        """An epoch of a run is over."""
        ...

    def done(self, recipe: Recipe, error: str | None) -> None:
        """A run is over, or failed."""
        ...


@dataclass(frozen=True)
class Outcome:
    """How a run of a study ended."""

    recipe: Recipe
    result: dict[str, Any] | None
    error: str | None = None


def run_all(recipes: Sequence[Recipe], root: Path, workers: int, machine: Machine, progress: Progress) -> list[Outcome]:
    """Run what is not finished yet, in `workers` processes; outcomes in the order of `recipes`.

    Raises:
        KeyboardInterrupt: the user stopped it; the workers are gone and finished runs are on disk.
    """
    outcomes: dict[Recipe, Outcome] = {}
    for recipe in recipes:
        run = Run.under(root, recipe)
        try:
            if (result := run.result) is not None:
                run.check_recipe()
                outcomes[recipe] = Outcome(recipe, result)
        except RunError as error:
            outcomes[recipe] = Outcome(recipe, None, str(error))
    for recipe, outcome in outcomes.items():
        progress.done(recipe, outcome.error)

    left = [recipe for recipe in recipes if recipe not in outcomes]
    if left:
        for outcome in _in_processes(left, root, min(workers, len(left)), machine, progress):
            outcomes[outcome.recipe] = outcome
            progress.done(outcome.recipe, outcome.error)
    return [outcomes[recipe] for recipe in recipes]


def _in_processes(
    recipes: Sequence[Recipe], root: Path, workers: int, machine: Machine, progress: Progress
) -> Iterator[Outcome]:
    """Outcomes as they come. A process that is killed takes its pool along: a new one gets what was not finished."""
    left, killed = list(recipes), Counter[Recipe]()
    while left:
        events, running = _SPAWN.Queue(), set[Recipe]()
        pool = ProcessPoolExecutor(workers, mp_context=_SPAWN, initializer=_start, initargs=(events, workers))
        with _stopping(pool):
            with _deaf():
                pending = {pool.submit(_work, recipe, root, machine): recipe for recipe in left}
            while pending:
                done, _ = wait(pending, timeout=0.1, return_when=FIRST_COMPLETED)
                for recipe, epoch, validation in _drained(events):
                    running.add(recipe)
                    if epoch:
                        progress.epoch(recipe, epoch, validation)
                suspects = running.copy() or {pending[future] for future in done}
                for future in done:
                    recipe = pending.pop(future)
                    if isinstance(future.exception(), BrokenProcessPool):
                        killed[recipe] += recipe in suspects
                        if killed[recipe] <= 1:
                            continue
                    left.remove(recipe)
                    running.discard(recipe)
                    yield _outcome(recipe, future)
        pool.shutdown()


def _drained(events: Any) -> Iterator[tuple[Recipe, int, float]]:
    try:
        while True:
            yield events.get_nowait()
    except Empty:
        return


@contextmanager
def _stopping(pool: ProcessPoolExecutor) -> Generator[None]:
    """End the pool's processes at once if the block is left by an exception; their runs resume from the last epoch."""
    try:
        yield
    except BaseException:
        with _deaf():  # to a second Ctrl-C
            for process in list((pool._processes or {}).values()):
                process.terminate()
            pool.shutdown(cancel_futures=True)
        raise


@contextmanager
def _deaf() -> Generator[None]:
    """Without Ctrl-C. Processes that start here inherit that: they must not hear it, even while they import."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _outcome(recipe: Recipe, future: Future[dict[str, Any]]) -> Outcome:
    try:
        return Outcome(recipe, future.result())
    except BrokenProcessPool:
        return Outcome(
            recipe, None, "its process was killed twice (out of memory?): the same command goes on from there"
        )
    except (RunError, ValueError) as error:
        return Outcome(recipe, None, str(error))
    except OSError as error:
        return Outcome(recipe, None, f"cannot write under {error.filename or 'its folder'}: {error.strerror or error}")
    except Exception as error:  # a study goes on; the type is what a bug report needs
        return Outcome(recipe, None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


_SPAWN = mp.get_context("spawn")  # fork is unsafe once torch has threads
_events: Any = None


def _start(events: Any, workers: int) -> None:
    """Set up a worker: its share of the cores, and it does not outlive the parent."""
    global _events
    _events = events
    threads(workers)
    parent = mp.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _work(recipe: Recipe, root: Path, machine: Machine) -> dict[str, Any]:
    last = 0.0
    _events.put((recipe, 0, 0.0))

    def report(row: dict[str, float]) -> None:
        nonlocal last
        if time.monotonic() - last > 0.1 or row["epoch"] == recipe.epochs:
            last = time.monotonic()
            _events.put((recipe, int(row["epoch"]), row["validation"]))

    return train(Run.under(root, recipe), machine, report)
