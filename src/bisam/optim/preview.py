"""Preview: the next step of an optimizer, computed before it is taken.

With it a method evaluates the loss at the end of the next step, before the weights have changed:

    e = next_step(optimizer)(g, oracle)             # what optimizer.step() would add to the weights with g in .grad
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
from bisam.vector import Scalar, Tensors, Vector, as_real

Group = Mapping[str, Any]
"""The settings of a parameter group, or the state of one parameter."""

_WRAPPERS = frozenset({"AcceleratedOptimizer", "LightningOptimizer", "_FabricOptimizer"})  # their attribute `optimizer`


def next_step(optimizer: Optimizer) -> Preview:
    """Returns a function `(gradient, oracle) -> displacement` that computes the next step of an optimizer.

    The displacement is what `optimizer.step()` would add to the weights if `gradient` were in `.grad`. The optimizer is
    not changed. See `Preview`.

    Args:
        optimizer: a `torch.optim.SGD`, `Adam` or `AdamW` with any settings, also as wrapped by Lightning or Accelerate.

    Raises:
        TypeError: `optimizer` is not an optimizer, or its type is not supported.

    Example:
        >>> import torch
        >>> from bisam import ModelOracle, Vector, cross_entropy, next_step
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> gradient = Vector([torch.ones(2, 2)])
        >>> next_step(optimizer)(gradient, ModelOracle(model, cross_entropy)).tensors[0]
        tensor([[-0.1000, -0.1000],
                [-0.1000, -0.1000]])
    """
    while {c.__name__ for c in type(optimizer).__mro__} & _WRAPPERS:
        optimizer = cast(Any, optimizer).optimizer
    if not isinstance(cast(Any, optimizer), Optimizer):
        raise TypeError(f"next_step takes the optimizer of the training loop, got {optimizer!r}")
    if type(optimizer) not in _STEPS:  # nor a subclass, whose step may differ
        raise TypeError(
            f"next_step knows the steps of torch.optim.SGD, Adam and AdamW, not of {type(optimizer).__name__}: train "
            "with one of these, or write the displacement of its step as a function (gradient, oracle) -> Vector"
        )
    return Preview(optimizer)


@dataclass(frozen=True, repr=False)
class Preview:
    """A function that computes the next step of an optimizer from its settings and state at the time of the call.

    Created by `next_step`. It does not include operations of the training loop on gradients, such as clipping.

    Args:
        optimizer: the optimizer, which is read and not changed.
    """

    optimizer: Optimizer

    def __repr__(self) -> str:
        return f"next_step({type(self.optimizer).__name__})"

    def __call__(self, gradient: Vector, oracle: Oracle) -> Vector:
        """Returns the displacement; zero for parameters that the optimizer does not hold, or that have no gradient.

        Raises:
            ValueError: the optimizer holds none of the parameters.
        """
        position = {id(p): i for i, p in enumerate(oracle.parameters)}
        held = [{position[id(p)]: p for p in g["params"] if id(p) in position} for g in self.optimizer.param_groups]
        if not any(held):
            raise ValueError(
                f"the {type(self.optimizer).__name__} holds none of the model's parameters, so its next step does not "
                "move them: give next_step the optimizer that trains this model"
            )
        w, e, step = oracle.weights, dict[int, Tensor](), _STEPS[type(self.optimizer)]
        for group, parameters in zip(self.optimizer.param_groups, held, strict=True):
            if moving := [i for i in parameters if i not in gradient.holes]:
                states = [self.optimizer.state.get(parameters[i], {}) for i in moving]  # state[p] would add an entry
                parts = (Vector([v.tensors[i] for i in moving]) for v in (w, gradient))
                e.update(zip(moving, step(group, states, *parts), strict=True))
        return w.like([e[i] if i in e else torch.zeros_like(t) for i, t in enumerate(w)], gradient.holes)


def _sgd_step(group: Group, states: Sequence[Group], w: Vector, g: Vector) -> Vector:
    g = _downhill(group, w, g, group["weight_decay"])
    if group["momentum"]:
        # The first momentum buffer is the gradient, without dampening.
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
    """Returns Adam's step count for each parameter, including the next step, without a device synchronisation."""
    on_device = group["capturable"] or group["fused"]
    counts = [None if s.get("step") is None else local(s["step"]) for s in states]
    zeros = (torch.zeros((), device=t.device if on_device else "cpu") for t in w)
    t = torch.stack([zero if count is None else count for count, zero in zip(counts, zeros, strict=True)]) + 1
    return t.double() if t.is_cpu else t


def _each(factors: Tensor) -> list[float] | Tensors:
    return factors.tolist() if factors.is_cpu else factors.unbind()


def _scalar(value: Scalar) -> Scalar:
    """Returns a setting that may be a tensor with one entry, as a number if that needs no device synchronisation."""
    if isinstance(value, Tensor):
        return float(value) if value.is_cpu else value.reshape(())
    return value
