"""Objectives: the losses that are minimised, and those that the adversary climbs.

An objective maps `(outputs, targets)` to one loss per example. The minimiser descends an *upper* bound of the 0-1 loss
(`cross_entropy`, or any loss of PyTorch with `reduction="none"`). The maximiser of BiSAM (Xie et al., ICML 2024,
https://arxiv.org/abs/2407.12993) climbs a differentiable *lower* bound up to log(K)/mu: with the margins
F_j = f_j - f_y against the label y,

    Q = (1/mu) log sum_j exp(mu phi(F_j)),    phi(x) <= 1 where x > 0, else phi(x) <= 0,

and Q - log(K)/mu <= 1{some wrong class scores higher than y} for K classes. The constant log(K)/mu has no gradient; the
losses below are Q, as in the paper.

    >>> import torch
    >>> logits, labels = torch.zeros(2, 3), torch.tensor([0, 2])
    >>> NegLog()(logits, labels).shape                             # (N, K), (N,) -> (N,)
    torch.Size([2])
    >>> maps = torch.zeros(2, 3, 4, 4), torch.full((2, 4, 4), -100)
    >>> Tanh(mu=10, alpha=0.1)(*maps).shape                        # (N, K, H, W), (N, H, W) -> (N, H, W), without -100
    torch.Size([2, 4, 4])
    >>> mixed = torch.full((2, 3), 1 / 3)
    >>> LowerBound(phi=torch.tanh, mu=5)(logits, mixed).shape      # (N, K), (N, K) class probabilities -> (N,)
    torch.Size([2])

Other adversaries climb one of these losses:

    >>> from bisam.schedules import Linear
    >>> sharper = NegLog(Linear(1.0, 10.0, steps=5_000))           # a bound that comes closer to the 0-1 loss
    >>> others = WrongClasses(NegLog(), margin=2.0)                # Q over the wrong classes alone, near the boundary
    >>> forgetting = OBF(gamma=0.0)                                # output bias forgetting

A metric that is wrong where a margin is positive has a bound of the same form: `LowerBound.of_margins` is Q of any
margins. Objectives around a bound make it one of another metric, and contain each other:

    >>> top5 = TopK(5, NegLog())                                   # the k-th margin
    >>> grades = CostSensitive("ordinal")                          # one decision for each level of the cost
    >>> tails = ClassWeighted(NegLog(), "balanced")                # weights of the classes
    >>> exact = ExactMatch(Binary())                               # the largest error of the positions of an example
    >>> masks = IoU(Binary())                                      # the Lovász extension of the Jaccard loss
    >>> order, matches, close = Pairwise(), Retrieval(), Tolerance(0.1)

An objective may have an attribute `ignore_index`. Training then averages over the other targets, as the cross-entropy
of torch does, if it returns one loss for each of them. It may have a method `at_step(step)` that returns the objective
of a training step; an oracle calls it.
"""

from bisam.objectives.bounds import (
    GAMMA as GAMMA,
    Binary as Binary,
    Bound as Bound,
    LowerBound as LowerBound,
    NegLog as NegLog,
    ObjectiveWrapper as ObjectiveWrapper,
    Tanh as Tanh,
    WrongClasses as WrongClasses,
    innermost as innermost,
    neg_log,
    tanh,
)
from bisam.objectives.classes import (
    ClassWeighted as ClassWeighted,
    CostSensitive as CostSensitive,
    Focal as Focal,
    TopK as TopK,
)
from bisam.objectives.forgetting import OBF as OBF
from bisam.objectives.objective import (
    Count as Count,
    CrossEntropy as CrossEntropy,
    Objective as Objective,
    OfClasses as OfClasses,
    at_step as at_step,
    count as count,
    count_of_mean as count_of_mean,
    cross_entropy as cross_entropy,
    mean as mean,
    which_count as which_count,
)
from bisam.objectives.positions import ExactMatch as ExactMatch, IoU as IoU, PerExample as PerExample
from bisam.objectives.scores import Pairwise as Pairwise, Retrieval as Retrieval, Tolerance as Tolerance

_neg_log, _tanh = neg_log, tanh  # of pickles of earlier versions
