"""Evaluation: the answer to a query on a batch, and the answer for a whole batch from those for its parts.

>>> whole = join([Evaluation(losses=torch.ones(n)) for n in (32, 32, 6)])
>>> whole.count
70
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from bisam import objectives, targets as check
from bisam.batches import children, mapped, tensors
from bisam.objectives import Count, Objective
from bisam.vector import Vector


@dataclass(frozen=True)
class Evaluation:
    """The answer to a query: losses and, if requested, their gradient.

    Attributes:
        losses: one per example (N,) or (N, d1, ...), or a scalar if the objective returns one; detached.
        grad: gradient of `value` with respect to the weights, or None if it was not requested.
        outputs: the outputs of the model, detached.
        value: the scalar that `grad` is the gradient of: the mean of the losses that count.
        count: number of losses that count. If the objective returns a scalar, that is assumed to be the mean over the
            batch, and `count` is the number of examples; for cross-entropy of torch without class weights it is the
            number of labels that are not ignored.
        targets: the targets that were passed to the objective.
        objective: the objective that was evaluated.
        decoupled: of the answer of a method, a further gradient that an optimizer applies outside of its update, with
            the learning rate alone: see `Decoupled`.
        versions: the result of `versions_of(outputs)` before the objective was evaluated; None if it is not known.

    Example:
        >>> import torch
        >>> from bisam import ModelOracle, cross_entropy
        >>> _ = torch.manual_seed(0)
        >>> oracle = ModelOracle(torch.nn.Linear(4, 3), cross_entropy)
        >>> answer = oracle.query((torch.randn(8, 4), torch.randint(3, (8,))))
        >>> answer.losses.shape, answer.outputs.shape, answer.count
        (torch.Size([8]), torch.Size([8, 3]), tensor(8.))
        >>> bool(answer.value == answer.losses.mean())
        True
        >>> answer.grad
        Vector(2 tensors, 15 entries)
    """

    losses: Tensor
    grad: Vector | None = None
    outputs: Any = None
    value: Tensor = None  # pyright: ignore[reportAssignmentType]
    count: Count = None  # pyright: ignore[reportAssignmentType]
    targets: Any = None
    objective: Objective | None = None
    decoupled: Vector | None = None
    versions: tuple[int, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.value is None:  # pyright: ignore[reportUnnecessaryComparison]
            object.__setattr__(self, "value", self.losses.mean())
        if self.count is None:  # pyright: ignore[reportUnnecessaryComparison]
            object.__setattr__(self, "count", self.losses.numel())

    @property
    def gradient(self) -> Vector:
        """`grad` of a query that requested it.

        Raises:
            AssertionError: the query was made with `grad=False`.
        """
        assert self.grad is not None, "the query was made with grad=False"
        return self.grad

    @property
    def per_example(self) -> Tensor:
        """The losses, one per example (N,): for several positions per example, the mean over those that count.

        An objective that returns a scalar may also have a method `per_example(outputs, targets) -> (N,)`. It is called
        with the stored outputs when a method needs these losses.

        Raises:
            TypeError: the objective returned a scalar and has no such method.
            ValueError: it has one, and a loss has changed the outputs in place.
        """
        if self.losses.dim() == 0:
            each = getattr(self.objective, "per_example", None)
            if not callable(each):
                raise TypeError(
                    "this method needs one loss per example, and the loss returned a scalar: pass your criterion with "
                    'reduction="none", for class labels also bisam.cross_entropy, or give it a method '
                    "per_example(outputs, targets)"
                )
            with torch.no_grad():
                return cast(Tensor, each(self._wide, self.targets))
        if self.losses.dim() == 1:
            return self.losses
        losses, counted = self.losses.flatten(1), objectives.which_count(self.losses, self.targets, self.objective)
        return losses.mean(1) if counted is None else losses.sum(1) / counted.flatten(1).sum(1).clamp_min(1)

    @property
    def correct(self) -> Tensor:
        """Whether the label has the largest logit, of the shape of the labels; False where a label is ignored.

        Raises:
            TypeError: the outputs are not logits in one tensor, or the targets are not class labels (int64).
            ValueError: their shapes do not match, or a loss has changed the outputs in place.
        """
        outputs, labels = self.outputs_of_model, self.targets
        if outputs is None:
            raise TypeError("the outputs of this query are not known here: another rank has answered it")
        check.types(outputs, labels)
        if labels.is_floating_point():
            raise TypeError(
                f"predictions are compared with class labels (int64), got targets of {labels.dtype}: mixed labels and "
                "targets for single logits have no prediction that is right or wrong"
            )
        if not check.fits(outputs, labels):
            raise check.mismatch(outputs, labels, check.IN_TORCH)
        right, ignored = (
            outputs.argmax(min(1, outputs.dim() - 1)) == labels,
            getattr(self.objective, "ignore_index", None),
        )
        return right if ignored is None else right & (labels != ignored)

    @torch.no_grad()
    def under(self, objective: Objective) -> Evaluation:
        """Evaluates another objective on the same outputs, without a forward pass and without a gradient.

        Raises:
            ValueError: the outputs are not those of the forward pass any more, because a loss has changed them in
                place.
        """
        if objective is self.objective:
            return replace(self, grad=None)
        losses = objective(self._wide, self.targets)
        if losses.dim():
            counted = objectives.count(losses, self.targets, objective)
        elif (counted := objectives.count_of_mean(self.targets, objective)) is None:
            counted = self.count
        value = objectives.mean(losses, counted)
        return Evaluation(losses, None, self.outputs, value, counted, self.targets, objective, versions=self.versions)

    @property
    def outputs_of_model(self) -> Any:
        """The outputs, as the model has returned them.

        Raises:
            ValueError: a loss has changed them in place.
        """
        if not self._is_as_returned:
            raise ValueError(
                "the outputs of the model were changed in place after the forward pass, by a loss or by other code, so "
                "that nothing else can be computed of them: let the loss work on a copy, outputs = outputs.clone()"
            )
        return self.outputs

    @property
    def _is_as_returned(self) -> bool:
        return self.versions in (None, versions_of(self.outputs))

    @property
    def _wide(self) -> Any:
        """The outputs, in float32 if in half precision: the autocast context of the forward pass may have ended."""
        return mapped(_widened, self.outputs_of_model)


def versions_of(outputs: Any) -> tuple[int, ...]:
    """Returns a number for each tensor of the outputs of a model that grows with each change in place."""
    return tuple([0 if t.is_inference() else t._version for t in tensors(outputs)])


def join(parts: Sequence[Evaluation]) -> Evaluation:
    """Joins evaluations of the parts of a batch, without gradients; each part is weighted by its `count`."""
    if len(parts) == 1:
        return replace(parts[0], grad=None)
    total: Count = sum(p.count for p in parts)
    value = torch.stack([p.value * p.count for p in parts]).sum() / divisor(total)
    losses = torch.cat([p.losses for p in parts]) if parts[0].losses.dim() else value
    outputs, targets = (_joined([getattr(p, name) for p in parts]) for name in ("outputs", "targets"))
    versions = None if all(p._is_as_returned for p in parts) else _CHANGED
    return Evaluation(losses, None, outputs, value, total, targets, parts[0].objective, versions=versions)


_CHANGED = (-1,)
"""Versions that no outputs have: of copies of outputs that were changed before."""


def _joined(parts: Sequence[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts)) if first.dim() else first
    if (inside := children(first)) is None:
        return first
    elements = zip(*[(children(part) or ([], None))[0] for part in parts], strict=True)
    return inside[1]([_joined(same) for same in elements])


def divisor(total: Count) -> Count:
    """Returns `total`, or 1 if it is 0."""
    return max(total, 1) if isinstance(total, int) else total.clamp_min(1)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
