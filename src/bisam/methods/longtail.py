"""Methods for long tails: the sharpness of the loss is weighted by class. ImbSAM and Focal-SAM.

The loss of an example is divided into two parts by the weight of its class. One part is minimised at the weights, and
the other one, whose sharpness counts, at the worst point nearby:

    >>> from bisam import FocalSAM, ImbSAM, NegLog
    >>> from bisam.objectives import ClassWeighted
    >>> tail = ImbSAM(0.05, tail=[7, 8, 9])               # SAM for the tail classes, plain training for the others
    >>> focal = FocalSAM(0.05, counts=[5000, 500, 50])    # a weight that falls with the frequency of a class
    >>> any_weights = ClassSAM(0.05, weight=Tail([7, 8, 9], weight=0.5))
    >>> bound = ImbSAM(0.05, tail=[1], ascent=ClassWeighted(NegLog(), [0, 1]))    # the adversary climbs a bound

CC-SAM (Zhou et al., 2023, CVPR) is not here: its radius of each class is not stated in a public source except by code
without a licence, and it takes a gradient for each class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bisam.batches import Batch
from bisam.evaluation import Evaluation
from bisam.methods.sam import SAM
from bisam.methods.written import call
from bisam.objectives import Objective, at_step
from bisam.oracle import Oracle, Query
from bisam.perturbations import Perturbation
from bisam.schedules import Radius
from bisam.validation import describe, instance, non_negative, numbers_of_classes, whole

LabelWeight = Callable[[Tensor], Tensor]
"""A function from class labels (int64) to weights of the same shape. The label of ignored examples is -1."""


@dataclass(frozen=True, repr=False)
class ClassSAM(SAM):
    """SAM with a weight of the sharpness for each class, as in ImbSAM and Focal-SAM.

    With c_y the weight of the label of an example and l its loss, the gradient is that of the mean of (1 - c_y) l at
    the weights plus that of the mean of c_y l at w + e. The means are over all examples. Where all weights are 1 it is
    SAM, and where all are 0 it is ERM, at the cost of three gradients.

    Args:
        perturb: see `SAM`.
        ascent: objective that the adversary climbs. Default: the mean of c_y l. For a bound with the same weights use
            `bisam.objectives.ClassWeighted`.
        descent: the loss l, one per example. Default: the training loss.
        weight: function from labels to the weights c_y, such as `Tail([8, 9])`.
        plain: the same for the weights at w. Default: 1 - c_y.

    Raises:
        TypeError: an argument has the wrong type.

    Raises when called:
        TypeError: the targets are not class labels (int64), or the loss is a scalar.
    """

    weight: LabelWeight = field(kw_only=True)
    plain: LabelWeight | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        instance("weight", self.weight, "a function from labels to weights such as Tail([8, 9])")
        if self.plain is not None:
            instance("plain", self.plain, "a function from labels to weights")

    def __repr__(self) -> str:
        return _named(self) or super().__repr__()

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes three queries."""
        loss = at_step(self.descent or oracle.loss, oracle.step)
        sharp, plain = _Weighted(loss, self.weight), _Weighted(loss, self.plain or _Rest(self.weight))
        here = oracle.query(batch, plain)
        look = oracle.query(batch, self.ascent or sharp, track=False, wrt=self.part(oracle))
        queries, look = [Query(batch, sharp, self.displacement(look.gradient, oracle))], None
        there = oracle.ask(queries)[0]
        sums = {"losses": here.losses + there.losses, "value": here.value + there.value}
        return replace(there, **sums, grad=here.gradient + there.gradient, objective=loss)


@dataclass(frozen=True)
class Tail:
    """The weights of ImbSAM: a number for the tail classes, and 0 for the others.

    Args:
        classes: the tail classes, integers >= 0; or one of them.
        weight: their weight, >= 0.

    Raises:
        TypeError: a class is not an int, or `weight` is not a number.
        ValueError: there is no class, or a number is negative.
    """

    classes: Sequence[int] | int
    weight: float = 1.0

    def __post_init__(self) -> None:
        classes: Any = [self.classes] if isinstance(self.classes, int) else self.classes
        if isinstance(classes, str | type) or not hasattr(classes, "__len__") or not len(classes):
            raise ValueError(f"tail must be a list of classes, as in [7, 8, 9], got {classes!r}")
        for label in classes:
            whole("a class of tail", label, least=0)
        object.__setattr__(self, "classes", tuple(classes))  # hashable
        non_negative("weight", self.weight)

    def __call__(self, labels: Tensor) -> Tensor:
        """Returns the weights."""
        return torch.isin(labels, torch.tensor(self.classes, device=labels.device)) * self.weight


@dataclass(frozen=True)
class Shares:
    """The weights of Focal-SAM: lam (1 - pi_c)^gamma, with the share pi_c of class c.

    Args:
        gamma: exponent, >= 0; with 0 all classes have the weight `lam`.
        lam: factor, >= 0.
        counts: number of training examples of each class. Default: the shares are those of the batch.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range, all counts are 0, or they are not in the order of the classes, as
            those of a dict.
    """

    gamma: float = 1.0
    lam: float = 1.0
    counts: Sequence[float] | None = None

    def __post_init__(self) -> None:
        non_negative("gamma", self.gamma)
        non_negative("lam", self.lam)
        if self.counts is not None:
            counts = numbers_of_classes("counts", "the count of class", self.counts)
            if not sum(counts):
                raise ValueError(f"counts must be the numbers of examples of each class, got {self.counts!r}")
            object.__setattr__(self, "counts", counts)

    def __call__(self, labels: Tensor) -> Tensor:
        """Returns the weights.

        Raises:
            ValueError: a label has no count (checked on the CPU).
        """
        if self.counts is None:
            return self.lam * (1 - _shares(labels)) ** self.gamma
        total = sum(self.counts)
        weights = [self.lam * (1 - n / total) ** self.gamma for n in self.counts]
        try:
            return torch.tensor(weights, dtype=_type(labels), device=labels.device)[labels]
        except IndexError as error:
            raise ValueError(
                f"there are counts of {len(weights)} classes, and a label is {int(labels.max())}: give a count for each"
            ) from error


def ImbSAM(
    rho: Perturbation | Radius = 0.05,
    *,
    tail: Sequence[int] | int,
    weight: float = 1.0,
    ascent: Objective | None = None,
) -> ClassSAM:
    """ImbSAM: SAM for the tail classes, and plain training for the others (Zhou et al., 2023).

    Source: https://arxiv.org/abs/2308.07815, as in the authors' code, which multiplies the losses of the tail by 2.

    Args:
        rho: a radius >= 0 (a number or a schedule), or a perturbation.
        tail: the tail classes, or one of them.
        weight: factor of their losses, >= 0.
        ascent: see `ClassSAM`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range.
    """
    chosen = Tail(tail)
    return ClassSAM(rho, ascent, weight=Tail(tail, weight), plain=_Rest(chosen))


def FocalSAM(
    rho: Perturbation | Radius = 0.05,
    gamma: float = 1.0,
    lam: float = 0.5,
    counts: Sequence[float] | None = None,
    ascent: Objective | None = None,
) -> ClassSAM:
    """Focal-SAM: the sharpness of a class counts lam (1 - pi_c)^gamma, less for frequent classes (Li et al., 2025).

    Source: https://arxiv.org/abs/2505.01660, as in the authors' code.

    Args:
        rho: a radius >= 0 (a number or a schedule), or a perturbation.
        gamma: exponent, >= 0; the authors' default is 1.
        lam: weight of the sharpness, >= 0; the authors' default is 0.5.
        counts: number of training examples of each class, as in the paper. Default: the shares are those of the batch.
        ascent: see `ClassSAM`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range.
    """
    return ClassSAM(rho, ascent, weight=Shares(gamma, lam, counts))


def _named(method: ClassSAM) -> str | None:
    """Returns the call of `ImbSAM` or `FocalSAM` that makes a method, as text; None if neither does."""
    weight, perturb, ascent = method.weight, ("perturb", method.perturb, None), ("ascent", method.ascent, None)
    if method.descent is not None:
        return None
    if isinstance(weight, Shares) and method.plain is None:
        own = [("gamma", weight.gamma, 1.0), ("lam", weight.lam, 0.5), ("counts", weight.counts, None)]
        return call("FocalSAM", [perturb, *own, ascent])
    if isinstance(weight, Tail) and method.plain == _Rest(Tail(weight.classes)):
        return call("ImbSAM", [perturb, ("tail", weight.classes, None), ("weight", weight.weight, 1.0), ascent])
    return None


def _shares(labels: Tensor) -> Tensor:
    """Returns the share of the label of each example, among the examples that are not ignored."""
    flat = labels.flatten()
    order = flat.sort().values  # memory of the labels, not of all pairs of them, and nothing waits for the device
    counts = torch.searchsorted(order, flat, right=True) - torch.searchsorted(order, flat)
    counts = counts.masked_fill(flat < 0, 0)  # more than all others, and a power of 1 minus their share would be NaN
    return counts.view(labels.shape).to(_type(labels)) / (flat >= 0).sum().clamp_min(1)


def _type(labels: Tensor) -> torch.dtype:
    return torch.float64 if labels.is_cpu else torch.float32  # other devices may have no float64


@dataclass(frozen=True)
class _Rest:
    """1 minus other weights."""

    weight: LabelWeight

    def __call__(self, labels: Tensor) -> Tensor:
        return 1 - self.weight(labels)


@dataclass(frozen=True)
class _Weighted:
    """A loss whose values are multiplied by a weight of their label."""

    loss: Objective
    weight: LabelWeight

    @property
    def ignore_index(self) -> int | None:
        return getattr(self.loss, "ignore_index", None)

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        if not isinstance(targets, Tensor) or targets.dtype != torch.int64:
            raise TypeError(f"weights of classes need class labels (int64), and the targets are {describe(targets)}")
        losses = self.loss(outputs, targets)
        if losses.shape != targets.shape:
            raise TypeError(
                f"weights of classes need one loss for each of the labels {tuple(targets.shape)}, got "
                f'{tuple(losses.shape)}: pass your criterion with reduction="none", or bisam.cross_entropy'
            )
        ignored = self.ignore_index
        labels = targets if ignored is None else targets.masked_fill(targets == ignored, -1)
        return losses * self.weight(labels).to(losses.dtype)
