"""Displacement: moves the weights of a model for a query, and restores them.

`Saved` restores them from a copy, bit for bit. `Redrawn` keeps no copy: it draws the noise that it has added again, and
subtracts it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bisam.seeded import Seeded
from bisam.vector import Vector, outside

_HALF = (torch.float16, torch.bfloat16)
_REMEDY = "use restore='copy', which restores every bit from a copy of the weights"


class Saved:
    """Weights and a copy of those that a displacement moves.

    Args:
        weights: the weights.
        at: the displacement.
        steady: whether the forward pass changes no weights itself, so that those outside of the displacement need no
            copy.
    """

    def __init__(self, weights: Vector, at: Vector, *, steady: bool) -> None:
        self._holes = at.holes
        if steady and at.holes:
            weights = weights.confined([i not in at.holes for i in range(len(at))])
        # Copied back, not subtracted: exact in every precision, and after a NaN.
        self._copies = weights.clone()

    def displace(self, weights: Vector, at: Vector) -> None:
        """Adds the displacement in place, except where it is zero by structure."""
        if len(self._holes) < len(at):
            torch._foreach_add_(outside(weights.tensors, self._holes), outside(at.tensors, self._holes))

    def restore(self, weights: Vector) -> None:
        """Restores the weights; may be called again after an interruption."""
        if len(holes := self._copies.holes) < len(weights):
            torch._foreach_copy_(outside(weights.tensors, holes), outside(self._copies.tensors, holes))


class Redrawn:
    """Weights that seeded noise moves and that no copy is kept of: they are restored to a rounding.

    Args:
        parameters: the parameters, whose versions tell whether a forward pass has changed them.
        weights: their data.
        noise: the displacement.

    Raises:
        ValueError: the weights are sharded, or in half precision.
    """

    def __init__(self, parameters: Sequence[Tensor], weights: Vector, noise: Seeded) -> None:
        if weights.layout.sharded:
            raise ValueError(f"displacements of sharded parameters cannot be drawn again: {_REMEDY}")
        if half := {t.dtype for t in weights} & {*_HALF}:
            raise ValueError(
                f"restoring {half.pop()} weights by subtraction changes them by up to 0.4 % in each query: {_REMEDY}"
            )
        self._noise, self._tensors = noise, weights.tensors
        # A version counts the changes in place. Those of the data count the changes that are made here: after an
        # interruption they tell which tensors are displaced. Those of the parameters count what a forward pass changes.
        self._versions = [t._version for t in weights]
        self._versions_of_parameters = [p._version for p in parameters]

    def displace(self) -> None:
        """Adds the noise in place, one tensor after the other."""
        for i, part in self._noise.each(Vector(self._tensors)):
            self._tensors[i].add_(part)

    def check(self, parameters: Sequence[Tensor], weights: Vector) -> None:
        """Checks that the forward pass has changed no weights, displaced or not; `restore` would not undo that.

        Raises:
            RuntimeError: it has changed or replaced the memory of a parameter. What it changes with `.data` in place is
                not noticed.
        """
        versions = [p._version for p in parameters]
        if versions != self._versions_of_parameters or self._replaced(weights):
            raise RuntimeError(f"the forward pass has changed weights while they were displaced: {_REMEDY}")

    def restore(self, weights: Vector) -> None:
        """Draws the noise again and subtracts it; may be called again after an interruption."""
        for i, part in self._noise.each(Vector(self._tensors)):
            if self._tensors[i]._version == self._versions[i] + 1:
                self._tensors[i].sub_(part)
        for old, new in self._replaced(weights):
            new.copy_(old)

    def _replaced(self, weights: Vector) -> list[tuple[Tensor, Tensor]]:
        pairs = zip(self._tensors, weights.tensors, strict=True)
        return [(old, new) for old, new in pairs if old.data_ptr() != new.data_ptr()]
