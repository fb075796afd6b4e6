"""Training: runs whose loss is not finite."""

from __future__ import annotations

import math

import pytest
import torch

from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run, finished
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training.train import Training, train

ONE = Recipe(method="sgd", epochs=3, batch_size=32, limit=96)
MACHINE = Machine(log=())


def broken_in(monkeypatch, epoch: int, *, after: bool = False) -> None:
    """Make a weight infinite before an epoch, or after its last step."""
    original = Training.epoch

    def broken(self, number):
        def break_it():
            with torch.no_grad():
                next(self._model.parameters()).fill_(math.inf)

        if number == epoch and not after:
            break_it()
        row = original(self, number)
        if number == epoch and after:
            break_it()
        return row

    monkeypatch.setattr(Training, "epoch", broken)


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_the_result_has_the_first_epoch_whose_loss_is_not_finite(tmp_path, monkeypatch, epoch):
    broken_in(monkeypatch, epoch)
    result = train(run := Run.under(tmp_path, ONE), MACHINE)
    assert result["diverged"] == epoch
    assert run.result == result
    (one,) = finished(tmp_path)
    assert one.diverged == epoch


def test_a_last_step_that_makes_the_weights_infinite_is_seen(tmp_path, monkeypatch):
    broken_in(monkeypatch, 3, after=True)
    assert train(Run.under(tmp_path, ONE), MACHINE)["diverged"] == 3


def test_a_run_that_stays_finite_says_so(tmp_path):
    assert train(Run.under(tmp_path, ONE), MACHINE)["diverged"] is None


def test_training_on_a_cpu_keeps_freed_memory(tmp_path, monkeypatch):
    calls: list[int] = []
    monkeypatch.setattr("bisam.experiments.training.train.keep_freed_memory", lambda: calls.append(1))
    train(Run.under(tmp_path, ONE), MACHINE)
    assert calls == [1]


def test_a_run_that_is_resumed_after_it_diverged_says_the_same(tmp_path, monkeypatch):
    def interrupt(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    broken_in(monkeypatch, 2)
    run = Run.under(tmp_path, ONE)
    with pytest.raises(KeyboardInterrupt):
        train(run, MACHINE, interrupt)
    assert train(run, MACHINE)["diverged"] == 2


def test_the_command_says_it_in_one_line(bisam, tmp_path):
    """A learning rate that is far too large."""
    flags = ("--lr", "1e30", "--method", "sgd", "--epochs", "1", "--limit", "640", "--batch-size", "32")
    code, out, err = bisam("train", *flags, "--out", tmp_path)
    assert code == 1
    assert "test accuracy" in out
    assert err.startswith("bisam: loss is nan since epoch 1: a smaller --learning-rate; ")
    assert len(err.splitlines()) == 1
