"""Objective: the type of objectives, the mean over their losses, objectives of classes, and cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bisam import targets as check
from bisam.validation import LARGEST, whole

Objective = Callable[[Any, Any], Tensor]
"""A function `(outputs, targets) -> losses` that returns one loss per example, or a scalar."""

Count = int | Tensor
"""A number of examples; a 0-dimensional tensor if it depends on the targets, which avoids a device synchronisation."""

_HALF = frozenset({torch.float16, torch.bfloat16})


def at_step(objective: Objective, step: int) -> Objective:
    """Returns the objective of a training step: what its method `at_step` returns, or itself without one."""
    of_step = getattr(objective, "at_step", None)
    return objective if of_step is None else of_step(step)


def count(losses: Tensor, targets: Any, objective: Objective) -> Count:
    """Returns the number of losses that count: those whose target is not the objective's `ignore_index`, if it has one.

    Args:
        losses: one per example. Where there are fewer than labels, as one for each sequence, all of them count.
        targets: targets that were passed to the objective; labels are integers.
        objective: `torch.nn.CrossEntropyLoss(reduction="none")` and the objectives in this module have an
            `ignore_index`.
    """
    of_each = which_count(losses, targets, objective)
    return losses.numel() if of_each is None else of_each.sum(dtype=torch.float32)


def which_count(losses: Tensor, targets: Any, objective: Any) -> Tensor | None:
    """Returns for each loss whether it counts, as `count` does; None if all do."""
    ignored = getattr(objective, "ignore_index", None)
    if ignored is None or not _are_labels(targets) or losses.shape != targets.shape:
        return None
    return targets != ignored


def count_of_mean(targets: Any, objective: Objective) -> Count | None:
    """Returns the number of losses that the mean of an objective is over, if it is known for an objective of a scalar.

    It is for cross-entropy and the negative log-likelihood of torch without class weights, which leave out labels.

    Args:
        targets: targets that were passed to the objective.
        objective: the objective.
    """
    if objective is F.cross_entropy or objective is F.nll_loss:
        ignored = -100
    elif getattr(type(objective), "forward", None) in _FORWARDS and _is_plain_mean(objective):
        ignored = cast(nn.NLLLoss, objective).ignore_index
    else:
        return None
    return (targets != ignored).sum(dtype=torch.float32) if _are_labels(targets) else None


_FORWARDS = (nn.CrossEntropyLoss.forward, nn.NLLLoss.forward)


def _is_plain_mean(objective: Any) -> bool:
    return objective.reduction == "mean" and objective.weight is None


def _are_labels(targets: Any) -> bool:
    return isinstance(targets, Tensor) and not targets.is_floating_point()


def mean(losses: Tensor, counted: Count) -> Tensor:
    """Returns the mean over the losses that count, or 0 if none does; ignored losses are 0. A scalar is unchanged."""
    if losses.dim() == 0:
        return losses
    return losses.mean() if isinstance(counted, int) else losses.sum() / counted.clamp_min(1)


class OfClasses:
    """Base class of objectives of classes, of labels or of class probabilities.

    Attributes:
        ignore_index: label of examples that are ignored.
    """

    ignore_index: int
    _widens: ClassVar[bool] = False
    """Whether it takes logits of half precision for labels, and computes in float32 by itself, a part at a time."""

    def __post_init__(self) -> None:
        whole("ignore_index", self.ignore_index, least=-LARGEST)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the loss per example, in float32 or a wider type; zero where a label is `ignore_index`.

        Args:
            outputs: logits (N, K), (N, K, d1, ...) or (K,), K >= 2. They are not modified.
            targets: int64 labels (N,), (N, d1, ...) or (); or class probabilities of the shape of `outputs`, for which
                the loss is the expectation over the label.

        Raises:
            TypeError: `outputs` or `targets` have the wrong type.
            ValueError: their shapes do not match, K < 2, a label is outside [0, K), or floating-point targets are not
                class probabilities.
        """
        return of_classes(self, outputs, targets, check.IN_TORCH)

    def _labelled(self, logits: Tensor, labels: Tensor, ignore_index: int | None) -> Tensor:
        """Returns the losses for labels; zero where a label is `ignore_index`. None: all labels count."""
        raise NotImplementedError

    def _expected(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        """Returns the expectation of the losses over the label; linear in the probabilities, whatever their sum."""
        raise NotImplementedError


@dataclass(frozen=True)
class CrossEntropy(OfClasses):
    """Cross-entropy, one loss per example: the default descent objective.

    For label smoothing pass `torch.nn.CrossEntropyLoss(label_smoothing=..., reduction="none")`. For class weights pass
    one with `reduction="mean"`, because torch divides by the sum of the weights and not by the number of examples.

    Args:
        ignore_index: label of examples that are ignored.

    Raises:
        TypeError: `ignore_index` is no int.
    """

    ignore_index: int = -100

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns losses of the shape of the labels; zero where a label is `ignore_index`.

        Args:
            outputs: logits (N, K) or (N, K, d1, ...), or (K,) for one example.
            targets: int64 labels (N,) or (N, d1, ...), or class probabilities of the shape of `outputs`.

        Raises:
            TypeError: `outputs` or `targets` have the wrong type.
            ValueError: their shapes do not match, or a label is outside [0, K) (on the CPU; on a GPU a device-side
                assert fails, as in torch).
        """
        check.types(outputs, targets)
        if not check.fits(outputs, targets):
            raise check.mismatch(outputs, targets, check.IN_TORCH)
        return in_range(self._labelled, outputs, targets, self.ignore_index)

    def _labelled(self, logits: Tensor, labels: Tensor, ignore_index: int | None) -> Tensor:
        ignored = -100 if ignore_index is None else ignore_index
        return F.cross_entropy(logits, labels, ignore_index=ignored, reduction="none")

    def _expected(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        return F.cross_entropy(logits, probabilities, reduction="none")


cross_entropy = CrossEntropy()


def of_classes(objective: OfClasses, outputs: Tensor, targets: Tensor, elsewhere: check.Elsewhere) -> Tensor:
    """Checks outputs and targets of an objective of classes and returns its losses."""
    classes, soft = check.types(outputs, targets), targets.is_floating_point()
    if classes < 2 or not check.fits(outputs, targets):
        raise check.mismatch(outputs, targets, elsewhere)
    if soft:
        check.probabilities(targets, elsewhere)
    logits, one = outputs if objective._widens and not soft else wide(outputs), outputs.dim() == 1
    if one:
        logits, targets = logits.unsqueeze(0), targets.unsqueeze(0)
    if soft:
        values = objective._expected(logits, targets)
    else:
        values = in_range(objective._labelled, logits, targets, objective.ignore_index)
    return values.squeeze(0) if one else values


def wide(tensor: Tensor) -> Tensor:
    """Returns a half-precision tensor in float32, and others unchanged."""
    return tensor.float() if tensor.dtype in _HALF else tensor


def _split_labels(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Returns which labels are ignored, and an index along the classes that is valid for all (N, 1, d1, ...)."""
    ignored = labels == ignore_index
    return ignored, labels.masked_fill(ignored, 0).unsqueeze(1)


def of_labels(logits: Tensor, labels: Tensor, ignore_index: int | None) -> tuple[Tensor | None, Tensor, Tensor]:
    """Returns which labels are ignored (None if none is), an index that is valid for all labels, and the logits at it.

    On a CPU `gather` itself detects a label outside [0, K), so no separate check is needed.
    """
    if ignore_index is None:
        index = labels.unsqueeze(1)
        return None, index, logits.gather(1, index)
    noticed = type(labels) is Tensor and labels.is_cpu and not torch.compiler.is_compiling()
    if noticed and not 0 <= ignore_index < logits.shape[1]:
        index = labels.unsqueeze(1)
        try:
            return None, index, logits.gather(1, index)
        except RuntimeError:
            pass  # some labels are ignored or out of range; the same call below raises for the latter
    ignored, index = _split_labels(labels, ignore_index)
    return ignored, index, logits.gather(1, index)


def in_range(
    loss: Callable[[Tensor, Tensor, int | None], Tensor], logits: Tensor, labels: Tensor, ignore_index: int
) -> Tensor:
    """Returns `loss(logits, labels, ignore_index)`; an error for a label out of range becomes one that shows it."""
    try:
        return loss(logits, labels, ignore_index)
    except (IndexError, RuntimeError) as error:
        if labels.is_floating_point() or "out of bounds" not in str(error):
            raise
        classes = logits.shape[1] if logits.dim() > 1 else logits.shape[0]
        if classes == 1:  # only cross-entropy takes them, as that of torch
            raise check.mismatch(logits, labels, check.IN_TORCH) from error
        bad = labels[(labels != ignore_index) & ((labels < 0) | (labels >= classes))]
        raise ValueError(
            f"label {int(bad[0])} is outside [0, {classes}): {bad.numel()} of {labels.numel()} labels are. Number the "
            f"classes from 0, and mark what is to be left out with {ignore_index} or name another ignore_index"
        ) from error
