"""Processes: what kills one, raises in one or outlives one."""

from __future__ import annotations

import multiprocessing as mp
import os
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from filelock import FileLock

from bisam.experiments.launch import processes
from bisam.experiments.launch.work import train_or_explain
from bisam.experiments.launch.workers import reason_killed
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run, finished
from bisam.experiments.runs.machine import Machine, end_with_parent, threads
from bisam.experiments.training.train import train
from tests.support.doubles import Silent

SHORT = Recipe(method="bisam_log", noise=0.4, rho=0.4, epochs=2, batch_size=256)
SGD = replace(SHORT, method="sgd", rho=None)


@dataclass(frozen=True)
class Deadly(Machine):
    """Kills the process that would compute in bfloat16, and counts who came by."""

    folder: Path = Path()

    def fabric(self, precision="32"):
        with (self.folder / precision).open("a") as file:
            file.write("x")
        if precision == "bf16":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().fabric(precision)


@pytest.mark.slow
def test_a_run_that_is_killed_costs_the_others_nothing(tmp_path):
    recipes = [replace(SHORT, precision="bf16"), SGD, SHORT]
    machine = Deadly(log=(), folder=tmp_path)
    progress = Silent()
    outcomes = processes.run_all(recipes, tmp_path / "runs", 2, machine, progress)
    assert [outcome.recipe for outcome in outcomes] == recipes
    assert "killed 2 times, probably because memory is short: give fewer --workers" in outcomes[0].error
    assert [outcome.error for outcome in outcomes[1:]] == [None, None]
    assert progress.ended == {outcome.recipe: outcome.error for outcome in outcomes}
    assert ((tmp_path / "bf16").read_text(), (tmp_path / "32").read_text()) == ("xx", "xx")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            -9,
            r"killed 2 times, probably because memory is short: give fewer --workers; the same command resumes",
        ),
        (-11, r"died 2 times \(SIGSEGV\): the same command resumes"),
        (-40, r"died 2 times \(signal 40\)"),
        (3, r"died 2 times \(exit code 3\)"),
    ],
)
def test_how_a_process_ended_is_said(code, message):
    assert re.search(message, reason_killed(code))


@dataclass(frozen=True)
class Raising(Machine):
    """Has no device but an error."""

    error: BaseException | None = None

    def fabric(self, precision="32"):
        assert self.error is not None
        raise self.error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("no such\nthing"), "no such thing"),
        (KeyError("x"), "KeyError: 'x'"),
        (SystemExit(3), "SystemExit: 3"),
        (MemoryError(), "out of memory: fewer runs at a time or a smaller batch_size need less (MemoryError)"),
        (torch.OutOfMemoryError("CUDA out of memory."), "a smaller batch_size need less (CUDA out of memory.)"),
        (PermissionError(13, "Permission denied", "/x"), "cannot write under /x: Permission denied"),
    ],
)
def test_an_error_is_one_line(tmp_path, error, message):
    outcome = train_or_explain(SHORT, tmp_path, Raising(error=error))
    assert outcome.result is None
    assert outcome.error is not None
    assert message in outcome.error
    assert "\n" not in outcome.error


def test_ctrl_c_is_left_to_the_user(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train_or_explain(SHORT, tmp_path, Raising(error=KeyboardInterrupt()))


@pytest.mark.slow
def test_a_run_that_another_study_holds_is_said_and_the_others_go_on(tmp_path):
    held = Run.under(tmp_path, SHORT).folder
    held.mkdir(parents=True)
    with FileLock(held / ".lock"):
        outcomes = processes.run_all([SHORT, SGD], tmp_path, 1, Machine(log=()), progress := Silent())
    assert [outcome.elsewhere for outcome in outcomes] == [True, False]
    assert (progress.started, progress.elsewhere) == ((1, 2), [SHORT])
    assert progress.begun == [(SHORT, 1), (SGD, 1)]
    assert f"{held} is in use by another process: let it finish, or give another --out" in outcomes[0].error
    assert outcomes[1].error is None
    assert [run.recipe for run in finished(tmp_path)] == [SGD]


@pytest.mark.slow
def test_runs_without_their_data_do_not_start_and_the_others_go_on(tmp_path):
    lacking = [replace(SHORT, dataset="cifar10", seed=seed) for seed in range(3)]
    progress = Silent()
    machine = Machine(log=(), data_dir=tmp_path / "nowhere")
    outcomes = processes.run_all([*lacking, SGD], tmp_path / "runs", 1, machine, progress)
    assert [outcome.started for outcome in outcomes] == [False, False, False, True]
    assert len({outcome.error for outcome in outcomes[:3]}) == 1
    assert "cifar10 is missing: give --download" in outcomes[0].error
    assert [outcome.recipe for outcome in outcomes] == [*lacking, SGD]
    assert progress.ended == {SGD: None}
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [SGD.slug]


def test_the_same_run_twice_is_run_once(tmp_path):
    first = train(Run.under(tmp_path, SHORT), Machine(log=()))
    progress = Silent()
    outcomes = processes.run_all([SHORT, SHORT], tmp_path, 1, Machine(log=()), progress)
    assert [outcome.result for outcome in outcomes] == [first, first]
    assert progress.ended == {SHORT: None}


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_and_the_same_call_goes_on_to_the_same_bits(tmp_path):
    recipes = [replace(SGD, epochs=20), SGD]
    train(Run.under(tmp_path / "a", SGD), Machine(log=()))

    class Interrupt(Silent):
        def epoch(self, recipe, epoch, validation):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        processes.run_all(recipes, tmp_path / "a", 2, Machine(log=()), Interrupt())
    assert not mp.active_children()
    broken, whole = (Run.under(tmp_path / folder, recipes[0]) for folder in "ab")
    assert broken.result is None
    assert broken.checkpoint() is not None
    outcomes = processes.run_all(recipes, tmp_path / "a", 2, Machine(log=()), Silent())
    assert [outcome.error for outcome in outcomes] == [None, None]
    before = torch.get_num_threads()
    threads(2)  # a worker's share is that of the study, not of the runs that are left
    try:
        train(whole, Machine(log=()))
    finally:
        torch.set_num_threads(before)
    a, b = (run.checkpoint()["sharp"] for run in (broken, whole))
    assert all(torch.equal(a[k], b[k]) for k in a if isinstance(a[k], torch.Tensor))


# Children of workers


def ended(pid: int) -> bool:
    """Whether a process that is not ours to wait for ends soon."""
    try:
        return bool(select.select([os.pidfd_open(pid)], [], [], 30)[0])
    except ProcessLookupError:
        return True


def _child(told: Any) -> None:
    end_with_parent()
    told.send(os.getpid())
    Event().wait(120)


@dataclass(frozen=True)
class Father(Machine):
    """Has a child when it is killed."""

    folder: Path = Path()

    def fabric(self, precision="32"):
        pid = self.folder / "pid"
        if pid.exists():
            return super().fabric(precision)
        here, there = mp.Pipe()
        mp.get_context("spawn").Process(target=_child, args=(there,)).start()
        pid.write_text(str(here.recv()))
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


linux = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="waits for a process that is not its child")


@pytest.mark.slow
@linux
def test_a_worker_has_children_which_die_with_it(tmp_path):
    (outcome,) = processes.run_all([SHORT], tmp_path / "runs", 1, Father(log=(), folder=tmp_path), Silent())
    assert outcome.error is None
    assert ended(int((tmp_path / "pid").read_text()))


KILLED = """
import multiprocessing as mp, os, signal, sys
from dataclasses import replace
from pathlib import Path
from bisam.experiments.launch import processes
from bisam.experiments.runs.machine import Machine, end_with_parent, threads
from bisam.experiments.recipes.recipe import Recipe

class Killer:
    def starting(self, processes, runs): ...
    def begins(self, recipe, worker): ...
    def epoch(self, recipe, epoch, validation):
        print(*[process.pid for process in mp.active_children()], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    def done(self, recipe, error, elsewhere=False): ...

if __name__ == "__main__":
    recipe = Recipe(method="bisam_log", noise=0.4, rho=0.4, epochs=1000, batch_size=256)
    processes.run_all([recipe, replace(recipe, seed=1)], Path(sys.argv[1]), 2, Machine(log=()), Killer())
"""


@pytest.mark.slow
@linux
def test_workers_do_not_outlive_a_killed_study(tmp_path):
    script = tmp_path / "study.py"
    script.write_text(KILLED)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    study = subprocess.run([sys.executable, script, tmp_path], env=environment, capture_output=True, check=False)
    assert study.returncode == -signal.SIGKILL
    workers = [int(pid) for pid in study.stdout.split()]
    assert len(workers) == 2
    assert all(ended(pid) for pid in workers)


@pytest.mark.slow
@linux
def test_a_run_on_two_devices_goes_on_after_its_worker_was_killed(tmp_path):
    """With what the method remembers on each device: Momentum-SAM's averages are of its own part of the batches."""
    recipe = replace(SHORT, method="momentum_sam", epochs=4)

    class Killer(Silent):
        children: tuple[int, ...] = ()

        def epoch(self, recipe, epoch, validation):
            if not self.epochs:
                (worker,) = mp.active_children()
                tasks = Path(f"/proc/{worker.pid}/task").glob("*/children")
                self.children = tuple(int(pid) for task in tasks for pid in task.read_text().split())
                worker.kill()
            super().epoch(recipe, epoch, validation)

    progress = Killer()
    (outcome,) = processes.run_all([recipe], tmp_path, 1, Machine(devices=2, log=()), progress)
    assert outcome.error is None
    assert outcome.result["processes"] == 2
    assert len(progress.children) >= 2
    assert all(ended(pid) for pid in progress.children)
    whole = Run.under(tmp_path / "whole", recipe)
    train(whole, Machine(devices=2, log=()))
    ours, theirs = (
        torch.utils._pytree.tree_leaves([run.checkpoint()["memories"], run.checkpoint()["sharp"]])
        for run in (Run.under(tmp_path, recipe), whole)
    )
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(ours, theirs, strict=True))


# --max-time, and SIGTERM


def test_no_run_is_begun_once_the_time_is_over(tmp_path):
    recipes, progress = [SGD, SHORT], Silent()
    outcomes = processes.run_all(recipes, tmp_path, 1, Machine(log=(), max_time=1e-9), progress)
    assert [(one.out_of_time, one.result, one.error) for one in outcomes] == [(True, None, None)] * 2
    assert (progress.ended, list(finished(tmp_path))) == ({}, [])


def test_a_run_in_a_worker_says_that_its_time_is_over(tmp_path):
    outcome = train_or_explain(SHORT, tmp_path, Machine(log=(), max_time=1e-3))
    assert (outcome.out_of_time, outcome.result, outcome.error) == (True, None, None)
    assert len(Run.under(tmp_path, SHORT).metrics()) == 1


STUDY = ("digits", "--seeds", "1", "--epochs", "200", "--workers", "2", "--log", "tensorboard", "--out")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_study_and_its_workers_and_each_log_says_so(tmp_path, number):
    """Sent to the first process alone, as `kill` does; SLURM sends it to all of them."""
    study = subprocess.Popen(
        [sys.executable, "-m", "bisam", "run", *STUDY, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert study.stdout is not None
    logs: list[Path] = []
    while len(logs) < 2:  # two runs have trained an epoch
        assert study.poll() is None
        logs = [log for log in tmp_path.glob("digits/*/seed-0/log.txt") if "epoch 1/" in log.read_text()]
        time.sleep(0.2)
    children = [int(pid) for pid in Path(f"/proc/{study.pid}/task/{study.pid}/children").read_text().split()]
    study.send_signal(number)
    _, err = study.communicate(timeout=60)
    word = "terminated" if number == signal.SIGTERM else "interrupted"
    assert study.returncode == 128 + number
    assert err == f"{word}: 0 of 10 runs are finished; the same command resumes the others\n"
    assert all(ended(pid) for pid in children)
    for log in logs:
        assert log.read_text().endswith("terminated: the same command resumes after the last completed epoch\n")
