"""SIGTERM and Ctrl-C: what is being written is finished, and the command says what goes on."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import replace

import pytest
import torch

pytest.importorskip("cyclopts")

from bisam.experiments.cli.progress import Display
from bisam.experiments.errors import OutOfTimeError
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs import folder
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.runs.signals import Terminated, delayed, exit_code, terminable
from bisam.experiments.training.train import train

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")

ONE = Recipe(method="sam", epochs=3, batch_size=32, limit=96)
MACHINE = Machine(log=())
FLAGS = ("--method", "sam", "--epochs", 3, "--batch-size", 32, "--limit", 96)


def lines(run):
    return [line[21:] for line in (run.folder / "log.txt").read_text().splitlines()]


def test_sigterm_raises_in_the_block_alone():
    with pytest.raises(Terminated) as caught, terminable():
        signal.raise_signal(signal.SIGTERM)
    assert exit_code(caught.value) == 143
    assert exit_code(KeyboardInterrupt()) == 130
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_sigterm_is_ignored():
    def twice():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Terminated), terminable():
        twice()


def test_an_error_that_sigterm_became_on_its_way_is_sigterm_again():
    """As of a DataLoader whose processes got the signal too, and of torch's C++ code that calls Python."""

    def another():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise RuntimeError("a worker was killed") from None

    with pytest.raises(Terminated), terminable():
        another()
    with pytest.raises(RuntimeError), terminable():
        raise RuntimeError


def test_a_handler_of_another_program_stays():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    try:
        with terminable():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [1]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_signals_are_delayed_to_the_end_of_a_block(number, kind, fails, request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    done = []

    def act():
        signal.raise_signal(number)
        done.append(1)
        if fails:
            raise OSError

    with pytest.raises(KeyboardInterrupt) as caught, terminable(), delayed():
        act()
    assert (done, type(caught.value)) == ([1], kind)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_other_threads_change_no_handler():
    found = []

    def act():
        with terminable(), delayed():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=act)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


def test_a_signal_while_an_epoch_is_saved_loses_nothing(tmp_path, monkeypatch):
    write, run = folder.write, Run.under(tmp_path, ONE)

    def signalled(path, *arguments, **named):
        if path.name == "checkpoint.pt":
            signal.raise_signal(signal.SIGTERM)
        write(path, *arguments, **named)

    monkeypatch.setattr(folder, "write", signalled)
    with pytest.raises(Terminated), terminable():
        train(run, MACHINE)
    checkpoint = run.checkpoint()
    assert checkpoint is not None
    assert len(checkpoint["history"]) == len(run.metrics()) == 1
    assert lines(run)[-1] == "terminated: the same command resumes after the last completed epoch"


def test_the_command_saves_and_exits_with_143(bisam, tmp_path, monkeypatch):
    usual = Display.advanced

    def advanced(self, recipe, completed, validation):
        usual(self, recipe, completed, validation)
        if completed == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Display, "advanced", advanced)
    code, out, err = bisam("train", *FLAGS, "--out", tmp_path)
    run = Run.under(tmp_path / "train", ONE)
    assert code == 143
    assert err == f"terminated: {run.folder} is saved; the same command resumes after its last completed epoch\n"
    assert len(run.metrics()) == 2
    monkeypatch.undo()
    code, out, _ = bisam("train", *FLAGS, "--out", tmp_path)
    assert code == 0
    assert "resumed after epoch 2" in out


# --max-time


def test_a_run_stops_before_an_epoch_that_does_not_fit_and_goes_on(tmp_path):
    run, whole = Run.under(tmp_path / "a", ONE), Run.under(tmp_path / "b", ONE)
    short = replace(MACHINE, max_time=1e-6)
    for epochs in (1, 2):
        with pytest.raises(OutOfTimeError, match="--max-time is over; the same command resumes"):
            train(run, short)
        assert len(run.metrics()) == epochs
        assert lines(run)[-1] == "--max-time is over: the same command resumes after the last completed epoch"
    assert train(run, short)["test_last"] == train(whole, replace(MACHINE, max_time=3600.0))["test_last"]
    a, b = (one.checkpoint()["sharp"] for one in (run, whole))
    assert all(torch.equal(a[k], b[k]) for k in a if isinstance(a[k], torch.Tensor))


def test_the_command_says_that_the_time_is_over(bisam, tmp_path):
    code, _, err = bisam("train", *FLAGS, "--max-time", "0.001s", "--out", tmp_path)
    run = Run.under(tmp_path / "train", ONE)
    assert code == 130
    assert (
        err == f"--max-time is over: {run.folder} is saved; the same command resumes after its last completed epoch\n"
    )
    assert len(run.metrics()) == 1


@pytest.mark.parametrize("time", ["soon", "-1", "0", "1h30", "nan", "1e3", "1:2:3", ""])
def test_what_is_no_duration_is_one_line(bisam, tmp_path, time):
    code, out, err = bisam("train", f"--max-time={time}", "--out", tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "max-time" in err
