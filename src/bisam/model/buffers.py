"""Buffers: the running statistics and other buffers of a module, which can be saved and restored.

then = buffers.remember()
model(x)                                          # BatchNorm moves its statistics
buffers.restore(then)                             # bit for bit, even where a module put another tensor in their place
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from bisam.vector import Tensors, clone

Slot = tuple[dict[str, Tensor | None], str, Tensor]
"""A module's dictionary of buffers, a name in it, and the buffer."""

Saved = tuple[list[Slot], list[tuple[Tensors, Tensors]]]
"""Buffers, and by type their memory and copies of its contents."""


class Buffers:
    """All buffers of a model, of any type; one `_foreach` call per type.

    Args:
        slots: the places of the buffers.
    """

    def __init__(self, slots: list[Slot]) -> None:
        self._slots = slots

    @cached_property
    def untouched(self) -> Saved:
        """The buffers when this was first read: read it before anything moves them."""
        return self.remember()

    def rollback(self) -> None:
        """Restore `untouched`: for a step that failed between two queries."""
        self.restore(self.untouched)

    @cached_property
    def _by_type(self) -> list[list[Tensor]]:
        # .data: the graph of another loss may hold the buffers, and must not see them move.
        groups: dict[torch.dtype, list[Tensor]] = {}
        for _, _, buffer in self._slots:
            groups.setdefault(buffer.dtype, []).append(buffer.data)
        return list(groups.values())

    @property
    def tensors(self) -> list[Tensor]:
        """The buffers."""
        return [buffer for _, _, buffer in self._slots]

    def refresh(self) -> None:
        """Adopt the tensors that modules have put in place of their buffers."""
        if any(owner.get(name) is not buffer for owner, name, buffer in self._slots):
            now = [(owner, name, owner.get(name)) for owner, name, _ in self._slots]
            self._slots = [(owner, name, buffer) for owner, name, buffer in now if buffer is not None]
            del self._by_type

    def remember(self) -> Saved:
        """All buffers, and copies of their contents."""
        return self._slots, [(group, clone(group)) for group in self._by_type]

    def restore(self, saved: Saved) -> None:
        """Put back what `remember` returned."""
        slots, groups = saved
        for group, contents in groups:
            torch._foreach_copy_(group, contents)
        for owner, name, buffer in slots:
            if owner.get(name) is not buffer:
                owner[name] = buffer
