"""Classes: bounds of other metrics of a prediction among K classes than its error."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from bisam.objectives.bounds import AroundClasses, LowerBound, NegLog
from bisam.objectives.objective import of_labels
from bisam.validation import whole


@dataclass(frozen=True)
class TopK(AroundClasses):
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
