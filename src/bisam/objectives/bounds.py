"""Bounds: lower bounds of the 0-1 loss, of classes and of labels that are independent of each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bisam import schedules, targets as check
from bisam.objectives.objective import OfClasses, at_step, of_classes, of_labels, wide
from bisam.schedules import Schedule
from bisam.validation import instance, positive

GAMMA = math.log(math.e - 1)
"""The offset that makes the -log bound pass through the origin (Xie et al., 2024, eq. 15)."""

_BLOCK = 2**24  # largest number of entries of a block of labels, or of rows: 64 MiB in float32
_BLOCK_ON_CPU = 2**18  # that of rows on a CPU: 1 MiB, which its cache holds, so that the terms of a block do
_sigmoid_backward = torch.ops.aten.sigmoid_backward.default  # grad s (1 - s) in one operation
_sigmoid_backward_out = torch.ops.aten.sigmoid_backward.grad_input
_FAST_MU = 64.0  # exp(-mu) is still a normal float32, so that the sums below can neither overflow nor vanish
_A_BOUND = "a LowerBound such as NegLog() or Tanh()"


@dataclass(frozen=True)
class LowerBound(OfClasses):
    """The objective Q of BiSAM for any `phi` below the 0-1 step (Xie et al., 2024, Lemma 3.1); it uses autograd.

    Source: https://arxiv.org/abs/2407.12993. Q = (1/mu) log sum_j exp(mu phi(f_j - f_y)) over all classes j, for logits
    f and the label y. Q is a lower bound of the 0-1 loss up to a constant: Q - log(K)/mu is one for K classes, Q alone
    is not. The label's own class is in the sum, so the gradient of Q vanishes on confident correct examples, as that of
    cross-entropy does: with 10 classes, where the logit of the label exceeds the others by 2, 5, 10 and 20, |dQ/df_y|
    is 0.59, 0.087, 6.5e-4 and 2.9e-8 for `NegLog()`, 0.053, 6.4e-3, 1.9e-4 and 4.1e-6 for `Tanh()`, and 0.55, 0.057,
    4.1e-4 and 1.9e-8 for cross-entropy (`bisam run label-gradient`).

    The authors' code computes mu Q. A factor changes nothing where the displacement is normalised, as in SAM. Logged
    values of Q differ by it, and so do the displacements of `LESAM` and `BSAM`, which are not normalised.

    Args:
        phi: elementwise lower bound of the step function, differentiable: tensor -> tensor of the same shape. The
            gradient of confident correct examples is as accurate as the derivative of `phi` for x << 0. In float32 that
            of `torch.tanh` is 0 from x = -10 on; 2 sigmoid(2 x) - 1, the same function, has an accurate one.
        mu: sharpness of the soft maximum over the classes, > 0, a number or a schedule (`bisam.schedules`). A larger
            value is closer to the maximum: the gap is log(K)/mu. With a schedule the bound is for the queries of a
            method (`ascent`, `descent`), which have a step; it cannot be called itself, see `at_step`.
        ignore_index: label of examples that are ignored.

    Raises:
        TypeError: `phi` is no function, `mu` is neither a number nor a schedule, or `ignore_index` is no int.
        ValueError: `mu`, or the first value of the schedule, is not positive and finite.
    """

    phi: Callable[[Tensor], Tensor]
    mu: float | Schedule
    ignore_index: int = field(default=-100, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        instance("phi", self.phi, "a function from a tensor to one of the same shape")
        if not callable(self.mu):
            return positive("mu", self.mu)
        schedules.check("mu", self.mu)
        if not isinstance(first := self.mu(0), Tensor):  # reading a tensor may synchronise with its device
            positive("mu at step 0", first)
        return None

    def at_step(self, step: int) -> LowerBound:
        """Returns the bound at a training step, with mu as a number. If mu is a number already, returns itself.

        Args:
            step: number of earlier steps, `oracle.step`.

        Raises:
            ValueError: the value of the schedule is not positive and finite.
        """
        if not callable(self.mu):
            return self
        positive(f"mu at step {step}", mu := float(self.mu(step)))  # of a tensor: waits for its device
        return replace(self, mu=mu)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns Q per example, in float32 or a wider type; zero where a label is `ignore_index`.

        Args:
            outputs: logits (N, K), (N, K, d1, ...) or (K,), K >= 2. They are not modified.
            targets: int64 labels (N,), (N, d1, ...) or (); or class probabilities of the shape of `outputs` (mixup,
                cutmix, smoothing), for which Q is the expectation over the label, at K times the cost. Probabilities
                are non-negative and sum to 1 over the classes, up to 0.01 (0.03 in bfloat16).

        Raises:
            TypeError: `outputs` or `targets` have the wrong type.
            ValueError: their shapes do not match, K < 2, a label is outside [0, K), or floating-point targets are not
                class probabilities (values are checked on the CPU; on a GPU a device-side assert fails, as in torch).
        """
        return of_classes(self, outputs, targets, check.Elsewhere(f"bisam.Binary({self._name}(...))"))

    def of_margins(self, margins: Tensor) -> Tensor:
        """Returns Q of decisions whose alternatives have these margins: for metrics that compare no classes.

        A decision is wrong if one of its J alternatives leads, max_j F_j > 0. The right answer is an alternative of
        margin 0, as the label's own class is, so that Q - log(J + 1)/mu <= 1{wrong}; in `WrongClasses` it is left out.

        Args:
            margins: the leads F (N, J, d1, ...) of the alternatives over the right answer. They are not modified.

        Returns:
            Q (N, d1, ...) in float32 or a wider type. No decision is ignored.

        Example:
            >>> import torch
            >>> from bisam import NegLog
            >>> scores = torch.tensor([[0.3, 2.0], [1.0, -1.0]])    # of an item that should lead, and of another
            >>> NegLog().of_margins(scores[:, 1:] - scores[:, :1])
            tensor([1.1213, 0.1810])
        """
        logits = torch.cat([torch.zeros_like(margins[:, :1]), margins], 1)
        right = torch.zeros_like(logits[:, 0], dtype=torch.int64)
        return self._labelled(wide(logits), right, None)

    def soft_maximum(self, values: Tensor) -> Tensor:
        """Returns (1/mu) log sum_j exp(mu v_j) of values (N, J, ...) over J: at most log(J)/mu above the maximum."""
        mu = self._mu
        return torch.logsumexp(mu * values, 1) / mu

    @property
    def _name(self) -> str:
        """The name of the bound that `Binary` takes in place of this one, for messages."""
        return type(self).__name__

    @property
    def _mu(self) -> float:
        """Mu as a number.

        Raises:
            TypeError: it is a schedule.
        """
        if callable(self.mu):
            raise TypeError(
                f"mu of {self!r} is a schedule, which has a value only in a training step: pass the bound as `ascent` "
                "or `descent` of a method, or call bound.at_step(step)(outputs, targets)"
            )
        return self.mu

    def _labelled(self, logits: Tensor, labels: Tensor, ignore_index: int | None) -> Tensor:
        """Returns Q for labels; zero where a label is `ignore_index`. None: all labels count."""
        ignored, index, reference = of_labels(logits, labels, ignore_index)
        margins = logits - reference
        # The label's own margin is constant. As a constant it leaves the gradient at the label, which is minus the sum
        # over the other classes, free of its own much larger term, which would cancel.
        margins = margins.scatter(1, index, margins.detach().gather(1, index))
        values = self.soft_maximum(self.phi(margins))
        return values if ignored is None else values.masked_fill(ignored, 0.0)

    def _expected(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        classes = logits.shape[1]
        width = max(1, _BLOCK // max(1, logits.numel()))
        if width >= classes:
            return self._against(logits, probabilities, 0)
        # Blocks of labels, recomputed in the backward pass: N K K entries at once would not fit for many classes.
        blocks = [
            checkpoint(self._against, logits, part, start, use_reentrant=False)
            for start, part in zip(range(0, classes, width), probabilities.split(width, 1), strict=True)
        ]
        return torch.stack(blocks).sum(0)

    def _against(self, logits: Tensor, probabilities: Tensor, start: int) -> Tensor:
        """Sum over the labels from `start` of probability times Q: a hard-label problem with one more dimension."""
        n, classes, *rest = logits.shape
        width = probabilities.shape[1]
        labels = torch.arange(start, start + width, device=logits.device).view(1, width, *[1] * len(rest))
        q = self._labelled(
            logits.unsqueeze(2).expand(n, classes, width, *rest), labels.expand(n, width, *rest).contiguous(), None
        )
        return (probabilities * q).sum(1)


def neg_log(x: Tensor) -> Tensor:
    """Returns phi of `NegLog`."""
    return 1 + F.logsigmoid(x - GAMMA)


def tanh(alpha: float, x: Tensor) -> Tensor:
    """Returns phi of `Tanh`."""
    return 2 * torch.sigmoid(2 * alpha * x) - 1  # not tanh, whose derivative 1 - tanh^2 cancels for x << 0


@dataclass(frozen=True)
class NegLog(LowerBound):
    """BiSAM (-log): Q with phi(x) = 1 - log(1 + exp(gamma - x)), gamma = log(e - 1) (Xie et al., 2024, eq. 15).

    Source: https://arxiv.org/abs/2407.12993, which recommends it. Value and gradient are in closed form:
    phi(x) = 1 + log sigmoid(x - gamma), so for mu = 1 Q = 1 + log sum_j sigmoid(f_j - f_y - gamma), which is
    cross-entropy with a sigmoid in place of the exponential. On confident correct examples its gradient is then
    e/(e - 1) = 1.58 times that of cross-entropy. On examples that are confidently misclassified, where the gradient of
    cross-entropy is largest, it vanishes.

    Args:
        mu: sharpness of the soft maximum, > 0 (the paper: 1), a number or a schedule; see `LowerBound`.
        ignore_index: label of examples that are ignored.

    Raises:
        TypeError: `mu` is neither a number nor a schedule, or `ignore_index` is no int.
        ValueError: `mu` is not positive and finite.

    Example:
        >>> import torch
        >>> from bisam import NegLog
        >>> logits = torch.tensor([[2.0, 0.0], [-2.0, 0.0]])
        >>> NegLog()(logits, torch.tensor([0, 0]))    # the second example is misclassified
        tensor([0.1810, 1.1648])
    """

    _widens: ClassVar[bool] = True
    phi: Callable[[Tensor], Tensor] = field(init=False, repr=False, compare=False)
    mu: float | Schedule = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "phi", neg_log)
        super().__post_init__()

    def _labelled(self, logits: Tensor, labels: Tensor, ignore_index: int | None) -> Tensor:
        if self._mu > _FAST_MU:
            return super()._labelled(wide(logits), labels, ignore_index)
        return cast(Tensor, _ClosedForm.apply(logits, labels, self, ignore_index))

    def _terms(self, margins: Tensor) -> tuple[Tensor, Tensor]:
        """Returns s = sigmoid(F - gamma) and u = exp(mu (phi - 1)) = s^mu."""
        s = margins.sub_(GAMMA).sigmoid_()
        return s, s if self.mu == 1 else s.pow(self._mu)

    def _rows(self, weight: Tensor, s: Tensor, u: Tensor) -> Tensor:
        """Phi' = 1 - s. Not weight s^(mu-1) s (1 - s), which is infinity times zero where s underflows and mu < 1.

        1 - s is exact up to eps. Where a wrong class leads by more than -log(eps), so that the gradient vanishes, it is
        0.
        """
        if self.mu == 1:
            return _sigmoid_backward(weight, s)
        return (1.0 - s).mul_(u).mul_(weight)


@dataclass(frozen=True)
class Tanh(LowerBound):
    """BiSAM (tanh): Q with phi(x) = tanh(alpha x) (Xie et al., 2024, eq. 14), value and gradient in closed form.

    Source: https://arxiv.org/abs/2407.12993. The defaults are those of the paper; the authors' training script
    overrides its own mu = 10 with 1.

    Args:
        mu: sharpness of the soft maximum, > 0 (the paper: 10), a number or a schedule; see `LowerBound`.
        alpha: slope of phi at 0, > 0 (the paper: 0.1).
        ignore_index: label of examples that are ignored.

    Raises:
        TypeError: `mu` is neither a number nor a schedule, `alpha` is not a number, or `ignore_index` is no int.
        ValueError: `mu` or `alpha` is not positive and finite.

    Example:
        >>> import torch
        >>> from bisam import Tanh
        >>> logits = torch.tensor([[2.0, 0.0], [-2.0, 0.0]])
        >>> Tanh()(logits, torch.tensor([0, 0]))    # the second example is misclassified
        tensor([0.0130, 0.2104])
    """

    _widens: ClassVar[bool] = True
    phi: Callable[[Tensor], Tensor] = field(init=False, repr=False, compare=False)
    mu: float | Schedule = 10.0
    alpha: float = 0.1

    def __post_init__(self) -> None:
        positive("alpha", self.alpha)
        object.__setattr__(self, "phi", partial(tanh, self.alpha))
        super().__post_init__()

    def _labelled(self, logits: Tensor, labels: Tensor, ignore_index: int | None) -> Tensor:
        if self._mu > _FAST_MU:
            return super()._labelled(wide(logits), labels, ignore_index)
        return cast(Tensor, _ClosedForm.apply(logits, labels, self, ignore_index))

    def _terms(self, margins: Tensor) -> tuple[Tensor, Tensor]:
        """Returns s = sigmoid(2 alpha F), where tanh(alpha F) = 2s - 1, and u = exp(mu (phi - 1)) = exp(2 mu (s - 1)).

        u is computed as 2^(c s - c). On a CPU sigmoid is several times cheaper than tanh, and a power of two than one
        of e.
        """
        s, c = margins.mul_(2 * self.alpha).sigmoid_(), 2 * self._mu / math.log(2)
        return s, torch.rsub(s, -c, alpha=-c).exp2_()

    def _rows(self, weight: Tensor, s: Tensor, u: Tensor) -> Tensor:
        """Phi' = 4 alpha s (1 - s)."""
        slope = u * (weight * (4 * self.alpha))
        return _sigmoid_backward_out(slope, s, grad_input=slope)  # in place: memory is the cost


class ObjectiveWrapper:
    """Base class of objectives around a bound.

    Attributes:
        bound: the bound.
    """

    bound: Any

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the losses, see `Objective`."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        instance("bound", self.bound, _A_BOUND)
        if not isinstance(self.bound, LowerBound):
            raise TypeError(f"bound must be {_A_BOUND}, got {self.bound!r}")

    def at_step(self, step: int) -> Any:
        """Returns the objective of a training step, see `LowerBound.at_step`."""
        bound = at_step(self.bound, step)
        return self if bound is self.bound else replace(cast(Any, self), bound=bound)


@dataclass(frozen=True)
class BoundWrapper(ObjectiveWrapper, LowerBound):
    """Base class of bounds of classes around another one, whose phi, mu and `ignore_index` they have."""

    phi: Callable[[Tensor], Tensor] = field(init=False, repr=False, compare=False)
    mu: float | Schedule = field(init=False, repr=False, compare=False)
    ignore_index: int = field(init=False, repr=False, compare=False)
    __call__ = LowerBound.__call__  # pyright: ignore[reportAssignmentType] - both bases have one

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("phi", "mu", "ignore_index"):
            object.__setattr__(self, name, getattr(self.bound, name))

    @property
    def _name(self) -> str:
        return cast(LowerBound, self.bound)._name


@dataclass(frozen=True)
class WrongClasses(BoundWrapper):
    """A bound whose sum is over the wrong classes alone: Q without the label's own class.

    Q = (1/mu) log sum over j != y of exp(mu phi(F_j)), with derivatives u_j phi'(F_j) / sum u for a wrong class j,
    u_j = exp(mu phi(F_j)), and minus their sum for the label y. Q - log(K - 1)/mu is a lower bound of the 0-1 loss for
    K classes; for two classes Q is phi(F), and a lower bound itself.

    In the paper (Xie et al., 2024, https://arxiv.org/abs/2407.12993) and in the authors' code the label's own class is
    in the sum. Its term is constant and outweighs all others on confident correct examples, so that their gradient
    vanishes: no adversary climbs them. Without it the gradient of `NegLog` at the label tends to -1 there, whatever the
    margin. With `margin` the loss of an example is multiplied by a weight

        exp(-max(m, 0) / margin),    m = f_y - (largest logit of the wrong classes),

    which is 1 for wrong examples and falls for correct ones with their distance from the decision boundary: the
    adversary climbs those that it can flip. In the gradient the weight is a constant; it times (Q - log(K - 1)/mu) is a
    lower bound too, because it is in [0, 1]. This class is this library's and not the paper's.

    Args:
        bound: the bound, whose phi, mu and `ignore_index` are used.
        margin: margin of a correct example, in logits, at which its weight is 1/e, > 0. Default: no weights.

    Raises:
        TypeError: `bound` is not a `LowerBound`, or is a `WrongClasses` already, or `margin` is not a number.
        ValueError: `margin` is not positive and finite.

    Example:
        >>> import torch
        >>> from bisam import NegLog, WrongClasses
        >>> logits = torch.tensor([[5.0, 0.0, 0.0]], requires_grad=True)    # a confident example
        >>> for bound in (NegLog(), WrongClasses(NegLog())):
        ...     (gradient,) = torch.autograd.grad(bound(logits, torch.tensor([0])).sum(), logits)
        ...     print(f"{gradient[0, 0].item():.3f}")
        -0.021
        -0.996
    """

    bound: LowerBound = field(default=NegLog())
    margin: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.bound, BoundWrapper):
            raise TypeError(
                f"bound must be {_A_BOUND}, got {self.bound!r}: WrongClasses goes inside of others, as in "
                "TopK(5, WrongClasses())"
            )
        if self.margin is not None:
            positive("margin", self.margin)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _labelled(self, logits: Tensor, labels: Tensor, ignore_index: int | None) -> Tensor:
        ignored, index, reference = of_labels(logits, labels, ignore_index)
        margins = logits - reference
        values = self.soft_maximum(self.phi(margins).scatter(1, index, -math.inf))
        if self.margin is not None:
            ahead = margins.detach().scatter(1, index, -math.inf).amax(1)  # -m
            values = values * torch.exp(ahead.clamp_max(0) / self.margin)
        return values if ignored is None else values.masked_fill(ignored, 0.0)


@dataclass(frozen=True)
class Binary(ObjectiveWrapper):
    """A bound for tasks with one logit per label: a binary head, several labels per example, or masks.

    A logit z is the two-class problem with logits (0, z), so the 0-1 loss is 1 where the sign of z is wrong, and the
    bound is Q of `bound` with K = 2 (the idea of Xie et al., 2024, for labels that are independent of each other;
    https://arxiv.org/abs/2407.12993). It is the adversary's counterpart of `torch.nn.BCEWithLogitsLoss` and takes the
    same arguments. No label is ignored.

    Args:
        bound: the bound of each label; its `ignore_index` is not used.

    Raises:
        TypeError: `bound` is not a `LowerBound`.

    Example:
        >>> import torch
        >>> from bisam import BiSAM, Binary, SharpnessAware, Tanh
        >>> Binary()(torch.tensor([2.0, -2.0]), torch.tensor([1.0, 1.0]))    # the second label is predicted wrongly
        tensor([0.1810, 1.1648])
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(4, 3)
        >>> sharp = SharpnessAware(model, BiSAM(0.05, Binary(Tanh())), torch.nn.BCEWithLogitsLoss())
        >>> x, labels = torch.randn(8, 4), torch.randint(2, (8, 3)).float()    # any number of 3 labels per example
        >>> sharp(x, labels).backward()
    """

    bound: LowerBound = field(default=NegLog())

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns Q per label, of the shape of `outputs` and in float32 or a wider type.

        Args:
            outputs: logits (N,), (N, 1), (N, L) or (N, L, d1, ...) for L labels. They are not modified.
            targets: 0 or 1 for each logit, of any integer, boolean or floating-point type; or, in a floating-point
                type, probabilities of label 1 (mixup, smoothing), for which Q is the expectation over the label.

        Raises:
            TypeError: `outputs` or `targets` have the wrong type.
            ValueError: their shapes differ, or a target is outside [0, 1] (values are checked on the CPU; on a GPU a
                device-side assert fails).
        """
        check.types(outputs, targets)
        bound = f"{type(self.bound).__name__}(...)"
        if targets.shape != outputs.shape:
            raise check.binary_mismatch(outputs, targets, bound)
        labels = targets if targets.is_floating_point() else targets.long()
        check.binary(labels, bound)
        z, p = wide(outputs), wide(labels)
        logits = torch.stack([torch.zeros_like(z), z], 1)
        if labels.is_floating_point():
            return self.bound._expected(logits, torch.stack([1 - p, p], 1))
        return self.bound._labelled(logits, labels, None)


def innermost(objective: Any) -> Any:
    """Returns what is inside of objectives around others, down to `Binary`, whose targets are those of labels."""
    while isinstance(objective, ObjectiveWrapper) and not isinstance(objective, Binary):
        objective = objective.bound
    return objective


Bound = LowerBound | ObjectiveWrapper
"""A bound of the 0-1 loss or of another metric, such as `NegLog()` and `Binary()`."""


class _ClosedForm(torch.autograd.Function):
    """Q = 1 + log(sum u)/mu with u = exp(mu (phi - 1)); dQ/df_j = u_j phi'_j / sum u, and minus their sum at the label.

    For a small batch the number of operations determines the cost, not their size: hence `rsub` for 1 + x/mu. A large
    one is taken in blocks of rows, whose terms the backward pass computes again: the gradient is then the only tensor
    of the size of the logits, which are converted to float32 block by block.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, bound: NegLog | Tanh, ignore_index: int | None) -> Tensor:
        ctx.bound, ctx.ignore_index = bound, ignore_index
        # A compiler fuses the terms, and views of a DTensor cannot be written to.
        whole = torch.compiler.is_compiling() or hasattr(logits, "device_mesh")
        ctx.in_blocks = not whole and logits.numel() > _BLOCK
        if ctx.in_blocks:
            total = torch.empty(labels.shape, dtype=wide(logits[:0]).dtype, device=logits.device)
            values = torch.empty_like(total)
            for rows, block in _blocks(logits):
                values[rows], total[rows], *_ = _values(bound, logits[block], labels[rows], ignore_index)
            ctx.save_for_backward(logits, labels, total)
            return values
        values, total, *terms = _values(bound, logits, labels, ignore_index)
        ctx.save_for_backward(logits, labels, total, *terms)
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,), bound = grads, ctx.bound
        logits, labels, total, *terms = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the terms have no graph, so start from the logits
            values = LowerBound._labelled(bound, wide(logits), labels, ctx.ignore_index)
            return torch.autograd.grad(values, logits, grad, create_graph=True)[0], None, None, None
        if not ctx.in_blocks:
            return _rows(bound, grad, total, *terms).to(logits.dtype), None, None, None
        result = torch.empty_like(logits)
        for rows, block in _blocks(logits):
            _, _, index, ignored, s, u = _values(bound, logits[block], labels[rows], ctx.ignore_index)
            result[block] = _rows(bound, grad[rows], total[rows], index, ignored, s, u)
        return result, None, None, None


def _values(
    bound: NegLog | Tanh, logits: Tensor, labels: Tensor, ignore_index: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Returns Q, the sum of u over the classes, and the terms of the gradient: index, ignored, s and u."""
    ignored, index, reference = of_labels(logits, labels, ignore_index)
    # Subtract first: the offset of a bound would be rounded away next to large logits.
    s, u = bound._terms(torch.sub(logits, wide(reference)))
    total = u.sum(1)
    values = torch.rsub(total.log(), 1.0, alpha=-1 / bound._mu)
    return values if ignored is None else values.masked_fill_(ignored, 0.0), total, index, ignored, s, u


def _rows(
    bound: NegLog | Tanh, grad: Tensor, total: Tensor, index: Tensor, ignored: Tensor | None, s: Tensor, u: Tensor
) -> Tensor:
    """Returns the gradient of the logits, for that of Q."""
    if ignored is not None:
        grad = grad.masked_fill(ignored, 0.0)
    weight = grad / total
    # The sum is that over the other classes: the label's own term would cancel in it, and where the margin is large
    # it is so much larger than the others that they would be rounded away.
    rows = bound._rows(weight.unsqueeze(1), s, u).scatter_(1, index, 0.0)
    return rows.scatter_(1, index, rows.sum(1, keepdim=True).neg_())


def _blocks(logits: Tensor) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Yields blocks of logits (N, K, d1, ...), as their places in the labels and in the logits.

    A block has at most `_BLOCK` entries, `_BLOCK_ON_CPU` on a CPU, or one row. The rows, which are along dimension 1,
    are not divided.
    """
    shape, most = logits.shape, min(_BLOCK, _BLOCK_ON_CPU) if logits.is_cpu else _BLOCK
    sizes, entries = (shape[0], *shape[2:]), shape.numel()
    ranges: list[list[slice]] = []
    for size in sizes:
        entries //= size  # of one place along this dimension
        step = min(size, max(1, most // entries))
        ranges.append([slice(start, start + step) for start in range(0, size, step)])
    for rows in product(*ranges):
        yield rows, (rows[0], slice(None), *rows[1:])
