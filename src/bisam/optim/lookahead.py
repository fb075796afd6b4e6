"""Lookahead: an optimizer that goes ahead for k steps and then comes part of the way back.

    optimizer = Lookahead(SGD(model.parameters(), lr=0.1), k=5, alpha=0.5)

It is an optimizer like any other: give it to schedulers, scalers and checkpoints in place of the one inside.
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
    """Any optimizer, drawn back every k steps: slow <- (1 - alpha) slow + alpha fast (Zhang et al., 2019).

    Source: https://arxiv.org/abs/1907.08610. With SGD and `ERM()` on a game it is LA-GDA, with `ExtraGradient` as the
    method LA-EG (Pethick et al., 2023, https://arxiv.org/abs/2310.13459).

    Settings and state are those of the optimizer inside, whose memory, such as momentum, is kept through the pulls.
    Evaluate a model after a multiple of k steps: in between its weights are the fast ones.

    Args:
        optimizer: takes the k steps.
        k: steps from one pull to the next, >= 1.
        alpha: how far the slow weights move towards the fast ones, 0 < alpha <= 1; 1 is the optimizer inside.

    Raises:
        TypeError: `optimizer` is no optimizer, `k` no whole number or `alpha` no number.
        ValueError: `k` is less than 1, or `alpha` outside (0, 1].
    """

    def __init__(self, optimizer: Optimizer, k: int = 5, alpha: float = 0.5) -> None:
        if not isinstance(cast(Any, optimizer), Optimizer):
            raise TypeError(
                "Lookahead takes an optimizer, as in Lookahead(torch.optim.SGD(model.parameters(), lr=0.1), k=5), got "
                f"{optimizer!r}"
            )
        whole("k", k)
        share("alpha", alpha)
        # Not super().__init__, which would make parameter groups and a state of its own: this is the way that copies
        # and unpickled optimizers go, and it makes the rest.
        self.__setstate__({"optimizer": optimizer, "k": k, "alpha": alpha, "_count": 0, "_slow": {}})

    optimizer: Optimizer
    k: int
    alpha: float
    _count: int  # steps since the last pull
    _slow: dict[Tensor, Tensor]  # for each parameter, its weights as they were then

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Those of the optimizer inside, also after it has loaded others."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of the optimizer inside."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Those of the optimizer inside."""
        return self.optimizer.defaults

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of the optimizer inside; every k-th is followed by the pull."""
        self._remember()
        loss = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        self._count += 1
        if self._count >= self.k:
            self._pull()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the optimizer inside."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Give the optimizer inside more parameters; their first pull counts from their first step."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """That of the optimizer inside, with the slow weights and the count as `lookahead`."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = self.optimizer.state_dict()
        slow = {i: self._slow[p] for i, p in enumerate(self._parameters()) if self._count and p in self._slow}
        # A list: a Lookahead inside this one has put its own there.
        state["lookahead"] = [{"count": self._count, "slow": slow}, *state.get("lookahead", [])]
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`; from that of a bare optimizer, with a pull after k more steps.

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
        # Copies: the caller may go on using the dictionary.
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
        if self._slow and not self._count:  # anew, for the weights may have been changed since the pull
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
