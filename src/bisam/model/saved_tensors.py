"""Saved tensors: whether the backward pass of an autograd function may change them in place."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar, cast

import torch
from torch import Tensor


def keeps_graph() -> bool:
    """Whether another backward pass of the same graph may follow the present one, as with `retain_graph=True`."""
    engine: Any = getattr(torch._C, "_autograd", None)
    keeps = getattr(engine, "_get_current_graph_task_keep_graph", None)  # older versions of torch do not say
    return torch.compiler.is_compiling() or keeps is None or bool(keeps())


def are_shared(saved: Sequence[Tensor]) -> bool:
    """Whether anything but their graph refers to tensors that it has saved, or to their storages.

    So does a tensor to itself whose entries share memory, as those of an expanded gradient.

    Args:
        saved: `ctx.saved_tensors`, at least one, in the backward pass.
    """
    if _storage_uses() is None or any(map(_is_expanded, saved)):
        return True
    objects, storages = _references(saved)
    fewest_objects, fewest_storages = _fewest()
    return objects > fewest_objects or storages > fewest_storages


def _is_expanded(t: Tensor) -> bool:
    return 0 in t.stride() and any(size > 1 and not stride for size, stride in zip(t.shape, t.stride(), strict=True))


def _storage_uses() -> Any:
    return getattr(torch._C, "_storage_Use_Count", None)  # not in older versions of torch


def _references(saved: Sequence[Tensor]) -> tuple[int, int]:
    """Returns the largest numbers of references to a tensor, and to a storage besides that of the base of a view."""
    uses = _storage_uses()
    # The gradient of a linear layer is a view, whose base has the same storage.
    storages = max(uses(t.untyped_storage()._cdata) - t._is_view() for t in saved)
    return max(map(sys.getrefcount, saved)), storages


class _Unshared(torch.autograd.Function):
    """Counts the references to a tensor that its graph alone refers to, which depend on the versions."""

    found: ClassVar[tuple[int, int]]

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Saves another tensor."""
        ctx.save_for_backward(x.clone())
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *factors: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Counts the references to it."""
        saved = ctx.saved_tensors
        _Unshared.found = _references(saved)
        return factors[0]


@cache
def _fewest() -> tuple[int, int]:
    with torch.enable_grad():
        cast(Tensor, _Unshared.apply(torch.zeros((), requires_grad=True))).backward()
    return _Unshared.found
