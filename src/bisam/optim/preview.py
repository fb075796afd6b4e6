"""Optimizers: where one is about to go, and one that goes there and comes part of the way back.

    e = lookahead(optimizer)(g, oracle)             # what optimizer.step() would add to the weights if g were in .grad
    optimizer = Lookahead(SGD(model.parameters(), lr=0.1), k=5, lam=0.5)

With the first a method stands where the next step will end, and nothing has moved. The second is an optimizer like any
other: schedulers, scalers and checkpoints get it in place of the one inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from bisam.distributed.layout import local
from bisam.oracle import Oracle
from bisam.validation import share, whole
from bisam.vector import Scalar, Tensors, Vector, as_real, clone

Group = Mapping[str, Any]
"""Settings of a parameter group, or what an optimizer remembers of one parameter."""

_WRAPPERS = frozenset({"AcceleratedOptimizer", "LightningOptimizer", "_FabricOptimizer"})  # they hold it as `optimizer`


def lookahead(optimizer: Optimizer) -> Preview:
    """The next step of an optimizer before it is made, `(gradient, oracle) -> displacement`.

    Args:
        optimizer: `torch.optim.SGD`, `Adam` or `AdamW` with any settings, bare or as Lightning or Accelerate wrap it.

    Raises:
        TypeError: it is no optimizer, or one whose step is not known here.
    """
    while {c.__name__ for c in type(optimizer).__mro__} & _WRAPPERS:
        optimizer = cast(Any, optimizer).optimizer
    if not isinstance(cast(Any, optimizer), Optimizer):
        raise TypeError(f"lookahead takes the optimizer of the training loop, got {optimizer!r}")
    if type(optimizer) not in _STEPS:  # nor a subclass, which may step otherwise
        raise TypeError(
            f"lookahead knows the steps of torch.optim.SGD, Adam and AdamW, not of {type(optimizer).__name__}: train "
            "with one of these, or write the displacement of its step as a function (gradient, oracle) -> Vector"
        )
    return Preview(optimizer)


@dataclass(frozen=True, repr=False)
class Preview:
    """What the next step of an optimizer would add to the weights, from its settings and state as they are by then.

    Made by `lookahead`. It is the step alone: what a loop does to gradients before, such as clipping, is not in it.

    Args:
        optimizer: read and never changed.
    """

    optimizer: Optimizer

    def __repr__(self) -> str:
        return f"lookahead({type(self.optimizer).__name__})"

    def __call__(self, gradient: Vector, oracle: Oracle) -> Vector:
        """The displacement; zero where the optimizer does not hold a parameter, or skips it for want of a gradient.

        Raises:
            ValueError: the optimizer holds none of the parameters.
        """
        position = {id(p): i for i, p in enumerate(oracle.parameters)}
        held = [{position[id(p)]: p for p in g["params"] if id(p) in position} for g in self.optimizer.param_groups]
        if not any(held):
            raise ValueError(
                f"the {type(self.optimizer).__name__} holds none of the model's parameters, so its next step does not "
                "move them: give lookahead the optimizer that trains this model"
            )
        w, e, step = oracle.weights, dict[int, Tensor](), _STEPS[type(self.optimizer)]
        for group, parameters in zip(self.optimizer.param_groups, held, strict=True):
            if moving := [i for i in parameters if i not in gradient.holes]:
                states = [self.optimizer.state.get(parameters[i], {}) for i in moving]  # state[p] would make one
                parts = (Vector([v.tensors[i] for i in moving]) for v in (w, gradient))
                e.update(zip(moving, step(group, states, *parts), strict=True))
        return w.like([e[i] if i in e else torch.zeros_like(t) for i, t in enumerate(w)], gradient.holes)


class Lookahead(Optimizer):
    """Any optimizer, drawn back every k steps: slow <- (1 - lam) slow + lam fast (Zhang et al., 2019).

    Source: https://arxiv.org/abs/1907.08610. With SGD and `ERM()` on a game it is LA-GDA, with `ExtraGradient` as the
    method LA-EG (Pethick et al., 2023, https://arxiv.org/abs/2310.13459).

    Settings and state are those of the optimizer inside, and what that remembers, such as momentum, lives through the
    pulls. Evaluate a model after a multiple of k steps: in between its weights are the fast ones.

    Args:
        optimizer: takes the k steps.
        k: steps from one pull to the next, >= 1.
        lam: how far towards the fast weights the slow ones go, 0 < lam <= 1; 1 is the optimizer inside.

    Raises:
        TypeError: `optimizer` is no optimizer, `k` no whole number or `lam` no number.
        ValueError: `k` is less than 1, or `lam` outside (0, 1].
    """

    def __init__(self, optimizer: Optimizer, k: int = 5, lam: float = 0.5) -> None:
        if not isinstance(cast(Any, optimizer), Optimizer):
            raise TypeError(
                "Lookahead takes an optimizer, as in Lookahead(torch.optim.SGD(model.parameters(), lr=0.1), k=5), got "
                f"{optimizer!r}"
            )
        whole("k", k)
        share("lam", lam)
        # Not super().__init__, which would make parameter groups and a state of its own: this is the way that copies
        # and unpickled optimizers go, and it makes the rest.
        self.__setstate__({"optimizer": optimizer, "k": k, "lam": lam, "_count": 0, "_slow": {}})

    optimizer: Optimizer
    k: int
    lam: float
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
        return {name: self.__dict__[name] for name in ("optimizer", "k", "lam", "_count", "_slow")}

    def __repr__(self) -> str:
        return f"Lookahead({self.optimizer!r}, k={self.k}, lam={self.lam})"

    @torch.no_grad()
    def _remember(self) -> None:
        if self._slow and not self._count:  # anew, for the weights may have been changed since the pull
            torch._foreach_copy_([local(t) for t in self._slow.values()], [local(p) for p in self._slow])
        if new := [p for p in self._parameters() if p not in self._slow]:
            self._slow.update(zip(new, clone([p.detach() for p in new]), strict=True))

    @torch.no_grad()
    def _pull(self) -> None:
        fast, slow = [local(p) for p in self._slow], [local(t) for t in self._slow.values()]
        torch._foreach_lerp_(slow, fast, self.lam)
        torch._foreach_copy_(fast, slow)
        self._count = 0

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]


def _sgd_step(group: Group, states: Sequence[Group], w: Vector, g: Vector) -> Vector:
    g = _downhill(group, w, g, group["weight_decay"])
    if group["momentum"]:
        # A buffer begins as the whole gradient, whatever the dampening.
        new = [1.0 if s.get("momentum_buffer") is None else 1 - group["dampening"] for s in states]
        m = _remembered("momentum_buffer", states, w) * group["momentum"] + Vector(torch._foreach_mul(g.tensors, new))
        g = g + m * group["momentum"] if group["nesterov"] else m
    return g * -_scalar(group["lr"])


def _adam_step(group: Group, states: Sequence[Group], w: Vector, g: Vector, *, decoupled: bool = False) -> Vector:
    decoupled = decoupled or group.get("decoupled_weight_decay", False)
    lr, b1, b2 = (_scalar(value) for value in (group["lr"], *group["betas"]))
    decay = group["weight_decay"]
    g = _downhill(group, w, g, 0 if decoupled else decay)
    names = ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else []))
    vectors = (g, *(_remembered(name, states, w) for name in names))
    g, m, v, *top = (Vector(as_real(vector.tensors)) for vector in vectors)  # a complex number is two
    m, v = m * b1 + g * (1 - b1), v * b2 + g * g * (1 - b2)
    if top:
        v = Vector(torch._foreach_maximum(v.tensors, top[0].tensors))
    t = _steps(group, states, w)
    m = Vector(torch._foreach_div(m.tensors, _each(1 - b1**t)))
    s = Vector(torch._foreach_div(v.sqrt().tensors, _each((1 - b2**t) ** 0.5)))
    e = m / (s + group["eps"]) * -lr
    e = Vector([torch.view_as_complex(a) if b.is_complex() else a for a, b in zip(e, w, strict=True)])
    return e - w * (lr * decay) if decoupled and decay else e


_STEPS: dict[type, Callable[[Group, Sequence[Group], Vector, Vector], Vector]] = {
    SGD: _sgd_step,
    Adam: _adam_step,
    AdamW: partial(_adam_step, decoupled=True),
}


def _downhill(group: Group, w: Vector, g: Vector, decay: Scalar) -> Vector:
    g = -g if group["maximize"] else g
    return g + w * decay if decay else g


def _remembered(name: str, states: Sequence[Group], w: Vector) -> Vector:
    found = [s.get(name) for s in states]
    return Vector([torch.zeros_like(t) if s is None else local(s) for s, t in zip(found, w, strict=True)])


def _steps(group: Group, states: Sequence[Group], w: Vector) -> Tensor:
    """Adam's count of steps, the coming one included, for each parameter: where it is, so that nothing waits for it."""
    on_device = group["capturable"] or group["fused"]
    counts = [None if s.get("step") is None else local(s["step"]) for s in states]
    zeros = (torch.zeros((), device=t.device if on_device else "cpu") for t in w)
    t = torch.stack([zero if count is None else count for count, zero in zip(counts, zeros, strict=True)]) + 1
    return t.double() if t.is_cpu else t


def _each(factors: Tensor) -> list[float] | Tensors:
    return factors.tolist() if factors.is_cpu else factors.unbind()


def _scalar(value: Scalar) -> Scalar:
    """A setting that may be a tensor of one entry, as a number where reading it does not wait for a device."""
    if isinstance(value, Tensor):
        return float(value) if value.is_cpu else value.reshape(())
    return value
