"""Oracle: the oracle of a stack of networks, for the library's own methods.

    answer = SAM(0.1)(StackedOracle(stack, loss), (inputs, labels))
    answer.gradient                                                        # tensors (S, ...), one gradient a network

A norm is (S,), one for each network, and so is a factor such as rho / ||g||. A batch has the examples of all networks,
one network after the other: inputs (S N, ...), labels (S N,). Losses and outputs of an answer are in the same order,
and its value is (S,).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from bisam import Evaluation, Oracle, Vector
from bisam.experiments.training.stacked.network import Stack
from bisam.objectives import Objective, at_step
from bisam.oracle import Query
from bisam.seeded import Seeded
from bisam.vector import ORDINARY, Scalar


class StackedVector(Vector):
    """Vectors of several networks, one for each: tensors (S, ...), whose norms are (S,).

    Products with a tensor (S,) have a factor for each network.
    """

    __slots__ = ()

    def __mul__(self, other: Vector | Scalar) -> StackedVector:
        if isinstance(other, Tensor) and other.dim():
            return cast(StackedVector, self.like([t * _beside(other, t) for t in self.tensors]))
        return cast(StackedVector, super().__mul__(other))

    __rmul__ = __mul__

    def __truediv__(self, other: Vector | Scalar) -> StackedVector:
        if isinstance(other, Tensor) and other.dim():
            return cast(StackedVector, self.like([t / _beside(other, t) for t in self.tensors]))
        return cast(StackedVector, super().__truediv__(other))

    def norm(self) -> Tensor:
        """The Euclidean norm of each network's vector (S,), finite if all entries are; see `Vector.norm`."""
        flat = torch.cat([t.flatten(1) for t in self.tensors], 1)
        norms = torch.linalg.vector_norm(flat, dim=1)
        ordinary = (norms > ORDINARY[0]) & (norms < ORDINARY[1])
        if bool(ordinary.all()):
            return norms
        return torch.where(ordinary, norms, torch.linalg.vector_norm(flat.double(), dim=1).to(norms.dtype))


def _beside(factors: Tensor, tensor: Tensor) -> Tensor:
    """Returns factors (S,) in a shape that multiplies a tensor (S, ...) network by network."""
    return factors.view(-1, *[1] * (tensor.dim() - 1))


class StackedOracle(Oracle):
    """The oracle of a stack in training mode.

    Args:
        stack: the networks.
        loss: the training loss, one for each example.
        step: number of losses that were computed before this one.

    Attributes:
        seen: the answer to the last query that updated running statistics.
    """

    def __init__(self, stack: Stack, loss: Objective, step: int = 0) -> None:
        self.stack, self.loss, self.step, self.state = stack, loss, step, {}
        self.names, self.layers, self.parameters = stack.names, stack.layers, list(stack.weights)
        self.weights = StackedVector([w.detach() for w in stack.weights])
        self.seen: Evaluation | None = None

    def ask(self, queries: Sequence[Query]) -> list[Evaluation]:
        """Answer queries with a gradient with respect to all weights, in series; see `Oracle.ask`."""
        return [self._answer(query) for query in queries]

    def clean(self) -> Evaluation:
        """The training loss and the outputs at the weights, with a value (S,).

        Raises:
            AssertionError: no query updated running statistics.
        """
        assert self.seen is not None, "nothing was evaluated at the weights"
        plain = self.seen.under(self.loss)
        return Evaluation(plain.losses, None, plain.outputs, self._means(plain.losses), plain.count, plain.targets)

    def _means(self, losses: Tensor) -> Tensor:
        each = losses.view(self.stack.count, -1)
        return each.sum(1) / each.shape[1]

    def _answer(self, query: Query) -> Evaluation:
        assert query.grad, "a stack computes gradients"
        assert query.buffers is None, "a stack is in training mode"
        assert query.wrt is None or all(query.wrt), "a stack computes whole gradients"
        inputs, labels = cast("tuple[Tensor, Tensor]", query.batch)
        at = query.take()
        assert not isinstance(at, Seeded), "a stack keeps copies of its weights"
        weights = [w.requires_grad_() for w in (self.weights if at is None else self.weights + at)]
        objective = at_step(self.loss if query.objective is None else query.objective, self.step)
        with torch.enable_grad():
            outputs = self.stack.train_logits(inputs.unflatten(0, (self.stack.count, -1)), weights, track=query.tracks)
            outputs = outputs.flatten(0, 1)
            losses = objective(outputs, labels)
            values = self._means(losses)
            # The networks share no weight, so that the gradient of the sum is that of each network's own loss.
            grads = torch.autograd.grad(values.sum(), weights)
        for weight in weights if at is None else ():
            weight.requires_grad_(False)
        made: dict[str, Any] = {"targets": labels, "objective": objective, "count": labels.numel()}
        answer = Evaluation(losses.detach(), StackedVector(grads), outputs.detach(), values.detach(), **made)
        if query.tracks:
            self.seen = answer
        return answer
