"""Workers: a pool of processes that do one job after another and send messages, and notice which of them is killed.

with open_pool(serve, 2) as pool:
    while True:
        while jobs and (worker := pool.free()) is not None:
            worker.give(job := jobs.pop(), job)
        if not pool.busy:
            return
        for worker, message in pool.messages():
            ...
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from bisam.experiments.errors import show_warnings_in_one_line
from bisam.experiments.runs.machine import end_with_parent, ignore_interrupts
from bisam.experiments.runs.signals import Terminated, exit_code, terminable

MAX_DEATHS = 2
"""A job is given up after its process was killed so often: the job is the likely cause."""

Serve = Callable[[Connection, int], None]
"""Runs the loop of a worker process: it gets a connection, and the number of processes that share the cores."""
Job = TypeVar("Job")

_SPAWN = mp.get_context("spawn")  # fork is unsafe once torch has threads


@dataclass(frozen=True)
class Killed:
    """Stands for the message of a worker that was killed, with the exit code of its process."""

    code: int | None

    @property
    def reason(self) -> str:
        """Why its job is given up, and the remedy."""
        return reason_killed(self.code)


class Worker(Generic[Job]):
    """A process that does one job after another.

    Attributes:
        place: its number, from 0.
        job: what it does, or None.
        connection: to the process.
    """

    def __init__(self, serve: Serve, share: int, place: int) -> None:
        self.place = place
        self.job: Job | None = None
        self.connection, theirs = _SPAWN.Pipe()
        # Not a daemon, which could have no child processes; a run on several devices has them.
        self.process = _SPAWN.Process(target=_run, args=(serve, theirs, share), daemon=False)
        with ignore_interrupts():
            self.process.start()
        theirs.close()

    def give(self, job: Job, message: Any) -> None:
        """Send the message that describes a job, which is then its job."""
        self.job = job
        self.send(message)

    def send(self, message: Any) -> None:
        """Send a message."""
        with suppress(ConnectionError):  # it was killed, which is noticed when no answer comes
            self.connection.send(message)

    def gone(self) -> bool:
        """Whether it was killed; its children may hold the connection open for a few seconds more."""
        return not self.process.is_alive() and not self.connection.poll()

    def end(self) -> None:
        """Wait for its end, and kill it after 5 seconds."""
        self.connection.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class Pool(Generic[Job]):
    """Up to `count` workers, each started when a job needs it."""

    def __init__(self, serve: Serve, count: int) -> None:
        self._serve, self._count = serve, count
        self.workers: list[Worker[Job]] = []

    @property
    def busy(self) -> list[Worker[Job]]:
        """The workers with a job."""
        return [worker for worker in self.workers if worker.job is not None]

    def free(self) -> Worker[Job] | None:
        """Return a worker without a job, a new one if need be; None if all are busy."""
        for worker in self.workers:
            if worker.job is None:
                return worker
        if len(self.workers) == self._count:
            return None
        place = min(set(range(self._count)) - {worker.place for worker in self.workers})
        self.workers.append(Worker(self._serve, self._count, place))
        return self.workers[-1]

    def messages(self) -> Generator[tuple[Worker[Job], Any]]:
        """Wait for at most a second, and yield a message of each busy worker that has sent one.

        A worker that was killed is taken out of the pool, and its message is `Killed`; it still has its job.
        """
        busy = {worker.connection: worker for worker in self.busy}
        ready = set(wait(list(busy), timeout=1))
        for connection, worker in busy.items():
            try:
                if connection in ready:
                    message = connection.recv()
                elif worker.gone():
                    raise EOFError
                else:
                    continue
            except (EOFError, ConnectionError):
                self.workers.remove(worker)
                worker.end()
                message = Killed(worker.process.exitcode)
            yield worker, message


def _run(serve: Serve, connection: Connection, share: int) -> None:
    """Run the loop of a worker process; it ends with its parent process, and at SIGTERM."""
    end_with_parent()
    show_warnings_in_one_line()
    try:
        with terminable():
            serve(connection, share)
    except Terminated as error:  # by the first process, or by the system; log.txt has said so
        os._exit(exit_code(error))  # without waiting for its own processes, which end with it


@contextmanager
def open_pool(serve: Serve, count: int) -> Generator[Pool[Any]]:
    """Yield a pool, whose workers are ended after the block; after an exception at once, as runs can be resumed.

    Args:
        serve: a function of a module.
        count: largest number of workers.
    """
    pool = Pool[Any](serve, count)
    try:
        yield pool
    except BaseException:
        with ignore_interrupts():  # a second Ctrl-C
            for worker in pool.workers:
                worker.process.terminate()
            for worker in pool.workers:
                worker.end()
        raise
    for worker in pool.workers:
        worker.connection.close()
    for worker in pool.workers:
        worker.process.join()


def reason_killed(code: int | None) -> str:
    """Return why a run is given up, from the exit code of its process, and the remedy."""
    remedy = "the same command resumes after its last epoch"
    if code == -9:  # SIGKILL, which some systems have no name for
        return (
            f"its process was killed {MAX_DEATHS} times, probably because memory is short: "
            f"give fewer --workers; {remedy}"
        )
    how = f"exit code {code}" if code is None or 0 <= code < 128 else _signal(abs(code) % 128)
    return f"its process died {MAX_DEATHS} times ({how}): {remedy}"


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
