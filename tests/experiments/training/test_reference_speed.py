"""Pace and estimates: data that is slow to begin, as where processes read files, is no step's time, nor forgotten."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from bisam import ERM, SharpnessAware, cross_entropy
from bisam.experiments import data
from bisam.experiments.data.digits import digits
from bisam.experiments.data.image_tensors import Images
from bisam.experiments.launch.estimate import estimate
from bisam.experiments.models.build import build
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training.counting import CountedMethod
from bisam.experiments.training.epoch import train_epoch
from bisam.experiments.training.reference_speed import (
    REFERENCE_STEPS,
    RENEWED,
    LatestSpeed,
    ReferenceSpeed,
    measurements,
)
from bisam.experiments.training.train import train

RECIPE = Recipe(method="sgd", batch_size=128, epochs=2)
BEGIN = 100.0  # seconds, of a clock that nothing else moves


@pytest.fixture
def slow(monkeypatch):
    """The digits, whose first batch takes `BEGIN` and a second, and each of the others a second."""
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    class Slow(Images):
        def indexed(self, *arguments, **options):
            nonlocal now
            now += BEGIN
            for batch in super().indexed(*arguments, **options):
                now += 1
                yield batch

    whole = digits(seed=0)
    train, test = (Slow(part.images, part.labels) for part in (whole.train, whole.test))
    return replace(whole, train=train, validation=test, test=test)


def test_the_pace_is_that_of_steps(slow):
    model = build("convnet", 10, channels=1)
    assert (
        ReferenceSpeed(Machine().fabric(), model, slow.train, RECIPE).seconds_per_loss()
        == (REFERENCE_STEPS - 1) / REFERENCE_STEPS
    )


@pytest.mark.parametrize("losses", [1, 10, RENEWED - 1, RENEWED, 3 * RENEWED])
def test_the_speed_is_measured_in_a_small_part_of_the_losses(losses):
    epochs, measured, latest = 300, [], LatestSpeed()

    def measure():
        measured.append(float(len(measured)))
        return measured[-1]

    found = [latest.after(losses, measure) for _ in range(epochs)]
    assert found[0] == 1  # the second measurement: the first warms up
    assert found == sorted(found)
    assert found[-1] == measured[-1]
    changes = [epoch for epoch in range(1, epochs) if found[epoch] != found[epoch - 1]]
    assert all(b - a == -(-RENEWED // losses) for a, b in zip([0, *changes], changes, strict=False))
    assert len(measured) == measurements(epochs, losses)
    assert len(measured) - 2 <= epochs * losses / RENEWED


def test_short_epochs_share_a_measurement(monkeypatch, tmp_path):
    calls = []
    whole = ReferenceSpeed.seconds_per_loss
    monkeypatch.setattr(ReferenceSpeed, "seconds_per_loss", lambda self: calls.append(1) or whole(self))
    recipe = Recipe(method="sam", train_examples=256, batch_size=128, epochs=4)
    train(Run.under(tmp_path, recipe), Machine(log=()))
    assert len(calls) == measurements(4, 2) == 2


def test_an_epoch_begins_with_its_data(slow):
    fabric, watch = Machine().fabric(), CountedMethod(ERM())
    loss = SharpnessAware(build("convnet", 10, channels=1), watch, cross_entropy)
    sharp, optimizer = fabric.setup(loss, torch.optim.SGD(loss.parameters(), 0.1))
    row = train_epoch(fabric, sharp, watch, optimizer, slow.train.first(1024), RECIPE, torch.Generator())
    assert (row["seconds"], row["losses"]) == (BEGIN + 8, 8)


def test_an_estimate_has_the_begin_of_each_look_at_the_data(slow, monkeypatch):
    monkeypatch.setattr(data, "load", lambda *_: slow)
    seconds = estimate(RECIPE, Machine()).seconds
    assert seconds is not None
    begun = (2 * 2 + measurements(2, 1)) * (BEGIN + 1)
    assert begun < seconds < begun + 2 * 3 * (REFERENCE_STEPS + 1)
