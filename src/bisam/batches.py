"""Batches: nests of containers and tensors. The size of a batch, parts of it, and what a forward pass is given.

>>> import torch
>>> x, y = torch.zeros(70, 4), torch.zeros(70, dtype=torch.int64)
>>> parts = split((x, y), 32)
>>> [size(part) for part in parts]
[32, 32, 6]

Containers are tuples, named tuples, lists, dictionaries and other mutable mappings, dataclasses, and classes that are
registered as pytrees. The examples are the first dimension of each tensor with dimensions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence, MutableSet, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Batch = tuple[Any, ...]
"""The arguments of the loss, usually `(inputs, targets)`; any nest of containers and tensors."""


class Keywords(dict[str, Any]):
    """The keyword arguments of a call of the loss: the last element of the batch, if there are any."""


def children(tree: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]] | None:
    """Returns the elements of a container, and a function that makes such a container of others; None for a leaf."""
    if tree is None or isinstance(tree, Tensor | str | bytes | int | float | complex):
        return None
    elements, structure = tree_flatten(tree, is_leaf=lambda part: part is not tree)
    if not structure.is_leaf():  # tuples, lists, dictionaries and registered classes
        return elements, lambda new: tree_unflatten(new, structure)
    if isinstance(tree, MutableMapping):
        keys = list(cast("MutableMapping[Any, Any]", tree))
        return [tree[key] for key in keys], lambda new: _with_items(tree, keys, new)
    if is_dataclass(tree) and not isinstance(tree, type):
        names = [f.name for f in fields(tree) if hasattr(tree, f.name)]
        return [getattr(tree, name) for name in names], lambda new: _with_attributes(tree, names, new)
    return None


def leaves(tree: Any) -> list[Any]:
    """Returns the leaves of a nest, for example its tensors."""
    if (inside := children(tree)) is None:
        return [tree]
    return [leaf for element in inside[0] for leaf in leaves(element)]


def is_flat(batch: Any) -> bool:
    """Whether a batch is a tuple of tensors, for which the functions of this module need not look for containers."""
    return type(batch) is tuple and {type(t) for t in cast("tuple[Any, ...]", batch)} == {Tensor}


def tensors(tree: Any) -> list[Tensor]:
    """Returns the tensors of a nest."""
    if is_flat(tree):
        return list(tree)
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]


def mapped(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Returns a nest in which `function` is applied to each tensor; containers are new, other leaves the same."""
    if isinstance(tree, Tensor):
        return function(tree)
    if (inside := children(tree)) is None:
        return tree
    return inside[1]([mapped(function, element) for element in inside[0]])


def size(batch: Any) -> int | None:
    """Returns the number of examples, on which all tensors with dimensions agree; None if they do not."""
    sizes = _sizes(tensors(batch))
    return sizes[0] if len(sizes) == 1 else None


def is_empty(batch: Any) -> bool:
    """Whether the batch has tensors with dimensions, all of which have no example."""
    if is_flat(batch) and batch[0].dim() and len(batch[0]):
        return False
    return _sizes(tensors(batch)) == [0]


def handed(batch: Any) -> Any:
    """Returns a batch with the same tensors in new containers: a forward pass may take elements out of them.

    Raises:
        TypeError: an iterator is in the batch, which only one pass could read.
    """
    if isinstance(batch, Tensor) or batch is None or is_flat(batch):
        return batch
    if isinstance(batch, Iterator):
        raise TypeError(
            f"the batch has a {type(cast(Any, batch)).__name__}, an iterator that only one of the passes of a step "
            "could read: pass a list of its elements"
        )
    if type(batch) is tuple:
        return tuple([handed(element) for element in cast("tuple[Any, ...]", batch)])
    if (inside := children(batch)) is not None:
        return inside[1]([handed(element) for element in inside[0]])
    mutable = isinstance(batch, MutableSequence | MutableSet) or hasattr(type(batch), "__copy__")
    return copy.copy(batch) if mutable else batch


def examples(batch: Batch, do: str = "choose examples of") -> int:
    """Returns the number of examples of a batch that is to be divided.

    Args:
        batch: the batch.
        do: what is to be done with it, for the error message.

    Raises:
        ValueError: it is not clear which part of the batch belongs to which example.
    """
    found = leaves(batch)
    sizes = _sizes([t for t in found if isinstance(t, Tensor)])
    if len(sizes) > 1:
        raise ValueError(f"cannot {do} a batch whose tensors have {sizes} examples: {_INSIDE}")
    if not sizes:
        raise ValueError(
            f"cannot {do} a batch of {', '.join(type(leaf).__name__ for leaf in found) or 'nothing'}: its examples "
            "must be in tensors, in tuples, lists, dicts or dataclasses (for other containers, dict(batch))"
        )
    for leaf in found:
        if not isinstance(leaf, Tensor | _SHARED) and not callable(leaf):
            raise ValueError(
                f"cannot {do} a batch with a {type(leaf).__name__}, which may have a part for each example: pass its "
                f"tensors, or {_INSIDE}"
            )
    if long := next(_lists_of_others(batch, sizes[0]), None):
        raise ValueError(
            f"cannot {do} a batch with a list of {len(long)} {type(long[0]).__name__}, which may be one for each of "
            f"the {sizes[0]} examples: pass a tensor, or {_INSIDE}"
        )
    return sizes[0]


def split(batch: Batch, m: int) -> list[Batch]:
    """Splits a batch into parts of `m` examples; the last one is smaller if `m` does not divide the batch size.

    Raises:
        ValueError: the tensors of the batch have different numbers of examples, there are no tensors, or there is
            something that may be one for each example and cannot be split.
    """
    n = examples(batch, "split")
    if n <= m:
        return [batch]

    def part(begin: int) -> Batch:
        return mapped(lambda t: t[begin : begin + m] if t.dim() else t, batch)

    return [part(begin) for begin in range(0, n, m)]


def take(batch: Batch, index: Tensor) -> Batch:
    """Returns the examples `index` (k,) of a batch.

    Raises:
        ValueError: as `split`.
    """
    examples(batch)
    return mapped(lambda t: t[index.to(t.device)] if t.dim() else t, batch)


def largest(scores: Tensor, k: int, batch: Batch) -> Batch:
    """Returns the `k` examples of a batch with the largest scores (N,), in the order of the batch.

    Raises:
        ValueError: the number of scores is not the number of examples.
    """
    if (n := examples(batch)) != len(scores):
        raise ValueError(
            f"choosing examples needs one loss for each, and there are {len(scores)} losses for {n} examples: let "
            "`forward` return outputs (N, K, ...) and targets (N, ...), not flattened"
        )
    return take(batch, scores.topk(k).indices.sort().values)


_INSIDE = "pass what is not per example inside `forward`"


def _sizes(found: Sequence[Tensor]) -> list[int]:
    return sorted({len(t) for t in found if t.dim()})


_SHARED = bool | int | float | complex | str | bytes | Enum | torch.dtype | torch.device | torch.Size | None
"""Types of leaves that are the same for all examples."""


def _lists_of_others(tree: Any, n: int) -> Iterator[list[Any]]:
    """Yields the lists of `n` elements, more than one, that are no tensors and no containers."""
    inside = children(tree)
    if inside is None:
        return
    others = not any(isinstance(part, Tensor) or children(part) is not None for part in inside[0])
    if others and isinstance(tree, list) and len(inside[0]) == n > 1:
        yield inside[0]
    for element in inside[0]:
        yield from _lists_of_others(element, n)


def _with_items(tree: Any, keys: Sequence[Any], values: Sequence[Any]) -> Any:
    new = copy.copy(tree)
    for key, value in zip(keys, values, strict=True):
        new[key] = value
    return new


def _with_attributes(tree: Any, names: Sequence[str], values: Sequence[Any]) -> Any:
    new = copy.copy(tree)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(new, name, value)  # also of a frozen dataclass
    return new
