"""Long tails: training sets in which the numbers of examples of the classes fall exponentially.

counts([500] * 10, 100.0)      # [500, 300, 180, 108, 65, 39, 23, 14, 8, 5]
groups(10)                     # {"many": range(3), "medium": range(3, 7), "few": range(7, 10)}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from bisam.experiments.data.splits import Data, drawn
from bisam.experiments.errors import DataError

BALANCED = "balanced"
"""Name of the metric that is the mean of the accuracies of the classes."""


def counts(available: Sequence[int], imbalance: float) -> list[int]:
    """Return the number of examples of each class in a long tail.

    It is n imbalance^(-k / (K - 1)) for class k of K, and at least 1. The profile is that of Cui et al. (2019,
    https://arxiv.org/abs/1901.05555) and Cao et al. (2019, https://arxiv.org/abs/1906.07413); n is the largest for
    which each class has as many.

    Args:
        available: examples of each class, at least 1.
        imbalance: of the first class to the last, at least 1.
    """
    last = max(len(available) - 1, 1)
    shares = [imbalance ** (-k / last) for k in range(len(available))]
    most = min(count / share for count, share in zip(available, shares, strict=True))
    return [max(1, round(most * share)) for share in shares]


def groups(classes: int) -> Mapping[str, range]:
    """Return the classes with many, medium and few examples: of ten the first 3, 4 and 3; none of fewer than three."""
    third = classes // 3
    if not third:
        return {}
    return {
        "many": range(third),
        "medium": range(third, classes - third),
        "few": range(classes - third, classes),
    }


def long_tailed(data: Data, imbalance: float, seed: int) -> Data:
    """Return a data set with a long tail of training examples, which a seed draws, and the metrics for it.

    Raises:
        DataError: a class has no training example; or validation or test has none of a group of classes.
    """
    labels = data.train.labels.cpu()
    available = torch.bincount(labels, minlength=data.classes).tolist()
    if 0 in available:
        raise DataError(f"imbalance needs training examples of each class, and class {available.index(0)} has none")
    metrics = (BALANCED, "accuracy", *groups(data.classes))
    for name, split in (("validation", data.validation), ("test", data.test)):
        there = set(split.labels.tolist())
        for group, members in groups(data.classes).items():
            if not there & set(members):
                raise DataError(f"the {name} part has no example of the classes with {group} examples: give more of it")
    order = drawn(len(labels), seed, stream=4)
    kept = [order[labels[order] == k][:count] for k, count in enumerate(counts(available, imbalance))]
    return replace(data, train=data.train.chosen(torch.cat(kept).sort().values), metrics=metrics)
