"""Scores: how good predictions are, as each task's own metric says, in [0, 1] or, for a correlation, [-1, 1]."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from sklearn.metrics import f1_score, matthews_corrcoef
from torch import Tensor

TITLES = {"accuracy": "accuracy", "f1": "F1", "matthews": "Matthews correlation"}
"""The metrics, as people write them."""


def scores(metrics: Sequence[str], predicted: Tensor, labels: Tensor) -> list[float]:
    """The scores of predicted classes (N,) by the names of their metrics: accuracy, f1 (of class 1), matthews."""
    return [_score(metric, predicted.cpu(), labels.cpu()) for metric in metrics]


def _score(metric: str, predicted: Tensor, labels: Tensor) -> float:
    match metric:
        case "accuracy":
            return (predicted == labels).sum().item() / len(labels)
        case "f1":
            return float(f1_score(labels.numpy(), predicted.numpy(), zero_division=0))  # pyright: ignore[reportArgumentType]
        case "matthews":
            with warnings.catch_warnings():  # of a single class in both, for which it is 0 by convention
                warnings.simplefilter("ignore", UserWarning)
                return float(matthews_corrcoef(labels.numpy(), predicted.numpy()))
        case _:
            raise AssertionError(metric)
