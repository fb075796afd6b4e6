"""Long tails: how many examples of each class are left, which, and the scores of groups of classes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import balanced_accuracy_score

from bisam.experiments import data
from bisam.experiments.data.long_tail import counts, groups
from bisam.experiments.errors import DataError
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.reports import tables
from bisam.experiments.reports.groups import arranged
from bisam.experiments.runs.folder import Run, finished
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training.metrics import scores
from bisam.experiments.training.train import train

MACHINE = Machine(log=())
ONE = Recipe(method="sam", model="mlp", epochs=1, batch_size=32, imbalance=10.0)


@pytest.mark.parametrize("imbalance", [1.0, 10.0, 100.0, 12.5])
@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_the_numbers_fall_exponentially(imbalance, classes):
    """As in the code of Cao et al. for classes of equal size, but rounded, where theirs truncates."""
    wanted = [max(1, round(500 * (1 / imbalance) ** (k / (classes - 1)))) for k in range(classes)]
    assert counts([500] * classes, imbalance) == wanted
    assert (wanted[0], wanted[-1]) == (500, round(500 / imbalance))


def test_no_class_needs_more_examples_than_it_has():
    available = [90, 500, 61, 70, 80, 30, 4]
    found = counts(available, 20.0)
    assert all(n <= most for n, most in zip(found, available, strict=True))
    assert any(n == most for n, most in zip(found, available, strict=True))
    assert found[0] / found[-1] == pytest.approx(20, rel=0.2)
    assert counts([5, 5, 5], 1e6) == [5, 1, 1]


@pytest.mark.parametrize(
    ("classes", "sizes"), [(2, []), (3, [1, 1, 1]), (10, [3, 4, 3]), (11, [3, 5, 3]), (100, [33, 34, 33])]
)
def test_groups_are_thirds_of_the_classes(classes, sizes):
    found = groups(classes)
    assert [len(members) for members in found.values()] == sizes
    assert [k for members in found.values() for k in members] == list(range(classes if sizes else 0))


def test_where_nothing_is_held_out_the_validation_examples_are_those_of_the_tail(tmp_path):
    for label in range(3):
        (folder := tmp_path / "train" / f"class{label}").mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (4, 4), (i, label, 0)).save(folder / f"{i}.png")
    recipe = replace(ONE, dataset=f"folder:{tmp_path}", image_size=4, held_out=0.0)
    found = data.load(recipe, MACHINE)
    assert torch.equal(found.validation.labels, found.train.labels)
    assert len(found.validation) < 40
    (images, _), (again, _) = (next(found.validation.batches(100)), next(found.train.unaugmented().batches(100)))
    assert torch.equal(images, again)


def test_the_seed_draws_the_examples_that_are_left():
    whole, first, again, other = (
        data.load(replace(ONE, imbalance=ratio, seed=seed), MACHINE)
        for ratio, seed in ((1.0, 0), (10.0, 0), (10.0, 0), (10.0, 1))
    )
    available = torch.bincount(whole.train.labels).tolist()
    assert torch.bincount(first.train.labels).tolist() == counts(available, 10.0)
    assert torch.equal(first.train.images, again.train.images)
    assert len(other.train) != len(first.train) or not torch.equal(other.train.images, first.train.images)
    rows = {image.numpy().tobytes() for image in whole.train.images}
    assert all(image.numpy().tobytes() in rows for image in first.train.images)
    for part in ("validation", "test"):
        assert torch.equal(getattr(first, part).images, getattr(whole, part).images)
    assert (whole.metrics, first.metrics) == (("accuracy",), ("balanced", "accuracy", "many", "medium", "few"))


def test_scores_are_means_over_the_classes():
    random = np.random.default_rng(0)
    labels, predicted = random.integers(0, 10, 200), random.integers(0, 10, 200)
    labels[labels == 4] = 5  # a class without examples
    right = {k: (predicted[labels == k] == k).mean() for k in range(10) if k != 4}
    found = scores(
        ("balanced", "many", "medium", "few"), torch.from_numpy(predicted)[:, None], torch.from_numpy(labels), 10
    )
    wanted = [
        np.mean([right[k] for k in some if k in right]) for some in (range(10), range(3), range(3, 7), range(7, 10))
    ]
    assert found == pytest.approx(wanted, abs=1e-12)
    keep = predicted != 4
    assert scores(
        ("balanced",), torch.from_numpy(predicted[keep])[:, None], torch.from_numpy(labels[keep]), 10
    ) == pytest.approx([balanced_accuracy_score(labels[keep], predicted[keep])], abs=1e-12)


def test_results_and_reports_have_the_scores_of_the_groups(tmp_path):
    for recipe in (ONE, replace(ONE, method="bisam_log"), replace(ONE, imbalance=100.0)):
        result = train(Run.under(tmp_path, recipe), MACHINE)
        assert result["metric"] == "balanced"
        assert list(result["scores"]["last"]) == ["balanced", "accuracy", "many", "medium", "few"]
        assert result["test_last"] == result["scores"]["last"]["balanced"]
        assert result["examples"] == len(data.load(recipe, MACHINE).train)
    page = tables.markdown("t", arranged(finished(tmp_path)), {})
    assert "| imbalance 10 balanced accuracy | imbalance 10 accuracy |" in page
    assert "few-example classes" in page


def test_what_cannot_be_is_refused(bisam, tmp_path):
    for value in (0.5, float("nan"), 1e7):
        with pytest.raises(ValueError, match="imbalance must be from 1 to 1000000"):
            replace(ONE, imbalance=value)
    with pytest.raises(DataError, match=r"imbalance needs training examples of each class, and class \d has none"):
        data.load(replace(ONE, limit=8), MACHINE)
    code, out, err = bisam("train", "--imbalance", 10, "--limit", 8, "--out", tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "imbalance needs training examples of each class" in err


def test_the_defaults_are_the_data_and_the_results_as_they_were():
    assert replace(ONE, imbalance=1.0).slug == Recipe(method="sam", model="mlp", epochs=1, batch_size=32).slug
