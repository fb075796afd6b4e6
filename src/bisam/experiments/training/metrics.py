"""Metrics: scores of predictions, as each task's own metric says, in [0, 1] or, for a correlation, [-1, 1].

>>> scores(("accuracy", "top5"), ranked(logits, ("accuracy", "top5")), labels)
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from sklearn.metrics import f1_score, matthews_corrcoef
from torch import Tensor

TITLES = {"accuracy": "accuracy", "top5": "top-5 accuracy", "f1": "F1", "matthews": "Matthews correlation"}
"""The metrics, as people write them."""


def ranked(logits: Tensor, metrics: Sequence[str]) -> Tensor:
    """The classes (N, R) of the largest logits (N, K), as many as the metrics ask for, the likeliest first."""
    if "top5" in metrics:
        return logits.topk(min(5, logits.shape[1]), 1).indices
    return logits.argmax(1, keepdim=True)


def scores(metrics: Sequence[str], predicted: Tensor, labels: Tensor) -> list[float]:
    """The scores of predictions by the names of their metrics: accuracy, top5, f1 (of class 1), matthews.

    Args:
        metrics: their names.
        predicted: what `ranked` makes, (N, R).
        labels: classes (N,).
    """
    return [_score(metric, predicted.cpu(), labels.cpu()) for metric in metrics]


def _score(metric: str, ranks: Tensor, labels: Tensor) -> float:
    predicted = ranks[:, 0]
    match metric:
        case "top5":
            return (ranks == labels[:, None]).any(1).sum().item() / len(labels)
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
