"""The ball of a run: its columns against the library, and that it changes nothing."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch.utils._pytree import tree_flatten

from bisam import L2, ModelOracle
from bisam.analysis import flips, zero_one_sharpness
from bisam.experiments import data
from bisam.experiments.models.build import build
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Finished, Run, finished
from bisam.experiments.runs.machine import Machine
from bisam.experiments.runs.results import BALL
from bisam.experiments.training import ball, loggers
from bisam.experiments.training.optimizers import descent_loss
from bisam.experiments.training.train import Training, train

PLAIN = Recipe(method="bisam_log", epochs=4, batch_size=32, limit=96, label_smoothing=0.1, noise=0.2)
MEASURED = replace(PLAIN, measured_epochs=2)
MACHINE = Machine(log=())
TIMES = ("seconds", "relative_time")


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Few examples and steps; all that is tested depends on neither."""
    monkeypatch.setattr(ball, "EXAMPLES", 60)
    monkeypatch.setattr(ball, "STEPS", 3)


def rows(run: Run) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in run.metrics()]


def without_ball(run: Run) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k not in BALL} for row in rows(run)]


def state(run: Run) -> list[object]:
    """All of a checkpoint but the history, tensors as bytes."""
    found = {k: v for k, v in run.checkpoint().items() if k != "history"}
    return [t.numpy().tobytes() if isinstance(t, torch.Tensor) else t for t in tree_flatten(found)[0]]


@pytest.mark.parametrize("method", ["bisam_log", "looksam"])
def test_a_run_with_measurements_is_the_run_without_to_the_bit(tmp_path, method):
    recipe = replace(PLAIN, method=method)
    plain, measured = (Run.under(tmp_path, one) for one in (recipe, replace(recipe, measured_epochs=2)))
    assert plain.folder.parent != measured.folder.parent
    results = [train(run, MACHINE) for run in (plain, measured)]
    assert state(plain) == state(measured)
    assert without_ball(plain) == without_ball(measured)
    assert not set(rows(plain)[0]) & set(BALL)
    assert results[0]["scores"] == results[1]["scores"]


def test_the_columns_are_those_of_the_library_at_the_last_weights(tmp_path):
    run = Run.under(tmp_path, MEASURED)
    train(run, MACHINE)
    known = [[not math.isnan(row[name]) for name in BALL] for row in rows(run)]
    assert known == [[epoch in (2, 4)] * len(BALL) for epoch in (1, 2, 3, 4)]
    splits = data.load(MEASURED, MACHINE)
    model = build("convnet", 10, channels=1)
    weights = run.checkpoint()["sharp"]
    model.load_state_dict({k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")})
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))[:64]
    images, labels = next(splits.train.batches(96))
    batches = [(images[part], labels[part]) for part in order.split(32)]
    oracle = ModelOracle(model, descent_loss(0.1, 10))
    largest = zero_one_sharpness(oracle, batches, L2(0.05), steps=3)
    found = flips(oracle, batches, L2(0.05))
    row = rows(run)[-1]
    assert (row["ball_error"], row["ball_worst"]) == (largest.error, largest.worst)
    assert row["flips_sam"] == found.flipped["loss"] / 64
    assert row["flips_log"] == found.flipped["-log"] / 64
    assert row["cosine_tanh"] == pytest.approx(found.cosines["loss"]["tanh"], rel=1e-6)


def test_a_resumed_run_measures_the_same(tmp_path):
    whole, parts = (Run(tmp_path / name / "seed-0", MEASURED) for name in ("whole", "parts"))
    train(whole, MACHINE)

    def stop(row):
        if row["epoch"] in (1, 2):
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(parts, MACHINE, stop)
    train(parts, MACHINE)
    assert [list(map(repr, row.values())) for row in rows(parts)] == [list(map(repr, r.values())) for r in rows(whole)]
    assert state(parts) == state(whole)


def test_a_diverged_run_ends_without_numbers(tmp_path, monkeypatch):
    original = Training.epoch

    def broken(self, number):
        with torch.no_grad():
            next(self._model.parameters()).fill_(math.inf)
        return original(self, number)

    monkeypatch.setattr(Training, "epoch", broken)
    result = train(run := Run.under(tmp_path, replace(MEASURED, epochs=1)), MACHINE)
    assert result["diverged"] == 1
    assert all(math.isnan(run.metrics()[0][name]) for name in BALL)
    assert isinstance(next(finished(tmp_path)), Finished)


@pytest.mark.parametrize(
    ("epochs", "count", "expected"),
    [
        (10, 0, []),
        (10, 1, [10]),
        (10, 2, [5, 10]),
        (10, 3, [4, 7, 10]),
        (3, 20, [1, 2, 3]),
        (200, 20, range(10, 201, 10)),
    ],
)
def test_measured_epochs_are_evenly_spaced_and_the_last_is_one(epochs, count, expected):
    recipe = Recipe(measured_epochs=count)
    assert [e for e in range(1, epochs + 1) if recipe.is_measured(e, epochs)] == list(expected)


def test_its_cost_is_what_is_stated():
    splits = data.load(PLAIN, MACHINE)
    oracle = ModelOracle(build("convnet", 10, channels=1), descent_loss(0.1, 10))
    batches = list(islice(splits.train.batches(32), 2))
    found = [zero_one_sharpness(oracle, batches, steps=30), flips(oracle, batches)]
    assert sum(one.backward for one in found) == pytest.approx(ball.GRADIENTS)
    assert sum(one.forward - one.backward for one in found) == pytest.approx(ball.FORWARDS)
    assert (ball.GRADIENTS, ball.FORWARDS) == (94, 13)
    assert ball.__doc__.count("94 gradients and 13 forward") == 1


def test_loggers_get_the_columns_of_measured_epochs_only(tmp_path):
    told = []

    class Board:
        epochs = 0

        def log(self, metrics, epoch, losses):
            told.append((epoch, set(metrics)))

    run = Run.under(tmp_path, MEASURED)
    train(run, MACHINE)
    logger = loggers.FaultTolerantLogger.__new__(loggers.FaultTolerantLogger)
    logger._name, logger._run, logger._logger, logger._last = "board", run, Board(), 0
    rows = run.metrics()
    logger.log(rows[-1], 4, int(sum(row["losses"] for row in rows)))  # the epochs before are missing there
    assert [step for step, _ in told] == [1, 2, 3, 4]
    assert [set(BALL) & names for _, names in told] == [set(), set(BALL), set(), set(BALL)]
    assert not any("epoch" in names for _, names in told)


@pytest.mark.slow
def test_two_processes_measure_the_same_and_are_not_changed_by_it(tmp_path):
    recipes = (replace(PLAIN, epochs=2), replace(MEASURED, epochs=2, measured_epochs=1))
    plain, measured = (Run.under(tmp_path, one) for one in recipes)
    for run in (plain, measured):
        train(run, Machine(log=(), devices=2))
    assert state(plain) == state(measured)
    assert without_ball(plain) == without_ball(measured)
    with open(measured.folder / "metrics.csv") as file:
        last = list(csv.DictReader(file))[-1]
    assert 0 <= float(last["ball_error"]) <= float(last["ball_worst"]) <= 1
