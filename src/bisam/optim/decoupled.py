"""Decoupled: an optimizer that applies a term of a method outside of its own update, with the learning rate alone.

WSAM decouples the sharpness as AdamW decouples weight decay: the term reaches neither the momentum nor the
preconditioner.

    sharp = SharpnessAware(model, WSAM(0.05, gamma=0.9, decouple=True), cross_entropy)
    optimizer = Decoupled(AdamW(model.parameters(), lr=1e-3), sharp)

The method returns the term in `Evaluation.decoupled`. `backward()` of the loss adds it to a `DecoupledTerm`, as
autograd adds the gradient to `.grad`, and the step of the optimizer takes it from there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from bisam.distributed.ddp import Averaging
from bisam.distributed.layout import ShardedLayout, local
from bisam.optim.lookahead import Lookahead
from bisam.optim.wrapper import OptimizerWrapper, check_wrapped
from bisam.validation import positive
from bisam.vector import TINY, WHOLE, Tensors, Vector


class DecoupledTerm:
    """The decoupled terms of parameters that await the next step of an optimizer.

    It accumulates over backward passes, and what is there is dropped with `.grad`, as by `model.zero_grad()`: before
    the next gradient of any loss is stored, the terms of parameters without `.grad` are removed, and all of them become
    zero if each `.grad` is zero. Copies and pickles are empty, as those of parameters have no `.grad`.
    """

    def __init__(self) -> None:
        self._pending: dict[Tensor, _Pending] = {}
        self._optimizers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._task = -1  # the backward pass that has looked for gradients which were dropped

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        DecoupledTerm.__init__(self)

    @property
    def is_applied(self) -> bool:
        """Whether an optimizer exists that applies the terms."""
        return len(self._optimizers) > 0

    def applied_by(self, optimizer: Any) -> None:
        """Declares that an optimizer applies the terms of its parameters."""
        self._optimizers.add(optimizer)

    def add(
        self,
        parameters: Sequence[Tensor],
        terms: Tensors,
        nodes: Mapping[Tensor, Any],
        averaging: Averaging | None = None,
        averaged: bool = False,
    ) -> None:
        """Adds the terms of a backward pass; call it in that pass.

        Args:
            parameters: the parameters.
            terms: new tensors, one for each parameter; if that is a DTensor, the local part.
            nodes: for each parameter the node of the graph that stores its gradient; none if it gets no gradient.
            averaging: the averaging of gradients over replicas; None if these terms are those of all ranks.
            averaged: whether it averages the gradients of this pass.

        Raises:
            RuntimeError: the pass is that of `torch.autograd.grad`, which stores no gradient.
        """
        # The graph task: in one backward pass several losses may add terms before autograd stores the first gradient.
        task = torch._C._current_graph_task_id()
        self._begin(task)
        for p, t in zip(parameters, terms, strict=True):
            node = nodes.get(p)
            if node is not None and not _stores(node):
                continue  # as with backward(inputs=...) of other parameters
            each = self._pending.setdefault(p, _Pending())
            each.averaging, each.averaged = averaging, averaged
            if node is None:
                each.include(t)
                continue
            each.staged = t if each.staged is None or each.task != task else t.add_(each.staged)
            each.task = task
            if each.node is not node:
                each.release()
                each.node, each.handle = node, node.register_prehook(_calling(self, p))

    def take(self, parameters: Sequence[Tensor]) -> dict[Tensor, Tensor]:
        """Returns the terms of those parameters that have one, averaged over replicas, and removes them here."""
        found = {p: each for p in parameters if (each := self._pending.get(p)) is not None and each.term is not None}
        self.drop(parameters)
        terms = [each.term for each in found.values() if each.term is not None]
        averaging = next((each.averaging for each in found.values() if each.averaged), None)
        return dict(zip(found, terms if averaging is None else averaging.peers.mean(terms), strict=True))

    def drop(self, parameters: Sequence[Tensor]) -> None:
        """Removes the terms of parameters."""
        for p in parameters:
            if (each := self._pending.pop(p, None)) is not None:
                each.release()

    def before_storing(self, parameter: Tensor) -> None:
        """Includes the staged term of a parameter; called before a backward pass stores a gradient of it."""
        task = torch._C._current_graph_task_id()
        self._begin(task)
        each = self._pending.get(parameter)
        if each is not None and each.staged is not None and each.task == task:
            each.include(each.staged)
            each.staged = None

    @torch.no_grad()
    def _begin(self, task: int) -> None:
        """Drops what was dropped of `.grad`, before a backward pass adds to it."""
        if task == self._task:
            return
        self._task = task
        there = list[tuple[Tensor, _Pending, Tensor]]()
        for p, each in self._pending.items():
            if each.term is None or each.node is None:
                continue
            if p.grad is None:
                each.term = None
            else:
                there.append((local(p.grad), each, each.term))
        if not there:
            return
        norms = torch._foreach_norm([torch.view_as_real(g) if g.is_complex() else g for g, *_ in there], 1)
        # All at once: a single parameter may have a gradient of zero and a term, as one behind weights of zero.
        zero = torch.stack([norm.to(norms[0].device, norms[0].dtype) for norm in norms]).eq(0).all()
        for _, each, term in there:
            term.masked_fill_(zero.to(term.device), 0)  # not a product: it may be infinite
            if each.averaging is not None:
                each.averaged = each.averaging.is_in_this_pass()


@dataclass
class _Pending:
    """The term of a parameter.

    Attributes:
        term: that of the passes whose gradient is in `.grad`.
        staged: that of a pass which has not stored its gradient yet, and never does if it fails.
        task: the graph task of that pass.
        node: the node of the graph that stores the gradient; it is kept alive, so that other graphs use it too.
        handle: that of the hook of the node.
        averaging: see `DecoupledTerm.add`.
        averaged: see `DecoupledTerm.add`.
    """

    term: Tensor | None = None
    staged: Tensor | None = None
    task: int = -1
    node: Any = None
    handle: Any = None
    averaging: Averaging | None = None
    averaged: bool = False

    def include(self, term: Tensor) -> None:
        """Adds to the term."""
        self.term = term if self.term is None else term.add_(self.term)

    def release(self) -> None:
        """Removes the hook."""
        if self.handle is not None:
            self.handle.remove()


def _calling(term: DecoupledTerm, parameter: Tensor) -> Callable[[Any], None]:
    """Returns a hook that calls `before_storing`, without a reference cycle through the graph."""
    to, of = weakref.ref(term), weakref.ref(parameter)

    def hook(_: Any) -> None:
        if (there := to()) is not None and (p := of()) is not None:
            there.before_storing(p)

    return hook


def _stores(node: Any) -> bool:
    """Whether the present backward pass runs the node that stores a gradient.

    Raises:
        RuntimeError: the pass is that of `torch.autograd.grad`.
    """
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError as error:
        if "autograd.grad" not in str(error):
            raise
        raise RuntimeError(
            "torch.autograd.grad stores no gradient in .grad, and the sharpness term of this loss (decouple=True) is "
            "applied together with .grad: call backward(), or use WSAM without decouple where the gradient is for "
            "something else than the step"
        ) from error


class HasDecoupledTerm(Protocol):
    """A loss whose method has a decoupled term: a `SharpnessAware`."""

    def decoupled_term(self) -> DecoupledTerm:
        """Returns where `backward()` adds the term."""
        ...


class Decoupled(OptimizerWrapper):
    """Adds -lr d to the steps of an optimizer, where d is the decoupled term of a loss: WSAM (Yue et al., 2023).

    Source: https://arxiv.org/abs/2305.15817. With `WSAM(decouple=True)` the optimizer steps with the gradient g at the
    weights, and then w <- w - lr gamma/(1 - gamma) (h - g), where h is the gradient at w + e and lr the learning rate
    of the parameter group. This is the default of the authors' code (`WeightedSAM` in
    https://github.com/intelligent-machine-learning/dlrover, atorch/atorch/optimizers/wsam.py), which was read for this
    class; of the paper itself only descriptions were. With SGD without momentum it is the step of `WSAM` without
    `decouple`.

    It replaces the wrapped optimizer in schedulers, scalers and checkpoints: parameter groups and state are those of
    the wrapped optimizer, and the term is applied with the learning rate that a group has at the step. Between
    `backward()` and `step()` the term is treated as `.grad` is: it is accumulated over micro-batches, averaged over the
    ranks of DistributedDataParallel, dropped by `zero_grad()`, and not applied in a step that a GradScaler skips, nor
    to parameters whose `.grad` is None. Give the GradScaler to the loss too, `SharpnessAware(..., scaler=scaler)`,
    which removes its factor from the term. If the term is not finite, the gradient is not finite either.
    `torch.autograd.grad` of the loss stores no `.grad`, and raises an error. Under FSDP2, where gradients of other
    losses reach `.grad` without autograd, call the `zero_grad()` of the optimizer and not that of the model after a
    step that was left out.

    Clipping of `.grad` and hooks of parameters change g alone; `max_norm` bounds the term. (The authors' code clips
    both g and h to a norm of 1 by default.) If an optimizer keeps further copies of the weights, as schedule-free ones
    do, these do not get the term. If it finds the size of its steps itself and has a learning rate of 1, as those of
    D-Adaptation and Prodigy, the term is far too large. `Lookahead(Decoupled(...))` is possible, the other order is
    not.

    Args:
        optimizer: the wrapped optimizer, which takes the steps. It needs a learning rate `lr`, and evaluates a closure
            once.
        sharp: the loss, `SharpnessAware(model, WSAM(decouple=True), ...)`. If several optimizers train its model, wrap
            each of them.
        max_norm: largest norm of the term over all parameters of this optimizer, > 0; a longer term is scaled to it.
            Default: no limit.

    Raises:
        TypeError: `optimizer` is not an optimizer, needs several evaluations (LBFGS), or is a `Lookahead` or the
            wrapper of a framework; `sharp` is no `SharpnessAware`; or `max_norm` is not a number.
        ValueError: the method of `sharp` has no decoupled term, a parameter group has no `lr`, or `max_norm` is not
            positive and finite.

    Example:
        >>> import torch
        >>> from bisam import WSAM, Decoupled, SharpnessAware, cross_entropy
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(4, 3)
        >>> sharp = SharpnessAware(model, WSAM(0.05, gamma=0.9, decouple=True), cross_entropy)
        >>> optimizer = Decoupled(torch.optim.AdamW(model.parameters(), lr=1e-3), sharp, max_norm=1.0)
        >>> schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     sharp(x, y).backward()
        ...     optimizer.step()
        ...     schedule.step()
    """

    max_norm: float | None
    _term: DecoupledTerm

    def __init__(self, optimizer: Optimizer, sharp: HasDecoupledTerm, max_norm: float | None = None) -> None:
        check_wrapped("Decoupled", optimizer, "Decoupled(torch.optim.AdamW(model.parameters(), lr=1e-3), sharp)")
        if isinstance(optimizer, Lookahead):
            name = type(optimizer).__name__
            raise TypeError(
                f"a {name} inside of Decoupled would not include the term in its slow updates: write "
                f"{name}(Decoupled(optimizer, sharp), ...)"
            )
        if isinstance(optimizer, LBFGS):
            raise TypeError(
                "LBFGS evaluates its closure several times in a step, and the decoupled term is that of one "
                "evaluation: use another optimizer, or WSAM without decouple"
            )
        if not callable(getattr(cast(Any, sharp), "decoupled_term", None)):
            raise TypeError(f"sharp must be the SharpnessAware loss whose term is applied, got {sharp!r}")
        if lacking := [i for i, group in enumerate(optimizer.param_groups) if "lr" not in group]:
            raise ValueError(
                f"the term is applied with the learning rate of a parameter group, and groups {lacking} of "
                f"{type(optimizer).__name__} have no 'lr': use WSAM without decouple"
            )
        if max_norm is not None:
            positive("max_norm", max_norm)
        self.__setstate__({"optimizer": optimizer, "max_norm": max_norm, "_term": sharp.decoupled_term()})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Takes one step of the wrapped optimizer, and then one with the term alone."""
        loss = self.inner_step(closure)
        self._apply()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients, as the wrapped optimizer does, and the term."""
        super().zero_grad(set_to_none)
        self._term.drop(self.parameters)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("optimizer", "max_norm", "_term")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._term.applied_by(self)

    def __repr__(self) -> str:
        limit = "" if self.max_norm is None else f", max_norm={self.max_norm}"
        return f"Decoupled({self.optimizer!r}{limit})"

    @torch.no_grad()
    def _apply(self) -> None:
        terms = self._term.take(self.parameters)
        if terms and self.max_norm is not None:
            d = Vector([*terms.values()], layout=ShardedLayout.of([*terms]) or WHOLE)
            terms = dict(zip(terms, d * (self.max_norm / (d.norm() + TINY)).clamp_max(1.0), strict=True))
        for group in self.param_groups:
            if moving := [p for p in group["params"] if p in terms and p.grad is not None]:
                rate = group["lr"] if group.get("maximize") else -group["lr"]
                weights, steps = [local(p) for p in moving], [terms[p] for p in moving]
                if isinstance(rate, Tensor):
                    torch._foreach_add_(weights, torch._foreach_mul(steps, rate.view(())))  # optimizers take (1,) too
                else:
                    torch._foreach_add_(weights, steps, alpha=rate)
