"""Eval mode: runs a model in another mode, or in eval mode with other values of its buffers, and restores both."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from bisam.model.module_state import ModuleState


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Generator[None]:
    """A context in which a model is in training or eval mode, as `model.train` sets it; each module's own returns."""
    before = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for module, was in before:
            module.training = was


class EvalMode:
    """The eval mode of a model for one forward pass.

    Args:
        roots: the model, and its loss if that is a module.
        state: their state.
    """

    def __init__(self, roots: Sequence[nn.Module], state: ModuleState) -> None:
        self._roots, self._state = roots, state
        self._modes: list[tuple[nn.Module, bool]] = []
        self._contents: list[Tensor] | None = None

    def enter(self, buffers: Sequence[Tensor]) -> None:
        """Saves the modes and the buffers, and changes them.

        Raises:
            ValueError: the buffers are not of the number of those of the model.
        """
        present = self._state.buffers
        if len(buffers) != len(present):
            raise ValueError(f"a query has {len(buffers)} buffers, and the model {len(present)}: pass one for each")
        # .data: the graph of another loss may hold a buffer, and would detect the change, which is undone.
        self._contents = [b.data.clone() for b in present]
        self._modes = [(module, module.training) for root in self._roots for module in root.modules()]
        self._state.write_buffers(buffers)
        for module, _ in self._modes:
            module.training = False  # not eval(), which a model may override to keep a part of it in its mode

    def leave(self) -> None:
        """Restores modes and buffers; also after an interruption at any moment, and more than once."""
        for module, training in self._modes:
            module.training = training
        if self._contents is not None:
            self._state.write_buffers(self._contents)
        self._modes, self._contents = [], None
