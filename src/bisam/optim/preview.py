"""Preview: the next step of an optimizer, computed before it is taken.

With it a method evaluates the loss at the end of the next step, before the weights have changed:

    e = next_step(optimizer)(g, oracle)             # what optimizer.step() would add to the weights with g in .grad
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, SparseAdam

from bisam.distributed.layout import local
from bisam.optim.copies import copied, is_optimizer, take_step
from bisam.optim.decoupled import Decoupled
from bisam.optim.lookahead import Lookahead
from bisam.optim.wrapper import is_of_framework
from bisam.oracle import Oracle
from bisam.vector import Scalar, Tensors, Vector, as_real

Group = Mapping[str, Any]
"""The settings of a parameter group, or the state of one parameter."""

Step = Callable[[Group, Sequence[Group], Vector, Vector], Vector]
"""From a group, the states of its parameters, their weights and their gradient to their displacement."""


def next_step(optimizer: Optimizer) -> Preview:
    """Returns a function `(gradient, oracle) -> displacement` that computes the next step of an optimizer.

    The displacement is what `optimizer.step()` would add to the weights if `gradient` were in `.grad`. The optimizer,
    its hooks and the random generators are not touched. See `Preview` for what it costs.

    Args:
        optimizer: any optimizer whose step needs neither a closure nor sparse gradients: those of torch except LBFGS
            and SparseAdam, subclasses of them, those of other packages, `Lookahead`; also as wrapped by Lightning or
            Accelerate. The step of a `Decoupled` is that without the term. If several optimizers train a model, add
            their displacements: `lambda g, oracle: next_step(muon)(g, oracle) + next_step(adamw)(g, oracle)`.

    Raises:
        TypeError: `optimizer` is not an optimizer, or its step needs a closure or sparse gradients.

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
    optimizer = _unwrapped(optimizer)
    _check(optimizer)
    return Preview(optimizer)


@dataclass(frozen=True, repr=False)
class Preview:
    """A function that computes the next step of an optimizer from its settings and state at the time of the call.

    Created by `next_step`. It does not include operations of the training loop on gradients, such as clipping, nor
    hooks of the optimizer. For SGD, Adam and AdamW it is a formula. Other optimizers, also subclasses of these, take
    the step on copies: during the call they take the memory of the weights, of the gradient and of the optimizer's
    state once more, and what the step itself allocates; the copies of the weights become the result. A step that draws
    random numbers, as for stochastic rounding, draws those that the generators would give now. Parameters of the
    optimizer that are not in the model have no gradient in the previewed step.

    Args:
        optimizer: the optimizer, which is read and not changed.
    """

    optimizer: Optimizer

    def __repr__(self) -> str:
        return f"next_step({type(self.optimizer).__name__})"

    def __call__(self, gradient: Vector, oracle: Oracle) -> Vector:
        """Returns the displacement; zero for parameters that the optimizer does not hold, or does not move.

        Raises:
            TypeError: the optimizer cannot be copied.
            ValueError: the optimizer holds none of the parameters.
        """
        position = {p: i for i, p in enumerate(oracle.parameters)}
        if not _holds(self.optimizer, position):
            raise ValueError(
                f"the {type(self.optimizer).__name__} holds none of the model's parameters, so its next step does not "
                "move them: give next_step the optimizer that trains this model"
            )
        w, e = oracle.weights, _displacements(self.optimizer, oracle.weights, gradient, position)
        return w.like([e[i] if i in e else torch.zeros_like(t) for i, t in enumerate(w)], gradient.holes - e.keys())


def momentum_of(optimizer: Optimizer) -> Momentum:
    """Returns a function `oracle -> momentum` that reads the momentum of an optimizer, for `MomentumSAM`.

    Args:
        optimizer: an optimizer with a momentum in the state of its parameters: SGD with momentum ("momentum_buffer"),
            Adam, AdamW and others of their kind ("exp_avg"), `Lookahead` around one, also as wrapped by Lightning or
            Accelerate. It is read and not changed.

    Raises:
        TypeError: `optimizer` is not an optimizer.

    Example:
        >>> import torch
        >>> from bisam import MomentumSAM, SharpnessAware, cross_entropy, momentum_of
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> sharp = SharpnessAware(model, MomentumSAM(0.3, buffer=momentum_of(optimizer)), cross_entropy)
    """
    optimizer = _unwrapped(optimizer)
    if not is_optimizer(optimizer):
        raise TypeError(f"momentum_of takes the optimizer of the training loop, got {optimizer!r}")
    return Momentum(optimizer)


@dataclass(frozen=True, repr=False)
class Momentum:
    """A function that returns the momentum of an optimizer at the time of the call. Created by `momentum_of`.

    Args:
        optimizer: the optimizer, which is read and not changed.
    """

    optimizer: Optimizer

    def __repr__(self) -> str:
        return f"momentum_of({type(self.optimizer).__name__})"

    def __call__(self, oracle: Oracle) -> Vector | None:
        """Returns the momentum, with holes at parameters that have none; None if none has, as before the first step.

        Raises:
            ValueError: the optimizer holds none of the parameters, or has taken steps with them and has no momentum.
        """
        states = [self.optimizer.state.get(p, {}) for p in oracle.parameters]  # state[p] would add an entry
        found = [next((s[n] for n in _MOMENTA if s.get(n) is not None), None) for s in states]
        if all(m is None for m in found):
            if not _holds(self.optimizer, set(oracle.parameters)):
                raise ValueError(
                    f"the {type(self.optimizer).__name__} holds none of the model's parameters, and has no momentum of "
                    "them: give momentum_of the optimizer that trains this model"
                )
            if any(states) or any("momentum" in g and not g["momentum"] for g in self.optimizer.param_groups):
                raise ValueError(
                    f"the {type(self.optimizer).__name__} keeps no momentum ({' or '.join(_MOMENTA)}): use "
                    "MomentumSAM(momentum=...), which has one of its own"
                )
            return None
        holes = frozenset([i for i, m in enumerate(found) if m is None])
        w = oracle.weights
        return w.like([torch.zeros_like(t) if m is None else local(m) for m, t in zip(found, w, strict=True)], holes)


_MOMENTA = ("momentum_buffer", "exp_avg")


def _holds(optimizer: Any, parameters: Container[Tensor]) -> bool:
    """Whether the optimizer holds any of the parameters."""
    return any(p in parameters for group in optimizer.param_groups for p in group["params"])


def _unwrapped(optimizer: Any) -> Any:
    # The term of a Decoupled is that of the present gradient, and not known in advance.
    while isinstance(optimizer, Decoupled) or is_of_framework(optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _check(optimizer: Any) -> None:
    if not is_optimizer(optimizer):
        raise TypeError(f"next_step takes the optimizer of the training loop, got {optimizer!r}")
    kind = type(optimizer)
    if kind is Lookahead:
        _check(_unwrapped(optimizer.optimizer))
    remedy = "use another optimizer, or write the displacement of its step as a function (gradient, oracle) -> Vector"
    if isinstance(optimizer, SparseAdam):
        raise TypeError(f"next_step has no sparse gradients, and {kind.__name__} needs them: {remedy}")
    optional = Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD
    _, *others = signature(kind.step).parameters.values()
    if needs := [p.name for p in others if p.default is Parameter.empty and p.kind not in optional]:
        raise TypeError(
            f"next_step asks for a step without arguments, and that of {kind.__name__} needs {', '.join(needs)}: "
            f"{remedy}"
        )


def _displacements(optimizer: Any, w: Vector, g: Vector, position: Mapping[Tensor, int]) -> dict[int, Tensor]:
    """Returns the displacements of the parameters that the next step may move, by their positions in the model."""
    if type(optimizer) is Lookahead:
        inside = _displacements(_unwrapped(optimizer.optimizer), w, g, position)
        held = {position[p]: p for group in optimizer.param_groups for p in group["params"] if p in position}
        fast = {i: w.tensors[i] + inside[i] if i in inside else w.tensors[i] for i in held}
        after = {i: optimizer.after_step(p, w.tensors[i], fast[i]) for i, p in held.items()}
        return {i: new - w.tensors[i] for i, new in after.items() if i in inside or new is not w.tensors[i]}
    if type(optimizer) in _STEPS:  # not of a subclass, whose step may differ
        return _by_formula(_STEPS[type(optimizer)], optimizer, w, g, position)
    return _on_copies(optimizer, w, g, position)


def _by_formula(
    step: Step, optimizer: Optimizer, w: Vector, g: Vector, position: Mapping[Tensor, int]
) -> dict[int, Tensor]:
    e = dict[int, Tensor]()
    for group in optimizer.param_groups:
        held = {position[p]: p for p in group["params"] if p in position}
        if moving := [i for i in held if i not in g.holes]:
            states = [optimizer.state.get(held[i], {}) for i in moving]  # state[p] would add an entry
            parts = (Vector([v.tensors[i] for i in moving]) for v in (w, g))
            e.update(zip(moving, step(group, states, *parts), strict=True))
    return e


@torch.no_grad()
def _on_copies(optimizer: Any, w: Vector, g: Vector, position: Mapping[Tensor, int]) -> dict[int, Tensor]:
    held = {p: position[p] for group in optimizer.param_groups for p in group["params"] if p in position}
    weights = {p: w.layout.wrapped(i, w.tensors[i].clone()) for p, i in held.items()}
    # Clones, because a step may change a gradient in place, as those of the package schedulefree do.
    gradients = {
        p: w.layout.wrapped(i, g.tensors[i].resolve_conj().clone()) for p, i in held.items() if i not in g.holes
    }
    copies, twin = copied(optimizer, weights, gradients)
    versions = {p: new._version for p, new in copies.items()}
    del weights, gradients
    take_step(twin)
    moved = [p for p, new in copies.items() if held[p] not in g.holes or new._version != versions[p]]
    new = [local(copies[p].detach()) for p in moved]
    torch._foreach_sub_(new, [w.tensors[held[p]] for p in moved])
    return {held[p]: part for p, part in zip(moved, new, strict=True)}


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


_STEPS: dict[type, Step] = {
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
