"""Logits: the outputs of a classifier on a sample, checked, with the label of each row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self, cast

import torch
from torch import Tensor

from bisam import targets as check
from bisam.analysis.samples import Sample
from bisam.objectives import CrossEntropy, Objective


@dataclass(frozen=True)
class OfClasses:
    """The base of objectives of logits of several classes and labels; all other outputs and targets are refused.

    Args:
        ignore_index: label of examples that are ignored; their loss is 0.
    """

    subject: ClassVar[str] = "this measure"
    """The subject of messages."""

    ignore_index: int = -100

    @classmethod
    def like(cls, loss: Objective) -> Self:
        """Returns the objective that ignores the same label as a loss."""
        ignored = getattr(loss, "ignore_index", None)
        return cls() if ignored is None else cls(ignored)

    def labels(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        """Returns the targets if they are labels of the classes of the outputs.

        Args:
            outputs: logits (N, K, ...), K >= 2.
            targets: int64 labels (N, ...).

        Raises:
            TypeError: `outputs` or `targets` have the wrong type.
            ValueError: their shapes do not match, K < 2, there are no targets, or a label is outside [0, K) and not
                `ignore_index`.
        """
        if targets is None:
            raise ValueError(
                f"{self.subject} compares logits with labels, and there are no labels of classes here, as in a "
                "regression or with several labels at once: measure sharpness instead"
            )
        classes = check.types(outputs, targets)
        soft = targets.is_floating_point()
        if outputs.dim() < 2 or classes < 2 or soft or not check.fits(outputs, targets):
            raise ValueError(
                f"{self.subject} compares logits (N, K, ...) of K >= 2 classes with int64 labels (N, ...), got outputs "
                f"of shape {tuple(outputs.shape)} and targets of type {targets.dtype} and shape {tuple(targets.shape)}"
            )
        outside = ((targets < 0) | (targets >= classes)) & (targets != self.ignore_index)
        if bool(outside.any()):
            raise ValueError(
                f"the labels of {classes} classes are 0 to {classes - 1}, or {self.ignore_index} for examples that are "
                f"ignored, got {int(targets[outside][0])}"
            )
        return targets


@dataclass(frozen=True)
class Labelled(OfClasses):
    """Cross-entropy, for measures that need the outputs alone."""

    def __call__(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        """Returns one loss per example, of the shape of `targets`; see `OfClasses.labels`."""
        # Checked before the loss, whose device-side assert would leave a GPU unusable.
        labels = self.labels(outputs, targets)
        return CrossEntropy(self.ignore_index)(outputs.to(torch.promote_types(outputs.dtype, torch.float32)), labels)


@dataclass(frozen=True)
class Rows:
    """Logits and labels of the examples of a batch that count; each position of a sequence or an image is a row.

    Attributes:
        logits: (n, K), float64, on the CPU.
        labels: (n,), on the CPU.
        counts: for each row of this rank's batch (N,), whether it counts.
    """

    logits: Tensor
    labels: Tensor
    counts: Tensor


def rows(sample: Sample) -> Iterator[Rows]:
    """Yields the rows of each batch that has any, in one forward pass.

    Ranks that share a batch get the rows of all of them.

    Raises:
        TypeError: outputs or targets have the wrong type.
        ValueError: the outputs are no logits of several classes, a label is outside the classes, a loss is not finite,
            or no label counts.
    """
    objective, total = Labelled.like(sample.oracle.loss), 0
    for answer in sample.each(objective=objective, grad=False):
        labels = cast(Tensor, answer.targets).flatten()
        logits = cast(Tensor, answer.outputs).movedim(1, -1).flatten(0, -2)
        counts = labels != objective.ignore_index
        logits, labels = (sample.oracle.gathered(t[counts]).cpu() for t in (logits, labels))
        total += len(labels)
        if len(labels):
            yield Rows(logits.double(), labels, counts)
    if not total:
        raise ValueError(f"no label counts: all of them are {objective.ignore_index}, which the loss ignores")
