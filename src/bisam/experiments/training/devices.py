"""Devices: one run on several devices of this machine, in one process for each."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from lightning_fabric import Fabric
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from bisam.experiments.errors import RunError, show_warnings_in_one_line
from bisam.experiments.runs.folder import Result, Row, Run
from bisam.experiments.runs.machine import Machine, end_with_parent, ignore_interrupts
from bisam.experiments.runs.signals import past_tense
from bisam.experiments.training.journal import RESUMES, OnLine, line_of

OnEpoch = Callable[[Row], None]
"""Called with the row of metrics of each epoch."""
TrainOne = Callable[[Fabric, Run, Machine], Any]
"""Trains a run in one of its processes."""


def train_in_processes(
    train_one: TrainOne,
    fabric: Fabric,
    run: Run,
    machine: Machine,
    on_epoch: OnEpoch | None,
    on_line: OnLine | None = None,
) -> Result | None:
    """Train a run in a new process for each device and return its result, or None if the time is over before.

    Args:
        train_one: a function of a module, called in each process.
        fabric: devices and precision.
        run: the folder, which this process holds.
        machine: where to compute.
        on_epoch: called in a thread of this process, with the rows that the first of the others writes.
        on_line: called in the same thread, with the lines that it appends to log.txt.

    Raises:
        RunError: a process failed or was killed.
        KeyboardInterrupt: the user or the system ended it; the processes are gone, and log.txt says so.
    """
    ended, others = threading.Event(), set(mp.active_children())
    reporter = threading.Thread(target=_report, args=(run, on_epoch, on_line, ended), daemon=True)
    reporter.start()
    try:
        # A partial, because `launch` would take further arguments for data.
        fabric.launch(partial(_train_in_child, train_one, run, machine, torch.get_num_threads(), time.time()))
    except KeyboardInterrupt as error:
        _end(set(mp.active_children()) - others)
        with suppress(OSError, RunError):
            run.writer().log(line_of(f"{past_tense(error)}: {RESUMES}"))
        raise
    except (ProcessRaisedException, ProcessExitedException) as error:
        reason = [line for line in str(error).splitlines() if line.strip()][-1]
        remedy = ": the same command resumes it" if isinstance(error, ProcessExitedException) else ""
        raise RunError(f"a process of {run.folder} failed ({reason}){remedy}") from error
    finally:
        ended.set()
        reporter.join()
    return run.result


def _end(processes: set[BaseProcess]) -> None:
    with ignore_interrupts():  # a second Ctrl-C
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _train_in_child(
    train_one: TrainOne, run: Run, machine: Machine, threads: int, start: float, fabric: Fabric
) -> None:
    end_with_parent()
    show_warnings_in_one_line()
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # the parent process reports Ctrl-C
    torch.set_num_threads(max(1, threads // machine.devices))
    train_one(fabric, run, machine.later(time.time() - start))


def _report(run: Run, on_epoch: OnEpoch | None, on_line: OnLine | None, ended: threading.Event) -> None:
    """Pass on what appears in metrics.csv and log.txt, and look a last time after the run has ended."""
    reported, last, log = 0, False, run.folder / "log.txt"
    position = log.stat().st_size if log.exists() else 0  # a resumed run has the lines of an earlier process
    while not last:
        last = ended.wait(0.5)
        with suppress(OSError, RunError):  # damaged or deleted, which the run itself reports
            if on_line is not None and log.exists():
                with open(log, "rb") as file:
                    file.seek(position)
                    whole = file.read().rpartition(b"\n")[0]  # the last line may be half written
                if whole:
                    position += len(whole) + 1
                    for line in whole.decode(errors="replace").splitlines():
                        on_line(line)
            if on_epoch is None:
                continue
            rows = run.metrics()
            for row in rows[reported:]:
                on_epoch(row)
            reported = max(reported, len(rows))
