"""Evaluation: the answer to a query on a batch, and how batches split and answers join.

parts = split((x, y), 32)                         # tuples, lists, dicts and tensors, 32 examples each
whole = join([oracle.query(part) for part in parts])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from bisam import objectives
from bisam.objectives import Count, Objective
from bisam.vector import Vector

Batch = tuple[Any, ...]
"""What the user passed to the loss, usually `(inputs, targets)`; any nest of tuples, lists, dicts and tensors."""


@dataclass(frozen=True)
class Evaluation:
    """The answer to a query.

    Attributes:
        losses: one per example (N,) or (N, d1, ...), or a scalar where the objective gives one; detached.
        grad: gradient of `value` with respect to the weights, or None where none was asked for.
        outputs: what the model returned, detached.
        value: the scalar that `grad` belongs to: the mean of the losses that count.
        count: how many count; where the objective gives a scalar, that is taken to be the mean over the batch.
    """

    losses: Tensor
    grad: Vector | None = None
    outputs: Any = None
    value: Tensor = None  # pyright: ignore[reportAssignmentType]
    count: Count = None  # pyright: ignore[reportAssignmentType]

    def __post_init__(self) -> None:
        if self.value is None:  # pyright: ignore[reportUnnecessaryComparison]
            object.__setattr__(self, "value", self.losses.mean())
        if self.count is None:  # pyright: ignore[reportUnnecessaryComparison]
            object.__setattr__(self, "count", self.losses.numel())

    @property
    def gradient(self) -> Vector:
        """`grad`, for a query that asked for it."""
        assert self.grad is not None, "the query was made with grad=False"
        return self.grad

    @property
    def per_example(self) -> Tensor:
        """The losses, one per example.

        Raises:
            TypeError: the objective returned a scalar.
        """
        if self.losses.dim() == 0:
            raise TypeError(
                "this method needs one loss per example, and the loss returned a scalar: pass bisam.cross_entropy, or "
                'your criterion with reduction="none"'
            )
        return self.losses


@dataclass(frozen=True)
class Seen:
    """What a query at the weights saw, kept for metrics."""

    objective: Objective
    targets: Any
    evaluation: Evaluation


def clean(seen: Sequence[Seen], loss: Objective) -> Evaluation:
    """Training losses and outputs at the weights, from what queries with any objective saw there: no forward pass."""
    parts: list[Evaluation] = []
    with torch.no_grad():
        for s in seen:
            part = s.evaluation
            if s.objective is not loss:
                outputs = tree_map_only(Tensor, _widened, part.outputs)  # as under the autocast that may be over by now
                losses = loss(outputs, s.targets)
                counted = objectives.count(losses, s.targets, loss) if losses.dim() else part.count
                part = Evaluation(losses, None, part.outputs, objectives.mean(losses, counted), counted)
            parts.append(part)
    return join(parts)


def size(batch: Any) -> int | None:
    """Number of examples: the first dimension of the first tensor that has one, or None where there is none."""
    flat = isinstance(batch, tuple) and batch and isinstance(batch[0], Tensor)
    leaves: Any = batch if flat else tree_flatten(batch)[0]
    return next((len(t) for t in leaves if isinstance(t, Tensor) and t.dim()), None)


def split(batch: Batch, m: int) -> list[Batch]:
    """Parts of `m` examples, the last one smaller where `m` does not divide the batch.

    Raises:
        ValueError: the tensors of the batch disagree about its size, or there are none.
    """
    leaves, structure = tree_flatten(batch)
    sizes = sorted({len(t) for t in leaves if isinstance(t, Tensor) and t.dim()})
    if len(sizes) > 1:
        raise ValueError(
            f"cannot split a batch whose tensors have {sizes} examples: pass what is not per example inside `forward`"
        )
    if not sizes:
        raise ValueError(
            f"cannot split a batch of {', '.join(type(leaf).__name__ for leaf in leaves) or 'nothing'}: its examples "
            "must be in tensors, in tuples, lists or dicts (for a Hugging Face batch, dict(batch))"
        )
    if sizes[0] <= m:
        return [batch]
    parts = [t.split(m) if isinstance(t, Tensor) and t.dim() else None for t in leaves]
    return [
        tree_unflatten([leaf if part is None else part[i] for leaf, part in zip(leaves, parts, strict=True)], structure)
        for i in range(-(-sizes[0] // m))
    ]


def join(parts: Sequence[Evaluation]) -> Evaluation:
    """Evaluations of the parts of a batch as one of the whole, without gradient; a part weighs what counts in it."""
    if len(parts) == 1:
        return replace(parts[0], grad=None)
    total: Count = sum(p.count for p in parts)
    value = torch.stack([p.value * p.count for p in parts]).sum() / divisor(total)
    losses = torch.cat([p.losses for p in parts]) if parts[0].losses.dim() else value
    leaves = zip(*[tree_flatten(p.outputs)[0] for p in parts], strict=True)
    structure = tree_flatten(parts[0].outputs)[1]
    outputs = [torch.cat(same) if isinstance(same[0], Tensor) and same[0].dim() else same[0] for same in leaves]
    return Evaluation(losses, None, tree_unflatten(outputs, structure), value, total)


def divisor(total: Count) -> Count:
    """`total`, or 1 where nothing counts and the sum is 0 too."""
    return max(total, 1) if isinstance(total, int) else total.clamp_min(1)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
