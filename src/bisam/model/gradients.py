"""Gradients: checks before a gradient is computed, loss scaling, and the conversion to a Vector."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from bisam.vector import Layout, Tensors, Vector, with_zeros

Scaler = torch.amp.GradScaler | Callable[[], float | Tensor]
"""The factor of float16 losses: a GradScaler, or a callable that returns the factor."""


class LossScale:
    """Scales the loss of each query, so that float16 gradients do not underflow, and records overflows.

    Args:
        scaler: a `torch.amp.GradScaler`, or a callable that returns the factor.
    """

    def __init__(self, scaler: Scaler) -> None:
        self._scaler = scaler
        self.overflow: Tensor | None = None
        """0 if all gradients were finite, else NaN; None before the first gradient."""

    def factor(self, device: torch.device) -> Tensor:
        """Returns the factor on a device.

        Raises:
            ValueError: the GradScaler belongs to another type of device.
        """
        one = torch.ones((), device=device)
        if isinstance(self._scaler, torch.amp.GradScaler):
            if self._scaler.is_enabled() and self._scaler._device != device.type:
                raise ValueError(
                    f"the scaler belongs to losses on {self._scaler._device}, and this one is on {device.type}: give "
                    f"the loss and the loop the same torch.amp.GradScaler({device.type!r})"
                )
            return self._scaler.scale(one)  # not get_scale(), which synchronises with the device
        return one * self._scaler()

    def note(self, gradient: Vector) -> None:
        """Records an overflow in a gradient: the gradient of the loss becomes NaN, and the scaler skips the step."""
        overflow = gradient.norm() * 0
        self.overflow = overflow if self.overflow is None else self.overflow + overflow


class Hooks:
    """Hooks of parameters, which must run once per step, on the gradient that reaches `.grad`.

    Args:
        hooks: the hooks of each parameter.
    """

    def __init__(self, hooks: Sequence[dict[int, Any]]) -> None:
        self._hooks = hooks
        self._kept: list[dict[int, Any]] | None = None

    @contextmanager
    def silenced(self) -> Generator[None]:
        """A context in which the hooks do not run."""
        self._kept = [dict(of_one) for of_one in self._hooks]
        try:
            for of_one in self._hooks:
                of_one.clear()
            yield
        finally:
            self.restore()

    def restore(self) -> None:
        """Restores the hooks; also after an interruption at any moment, and more than once."""
        if self._kept is not None:
            for of_one, contents in zip(self._hooks, self._kept, strict=True):
                of_one.update(contents)
            self._kept = None


def filled(
    grads: Sequence[Tensor | None],
    layout: Layout,
    weights: Callable[[], Vector],
    names: Callable[[], Sequence[str]],
    wrt: Sequence[bool] | None = None,
) -> Vector:
    """Converts gradients to a Vector; where autograd returned None, or was not asked, it has zeros and a hole.

    Args:
        grads: the result of autograd, with None at the weights that it was not asked for.
        layout: the layout of the weights.
        weights: returns the weights, whose shapes the zeros have.
        names: returns the parameters' names, for the error message.
        wrt: see `Query`.

    Raises:
        ValueError: a gradient is sparse.
    """
    holes: frozenset[int] = frozenset()
    if type(None) in {type(g) for g in grads}:
        holes, like = frozenset([i for i, g in enumerate(grads) if g is None]), weights().tensors
        asked = [True] * len(grads) if wrt is None else wrt
        grads = [torch.zeros_like(w) if g is None and a else g for g, a, w in zip(grads, asked, like, strict=True)]
        grads = with_zeros(grads, like)
    dense = cast(Tensors, grads)
    if {g.layout for g in dense} != {torch.strided}:
        i, kind = next((i, g.layout) for i, g in enumerate(dense) if g.layout is not torch.strided)
        raise ValueError(
            f"the gradient of {names()[i]} is sparse ({kind}), and a displacement of the weights is dense: "
            "use sparse=False in the embedding"
        )
    # Conjugated or negated lazily, which not all operations on lists support; `map`, because this runs in each query.
    if any(map(Tensor.is_conj, dense)) or any(map(Tensor.is_neg, dense)):
        dense = [g.resolve_conj().resolve_neg() for g in dense]
    return Vector(dense, holes, layout)


def check_trainable(model: nn.Module, parameters: Sequence[Tensor], losses: Tensor, given: bool) -> None:
    """Checks that the losses have a gradient with respect to the parameters, and that the batch required none.

    Args:
        model: the model.
        parameters: its trainable parameters.
        losses: the losses, with their graph.
        given: whether a tensor of the batch required a gradient before the forward pass.

    Raises:
        ValueError: no parameter is trainable, the losses have no graph, or a tensor of the batch requires a gradient.
    """
    if not parameters:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter: call requires_grad_() on those to be "
            "trained, or model.eval() to evaluate"
        )
    if not losses.requires_grad:
        raise ValueError(
            "the loss does not depend on the trainable parameters: it was detached, computed under no_grad, or "
            "made of something that has no gradient, such as an accuracy"
        )
    if given:
        raise ValueError(
            "a tensor of the batch needs a gradient, and none would reach it: detach it, or put the module that "
            "made it into the model. For derivatives with respect to an input, as in a physics-informed loss, call "
            "x = x.detach().requires_grad_() inside `forward`"
        )


class Strangers:
    """Finds leaf tensors that the loss depends on and that are not trained, in the first graphs of a training run.

    A parameter of another module is one. Any other leaf may also have been made by `forward` or the loss itself, for
    derivatives with respect to an input: such a leaf is another tensor in each graph.
    """

    def __init__(self) -> None:
        self._before: list[Tensor] | None = None
        self.done = False

    def check(self, losses: Tensor, known: Iterable[Tensor]) -> None:
        """Checks a graph.

        Args:
            losses: the losses, with their graph.
            known: the parameters and the tensors of the batch.

        Raises:
            ValueError: there is such a tensor; the message shows their number and shapes.
        """
        found = _leaves(losses, {id(t) for t in known})
        before = self._before or []
        strangers = [t for t in found if isinstance(t, nn.Parameter) or any(t is other for other in before)]
        if strangers:
            shapes = [tuple(t.shape) for t in strangers]
            raise ValueError(
                f"the loss depends on {len(shapes)} tensors that need a gradient and are no parameters of the model "
                f"(shapes {', '.join(map(str, shapes[:3]))}{', ...' if len(shapes) > 3 else ''}): they would not be "
                "trained. If this loss is to train them, put them into the model, or pass a loss with parameters as an "
                "nn.Module. If not (a teacher, or the discriminator in the loss of a generator), call "
                "requires_grad_(False) on them before this loss; where another loss trains them, call "
                "requires_grad_(True) before that one"
            )
        self.done = not found or self._before is not None
        self._before = None if self.done else found


def _leaves(losses: Tensor, known: set[int]) -> list[Tensor]:
    """Returns the leaf tensors of a graph, except those whose identity is known."""
    todo, seen, leaves = [losses.grad_fn], set[Any](), list[Tensor]()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf: Tensor | None = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            leaves.append(leaf)
        todo += [following for following, _ in node.next_functions]
    return leaves
