"""Processes: independent runs on the cores of one machine, with live progress.

A run that fails is reported and does not stop the others; what is interrupted goes on where it was, by the same call.
"""

from __future__ import annotations

import multiprocessing as mp
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import compress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from bisam.experiments.data import source
from bisam.experiments.launch.outcomes import Done, Outcome, Progress, attempted, collected
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Row
from bisam.experiments.runs.machine import Machine, deaf, end_with_parent, threads


def run_all(recipes: Sequence[Recipe], root: Path, workers: int, machine: Machine, progress: Progress) -> list[Outcome]:
    """Run what is not finished yet, in `workers` processes; outcomes in the order of `recipes`.

    A process that is killed costs its run an epoch and the other runs nothing; its run goes on in a new one, once.

    Raises:
        KeyboardInterrupt: the user stopped it; the workers are gone and finished runs are on disk.
    """
    share = min(workers, len(recipes))  # not of what is left: on other numbers of threads a run has other bits

    def run(left: Sequence[Recipe], done: Done) -> None:
        _in_processes(left, root, share, machine, progress, done)

    return collected(recipes, root, progress, run)


_SPAWN = mp.get_context("spawn")  # fork is unsafe once torch has threads
_LIVES = 2
"""A run whose process was killed so often is given up: it is likely to blame."""


class _Worker:
    """A process that computes one run after another."""

    def __init__(self, share: int, place: int) -> None:
        self.place = place
        self.recipe: Recipe | None = None
        self.connection, theirs = _SPAWN.Pipe()
        # It may have children, as a run on several devices does: a daemon may not.
        self.process = _SPAWN.Process(target=_serve, args=(theirs, share), daemon=False)
        with deaf():
            self.process.start()
        theirs.close()

    def give(self, recipe: Recipe, root: Path, machine: Machine) -> None:
        self.recipe = recipe
        with suppress(ConnectionError):  # it was killed; that is seen when its answer does not come
            self.connection.send((recipe, root, machine.at(self.place)))

    def gone(self) -> bool:
        """Whether it was killed; a child of its own may hold the connection open for some seconds more."""
        return not self.process.is_alive() and not self.connection.poll()

    def end(self) -> None:
        """Kill it if it does not go on its own."""
        self.connection.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


@contextmanager
def _staff() -> Generator[list[_Worker]]:
    """A list of workers that end with the block: at once if by an exception, for their runs resume from an epoch."""
    staff: list[_Worker] = []
    try:
        yield staff
    except BaseException:
        with deaf():  # to a second Ctrl-C
            for worker in staff:
                worker.process.terminate()
            for worker in staff:
                worker.end()
        raise
    for worker in staff:
        worker.connection.close()
    for worker in staff:
        worker.process.join()


def _in_processes(
    recipes: Sequence[Recipe], root: Path, workers: int, machine: Machine, progress: Progress, done: Done
) -> None:
    left, killed = deque(recipes), Counter[Recipe]()
    with _staff() as staff:
        while True:
            for worker in staff:
                if worker.recipe is None and left:
                    worker.give(left.popleft(), root, machine)
            while left and len(staff) < workers:
                staff.append(_Worker(workers, min(set(range(workers)) - {worker.place for worker in staff})))
                staff[-1].give(left.popleft(), root, machine)
            busy = {worker.connection: worker for worker in staff if worker.recipe is not None}
            if not busy:
                return
            ready = set(wait(list(busy), timeout=1))
            for connection, worker in busy.items():
                recipe = worker.recipe
                assert recipe is not None
                try:
                    if connection in ready:
                        message = connection.recv()
                    elif worker.gone():
                        raise EOFError
                    else:
                        continue
                except (EOFError, ConnectionError):
                    staff.remove(worker)
                    worker.end()
                    killed[recipe] += 1
                    if killed[recipe] < _LIVES:
                        left.appendleft(recipe)
                    else:
                        done(Outcome(recipe, None, reason_killed(worker.process.exitcode)))
                    continue
                if isinstance(message, Outcome):
                    worker.recipe = None
                    done(message)
                    if not message.started:
                        left = _without(left, message, done)
                else:
                    progress.epoch(recipe, *message)


def _without(left: deque[Recipe], lacking: Outcome, done: Done) -> deque[Recipe]:
    """What is left but for the recipes that lack the same data, which need not be tried."""
    same = [source(recipe) == source(lacking.recipe) for recipe in left]
    for recipe in compress(left, same):
        done(replace(lacking, recipe=recipe))
    return deque(recipe for recipe, lacks in zip(left, same, strict=True) if not lacks)


def reason_killed(code: int | None) -> str:
    """Why a run is given up whose process ended with this exit code, and what to do."""
    goes_on = "the same command goes on from its last epoch"
    if code == -9:  # SIGKILL, which not every system has by name
        return (
            f"its process was killed {_LIVES} times, as the system does when memory is short: "
            f"give fewer --workers; {goes_on}"
        )
    how = f"exit code {code}" if code is None or code >= 0 else _signal(-code)
    return f"its process died {_LIVES} times ({how}): {goes_on}"


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _serve(connection: Connection, share: int) -> None:
    """What a worker does."""
    end_with_parent()
    threads(share)
    one_at_a_time = threading.Lock()  # the epochs of a run on several devices come from a thread

    def send(message: Any) -> None:
        with one_at_a_time:
            connection.send(message)

    while True:
        try:
            recipe, root, machine = connection.recv()
        except EOFError:
            return
        last = 0.0

        def report(row: Row, epochs: int = recipe.epochs) -> None:
            nonlocal last
            if time.monotonic() - last > 0.1 or row["epoch"] == epochs:
                last = time.monotonic()
                send((int(row["epoch"]), row["validation"]))

        send(attempted(recipe, root, machine, report))
