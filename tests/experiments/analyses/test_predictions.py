"""Analyses of predictions, features and gradients, of the weights in a file on digits."""

from __future__ import annotations

import json
from dataclasses import replace
from math import isfinite, nan
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision")

from bisam.analysis import corruptions, gradient_norm, margins
from bisam.experiments.analyses.catalogue import ANALYSES
from bisam.experiments.analyses.run import analyse_weights, numbers
from bisam.experiments.analyses.settings import Settings
from bisam.experiments.analyses.subject import Subject, of_file
from bisam.experiments.models.build import build
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.machine import Machine

WHAT = ("margins", "feature-margins", "rank", "gradient", "corruptions")
SETTINGS = Settings(split="test", examples=50, batch_size=16)
RECIPE = Recipe(dataset="digits", model="convnet")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(build("convnet", 10, channels=1).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def subject(weights) -> Subject:
    return of_file(weights, RECIPE, SETTINGS, Machine(device="cpu"))


def test_the_analyses_are_those_of_the_library(weights, subject, tmp_path):
    content = analyse_weights(weights, RECIPE, tmp_path, WHAT, SETTINGS, Machine(device="cpu"))
    found = numbers(content, WHAT, replace(SETTINGS, weights="file"))
    plain = margins(subject.oracle, subject.batches)
    assert found["median margin"] == pytest.approx(plain.median)
    assert found["10th percentile of margins"] == pytest.approx(plain.quantiles[10])
    assert found["gradient norm"] == pytest.approx(gradient_norm(subject.oracle, subject.batches).norm, rel=1e-5)
    mean, std = subject.split.statistics
    errors = corruptions(subject.oracle, subject.batches, mean=mean, std=std)
    assert found["mean error, corrupted"] == errors.mean_error
    assert all(isfinite(value) for title, value in found.items() if title != "noise scale")
    pytest.importorskip("matplotlib")
    for entry in content["entries"]:
        analysis = ANALYSES[entry["analysis"]]
        restored = analysis.restored(json.loads(json.dumps(entry["results"])))
        figure = analysis.draw(restored)
        assert [axes.get_xlabel() for axes in figure.axes]


def test_the_gradient_is_that_of_shuffled_batches_of_the_same_examples(subject):
    shuffled = subject.shuffled(16, 0)
    assert [len(y) for _, y in shuffled] == [16, 16, 16, 2]
    images = [torch.cat([x for x, _ in batches]).flatten(1) for batches in (subject.batches, shuffled)]
    assert not torch.equal(*images)
    assert sorted(map(tuple, images[0].tolist())) == sorted(map(tuple, images[1].tolist()))
    assert torch.equal(subject.shuffled(16, 0)[0][1], shuffled[0][1])
    assert not torch.equal(subject.shuffled(16, 1)[0][0], shuffled[0][0])


def test_calibration(weights, tmp_path):
    pytest.importorskip("torchmetrics")
    content = analyse_weights(weights, RECIPE, tmp_path, ["calibration"], SETTINGS, Machine(device="cpu"))
    found = numbers(content, ["calibration"], replace(SETTINGS, weights="file"))
    assert 0 < found["ECE"] <= found["MCE"] <= 1
    again = ANALYSES["calibration"].restored(content["entries"][0]["results"])["calibration"]
    assert any(mean != mean for mean in again.confidences)  # an empty bin


class Texts:
    """A split without images."""

    statistics = None


def test_corruptions_of_texts_are_refused(subject):
    texts: Any = replace(subject, split=Texts(), recipe=replace(RECIPE, dataset="glue:rte"))
    with pytest.raises(ValueError, match="corruptions are those of images, and 'glue:rte' has none: leave them out"):
        ANALYSES["corruptions"].measures["corruptions"].call(texts, SETTINGS, lambda *_: None)


def test_a_noise_scale_that_was_not_estimated_is_nan():
    column = next(column for column in ANALYSES["gradient"].columns if column.title == "noise scale")
    assert str(column.value({"gradient": {"noise_scale": None}})) == str(nan)
    assert column.value({"gradient": {"noise_scale": 3}}) == 3


def test_titles_of_columns_are_unique():
    titles = [column.title for analysis in ANALYSES.values() for column in analysis.columns]
    assert len(titles) == len(set(titles))
