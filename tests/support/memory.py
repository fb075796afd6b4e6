"""The memory of tensors that are alive, in units of the weights of a model."""

from __future__ import annotations

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Weights(TorchDispatchMode):
    """Memory that was born under the mode in tensors as large as a mask of the weights, in weights of 4 bytes."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.entries, self.born = entries, dict[int, tuple[StorageWeakRef, int]]()

    def held(self) -> float:
        return sum(size for ref, size in self.born.values() if not ref.expired()) / (4 * self.entries)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and (size := t.untyped_storage().nbytes()) >= self.entries:
                ref = StorageWeakRef(t.untyped_storage())
                self.born.setdefault(ref.cdata, (ref, size))
        return result


class Peak(Weights):
    """The same, with the largest memory until now."""

    def __init__(self, entries: int) -> None:
        super().__init__(entries)
        self.peak = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(function, types, args, kwargs)
        self.peak = max(self.peak, self.held())
        return result
