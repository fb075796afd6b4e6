"""Splits: digits, label noise and batches."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from sklearn.datasets import load_digits

from bisam.experiments import data
from bisam.experiments.data import cifar
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training.train import train

SHORT = Recipe(method="bisam_log", noise=0.4, rho=0.4, epochs=3, batch_size=256)


PARTS = ("train", "validation", "test")


def examples(split) -> list[tuple[bytes, int]]:
    """The pixels of digits, from 0 to 16, and the labels."""
    (mean,), (std,) = split.statistics
    pixels = ((split.images * std + mean) * 16).round().to(torch.uint8).flatten(1)
    return [(row.numpy().tobytes(), label) for row, label in zip(pixels, split.labels.tolist(), strict=True)]


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_digits_are_split_without_overlap_and_scaled_by_the_training_part(seed):
    d = data.load(Recipe(seed=seed), Machine())
    assert [len(part) for part in (d.train, d.validation, d.test)] == [1078, 270, 449]
    torch.testing.assert_close(d.train.images.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(d.train.images.std(), torch.tensor(1.0), atol=1e-5, rtol=0)
    images, labels = load_digits(return_X_y=True)
    everything = [(row.astype("uint8").tobytes(), int(label)) for row, label in zip(images, labels, strict=True)]
    # Equal as multisets: each example is in one part, and once.
    assert Counter(one for part in PARTS for one in examples(getattr(d, part))) == Counter(everything)


def test_each_seed_has_a_split_of_its_own_whatever_the_method_and_the_noise():
    def loaded(**fields):
        d = data.load(Recipe(**fields), Machine())
        return [getattr(d, part).images for part in PARTS]

    first, again = loaded(seed=1), loaded(seed=1, method="sam", noise=0.4, epochs=3, batch_size=7)
    assert all(map(torch.equal, first, again))
    one, other = (data.load(Recipe(seed=seed), Machine()) for seed in (1, 2))
    for part in PARTS:
        common = Counter(examples(getattr(one, part))) & Counter(examples(getattr(other, part)))
        share = len(getattr(one, part)) / 1797
        assert abs(common.total() / len(getattr(one, part)) - share) < 0.1  # as of independent draws


def test_a_limit_keeps_a_random_part_of_training_and_validation():
    def kept(limit: int | None, seed: int = 1) -> list[list[tuple[bytes, int]]]:
        d = data.load(Recipe(limit=limit, seed=seed), Machine())
        return [examples(getattr(d, part)) for part in PARTS]

    whole = kept(None)
    assert kept(1797) == whole  # a limit that does not bind changes nothing
    train, validation, test = kept(100)
    assert [len(part) for part in (train, validation, test)] == [100] * 3
    assert test == whole[2][:100]
    for some, everything in ((train, whole[0]), (validation, whole[1])):
        assert not Counter(some) - Counter(everything)
        assert some != everything[:100]
    assert kept(100) == [train, validation, test]
    assert kept(1000)[1:] == whole[1:]  # it binds in training alone


def test_an_official_test_set_is_the_same_for_every_seed(tmp_path, monkeypatch):
    """Also what a limit keeps of it; validation images of CIFAR are the authors', and training images are limited."""
    random = torch.Generator().manual_seed(0)
    files = {part: (torch.randint(256, (n, 3, 4, 4), generator=random, dtype=torch.uint8), torch.arange(n) % 10)
             for part, n in ((True, 50), (False, 20))}  # fmt: skip
    monkeypatch.setattr(cifar, "_cifar", lambda _name, _root, train, *_: files[train])
    whole, one, other = (
        data.load(Recipe(dataset="cifar10", model="resnet20", limit=limit, seed=seed), Machine())
        for limit, seed in ((None, 1), (10, 1), (10, 2))
    )
    again = data.load(Recipe(dataset="cifar10", model="resnet20", seed=2), Machine())
    for part in PARTS:
        assert torch.equal(getattr(whole, part).images, getattr(again, part).images)
    assert torch.equal(one.test.images, files[False][0][:10])
    assert torch.equal(one.test.images, other.test.images)
    assert torch.equal(one.validation.images, whole.validation.images)  # 5 of them
    assert not torch.equal(one.train.images, other.train.images)


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
