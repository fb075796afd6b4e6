"""Classes: bounds of other metrics of a prediction among K classes than its error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor

from bisam.objectives.bounds import BoundWrapper, LowerBound, NegLog, ObjectiveWrapper
from bisam.objectives.objective import OfClasses, of_labels
from bisam.validation import instance, non_negative, numbers_of_classes, shown, whole


@dataclass(frozen=True)
class TopK(BoundWrapper):
    """A bound of the top-k error, 1 where k wrong classes score higher than the label, as ImageNet's top-5 error.

    It is Q of `bound` without the k - 1 wrong classes that score highest: of the others one leads if and only if the
    k-th margin is positive. Q - log(K - k + 1)/mu is a lower bound of the top-k error for K classes, and for k = 1 Q is
    that of `bound` (the idea of Xie et al., 2024, https://arxiv.org/abs/2407.12993, for this metric). Its counterpart
    in the descent is cross-entropy, which is log(k + 1) at least where the label is not among the first k.

    Args:
        k: number of predictions, one of which is to be the label, >= 1.
        bound: the bound, whose phi, mu and `ignore_index` are used.

    Raises:
        TypeError: `k` is not an int, or `bound` is not a `LowerBound`.
        ValueError: `k` is less than 1.

    Raises when called:
        ValueError: there are no more than k classes; else as `LowerBound`.

    Example:
        >>> import torch
        >>> from bisam.objectives import NegLog, TopK
        >>> logits = torch.tensor([[3.0, 1.0, 2.0, 0.0]])    # the label is class 1, in the third place
        >>> torch.cat([TopK(k, NegLog(mu=10.0))(logits, torch.tensor([1])) for k in (1, 2, 3)])
        tensor([7.9681e-01, 5.1073e-01, 6.4072e-05])
    """

    k: int
    bound: LowerBound = field(default=NegLog())

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("k", self.k)

    def _labelled(self, logits: Tensor, labels: Tensor, ignore_index: int | None) -> Tensor:
        if (left := logits.shape[1] - self.k) < 1:
            raise ValueError(f"the top-{self.k} error of {logits.shape[1]} classes is always 0: k must be less")
        ignored, index, reference = of_labels(logits, labels, ignore_index)
        others = logits.scatter(1, index, math.inf).topk(left, 1, largest=False, sorted=False).values
        values = self.bound.of_margins(others - reference)
        return values if ignored is None else values.masked_fill(ignored, 0.0)


@dataclass(frozen=True)
class CostSensitive(BoundWrapper):
    """A bound of the cost c(y, j) of predicting class j for label y: ordinal classes, or errors that differ in weight.

    The cost is a sum over its levels: with c_1 < c_2 < ... the costs for the label and A_l the classes that cost c_l or
    more, it is the sum of (c_l - c_(l-1)) 1{the prediction is in A_l} (the reduction of Lin & Li, 2012, to binary
    problems, https://doi.org/10.1162/NECO_a_00265). The prediction is in A_l where a class of A_l scores higher than
    all that cost less, a decision with the margins F_j = f_j - max over the others of f, which Q of `bound` bounds
    (the idea of Xie et al., 2024, https://arxiv.org/abs/2407.12993). The sum is a lower bound of the cost up to
    log(K)/mu times the largest cost for the label. Where all errors cost 1 it is `bound`.

    Its counterpart in the descent is cross-entropy times the largest cost for the label, divided by log 2. The time is
    that of K - 1 bounds: it is made for tens of classes.

    Args:
        costs: K rows of K numbers >= 0, the cost of each prediction for each label, 0 on the diagonal; or "ordinal" for
            |y - j|, whose mean over examples is the mean absolute error of the class.
        bound: the bound, whose phi, mu and `ignore_index` are used.

    Raises:
        TypeError: a cost is not a number, or `bound` is not a `LowerBound`.
        ValueError: a cost is negative or not finite, one on the diagonal is not 0, or they are no square.

    Raises when called:
        ValueError: the outputs have another number of classes than the costs; else as `LowerBound`.

    Example:
        >>> import torch
        >>> from bisam.objectives import CostSensitive, Tanh, WrongClasses
        >>> grades = CostSensitive("ordinal", WrongClasses(Tanh(mu=20.0, alpha=1.0)))
        >>> grades(torch.tensor([[0.0, 0.0, 0.0, 9.0]]), torch.tensor([0]))    # the prediction is 3 grades too high
        tensor([3.])
        >>> misses = CostSensitive([[0, 1], [10, 0]])    # to miss class 1 is ten times as bad
    """

    costs: Sequence[Sequence[float]] | Literal["ordinal"]
    bound: LowerBound = field(default=NegLog())

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.costs, str):
            if self.costs != "ordinal":
                raise ValueError(f'costs must be rows of numbers or "ordinal", got {shown(self.costs)}')
            return
        rows = [list(row) for row in self.costs]
        if not rows or any(len(row) != len(rows) for row in rows):
            raise ValueError(f"costs must be K rows of K numbers, got rows of {[len(row) for row in rows]}")
        for label, row in enumerate(rows):
            for prediction, cost in enumerate(row):
                non_negative(f"the cost of prediction {prediction} for label {label}", cost)
            if row[label] != 0:
                raise ValueError(f"the cost of prediction {label} for label {label} must be 0, got {row[label]}")
        object.__setattr__(self, "costs", tuple([tuple(row) for row in rows]))  # hashable

    def _labelled(self, logits: Tensor, labels: Tensor, ignore_index: int | None) -> Tensor:
        ignored, index, _ = of_labels(logits, labels, ignore_index)
        costs, order = self._of(logits).sort(dim=1, stable=True)
        rows = index.squeeze(1)
        steps, scores = costs.diff(dim=1)[rows].movedim(-1, 1), logits.gather(1, order[rows].movedim(-1, 1))
        best = scores.cummax(1).values
        values = torch.zeros_like(best[:, 0])
        for level in range(1, scores.shape[1]):
            q = self.bound.of_margins(scores[:, level:] - best[:, level - 1 : level])
            values = values + steps[:, level - 1] * q
        return values if ignored is None else values.masked_fill(ignored, 0.0)

    def _of(self, logits: Tensor) -> Tensor:
        """Returns the costs (K, K) for these logits."""
        classes = logits.shape[1]
        if isinstance(self.costs, str):
            ranks = torch.arange(classes, dtype=logits.dtype, device=logits.device)
            return (ranks.unsqueeze(1) - ranks).abs()
        if len(self.costs) != classes:
            raise ValueError(f"the costs are those of {len(self.costs)} classes, and the outputs have {classes}")
        return torch.tensor(self.costs, dtype=logits.dtype, device=logits.device)


@dataclass(frozen=True)
class Focal:
    """Class weights (1 - pi_c)^gamma, with the share pi_c of class c: less for frequent classes (Li et al., 2025).

    From Focal-SAM, https://arxiv.org/abs/2505.01660, whose formula has the shares of the training set; here they are
    those of the batch. They are not the weights (1 - p)^gamma of the focal loss, which depend on the prediction.

    Args:
        gamma: exponent, >= 0; with 0 all weights are 1.

    Raises:
        TypeError: `gamma` is not a number.
        ValueError: `gamma` is negative or not finite.
    """

    gamma: float

    def __post_init__(self) -> None:
        non_negative("gamma", self.gamma)


@dataclass(frozen=True)
class ClassWeighted(OfClasses, ObjectiveWrapper):
    """An objective of classes whose losses are multiplied by a weight of their label: the adversary of long tails.

    The loss is w_y Q; for class probabilities it is the expectation over the label. With "balanced" its mean over the
    batch is that over the classes of the batch of the mean over each, a lower bound of the balanced error up to the
    constant of `bound`. Otherwise it is one of w_y 1{wrong}, up to w_y times that constant. The mean is over the
    number of examples: unlike torch's, it is not divided by the sum of the weights.

    As `SAM(ascent=...)` it gives the perturbations of methods for long tails, with cross-entropy as in their papers or
    with a bound: ImbSAM (Zhou et al., 2023, https://arxiv.org/abs/2308.07815) climbs the tail classes, whose weights
    are 1 and the others' 0; Focal-SAM (Li et al., 2025, https://arxiv.org/abs/2505.01660) climbs the losses with the
    weights of `Focal`. The descent of both is another: they add the gradient of what is not climbed at the weights
    themselves, where `SAM` descends on the training loss at the displaced ones. `bisam.ImbSAM` and `bisam.FocalSAM` are
    the whole methods.

    Args:
        bound: the objective: a `LowerBound`, `OBF` or `cross_entropy`; its `ignore_index` is used.
        weights: one number >= 0 for each class; or "balanced", n/(C n_c) for a class with n_c of n examples of the
            batch, and C classes in it; or `Focal(gamma)`.

    Raises:
        TypeError: `bound` is no objective of classes, or a weight is not a number.
        ValueError: a weight is negative or not finite, or there is none.

    Raises when called:
        ValueError: the outputs have another number of classes than the weights; else as `bound`.

    Example:
        >>> import torch
        >>> from bisam import SAM, NegLog, cross_entropy
        >>> from bisam.objectives import ClassWeighted, Focal
        >>> logits, labels = torch.zeros(4, 2), torch.tensor([0, 0, 0, 1])
        >>> ClassWeighted(cross_entropy, "balanced")(logits, labels)    # each class counts the same
        tensor([0.4621, 0.4621, 0.4621, 1.3863])
        >>> tail = SAM(0.05, ascent=ClassWeighted(cross_entropy, [0, 1]))
        >>> focal = SAM(0.05, ascent=ClassWeighted(NegLog(), Focal(2.0)))
    """

    bound: OfClasses = field(default=NegLog())
    weights: Sequence[float] | Literal["balanced"] | Focal = "balanced"
    ignore_index: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        instance("bound", self.bound, "an objective of classes such as NegLog() or cross_entropy")
        if not isinstance(cast(Any, self.bound), OfClasses):
            raise TypeError(f"bound must be an objective of classes such as NegLog(), got {shown(self.bound)}")
        object.__setattr__(self, "ignore_index", self.bound.ignore_index)
        if isinstance(self.weights, Focal) or self.weights == "balanced":
            return
        if isinstance(cast(Any, self.weights), str | type):
            raise ValueError(f'weights must be numbers, "balanced" or Focal(gamma), got {shown(self.weights)}')
        object.__setattr__(self, "weights", numbers_of_classes("weights", "the weight of class", self.weights))

    def _labelled(self, logits: Tensor, labels: Tensor, ignore_index: int | None) -> Tensor:
        ignored, index, _ = of_labels(logits, labels, ignore_index)
        rows = index.squeeze(1)
        counted = torch.ones_like(rows, dtype=logits.dtype) if ignored is None else (~ignored).to(logits.dtype)
        counts = logits.new_zeros(logits.shape[1]).scatter_add(0, rows.flatten(), counted.flatten())
        return self._of(counts)[rows] * self.bound._labelled(logits, labels, ignore_index)

    def _expected(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        weights = self._of(probabilities.detach().to(logits.dtype).movedim(1, -1).flatten(0, -2).sum(0))
        return self.bound._expected(logits, probabilities * weights.view(-1, *[1] * (logits.dim() - 2)))

    def _of(self, counts: Tensor) -> Tensor:
        """Returns the weights (K,) of classes that occur so often in a batch."""
        if isinstance(self.weights, Focal):
            return (1 - counts / counts.sum().clamp_min(1)) ** self.weights.gamma
        if isinstance(self.weights, str):
            return (counts.sum() / (counts > 0).sum() / counts).masked_fill(counts == 0, 0.0)
        if len(self.weights) != len(counts):
            raise ValueError(f"there are weights for {len(self.weights)} classes, and the outputs have {len(counts)}")
        return torch.tensor(self.weights, dtype=counts.dtype, device=counts.device)
