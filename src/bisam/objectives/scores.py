"""Scores: bounds for outputs that are no classes and no labels: ranks, matches and real numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bisam import targets as check
from bisam.objectives.bounds import LowerBound, NegLog, ObjectiveWrapper
from bisam.objectives.objective import Objective, wide
from bisam.validation import instance, positive


@dataclass(frozen=True)
class Tolerance(ObjectiveWrapper):
    """A bound of the error of a regression with tolerance, 1 where the output is off by more than epsilon.

    A prediction can be too high or too low: with the residual r = output - target these are two alternatives with the
    margins r/epsilon - 1 and -r/epsilon - 1, in units of the tolerance, and Q of `bound` is a lower bound of
    1{|r| > epsilon} up to log(3)/mu, and up to log(2)/mu around `WrongClasses` (the idea of Xie et al., 2024,
    https://arxiv.org/abs/2407.12993, for this metric). Counterparts in the descent are the square error divided by
    epsilon^2 and the absolute error divided by epsilon.

    Args:
        epsilon: the tolerance, > 0, in units of the targets.
        bound: the bound, whose phi and mu are used. No target is ignored.

    Raises:
        TypeError: `epsilon` is not a number, or `bound` is not a `LowerBound`.
        ValueError: `epsilon` is not positive and finite.

    Example:
        >>> import torch
        >>> from bisam import BiSAM, SharpnessAware, Tanh, WrongClasses
        >>> from bisam.objectives import Tolerance
        >>> within = Tolerance(0.5, WrongClasses(Tanh(mu=20.0, alpha=2.0)))
        >>> within(torch.tensor([1.1, 3.0]), torch.tensor([1.0, 1.0]))
        tensor([-0.9090,  1.0000])
        >>> sharp = SharpnessAware(torch.nn.Linear(4, 1), BiSAM(0.05, Tolerance(0.5)), torch.nn.MSELoss())
        >>> sharp(torch.randn(8, 4), torch.randn(8, 1)).backward()
    """

    epsilon: float
    bound: LowerBound = field(default=NegLog())

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("epsilon", self.epsilon)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns Q per number, of the shape of `outputs` and in float32 or a wider type.

        Args:
            outputs: floating-point numbers (N,), (N, 1) or (N, d1, ...).
            targets: numbers of the same shape, of any real type.

        Raises:
            TypeError: `outputs` or `targets` have the wrong type.
            ValueError: their shapes differ.
        """
        check.types(outputs, targets)
        check.same_shape(outputs, targets, "Tolerance")
        residual = (wide(outputs) - wide(targets)) / self.epsilon
        return self.bound.of_margins(torch.stack([residual - 1, -residual - 1], 1))


@dataclass(frozen=True)
class Pairwise(ObjectiveWrapper):
    """A bound of the ranking error of a list: the share of its pairs that are in the wrong order.

    A pair in which item i is more relevant than item j is in the wrong order if s_j - s_i > 0 for their scores s, and
    Q of `bound` with this margin is a lower bound of that up to log(2)/mu; around `WrongClasses` it is phi(s_j - s_i),
    and one itself (the idea of Xie et al., 2024, https://arxiv.org/abs/2407.12993, for this metric). The loss of a list
    is the mean over its pairs of different relevance. For relevance 0 or 1 the ranking error is 1 - AUC. The
    counterpart in the descent is the logistic loss of the differences (RankNet) divided by log 2. The memory is that of
    L^2 numbers for a list of L.

    A batch in which each pair is one example needs `Binary()` alone, on the difference of the two scores.

    Args:
        bound: the bound, whose phi and mu are used.

    Raises:
        TypeError: `bound` is not a `LowerBound`.

    Example:
        >>> import torch
        >>> from bisam import Tanh, WrongClasses
        >>> from bisam.objectives import Pairwise
        >>> scores, relevance = torch.tensor([[9.0, 5.0, 0.0]]), torch.tensor([[2, 0, 1]])    # one of 3 pairs is wrong
        >>> Pairwise(WrongClasses(Tanh(alpha=1.0)))(scores, relevance)
        tensor([-0.3331])
    """

    bound: LowerBound = field(default=NegLog())

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the bound per list, in float32 or a wider type; zero for a list without a pair.

        Args:
            outputs: scores (N, L) of the items of N lists, or (L,) of one list.
            targets: relevance of the items, of the same shape and any real type.

        Raises:
            TypeError: `outputs` or `targets` have the wrong type.
            ValueError: their shapes differ, or have more than two dimensions.
        """
        check.types(outputs, targets)
        check.same_shape(outputs, targets, "Pairwise")
        if outputs.dim() > 2:
            raise ValueError(f"Pairwise needs scores (N, L) or (L,), got {tuple(outputs.shape)}")
        s, r = wide(outputs), targets
        pairs = r.unsqueeze(-1) > r.unsqueeze(-2)
        q = self.bound.of_margins((s.unsqueeze(-2) - s.unsqueeze(-1)).flatten().unsqueeze(1)).view(pairs.shape)
        return (q * pairs).sum((-2, -1)) / pairs.sum((-2, -1)).clamp_min(1)


@dataclass(frozen=True)
class Retrieval(ObjectiveWrapper):
    """An objective of the matches in a batch of pairs, in both directions: contrastive losses, as that of CLIP.

    With the similarities S (N, N) of N queries and N items, which query i matches item y_i, a direction is a
    classification among N: of the rows of S for the labels y, and of its columns for the inverse. The loss of a pair is
    the mean of `bound` in both directions. Around `cross_entropy` it is the loss of CLIP (Radford et al., 2021,
    https://arxiv.org/abs/2103.00020); around `NegLog()` a lower bound, up to log(N)/mu, of the retrieval error in the
    batch: the share of queries and items that are closer to another than to their match. Around `TopK(k)` it is that
    of recall at k. `cross_entropy` divided by log 2 is an upper bound. For one direction take `bound` itself.

    Args:
        bound: an objective of classes that returns one loss per example.

    Raises:
        TypeError: `bound` is not callable.

    Example:
        >>> import torch
        >>> from bisam import BiSAM, SharpnessAware, cross_entropy
        >>> from bisam.objectives import Retrieval
        >>> def similarities(model, images, texts):
        ...     a, b = [torch.nn.functional.normalize(model(x), dim=1) for x in (images, texts)]
        ...     return a @ b.T / 0.07, torch.arange(len(a))
        >>> model = torch.nn.Linear(4, 3)
        >>> sharp = SharpnessAware(model, BiSAM(0.05, Retrieval()), Retrieval(cross_entropy), similarities)
        >>> sharp(torch.randn(8, 4), torch.randn(8, 4)).backward()
    """

    bound: Objective = field(default=NegLog())

    def __post_init__(self) -> None:
        instance("bound", self.bound, "an objective of classes such as NegLog() or cross_entropy")

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the loss of each pair (N,).

        Args:
            outputs: similarities (N, N), those of a query in a row.
            targets: int64 numbers (N,) of the items that match the queries, each once: usually `torch.arange(N)`.

        Raises:
            TypeError: `outputs` or `targets` have the wrong type.
            ValueError: the outputs are no square, or the targets no permutation (values are checked on the CPU; on a
                GPU a device-side assert fails).
        """
        check.types(outputs, targets)
        check.matches(outputs, targets)
        s = wide(outputs)
        queries, items = self.bound(s, targets), self.bound(s.T, targets.argsort())
        return (queries + items[targets]) / 2
