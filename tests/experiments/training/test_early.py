"""Runs that end before their last epoch: weights that are not finite, and validation that does not improve."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run, finished
from bisam.experiments.runs.machine import Machine
from bisam.experiments.runs.results import since_better, words_of_divergence
from bisam.experiments.training import epoch as epochs, train as training, trained
from bisam.experiments.training.train import Training, train

ONE = Recipe(method="sam", epochs=4, batch_size=32, limit=96, rho=0.1)
MACHINE = Machine(log=())
ON = replace(MACHINE, stop_on_nan=False)


def changed(monkeypatch, change) -> None:
    """Change a run before an epoch, or its row of metrics after it: `change(training, epoch, row or None)`."""
    original = Training.epoch

    def epoch(self, number):
        change(self, number, None)
        row = original(self, number)
        change(self, number, row)
        return row

    monkeypatch.setattr(Training, "epoch", epoch)


def breaks(training, epoch, row):
    if epoch == 2 and row is None:
        with torch.no_grad():
            next(training._model.parameters()).fill_(math.inf)


def lines(run):
    return [line[21:] for line in (run.folder / "log.txt").read_text().splitlines()]


@pytest.mark.parametrize(("machine", "epochs"), [(MACHINE, 2), (ON, 4)])
def test_a_run_whose_weights_are_not_finite_ends_and_says_so(tmp_path, monkeypatch, machine, epochs):
    changed(monkeypatch, breaks)
    result = train(run := Run.under(tmp_path, ONE), machine)
    message = "loss is nan since epoch 2: a smaller --learning-rate or --rho"
    assert (result["diverged"], result["message"]) == (2, message)
    assert result.get("stopped") == ("diverged" if epochs == 2 else None)
    (one,) = finished(tmp_path)  # with all its checks
    assert len(one.metrics) == epochs
    assert lines(run).count(message) == 1
    assert ("training ends early, after epoch 2: --stop-on-nan" in lines(run)) == (epochs == 2)
    assert train(run, machine) == result


def test_scores_do_not_depend_on_it(tmp_path, monkeypatch):
    changed(monkeypatch, breaks)
    short, whole = (train(Run.under(tmp_path / str(m), ONE), m) for m in (MACHINE, ON))
    for name in ("test_best", "test_last", "best_epoch", "validation_best", "diverged", "headline", "scores"):
        assert short[name] == whole[name], name


def test_a_loss_that_is_infinite_once_ends_nothing(tmp_path, monkeypatch):
    """A gradient scaler leaves such a step out, so that the weights stay finite."""

    def once(training, epoch, row):
        if epoch == 2 and row is not None:
            row["train_loss"] = math.inf

    changed(monkeypatch, once)
    result = train(Run.under(tmp_path, ONE), MACHINE)
    assert (result["diverged"], "stopped" in result) == (2, False)
    assert len(Run.under(tmp_path, ONE).metrics()) == 4


@pytest.mark.parametrize("recipe", [ONE, replace(ONE, epochs=None, steps=12), replace(ONE, epochs=None, steps=6)])
def test_a_long_epoch_ends_at_the_next_look(tmp_path, monkeypatch, recipe):
    monkeypatch.setattr(epochs, "LOOK", 2)
    changed(monkeypatch, breaks)
    result = train(run := Run.under(tmp_path, recipe), MACHINE)
    assert (result["diverged"], result["stopped"]) == (2, "diverged")
    (one,) = finished(tmp_path)
    assert [row["losses"] for row in one.metrics] == [3, 2]
    assert [row.get("step") for row in one.metrics] == ([None] * 2 if recipe.steps is None else [3, 5])
    monkeypatch.setattr(training.Training, "epoch", None)
    (run.folder / "result.json").unlink()  # as if it were interrupted before it was written
    assert train(run, ON)["stopped"] == "diverged"


def test_the_loss_is_looked_at_once_in_so_many_losses(tmp_path, monkeypatch):
    looks = []
    monkeypatch.setattr(epochs, "LOOK", 2)
    monkeypatch.setattr(Training, "_is_hopeless", lambda self, sums: looks.append(sums))
    train(Run.under(tmp_path, replace(ONE, epochs=1, limit=160)), MACHINE)
    assert len(looks) == 2  # after 2 and 4 of 5


def test_a_run_of_an_earlier_bisam_that_diverged_ends_when_it_is_resumed(tmp_path, monkeypatch):
    def interrupt(row):
        if row["epoch"] == 3:
            raise KeyboardInterrupt

    changed(monkeypatch, breaks)
    run = Run.under(tmp_path, ONE)
    with pytest.raises(KeyboardInterrupt):
        train(run, ON, interrupt)
    result = train(run, MACHINE)
    assert (result["diverged"], result["stopped"], len(run.metrics())) == (2, "diverged", 3)


# Patience

SCORES = [0.2, 0.3, 0.3, 0.25]


@pytest.fixture
def scored(monkeypatch):
    """Validation has the `SCORES`, one for each epoch."""
    original = Training._scores

    def scores(self, model, split):
        validates = split is self._validation
        return [SCORES[len(self._state.history)]] if validates else original(self, model, split)

    monkeypatch.setattr(Training, "_scores", scores)


@pytest.mark.parametrize(("patience", "epochs"), [(1, 3), (2, 4), (3, 4)])
@pytest.mark.usefixtures("scored")
def test_a_run_ends_after_so_many_epochs_without_a_better_score(tmp_path, patience, epochs):
    result = train(run := Run.under(tmp_path, replace(ONE, patience=patience)), MACHINE)
    assert len(run.metrics()) == epochs
    assert result["diverged"] is None
    if epochs == 4:
        assert "stopped" not in result
        return
    message = "validation has not improved for 1 epoch (--patience 1)"
    assert (result["stopped"], result["message"]) == ("patience", message)
    assert f"training ends early, after epoch 3: {message}" in lines(run)
    (one,) = finished(tmp_path)
    assert len(one.metrics) == 3
    assert trained.weights(run, trained.result_of(run), "last")


@pytest.mark.usefixtures("scored")
def test_a_run_that_is_resumed_ends_after_the_same_epoch(tmp_path):
    def interrupt(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    run = Run.under(tmp_path, replace(ONE, patience=1))
    with pytest.raises(KeyboardInterrupt):
        train(run, MACHINE, interrupt)
    assert train(run, MACHINE)["stopped"] == "patience"
    assert len(run.metrics()) == 3


def test_epochs_since_a_better_score_count_ties():
    rows = [{"validation": score} for score in SCORES]
    assert [since_better(rows[:n]) for n in range(5)] == [0, 0, 0, 1, 2]


def test_patience_without_effect_leaves_a_run_as_it_was():
    assert replace(ONE, patience=None).slug == ONE.slug
    assert replace(ONE, patience=2).slug != ONE.slug
    with pytest.raises(ValueError, match="patience must be"):
        replace(ONE, patience=0)


@pytest.mark.parametrize(
    ("recipe", "loss", "words"),
    [
        (ONE, math.nan, "loss is nan since epoch 1: a smaller --learning-rate or --rho"),
        (Recipe(method="sgd"), math.inf, "loss is inf since epoch 1: a smaller --learning-rate"),
        (
            Recipe(method="SAM(0.1)"),
            math.nan,
            "loss is nan since epoch 1: a smaller --learning-rate or radius in --method",
        ),
        (Recipe(precision="16"), math.nan, "loss is nan since epoch 1: a smaller --learning-rate or --rho, or another"),
        (Recipe(method="sgd"), 0.5, "the weights are not finite after epoch 1: a smaller --learning-rate"),
    ],
)
def test_the_message_names_what_prevents_it(recipe, loss, words):
    assert words_of_divergence(recipe, [{"train_loss": loss}], 1).startswith(words)
