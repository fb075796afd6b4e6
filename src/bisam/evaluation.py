"""Evaluation: the answer to a query on a batch, and how batches split and answers join.

parts = split((x, y), 32)                         # tuples, lists, dicts and tensors, 32 examples each
whole = join([oracle.query(part) for part in parts])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

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
        targets: what the objective compared the outputs with.
        objective: what was evaluated.
    """

    losses: Tensor
    grad: Vector | None = None
    outputs: Any = None
    value: Tensor = None  # pyright: ignore[reportAssignmentType]
    count: Count = None  # pyright: ignore[reportAssignmentType]
    targets: Any = None
    objective: Objective | None = None

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
        """The losses, one per example (N,): the mean over the positions of an example that count, where it has several.

        An objective that returns a scalar may have a method `per_example(outputs, targets) -> (N,)` besides: its
        losses are computed here, when a method asks for them, from the outputs that are there.

        Raises:
            TypeError: the objective returned a scalar, and has no such method.
        """
        if self.losses.dim() == 0:
            each = getattr(self.objective, "per_example", None)
            if not callable(each):
                raise TypeError(
                    "this method needs one loss per example, and the loss returned a scalar: pass bisam.cross_entropy, "
                    'or your criterion with reduction="none", or give it a method per_example(outputs, targets)'
                )
            with torch.no_grad():
                return cast(Tensor, each(self._wide, self.targets))
        if self.losses.dim() == 1:
            return self.losses
        losses, ignored = self.losses.flatten(1), getattr(self.objective, "ignore_index", None)
        if ignored is None or not isinstance(self.targets, Tensor) or self.targets.is_floating_point():
            return losses.mean(1)
        return losses.sum(1) / (self.targets != ignored).flatten(1).sum(1).clamp_min(1)

    @torch.no_grad()
    def under(self, objective: Objective) -> Evaluation:
        """The same outputs under another objective: no forward pass, no gradient."""
        if objective is self.objective:
            return replace(self, grad=None)
        losses = objective(self._wide, self.targets)
        counted = objectives.count(losses, self.targets, objective) if losses.dim() else self.count
        value = objectives.mean(losses, counted)
        return Evaluation(losses, None, self.outputs, value, counted, self.targets, objective)

    @property
    def _wide(self) -> Any:
        """The outputs as they are under the autocast that may be over by now."""
        return tree_map_only(Tensor, _widened, self.outputs)


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
    sizes = _sizes(leaves)
    if len(sizes) > 1:
        raise ValueError(f"cannot split a batch whose tensors have {sizes} examples: {_INSIDE}")
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


def take(batch: Batch, index: Tensor) -> Batch:
    """The examples `index` (k,) of a batch.

    Raises:
        ValueError: the tensors of the batch disagree about its size.
    """
    leaves, structure = tree_flatten(batch)
    sizes = _sizes(leaves)
    if len(sizes) > 1:
        raise ValueError(f"cannot choose examples of a batch whose tensors have {sizes}: {_INSIDE}")
    chosen = [t[index.to(t.device)] if isinstance(t, Tensor) and t.dim() else t for t in leaves]
    return tree_unflatten(chosen, structure)


def largest(scores: Tensor, k: int, batch: Batch) -> Batch:
    """The `k` examples of a batch with the largest scores (N,), in their order.

    Raises:
        ValueError: there are not as many scores as examples.
    """
    if (n := size(batch)) != len(scores):
        raise ValueError(
            f"choosing examples needs one loss for each, and there are {len(scores)} losses for {n} examples: let "
            "`forward` return outputs (N, K, ...) and targets (N, ...), not flattened"
        )
    return take(batch, scores.topk(k).indices.sort().values)


_INSIDE = "pass what is not per example inside `forward`"


def _sizes(leaves: Sequence[Any]) -> list[int]:
    return sorted({len(t) for t in leaves if isinstance(t, Tensor) and t.dim()})


def join(parts: Sequence[Evaluation]) -> Evaluation:
    """Evaluations of the parts of a batch as one of the whole, without gradient; a part weighs what counts in it."""
    if len(parts) == 1:
        return replace(parts[0], grad=None)
    total: Count = sum(p.count for p in parts)
    value = torch.stack([p.value * p.count for p in parts]).sum() / divisor(total)
    losses = torch.cat([p.losses for p in parts]) if parts[0].losses.dim() else value
    outputs, targets = (_joined([getattr(p, name) for p in parts]) for name in ("outputs", "targets"))
    return Evaluation(losses, None, outputs, value, total, targets, parts[0].objective)


def _joined(trees: Sequence[Any]) -> Any:
    leaves = zip(*[tree_flatten(tree)[0] for tree in trees], strict=True)
    together = [torch.cat(same) if isinstance(same[0], Tensor) and same[0].dim() else same[0] for same in leaves]
    return tree_unflatten(together, tree_flatten(trees[0])[1])


def divisor(total: Count) -> Count:
    """`total`, or 1 where nothing counts and the sum is 0 too."""
    return max(total, 1) if isinstance(total, int) else total.clamp_min(1)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
