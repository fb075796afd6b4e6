"""Data: images and labels as tensors, split into train, validation and test, with seeded label noise on the first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from bisam.experiments.names import unknown

_NEEDS = {
    name: f"{classes} classes of 32x32 images in {folder}, the 32x32 networks and their augmentation"
    for name, classes, folder in (("cifar10", 10, "cifar-10-batches-py"), ("cifar100", 100, "cifar-100-python"))
}


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W), standardised, and labels (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        """The same on `device`."""
        return Split(self.images.to(device), self.labels.to(device))

    def batches(self, size: int, shuffle: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of `size` examples, the last one smaller; the order is drawn from torch's generator."""
        order = torch.randperm(len(self)) if shuffle else torch.arange(len(self))
        for index in order.to(self.labels.device).split(size):
            yield self.images[index], self.labels[index]


@dataclass(frozen=True)
class Data:
    """The three splits of a data set."""

    train: Split
    validation: Split
    test: Split
    classes: int


def load(dataset: str, noise: float, seed: int) -> Data:
    """The data set by name, with a share `noise` of the training labels replaced.

    Raises:
        ValueError: the name is unknown, or the data set needs what is not here.
    """
    if dataset in _NEEDS:
        raise ValueError(f"{dataset} needs {_NEEDS[dataset]}, which this version does not have; --dataset digits runs")
    if dataset != "digits":
        raise unknown("dataset", dataset, ["digits"])
    data = _digits()
    return replace(
        data, train=replace(data.train, labels=symmetric_noise(data.train.labels, noise, data.classes, seed))
    )


def symmetric_noise(labels: Tensor, rate: float, classes: int, seed: int) -> Tensor:
    """`labels` with exactly round(rate * N) of them replaced by another class, drawn uniformly."""
    random = np.random.default_rng([seed, 0x5EED])
    chosen = random.permutation(len(labels))[: round(rate * len(labels))]
    noisy = labels.clone()
    shift = torch.from_numpy(random.integers(1, classes, len(chosen)))
    noisy[chosen] = (labels[chosen] + shift) % classes
    return noisy


def _digits() -> Data:
    """scikit-learn's digits: 1,797 real images of 8x8, 60/15/25 per cent, the same split for every seed."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(42).permutation(len(labels))
    x = torch.from_numpy(images[order]).float().view(-1, 1, 8, 8)
    y = torch.from_numpy(labels[order]).long()
    first, second = round(0.6 * len(y)), round(0.75 * len(y))
    mean, std = x[:first].mean(), x[:first].std()
    x = (x - mean) / std
    parts = [Split(x[a:b], y[a:b]) for a, b in ((0, first), (first, second), (second, len(y)))]
    return Data(*parts, classes=10)
