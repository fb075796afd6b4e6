"""Lookahead and ProximalPoint: optimizers that take k steps and then move back part of the way.

They wrap another optimizer and replace it in schedulers, scalers and checkpoints:

    >>> from torch.optim import SGD, Adam
    >>> model = torch.nn.Linear(4, 3)
    >>> optimizer = Lookahead(SGD(model.parameters(), lr=0.1), k=5, alpha=0.5)
    >>> extra_adam = ProximalPoint(Adam(model.parameters(), lr=1e-3))

Each step of Lookahead continues from the last one. The steps of ProximalPoint all start from the same weights, as those
of extragradient methods do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from bisam.distributed.layout import local
from bisam.optim.wrapper import OptimizerWrapper, check_wrapped
from bisam.validation import share, whole
from bisam.vector import clone


class Lookahead(OptimizerWrapper):
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
        TypeError: `optimizer` is not an optimizer, or one that a framework has wrapped; `k` is not an int, or `alpha`
            is not a number.
        ValueError: `k` is less than 1, or no multiple of the inner steps of a `ProximalPoint`, or `alpha` is outside
            (0, 1].

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
        check_wrapped("Lookahead", optimizer, "Lookahead(torch.optim.SGD(model.parameters(), lr=0.1), k=5)")
        whole("k", k)
        share("alpha", alpha)
        if isinstance(optimizer, ProximalPoint) and k % optimizer.inner:
            raise ValueError(
                f"k must be a multiple of the {optimizer.inner} steps of the ProximalPoint inside, got {k}"
            )
        self.__setstate__({"optimizer": optimizer, "k": k, "alpha": alpha, "_count": 0, "_slow": {}})

    @staticmethod
    def joint(*optimizers: Lookahead) -> None:
        """Makes slow updates simultaneous: each waits until all of `optimizers` have taken their k steps.

        For the players of a game that take turns, each with an optimizer: without it, the weights of the first player
        move back before the last step of the second. Call it again after a copy of a single optimizer; checkpoints do
        not contain it.

        Args:
            *optimizers: one for each player.

        Raises:
            TypeError: one is no `Lookahead` or `ProximalPoint`.
        """
        for one in optimizers:
            if not isinstance(cast(Any, one), Lookahead):
                raise TypeError(f"joint takes Lookahead or ProximalPoint optimizers, got {one!r}")
        for one in optimizers:
            one._players = optimizers

    k: int
    alpha: float
    _count: int  # steps since the last slow update
    _slow: dict[Tensor, Tensor]  # the weights of each parameter after that update
    _players: tuple[Lookahead, ...] = ()  # whose slow updates are simultaneous; () is this one alone

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Takes one step of the wrapped optimizer; every k-th step is followed by the slow update."""
        self._remember()
        loss = self.inner_step(closure)
        self._count += 1
        self._end_round()
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

    def saved(self) -> dict[str, Any]:
        """Returns the state of the wrapped optimizer, with slow weights and step count under the key `lookahead`."""
        state = self.optimizer.state_dict()
        slow = {i: self._slow[p] for i, p in enumerate(self.parameters) if self._count and p in self._slow}
        # A list, because a Lookahead inside this one adds its own entry.
        state["lookahead"] = [{"count": self._count, "slow": slow}, *state.get("lookahead", [])]
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Restores a state; after that of a bare optimizer, the next slow update follows after k steps."""
        mine, *inside = cast("list[dict[str, Any]]", state.get("lookahead") or [{"count": 0, "slow": {}}])
        self.optimizer.load_state_dict({**state, "lookahead": inside})
        parameters = self.parameters
        # Copies: the caller may still use the dictionary.
        self._slow = {parameters[i]: torch.empty_like(parameters[i].data).copy_(t) for i, t in mine["slow"].items()}
        self._count = mine["count"]

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("optimizer", "k", "alpha", "_count", "_slow", "_players")}

    def __repr__(self) -> str:
        return f"Lookahead({self.optimizer!r}, k={self.k}, alpha={self.alpha})"

    @torch.no_grad()
    def _remember(self) -> None:
        if self._slow and not self._count:  # copy again: the weights may have been changed since the slow update
            torch._foreach_copy_([local(t) for t in self._slow.values()], [local(p) for p in self._slow])
        if new := [p for p in self.parameters if p not in self._slow]:
            self._slow.update(zip(new, clone([p.detach() for p in new]), strict=True))

    def _end_round(self) -> None:
        players = self._players or (self,)
        if all(one._count >= one.k for one in players):
            for one in players:
                one._pull()

    @torch.no_grad()
    def _pull(self) -> None:
        fast, slow = [local(p) for p in self._slow], [local(t) for t in self._slow.values()]
        torch._foreach_lerp_(slow, fast, self.alpha)
        torch._foreach_copy_(fast, slow)
        self._count = 0


class ProximalPoint(Lookahead):
    """Relaxed approximate proximal point: `inner` steps from the same weights w (Pethick, Xie and Cevher, 2023).

    Source: https://arxiv.org/abs/2310.13459. Each call of `step` sets z <- w + u, where u is the update of the wrapped
    optimizer for the gradient at z. After `inner` steps, w <- (1 - alpha) w + alpha z, and z <- w. `Lookahead` differs
    in one point: its steps continue from z. With `inner=2` it is an extragradient method:

        ProximalPoint(SGD(params, lr=gamma))                           # EG
        ProximalPoint(SGD(params, lr=gamma), alpha=0.5)                # EG+
        ProximalPoint(Adam(params, lr=lr))                             # ExtraAdam (Gidel et al., 2019)
        ProximalPoint(Adam(params, lr=lr), alpha=0.5)                  # ExtraAdam+
        ProximalPoint(SGD(params, lr=gamma), inner=3, alpha=0.9)       # RAPP
        ProximalPoint(Adam(params, lr=lr), inner=3, alpha=0.9)         # RAPP with Adam
        Lookahead(ProximalPoint(Adam(params, lr=lr)), k=10)            # LA-ExtraAdam: k is a multiple of inner

    Each inner step is a step of the training loop, with a batch of its own and players in any order: with an optimizer
    for each player they take turns (see `joint`). `RAPP` is the same algorithm as a method, which makes all inner steps
    of all players in one call of the loss.

    Adam updates its moments in each inner step, as in ExtraAdam (https://arxiv.org/abs/1802.10551). Weight decay of the
    wrapped optimizer is that of w, not of z. Parameter groups and state are those of the wrapped optimizer. Evaluate a
    model after a multiple of `inner` steps: in between it has the weights z.

    Args:
        optimizer: the wrapped optimizer. Its step must need one gradient.
        inner: number of inner steps, >= 1; with 1 and alpha 1 it is the wrapped optimizer.
        alpha: interpolation towards the last z, in (0, 1].

    Raises:
        TypeError: `optimizer` is not an optimizer, or one that a framework has wrapped; `inner` is not an int, or
            `alpha` is not a number.
        ValueError: `inner` is less than 1, or `alpha` is outside (0, 1].

    Example:
        >>> import torch
        >>> from bisam import ProximalPoint
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = ProximalPoint(torch.optim.SGD([w], lr=0.5))
        >>> for _ in range(2):    # f(w) = w^2/2: z = 1 - 0.5 * 1 = 0.5, then w = 1 - 0.5 * 0.5
        ...     w.grad = w.detach().clone()
        ...     optimizer.step()
        >>> w.data
        tensor([0.7500])
    """

    def __init__(self, optimizer: Optimizer, inner: int = 2, alpha: float = 1.0) -> None:
        check_wrapped("ProximalPoint", optimizer, "ProximalPoint(torch.optim.Adam(model.parameters()))")
        whole("inner", inner)
        super().__init__(optimizer, inner, alpha)

    @property
    def inner(self) -> int:
        """Number of inner steps."""
        return self.k

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Takes one inner step; every `inner`-th one is followed by the interpolation. A closure is evaluated at z."""
        loss = None
        if closure is not None:  # not by the wrapped optimizer, whose step begins at w
            with torch.enable_grad():
                loss = closure()
        self._remember()
        self._return()
        self.optimizer.step()
        self._count += 1
        self._end_round()
        return loss

    def __repr__(self) -> str:
        return f"ProximalPoint({self.optimizer!r}, inner={self.k}, alpha={self.alpha})"

    @torch.no_grad()
    def _return(self) -> None:
        if self._count:  # else the weights are w
            torch._foreach_copy_([local(p) for p in self._slow], [local(t) for t in self._slow.values()])
