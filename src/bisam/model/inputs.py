"""Inputs: checks that all queries of a step see the same batch.

A forward pass may change a tensor of the batch in place, as in `x.sub_(1)`. A plain training loop does not notice, but
the next query of a method would be on other inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bisam.batches import Batch, tensors
from bisam.vector import same_values


class _Given(NamedTuple):
    """A tensor of a batch as the first query on it got it."""

    place: int
    tensor: Tensor
    version: int
    contents: Tensor | None


class Inputs:
    """The batches of a step.

    Args:
        thorough: whether to compare contents too, which finds changes through `tensor.data` or an array that shares the
            memory.
    """

    def __init__(self, *, thorough: bool) -> None:
        self._thorough = thorough
        self._given: list[_Given] = []
        self._earlier: list[_Given] = []  # of other parts of the batch
        self._batches: dict[int, Batch] = {}  # by identity
        self._without: list[Tensor] = []
        self.need_gradients = False
        """Whether a tensor of the batch of the present query required a gradient before the forward pass."""

    def begin(self, batch: Batch) -> None:
        """Prepares a query on a batch.

        Raises:
            ValueError: an earlier query has changed a tensor of its batch in place.
        """
        for given in self._given:
            self._check(given)
        found = tensors(batch)
        self._without = [t for t in found if not t.requires_grad]
        self.need_gradients = len(self._without) < len(found)
        if id(batch) not in self._batches:
            self._batches[id(batch)] = batch
            for i, t in enumerate(found):
                if t.is_inference():  # cannot be changed in place outside of inference mode
                    continue
                compared = self._thorough and t.layout is torch.strided and not t.is_nested
                self._given.append(_Given(i, t, t._version, t.detach().clone() if compared else None))

    def end(self) -> None:
        """Resets `requires_grad` of tensors for which a forward pass has set it: the next query gets the same batch."""
        for t in self._without:
            if t.requires_grad and t.is_leaf:
                t.requires_grad_(False)
        self._without = []

    def next_part(self) -> None:
        """Declares that the next queries are on another part of the batch, whatever passes did to those before."""
        self._earlier += self._given
        self._given, self._batches = [], {}

    def check(self) -> None:
        """Checks the batches of all queries so far, those on other parts too.

        Raises:
            ValueError: a query has changed a tensor of its batch in place.
        """
        for given in (*self._earlier, *self._given):
            self._check(given)

    def _check(self, given: _Given) -> None:
        tensor, contents = given.tensor, given.contents
        changed = tensor._version != given.version
        if not changed and contents is not None:
            changed = tensor.shape != contents.shape or not same_values(tensor, contents)
        if changed:
            raise ValueError(
                f"a forward pass changed tensor {given.place} of the batch in place (an input of shape "
                f"{tuple(tensor.shape)} and type {tensor.dtype}), so that the next query of this step would see "
                "another batch: let `forward` work on a copy, x = x.clone()"
            )
