"""Wrapper: an optimizer that wraps another one and replaces it in schedulers, scalers and checkpoints.

class Mine(OptimizerWrapper):
    def __init__(self, optimizer):
        self.__setstate__({"optimizer": optimizer})     # not super().__init__, which would create groups of its own
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor
from torch.optim import Optimizer


class OptimizerWrapper(Optimizer):
    """Base class of optimizers whose parameter groups, state and defaults are those of the optimizer that they wrap.

    A subclass overrides `step`, and `saved` and `restore` if it has a state of its own. Copies and unpickled optimizers
    call `__setstate__`, which creates hooks and all other attributes of an optimizer.
    """

    optimizer: Optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The parameter groups of the wrapped optimizer, also after it has loaded others."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The state of the wrapped optimizer."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The default settings of the wrapped optimizer."""
        return self.optimizer.defaults

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters of all groups."""
        return [p for group in self.param_groups for p in group["params"]]

    def inner_step(self, closure: Callable[[], Any] | None) -> Any:
        """Takes one step of the wrapped optimizer and returns what it returns."""
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients, as the wrapped optimizer does."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters to the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)

    def saved(self) -> dict[str, Any]:
        """Returns what `state_dict` does, without calling hooks."""
        return self.optimizer.state_dict()

    def restore(self, state: dict[str, Any]) -> None:
        """Restores the result of `saved`, without calling hooks."""
        self.optimizer.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the wrapped optimizer, with that of the wrapper if it has one."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = self.saved()
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the result of `state_dict`, also that of a bare optimizer.

        Raises:
            ValueError: the state belongs to other parameters.
        """
        state = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state)
            state = state if changed is None else changed
        self.restore(state)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)


def is_of_framework(optimizer: object) -> bool:
    """Whether Lightning, Fabric or Accelerate has wrapped an optimizer, which is then its attribute `optimizer`."""
    return bool({c.__name__ for c in type(optimizer).__mro__} & _OF_FRAMEWORKS)


_OF_FRAMEWORKS = frozenset({"AcceleratedOptimizer", "LightningOptimizer", "_FabricOptimizer"})


def check_wrapped(name: str, optimizer: object, example: str) -> None:
    """Checks that an argument is an optimizer, and not one that a framework has wrapped.

    Raises:
        TypeError: it is not; the message shows `name`, `example` and the value.
    """
    if not isinstance(cast(Any, optimizer), Optimizer):
        raise TypeError(f"{name} takes an optimizer, as in {example}, got {optimizer!r}")
    if is_of_framework(optimizer):
        raise TypeError(
            f"{type(optimizer).__name__} may skip a step without saying so (an overflow, gradient accumulation), which "
            f"{name} would take for a step: make {example} first, and give that to the framework (prepare, setup)"
        )
