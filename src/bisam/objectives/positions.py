"""Positions: one loss for an example that has many decisions, such as labels, tokens or pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor

from bisam.objectives.bounds import Around, Binary, LowerBound, NegLog
from bisam.objectives.objective import Objective
from bisam.validation import instance


@dataclass(frozen=True)
class PerExample(Around):
    """The mean of an objective over the positions of each example, so that each example counts the same.

    Without it the mean of a batch is over its positions: a long sequence outweighs a short one, and an image with few
    pixels that are labelled counts little. A lower bound of the error at a position becomes one of the share of the
    positions of an example that are wrong, up to the same constant, and an upper bound one from above:
    `PerExample(cross_entropy)` is the training loss that belongs to `PerExample(NegLog())`.

    Args:
        bound: an objective that returns one loss per position; its `ignore_index` tells which positions do not count.

    Raises:
        TypeError: `bound` is not callable.

    Raises when called:
        ValueError: `bound` returns a scalar; else as `bound`.

    Example:
        >>> import torch
        >>> from bisam import NegLog
        >>> from bisam.objectives import PerExample
        >>> logits, labels = torch.zeros(2, 3, 5), torch.tensor([[0, 1, 2, 0, 1], [2, 2, -100, -100, -100]])
        >>> PerExample(NegLog())(logits, labels).shape    # (N, K, T), (N, T) -> (N,)
        torch.Size([2])
    """

    bound: Objective = field(default=NegLog())

    def __post_init__(self) -> None:
        instance("bound", self.bound, "an objective such as NegLog() or cross_entropy")

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the losses (N,); zero where no position counts. Arguments as those of `bound`."""
        losses = self.bound(outputs, targets)
        if losses.dim() == 0 and targets.dim():
            raise ValueError(f'{self.bound!r} returned a scalar, not a loss for each position: use reduction="none"')
        if losses.dim() < 2:
            return losses
        counted = _counted(self.bound, targets)
        return losses.flatten(1).mean(1) if counted is None else losses.flatten(1).sum(1) / counted.sum(1).clamp_min(1)


@dataclass(frozen=True)
class ExactMatch(Around):
    """A bound of the exact-match error, 1 where any decision about an example is wrong: its labels, tokens or pixels.

    For several labels per example that is the subset 0-1 loss, `ExactMatch(Binary())`; for sequences the share of those
    with a wrong token, `ExactMatch(NegLog())`. The error of an example is the largest error of its positions, so with
    the values Q_t of `bound` at T positions the bound is their soft maximum (1/mu) log sum_t exp(mu Q_t), as that of
    Xie et al. (2024, https://arxiv.org/abs/2407.12993) over classes. It is a lower bound up to log(T)/mu and the
    constant of `bound`. The mean over the positions, which is the Hamming loss or the token error, needs no other
    objective than `bound` itself, or `PerExample`. The counterpart in the descent is the sum of the losses of the
    positions divided by log 2.

    Args:
        bound: the bound of each position, whose mu and `ignore_index` are used.

    Raises:
        TypeError: `bound` is neither a `LowerBound` nor a `Binary`.

    Example:
        >>> import torch
        >>> from bisam import Binary, Tanh, WrongClasses
        >>> from bisam.objectives import ExactMatch
        >>> subset = ExactMatch(Binary(WrongClasses(Tanh(mu=20.0, alpha=1.0))))
        >>> subset(torch.tensor([[9.0, -9.0], [9.0, 9.0]]), torch.tensor([[1, 0], [1, 0]]))    # right, half right
        tensor([-0.9653,  1.0000])
    """

    bound: LowerBound | Binary = field(default=NegLog())

    def __post_init__(self) -> None:
        instance("bound", self.bound, "a LowerBound such as NegLog(), or Binary()")
        if not isinstance(cast(Any, self.bound), LowerBound | Binary):
            raise TypeError(f"bound must be a LowerBound such as NegLog(), or Binary(), got {self.bound!r}")

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the bound (N,), in float32 or a wider type; zero where no position counts.

        Arguments and errors are those of `bound`: logits (N, K, d1, ...) with labels (N, d1, ...), or for `Binary`
        logits (N, L, ...) with targets of the same shape.
        """
        values = self.bound(outputs, targets)
        if values.dim() < 2:
            return values
        lower = self.bound.bound if isinstance(self.bound, Binary) else self.bound
        counted = _counted(self.bound, targets)
        if counted is None:
            return lower.soft_maximum(values.flatten(1))
        some = counted.any(1, keepdim=True)  # with -inf at all positions the gradient would not be finite
        values = lower.soft_maximum(values.flatten(1).masked_fill(~counted & some, -math.inf))
        return values.masked_fill(~some.squeeze(1), 0.0)


def _counted(objective: Any, targets: Tensor) -> Tensor | None:
    """Returns which positions (N, T) count; None if all do."""
    ignored = getattr(objective, "ignore_index", None)
    return None if ignored is None or targets.is_floating_point() else (targets != ignored).flatten(1)
