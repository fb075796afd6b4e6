"""Batches: the size of a batch, and the parts of one. A batch is any nest of tuples, lists, dicts and tensors.

>>> import torch
>>> x, y = torch.zeros(70, 4), torch.zeros(70, dtype=torch.int64)
>>> parts = split((x, y), 32)
>>> [size(part) for part in parts]
[32, 32, 6]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Batch = tuple[Any, ...]
"""The arguments of the loss, usually `(inputs, targets)`; any nest of tuples, lists, dicts and tensors."""


def size(batch: Any) -> int | None:
    """Returns the number of examples: the first dimension of the first tensor that has one, else None."""
    flat = isinstance(batch, tuple) and batch and isinstance(batch[0], Tensor)
    leaves: Any = batch if flat else tree_flatten(batch)[0]
    return next((len(t) for t in leaves if isinstance(t, Tensor) and t.dim()), None)


def split(batch: Batch, m: int) -> list[Batch]:
    """Splits a batch into parts of `m` examples; the last one is smaller if `m` does not divide the batch size.

    Raises:
        ValueError: the tensors of the batch have different numbers of examples, or there are no tensors.
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
    """Returns the examples `index` (k,) of a batch.

    Raises:
        ValueError: the tensors of the batch have different numbers of examples.
    """
    leaves, structure = tree_flatten(batch)
    sizes = _sizes(leaves)
    if len(sizes) > 1:
        raise ValueError(f"cannot choose examples of a batch whose tensors have {sizes}: {_INSIDE}")
    chosen = [t[index.to(t.device)] if isinstance(t, Tensor) and t.dim() else t for t in leaves]
    return tree_unflatten(chosen, structure)


def largest(scores: Tensor, k: int, batch: Batch) -> Batch:
    """Returns the `k` examples of a batch with the largest scores (N,), in the order of the batch.

    Raises:
        ValueError: the number of scores is not the number of examples.
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
