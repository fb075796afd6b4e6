"""Operators: how many a function runs, and how often they read and write large tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NO_KERNEL = (
    "aten.alias",
    "aten.as_strided",
    "aten.detach",
    "aten.empty",
    "aten.expand",
    "aten.permute",
    "aten.select",
    "aten.slice",
    "aten.t.",
    "aten.unsqueeze",
    "aten.view",
    "profiler.",
)
"""Operators that make another tensor of the same storage, or compute nothing."""
_INDEXED = ("aten.gather", "aten.scatter", "aten.nll_loss")
"""Operators that read one entry of each row."""


class Operators(TorchDispatchMode):
    """Counts the operators that compute something, and the entries that they read and write.

    Args:
        least: number of entries of a tensor that counts as large.

    Attributes:
        count: number of operators.
        entries: entries of large tensors that were read or written. Operators that read one entry of each row read
            none, but may write all.
    """

    def __init__(self, least: int = 1) -> None:
        super().__init__()
        self._least = least
        self.count = self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (name := str(func)).startswith(_NO_KERNEL):
            return out
        self.count += 1
        if not name.startswith(_INDEXED):
            self._add(args, kwargs)
        if not (name.startswith(_INDEXED) and "_." in name):  # in place they write one entry of each row
            self._add(out)
        return out

    def _add(self, *values: Any) -> None:
        for t in tree_leaves(values):
            if isinstance(t, Tensor) and t.numel() >= self._least:
                self.entries += t.numel()
