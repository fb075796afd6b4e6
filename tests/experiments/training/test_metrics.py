"""Scores: what the metrics of the tasks are."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import top_k_accuracy_score

from bisam.experiments.runs.results import TITLES
from bisam.experiments.training.metrics import ranked, scores

BOTH = ("accuracy", "top5")


def test_top5_is_scikit_learns():
    logits, labels = torch.randn(200, 12), torch.arange(200) % 12
    first, fifth = scores(BOTH, ranked(logits, BOTH), labels, logits.shape[1])
    assert first == top_k_accuracy_score(labels, logits, k=1)
    assert fifth == top_k_accuracy_score(labels, logits, k=5)
    assert 0 < first < fifth < 1


@pytest.mark.parametrize("classes", [2, 5])
def test_with_five_classes_or_less_every_prediction_is_among_the_best(classes):
    logits, labels = torch.randn(20, classes), torch.arange(20) % classes
    first, fifth = scores(BOTH, ranked(logits, BOTH), labels, logits.shape[1])
    assert fifth == 1
    assert first == (logits.argmax(1) == labels).sum().item() / 20


def test_all_metrics_of_two_classes():
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    labels = torch.tensor([1, 0, 0, 0])
    predicted = ranked(logits, ("f1",))
    assert predicted.tolist() == [[1], [1], [0], [0]]
    accuracy, f1, matthews = scores(("accuracy", "f1", "matthews"), predicted, labels, 2)
    assert (accuracy, f1) == (0.75, pytest.approx(2 / 3))
    assert matthews == pytest.approx(1 / 3**0.5)


def test_every_metric_has_a_title():
    of_tokens = {"exact_match", "likelihood"}
    assert set(TITLES) == {"accuracy", "top5", "f1", "matthews", "balanced", "many", "medium", "few", *of_tokens}
    with pytest.raises(AssertionError):
        scores(("bleu",), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), 2)
