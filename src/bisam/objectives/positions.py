"""Positions: one loss for an example that has many decisions, such as labels, tokens or pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bisam import targets as check
from bisam.objectives.bounds import Binary, LowerBound, NegLog, ObjectiveWrapper
from bisam.objectives.objective import Objective, in_range, of_labels, wide
from bisam.validation import instance


@dataclass(frozen=True)
class PerExample(ObjectiveWrapper):
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
        losses = losses.flatten(1)
        return losses.sum(1) / _counted(self.bound, targets, losses).sum(1).clamp_min(1)


@dataclass(frozen=True)
class ExactMatch(ObjectiveWrapper):
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
        _of_positions(self.bound)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the bound (N,), in float32 or a wider type; zero where no position counts.

        Arguments and errors are those of `bound`: logits (N, K, d1, ...) with labels (N, d1, ...), or for `Binary`
        logits (N, L, ...) with targets of the same shape.
        """
        values = self.bound(outputs, targets)
        if values.dim() < 2:
            return values
        lower, values = self.bound.bound if isinstance(self.bound, Binary) else self.bound, values.flatten(1)
        counted = _counted(self.bound, targets, values)
        some = counted.any(1, keepdim=True)  # with -inf at all positions the gradient would not be finite
        values = lower.soft_maximum(values.masked_fill(~counted & some, -math.inf))
        return values.masked_fill(~some.squeeze(1), 0.0)


@dataclass(frozen=True)
class IoU(ObjectiveWrapper):
    """A bound of the Jaccard loss 1 - IoU of segmentation, of each image, as a mean over its classes.

    Let M be the pixels that are wrong about class c: those of c that are predicted otherwise, and others that are
    predicted as c. Then 1 - IoU = |M| / |pixels of c or in M|, a function of the set M that grows with it. Its Lovász
    extension, which sorts the pixels by their values and weighs each with the growth at its place, interpolates it and
    grows with each value (Berman et al., 2018, https://arxiv.org/abs/1705.08790). With Q of `bound` for the pixels,
    each a decision with the margin of class c, it is therefore a lower bound up to log(2)/mu, and around `WrongClasses`
    without a constant, where Berman et al. take hinge losses for an upper bound (the lower one: the idea of Xie et al.,
    2024, https://arxiv.org/abs/2407.12993, for this metric). A soft count of the set M would need non-negative values,
    and pixels that are right would have no gradient. In the gradient the weights are constants.

    Classes without a pixel in an image do not count there. In the descent cross-entropy is usual; the sum of that of
    the wrong pixels, divided by log 2 and the number of pixels of c, is an upper bound for class c. The error of pixels
    needs no other objective than `bound`, or `PerExample`.

    Args:
        bound: the bound of each pixel, whose phi, mu and `ignore_index` are used: a `LowerBound` for one of K classes
            per pixel, or `Binary` for one logit per mask.

    Raises:
        TypeError: `bound` is neither a `LowerBound` nor a `Binary`.

    Example:
        >>> import torch
        >>> from bisam import Tanh, WrongClasses
        >>> from bisam.objectives import IoU
        >>> bound = IoU(WrongClasses(Tanh(alpha=10.0)))
        >>> labels = torch.tensor([[[0, 0, 0, 1]]])    # an image of four pixels
        >>> logits = 9.0 * torch.nn.functional.one_hot(torch.tensor([[[0, 0, 1, 1]]]), 2).movedim(-1, 1)
        >>> bound(logits, labels)    # the third is wrong: IoU 2/3 and 1/2; right ones count with phi, -1 here
        tensor([-0.1667])
    """

    bound: LowerBound | Binary = field(default=NegLog())

    def __post_init__(self) -> None:
        _of_positions(self.bound)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the bound per image (N,), in float32 or a wider type; zero for an image without labelled pixels.

        Args:
            outputs: logits (N, K, d1, ...); around `Binary` those of L masks, (N, L, d1, ...).
            targets: int64 labels (N, d1, ...); around `Binary` 0 or 1 for each logit, of any type.

        Raises:
            TypeError: `outputs` or `targets` have the wrong type.
            ValueError: their shapes do not match, or a target is not a label.
        """
        margins, members, counted, lower = self._masks(outputs, targets)
        values = lower.of_margins(torch.where(members, -margins, margins).flatten().unsqueeze(1)).view(margins.shape)
        present = (members & counted).any(-1)
        return (_lovasz(values, members, counted) * present).sum(1) / present.sum(1).clamp_min(1)

    def _masks(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, LowerBound]:
        """Returns the lead of each class at each pixel (N, K, P), the pixels of each, which count, and the bound."""
        classes = check.types(outputs, targets)
        if isinstance(self.bound, Binary):
            check.masks(outputs, targets)
            margins, members = wide(outputs).flatten(2), targets.flatten(2) > 0.5
            return margins, members, torch.ones_like(members), self.bound.bound
        if classes < 2 or not check.fits(outputs, targets):
            raise check.mismatch(outputs, targets, check.Elsewhere("bisam.objectives.IoU(Binary(...))"))
        if targets.is_floating_point() or outputs.dim() < 3:
            raise ValueError(
                f"IoU needs int64 labels (N, d1, ...) of pixels, got {targets.dtype} of shape {tuple(targets.shape)}"
            )
        z, labels = wide(outputs).flatten(2), targets.flatten(1)
        in_range(lambda z, y, ignored: of_labels(z, y, ignored)[2], z, labels, self.bound.ignore_index)
        each = torch.arange(classes, device=z.device).unsqueeze(1)
        best = z.topk(2, 1)
        rivals = torch.where(each == best.indices[:, :1], best.values[:, 1:], best.values[:, :1])
        return z - rivals, labels.unsqueeze(1) == each, (labels != self.bound.ignore_index).unsqueeze(1), self.bound


def _lovasz(values: Tensor, members: Tensor, counted: Tensor) -> Tensor:
    """Returns the Lovász extension (N, K) of the Jaccard loss for values (N, K, P) of the pixels."""
    counted = counted.expand_as(members)
    order = values.detach().masked_fill(~counted, -math.inf).argsort(-1, descending=True)
    masks = members & counted, ~members & counted
    missed, false = [mask.gather(-1, order).to(values.dtype).cumsum(-1) for mask in masks]
    losses = (missed + false) / (missed[..., -1:] + false).clamp_min(1)
    return (losses.diff(dim=-1, prepend=torch.zeros_like(losses[..., :1])) * values.gather(-1, order)).sum(-1)


def _of_positions(bound: Any) -> None:
    """Checks that a bound is one of classes or of labels."""
    instance("bound", bound, "a LowerBound such as NegLog(), or Binary()")
    if not isinstance(bound, LowerBound | Binary):
        raise TypeError(f"bound must be a LowerBound such as NegLog(), or Binary(), got {bound!r}")


def _counted(objective: Any, targets: Tensor, values: Tensor) -> Tensor:
    """Returns which positions of `values` (N, T) count."""
    ignored = getattr(objective, "ignore_index", None)
    if ignored is None or targets.is_floating_point():
        return torch.ones_like(values, dtype=torch.bool)
    return (targets != ignored).flatten(1)
