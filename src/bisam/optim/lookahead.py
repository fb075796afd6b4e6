"""Lookahead: an optimizer that takes k steps and then moves back part of the way.

It wraps another optimizer and replaces it in schedulers, scalers and checkpoints:

    >>> from torch.optim import SGD
    >>> model = torch.nn.Linear(4, 3)
    >>> optimizer = Lookahead(SGD(model.parameters(), lr=0.1), k=5, alpha=0.5)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from bisam.distributed.layout import local
from bisam.validation import share, whole
from bisam.vector import clone


class Lookahead(Optimizer):
    """Lookahead: after every k steps of an optimizer, slow <- (1 - alpha) slow + alpha fast (Zhang et al., 2019).

    Source: https://arxiv.org/abs/1907.08610. The weights are then set to the slow weights. On a game, SGD with `ERM()`
    is LA-GDA, and SGD with `ExtraGradient` is LA-EG (Pethick et al., 2023, https://arxiv.org/abs/2310.13459).

    Parameter groups and state are those of the wrapped optimizer; its state, such as momentum, is not changed by the
    slow update. Evaluate a model after a multiple of k steps: in between it has the fast weights.

    Args:
        optimizer: the wrapped optimizer, which takes the steps.
        k: number of steps between two slow updates, >= 1.
        alpha: step size of the slow weights towards the fast ones, in (0, 1]; with 1 it is the wrapped optimizer.

    Raises:
        TypeError: `optimizer` is not an optimizer, `k` is not an int, or `alpha` is not a number.
        ValueError: `k` is less than 1, or `alpha` is outside (0, 1].

    Example:
        >>> import torch
        >>> from bisam import Lookahead
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = Lookahead(torch.optim.SGD([w], lr=0.1), k=2, alpha=0.5)
        >>> for _ in range(2):
        ...     w.grad = torch.ones(1)
        ...     optimizer.step()
        >>> w.data    # SGD alone: 1 - 2 * 0.1 = 0.8; the slow update moves half of the way back
        tensor([0.9000])
    """

    def __init__(self, optimizer: Optimizer, k: int = 5, alpha: float = 0.5) -> None:
        if not isinstance(cast(Any, optimizer), Optimizer):
            raise TypeError(
                "Lookahead takes an optimizer, as in Lookahead(torch.optim.SGD(model.parameters(), lr=0.1), k=5), got "
                f"{optimizer!r}"
            )
        whole("k", k)
        share("alpha", alpha)
        # Not super().__init__, which would create its own parameter groups and state. Copies and unpickled optimizers
        # call __setstate__ too, which creates all other attributes.
        self.__setstate__({"optimizer": optimizer, "k": k, "alpha": alpha, "_count": 0, "_slow": {}})

    optimizer: Optimizer
    k: int
    alpha: float
    _count: int  # steps since the last slow update
    _slow: dict[Tensor, Tensor]  # the weights of each parameter after that update

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

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Takes one step of the wrapped optimizer; every k-th step is followed by the slow update."""
        self._remember()
        loss = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        self._count += 1
        if self._count >= self.k:
            self._pull()
        return loss

    def after_step(self, parameter: Tensor, weights: Tensor, fast: Tensor) -> Tensor:
        """Returns the weights of a parameter after the next step, which is not taken.

        Args:
            parameter: a parameter of the optimizer.
            weights: its present weights; if it is a DTensor, the local part of them.
            fast: its weights after a step of the wrapped optimizer alone, in the same form.
        """
        if self._count + 1 < self.k:
            return fast
        slow = self._slow.get(parameter) if self._count else None
        return (weights if slow is None else local(slow)).lerp(fast, self.alpha)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients, as the wrapped optimizer does."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters to the wrapped optimizer; their slow weights start at their next step."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the wrapped optimizer, with slow weights and step count under the key `lookahead`."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = self.optimizer.state_dict()
        slow = {i: self._slow[p] for i, p in enumerate(self._parameters()) if self._count and p in self._slow}
        # A list, because a Lookahead inside this one adds its own entry.
        state["lookahead"] = [{"count": self._count, "slow": slow}, *state.get("lookahead", [])]
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state; after that of a bare optimizer, the next slow update follows after k steps.

        Raises:
            ValueError: the state belongs to other parameters.
        """
        state = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state)
            state = state if changed is None else changed
        mine, *inside = cast("list[dict[str, Any]]", state.get("lookahead") or [{"count": 0, "slow": {}}])
        self.optimizer.load_state_dict({**state, "lookahead": inside})
        parameters = self._parameters()
        # Copies: the caller may still use the dictionary.
        self._slow = {parameters[i]: torch.empty_like(parameters[i].data).copy_(t) for i, t in mine["slow"].items()}
        self._count = mine["count"]
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("optimizer", "k", "alpha", "_count", "_slow")}

    def __repr__(self) -> str:
        return f"Lookahead({self.optimizer!r}, k={self.k}, alpha={self.alpha})"

    @torch.no_grad()
    def _remember(self) -> None:
        if self._slow and not self._count:  # copy again: the weights may have been changed since the slow update
            torch._foreach_copy_([local(t) for t in self._slow.values()], [local(p) for p in self._slow])
        if new := [p for p in self._parameters() if p not in self._slow]:
            self._slow.update(zip(new, clone([p.detach() for p in new]), strict=True))

    @torch.no_grad()
    def _pull(self) -> None:
        fast, slow = [local(p) for p in self._slow], [local(t) for t in self._slow.values()]
        torch._foreach_lerp_(slow, fast, self.alpha)
        torch._foreach_copy_(fast, slow)
        self._count = 0

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]
