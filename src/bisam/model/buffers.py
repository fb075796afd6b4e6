"""Buffers: saves and restores the running statistics and other buffers of a module.

A buffer is restored bit for bit, also if the module has replaced its tensor:

    then = buffers.remember()
    model(x)                                          # BatchNorm updates its statistics
    buffers.restore(then)
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from bisam.vector import Tensors, clone

Slot = tuple[dict[str, Tensor | None], str, Tensor]
"""A module's dictionary of buffers, a name in it, and the buffer."""

Saved = tuple[list[Slot], list[tuple[Tensors, Tensors]]]
"""Buffers, and for each type their tensors and copies of the contents."""


class Buffers:
    """All buffers of a model, of any type; operations take one `_foreach` call per type.

    Args:
        slots: the places of the buffers.
    """

    def __init__(self, slots: list[Slot]) -> None:
        self._slots = slots

    @cached_property
    def untouched(self) -> Saved:
        """The buffers at the first access of this property; access it before they change."""
        return self.remember()

    def rollback(self) -> None:
        """Restores `untouched`, after a step that failed between two queries."""
        self.restore(self.untouched)

    @cached_property
    def _by_type(self) -> list[list[Tensor]]:
        # .data: the graph of another loss may hold the buffers, and would detect the in-place change.
        groups: dict[torch.dtype, list[Tensor]] = {}
        for _, _, buffer in self._slots:
            groups.setdefault(buffer.dtype, []).append(buffer.data)
        return list(groups.values())

    @property
    def tensors(self) -> list[Tensor]:
        """The buffers."""
        return [buffer for _, _, buffer in self._slots]

    def refresh(self) -> None:
        """Updates the list of buffers with the tensors by which modules have replaced their buffers."""
        if any(owner.get(name) is not buffer for owner, name, buffer in self._slots):
            now = [(owner, name, owner.get(name)) for owner, name, _ in self._slots]
            self._slots = [(owner, name, buffer) for owner, name, buffer in now if buffer is not None]
            del self._by_type

    def remember(self) -> Saved:
        """Returns all buffers and copies of their contents."""
        return self._slots, [(group, clone(group)) for group in self._by_type]

    def restore(self, saved: Saved) -> None:
        """Restores the result of `remember`."""
        slots, groups = saved
        for group, contents in groups:
            torch._foreach_copy_(group, contents)
        for owner, name, buffer in slots:
            if owner.get(name) is not buffer:
                owner[name] = buffer
