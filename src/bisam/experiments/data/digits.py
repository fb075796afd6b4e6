"""Digits: the data set of small images that comes with scikit-learn."""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch

from bisam.experiments.data.image_tensors import Images
from bisam.experiments.data.splits import Data, drawn


def digits(seed: int) -> Data:
    """Load scikit-learn's digits: 1,797 images of 8x8, split 60/15/25 per cent.

    All images are standardised with the mean and the standard deviation of the training part.

    Args:
        seed: draws the split.
    """
    images, labels = _all()
    order = drawn(len(labels), seed)
    x = torch.from_numpy(images)[order].float().view(-1, 1, 8, 8)
    y = torch.from_numpy(labels)[order].long()
    first, second = round(0.6 * len(y)), round(0.75 * len(y))
    mean, std = x[:first].mean(), x[:first].std()
    x = (x - mean) / std
    known = (float(mean) / 16,), (float(std) / 16,)  # pixels are 0 to 16
    parts = [Images(x[a:b], y[a:b], standardised=known) for a, b in ((0, first), (first, second), (second, len(y)))]
    return Data(*parts, classes=10)


@cache
def _all() -> tuple[Any, Any]:
    """All images and labels, read once in a process: a stack of seeds splits them many times."""
    from sklearn.datasets import load_digits  # not at the top: it takes seconds, and the plan of a study needs no data

    return cast(Any, load_digits(return_X_y=True))
