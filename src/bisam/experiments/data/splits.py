"""Splits: the training, validation and test part of a data set, and the batches of their examples.

Where a data set has no official part, the seed of a run draws it with `drawn`: runs of one seed share their split, so
that methods are compared on the same one, and the spread over seeds contains that of the split.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

IGNORED = -100
"""The label of a position that does not count, as for torch's losses and the bounds."""

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation, one for each channel or one for all, as shares of the largest value of a pixel."""


class Batches(Protocol):
    """Examples that are loaded in batches."""

    def __len__(self) -> int: ...

    def batches(
        self, size: int, generator: torch.Generator | None = None, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[Any, Tensor]]:
        """Yield inputs and labels of `size` examples at a time; `generator` draws their order and augmentation.

        Args:
            size: examples in a batch, summed over the ranks; the last batch may be smaller.
            generator: on the CPU; without one, examples keep their order. No other generator is used.
            rank: the process, among `ranks`, whose equal share of each batch is returned; a remainder is dropped.
            ranks: processes that share the batches.
        """
        ...

    def indexed(
        self, size: int, generator: torch.Generator | None = None, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[Tensor, Any, Tensor]]:
        """Yield the same batches, and before each the numbers of its examples in the split (n,), on the CPU."""
        ...


class Split(Batches, Protocol):
    """Examples with labels, loaded in batches."""

    @property
    def labels(self) -> Tensor:
        """Classes (N,), int64; or tokens (N, T), of which those that are `IGNORED` do not count."""
        ...

    @property
    def statistics(self) -> Statistics | None:
        """What images are standardised with; None if the inputs are no images, or it is not known."""
        ...

    def to(self, device: torch.device) -> Self:
        """Return the split with its batches on `device`."""
        ...

    def first(self, count: int) -> Self:
        """Return the first `count` examples."""
        ...

    def chosen(self, index: Tensor) -> Self:
        """Return the examples with these numbers (n,), in this order."""
        ...

    def relabelled(self, labels: Tensor) -> Self:
        """Return the split with other labels, of the same shape."""
        ...

    def unaugmented(self) -> Self:
        """Return the split without augmentation."""
        ...


@dataclass(frozen=True)
class Data:
    """A data set: three splits, the number of classes, and the metrics, the first of which selects the best epoch.

    Raises:
        ValueError: a label is outside the classes, or a split is empty.
    """

    train: Split
    validation: Split
    test: Split
    classes: int
    metrics: tuple[str, ...] = ("accuracy",)

    def __post_init__(self) -> None:
        for name in ("train", "validation", "test"):
            labels = getattr(self, name).labels
            if not len(labels):
                raise ValueError(f"the {name} part of the data is empty")
            if labels.dim() > 1 and not len(labels := labels[labels != IGNORED]):
                raise ValueError(f"no label of the {name} part of the data counts")
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.classes:
                wrong = low if low < 0 else high
                raise ValueError(f"label {wrong} in the {name} part is outside the {self.classes} classes 0 to "
                                 f"{self.classes - 1}: fix the labels")  # fmt: skip


def drawn(count: int, seed: int, stream: int = 0) -> Tensor:
    """Return the numbers (count,) from 0 on in an order that a seed draws, for splits.

    Args:
        count: number of examples.
        seed: of a run; label noise and batches are drawn from other random numbers of the same seed.
        stream: for other random numbers from the same seed.
    """
    return torch.from_numpy(np.random.default_rng([seed, 0x5B117, stream]).permutation(count))


def without_index(batches: Iterator[tuple[Tensor, Any, Tensor]]) -> Iterator[tuple[Any, Tensor]]:
    """Return an iterator over the inputs and labels of batches that `Batches.indexed` returned."""
    return ((inputs, labels) for _, inputs, labels in batches)


def batches_of(count: int, size: int, ranks: int = 1) -> int:
    """Return the number of batches that `shares` yields."""
    whole = count // size if size >= ranks else 0
    return whole + (count % size >= ranks)


def shares(
    count: int,
    size: int,
    generator: torch.Generator | None = None,
    rank: int = 0,
    ranks: int = 1,
    lengths: Tensor | None = None,
    bucket: int = 1,
) -> Iterator[Tensor]:
    """Yield the indices of `count` examples in batches, on the CPU; see `Batches.batches`.

    Args:
        count: number of examples.
        size: see `Batches.batches`, as the next three.
        generator: draws the order.
        rank: the process.
        ranks: processes that share the batches.
        lengths: of the examples (count,), for buckets.
        bucket: batches in a bucket. The examples of a bucket are a random part of all; they are sorted by length, and
            divided into batches whose order is random. Without a generator nothing is sorted.
    """
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    for index in _batched(order, size, generator, lengths, bucket):
        if equal := len(index) // ranks:
            yield index[rank : equal * ranks : ranks]


def _batched(
    order: Tensor, size: int, generator: torch.Generator | None, lengths: Tensor | None, bucket: int
) -> Iterator[Tensor]:
    if generator is None or lengths is None or bucket == 1:
        yield from order.split(size)
        return
    for part in order.split(size * bucket):
        batches = part[lengths[part].argsort(stable=True)].split(size)
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[i]
