"""Displacement: weights that are displaced in place and restored bit for bit.

Many small weights on a CPU are displaced and restored through one flat tensor, because a call for each of them costs
more than its arithmetic; see `Vector.packed`.
"""

from __future__ import annotations

import torch

from bisam.vector import Vector


class Origin:
    """A copy of the weights, from which they are restored.

    Args:
        weights: the weights, whose tensors share memory with the parameters.
        by: the displacement that follows.
    """

    def __init__(self, weights: Vector, by: Vector) -> None:
        together = by.packed() is not None and _are_separate(weights) and by.shapes == weights.shapes
        self._flat = weights.packed() if together else None
        self._copy = weights.clone() if self._flat is None else None

    def displace(self, weights: Vector, by: Vector) -> None:
        """Adds the displacement in place, except where it is zero by structure."""
        if self._flat is not None and (flat := by.packed()) is not None:
            _write(self._flat + flat, weights)
            return
        moved = [i for i in range(len(by)) if i not in by.holes]
        if moved:
            torch._foreach_add_([weights.tensors[i] for i in moved], [by.tensors[i] for i in moved])

    def restore(self, weights: Vector) -> None:
        """Copies the values back, not subtracted: exact in every precision, and after a NaN."""
        if self._copy is not None:
            torch._foreach_copy_(weights.tensors, self._copy.tensors)
        elif self._flat is not None:
            if _are_separate(weights):
                _write(self._flat, weights)
            else:  # the forward pass has given them other memory
                parts = self._flat.split([w.numel() for w in weights])
                torch._foreach_copy_(weights.tensors, [p.view(w.shape) for p, w in zip(parts, weights, strict=True)])


def _are_separate(weights: Vector) -> bool:
    """Whether no two weights begin at the same place, and each is contiguous."""
    return all([w.is_contiguous() for w in weights]) and len({w.data_ptr() for w in weights}) == len(weights)


def _write(flat: Tensor, weights: Vector) -> None:
    """Writes the entries of a flat tensor into contiguous weights."""
    torch.split_with_sizes_copy(flat, [w.numel() for w in weights], out=[w.view(-1) for w in weights])
