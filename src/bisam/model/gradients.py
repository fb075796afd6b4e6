"""Gradients: checks before a gradient is computed, loss scaling, and the conversion to a Vector."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from bisam.batches import Batch
from bisam.vector import Layout, Tensors, Vector

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


@contextmanager
def silenced(hooks: Sequence[dict[int, Any]]) -> Generator[None]:
    """A context without these hooks of parameters, which must run once, on the gradient that reaches `.grad`."""
    kept = [dict(of_one) for of_one in hooks]
    for of_one in hooks:
        of_one.clear()
    try:
        yield
    finally:
        for of_one, contents in zip(hooks, kept, strict=True):
            of_one.update(contents)


def filled(
    grads: Sequence[Tensor | None],
    layout: Layout,
    weights: Callable[[], Vector],
    names: Callable[[], Sequence[str]],
) -> Vector:
    """Converts gradients to a Vector; where autograd returned None it has zeros and a hole.

    Args:
        grads: the result of autograd.
        layout: the layout of the weights.
        weights: returns the weights, whose shapes the zeros have.
        names: returns the parameters' names, for the error message.

    Raises:
        ValueError: a gradient is sparse.
    """
    holes: frozenset[int] = frozenset()
    if type(None) in {type(g) for g in grads}:
        holes = frozenset([i for i, g in enumerate(grads) if g is None])
        grads = [torch.zeros_like(w) if g is None else g for g, w in zip(grads, weights(), strict=True)]
    dense = cast(Tensors, grads)
    if {g.layout for g in dense} != {torch.strided}:
        i, kind = next((i, g.layout) for i, g in enumerate(dense) if g.layout is not torch.strided)
        raise ValueError(
            f"the gradient of {names()[i]} is sparse ({kind}), and a displacement of the weights is dense: "
            "use sparse=False in the embedding"
        )
    if any(g.is_conj() or g.is_neg() for g in dense):  # computed later, which not all operations on lists support
        dense = [g.resolve_conj().resolve_neg() for g in dense]
    return Vector(dense, holes, layout)


def check_trainable(model: nn.Module, parameters: Sequence[Tensor], batch: Batch, losses: Tensor) -> None:
    """Checks that the losses have a gradient with respect to the parameters, and that the batch requires none.

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
    if any(isinstance(t, Tensor) and t.requires_grad for t in batch):
        raise ValueError(
            "a tensor of the batch needs a gradient, and none would reach it: detach it, or put the module that "
            "made it into the model"
        )


def check_strangers(losses: Tensor, parameters: Iterable[Tensor]) -> None:
    """Checks that the losses depend on no other leaf tensors than the parameters, which would silently not be trained.

    Raises:
        ValueError: they do; the message shows the number and the shapes of these tensors.
    """
    known = {id(p) for p in parameters}
    todo, seen, shapes = [losses.grad_fn], set[Any](), list[tuple[int, ...]]()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf: Tensor | None = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            shapes.append(tuple(leaf.shape))
        todo += [following for following, _ in node.next_functions]
    if shapes:
        raise ValueError(
            f"the loss depends on {len(shapes)} tensors that need a gradient and are no parameters of the model "
            f"(shapes {', '.join(map(str, shapes[:3]))}{', ...' if len(shapes) > 3 else ''}): they would not be "
            "trained. Put them into the model, or pass a loss with parameters as an nn.Module"
        )
