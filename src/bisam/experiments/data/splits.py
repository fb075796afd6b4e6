"""Splits: the parts of a data set, and how their examples come in batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor


class Batches(Protocol):
    """Examples that come in batches."""

    def __len__(self) -> int: ...

    def batches(
        self, size: int, generator: torch.Generator | None = None, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[Any, Tensor]]:
        """Inputs and targets of `size` examples at a time, in the order and augmented as `generator` draws.

        Args:
            size: examples in a batch of all ranks together; the last one is smaller.
            generator: on the CPU; without one examples come in their order. Nothing else is drawn from.
            rank: of `ranks` processes, whose equal share of each batch to give; a remainder is left out.
            ranks: processes that share the batches.
        """
        ...


class Split(Batches, Protocol):
    """Examples with labels, which come in batches."""

    @property
    def labels(self) -> Tensor:
        """Classes (N,), int64."""
        ...

    def to(self, device: torch.device) -> Self:
        """The same, with its batches on `device`."""
        ...

    def first(self, count: int) -> Self:
        """The first `count` examples."""
        ...

    def relabelled(self, labels: Tensor) -> Self:
        """The same with other labels (N,)."""
        ...


@dataclass(frozen=True)
class Data:
    """A data set: three splits, number of classes, and how it is scored (the first score chooses the best epoch).

    Raises:
        ValueError: a label is outside the classes, or a part is empty.
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
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.classes:
                wrong = low if low < 0 else high
                raise ValueError(f"label {wrong} in the {name} part is outside the {self.classes} classes 0 to "
                                 f"{self.classes - 1}: mend the labels")  # fmt: skip


def batches_of(count: int, size: int, ranks: int = 1) -> int:
    """How many batches `shares` makes."""
    whole = count // size if size >= ranks else 0
    return whole + (count % size >= ranks)


def shares(
    count: int, size: int, generator: torch.Generator | None = None, rank: int = 0, ranks: int = 1
) -> Iterator[Tensor]:
    """Indices of `count` examples in batches, on the CPU, as `Split.batches` takes them."""
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    for index in order.split(size):
        if equal := len(index) // ranks:
            yield index[rank : equal * ranks : ranks]
