"""Splits: digits, label noise and batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bisam.experiments import data
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training.train import train

SHORT = Recipe(method="bisam_log", noise=0.4, rho=0.4, epochs=3, batch_size=256)


def test_digits_are_split_without_overlap_and_scaled_by_the_training_part():
    d = data.load(Recipe(), Machine())
    assert [len(part) for part in (d.train, d.validation, d.test)] == [1078, 270, 449]
    torch.testing.assert_close(d.train.images.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(d.train.images.std(), torch.tensor(1.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rate", [0.0, 0.4, 0.99])
def test_label_noise_moves_exactly_its_share_to_other_classes(rate):
    labels = torch.arange(1000) % 10
    noisy = data.symmetric_noise(labels, rate, 10, seed=3)
    assert (noisy != labels).sum() == round(rate * 1000)
    assert noisy.min() >= 0
    assert noisy.max() <= 9
    assert torch.equal(noisy, data.symmetric_noise(labels, rate, 10, seed=3))


def test_noise_is_on_the_training_labels_only():
    clean, noisy = data.load(Recipe(seed=1), Machine()), data.load(Recipe(noise=0.4, seed=1), Machine())
    assert not torch.equal(clean.train.labels, noisy.train.labels)
    for part in ("validation", "test"):
        assert torch.equal(getattr(clean, part).labels, getattr(noisy, part).labels)


@pytest.mark.parametrize("rate", [0.4, 0.8])
def test_noise_is_on_the_validation_labels_where_it_is_asked_for(rate):
    recipe = Recipe(noise=rate, seed=1)
    clean, noisy = data.load(recipe, Machine()), data.load(replace(recipe, validation_noise=True), Machine())
    assert torch.equal(clean.train.labels, noisy.train.labels)
    assert torch.equal(clean.test.labels, noisy.test.labels)
    other = clean.validation.labels != noisy.validation.labels
    assert other.sum() == round(rate * len(other))
    assert noisy.validation.labels.unique().numel() == 10
    again = data.load(replace(recipe, validation_noise=True, seed=2), Machine()).validation.labels
    assert not torch.equal(noisy.validation.labels, again)
    # Other random numbers than those of the training labels: independent of which of them are noisy.
    among = clean.validation.relabelled(clean.train.labels[: len(other)])
    same = data.symmetric_noise(among.labels, rate, 10, 1) != among.labels
    assert not torch.equal(same, other)


def test_noise_on_the_validation_labels_is_what_epochs_are_chosen_by(tmp_path):
    recipe = replace(SHORT, method="sgd", rho=None, epochs=1, validation_noise=True)
    (noisy, clean) = (train(Run.under(tmp_path, one)) for one in (recipe, replace(recipe, validation_noise=False)))
    assert noisy["test_best"] == clean["test_best"]
    assert noisy["validation_best"] < clean["validation_best"]


def test_batches_cover_the_split_once():
    split = data.load(Recipe(), Machine()).validation
    seen = torch.cat([x for x, _ in split.batches(64, torch.Generator())])
    assert len(seen) == len(split)
    assert torch.equal(seen.sum(0).round(decimals=2), split.images.sum(0).round(decimals=2))
