"""Runs without a test: what they leave in their folder, how they are stopped, and that `train` finishes them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from bisam.experiments.errors import RunError, StoppedError
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training.train import Training, train, validate

ONE = Recipe(method="sam", epochs=3, batch_size=64, limit=192)
MACHINE = Machine(log=())
OF_TIME = {"seconds", "relative_time"}


def timeless(rows):
    return [{name: value for name, value in row.items() if name not in OF_TIME} for row in rows]


@pytest.fixture
def untested(monkeypatch):
    """No run can be tested."""

    def fails(self):
        raise AssertionError("the test examples are used")

    monkeypatch.setattr(Training, "_test", fails)


def test_nothing_of_a_run_without_a_test_is_a_test_score(tmp_path, untested):
    run = Run.under(tmp_path, ONE)
    seen = []
    found = validate(run, MACHINE, seen.append)
    assert run.result is None
    assert len(run.metrics()) == len(seen) == 3
    assert found.score == run.metrics()[-1]["validation"]  # validation is small: the last epoch is the headline
    assert (found.headline, found.epoch, found.diverged, found.metric) == ("last", 3, None, "accuracy")
    for path in run.folder.iterdir():
        if path.name != "checkpoint.pt" and "checkpoint" not in path.name:
            assert "test" not in path.read_text().replace("without a test", ""), path
    assert not [name for name in run.checkpoint() if "test" in name]


def test_train_tests_and_finishes_it_as_if_it_had_trained_it(tmp_path):
    validate(here := Run.under(tmp_path / "a", ONE), MACHINE)
    finished, straight = train(here, MACHINE), train(there := Run.under(tmp_path / "b", ONE), MACHINE)
    assert timeless(here.metrics()) == timeless(there.metrics())
    for name in ("test_best", "test_last", "validation_best", "best_epoch", "headline", "scores"):
        assert finished[name] == straight[name]


def test_many_validation_examples_choose_the_best_epoch(tmp_path, monkeypatch):
    scores = iter([0.5, 0.9, 0.7])
    original = Training._scores
    monkeypatch.setattr(Training, "_scores", lambda self, *rest: [next(scores), *original(self, *rest)[1:]])
    monkeypatch.setattr("bisam.experiments.runs.results.ENOUGH", 1)
    found = validate(Run.under(tmp_path, ONE), MACHINE)
    assert (found.headline, found.epoch, found.score) == ("best", 2, 0.9)


def test_a_run_is_stopped_after_an_epoch_and_resumed(tmp_path, untested):
    run = Run.under(tmp_path / "a", ONE)

    def stop(row):
        if row["epoch"] == 2:
            raise StoppedError("pruned")

    with pytest.raises(StoppedError, match="pruned"):
        validate(run, Machine(log=("tensorboard",)), stop)
    assert len(run.metrics()) == 2
    assert run.folder.joinpath("log.txt").read_text().splitlines()[-1].endswith("stopped: pruned")
    validate(run, MACHINE)
    validate(straight := Run.under(tmp_path / "b", ONE), MACHINE)
    assert timeless(run.metrics()) == timeless(straight.metrics())


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_divergence_is_found(tmp_path, monkeypatch, epoch):
    original = Training.epoch

    def broken(self, number):
        row = original(self, number)
        if number == epoch:
            with torch.no_grad():
                next(self._model.parameters()).fill_(math.nan)
        return row

    monkeypatch.setattr(Training, "epoch", broken)
    assert validate(Run.under(tmp_path, ONE), MACHINE).diverged == min(epoch + 1, 3)


def test_what_cannot_be_validated_is_refused(tmp_path):
    with pytest.raises(ValueError, match="leaves no validation examples"):
        validate(Run.under(tmp_path, replace(ONE, held_out=0.0)), MACHINE)
    with pytest.raises(ValueError, match="uses one device, got 2"):
        validate(Run.under(tmp_path, ONE), replace(MACHINE, devices=2))
    assert not list(tmp_path.iterdir())
    train(run := Run.under(tmp_path, ONE), MACHINE)
    assert validate(run, MACHINE).epoch == 3  # from its checkpoint
    (run.folder / "checkpoint.pt").unlink()
    with pytest.raises(RunError, match="is finished and has no checkpoint"):
        validate(run, MACHINE)
