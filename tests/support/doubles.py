"""Test doubles: oracles without a model, losses that act in one of their calls, and a recording progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bisam import Evaluation, Oracle, Vector, cross_entropy
from bisam.oracle import Query, View

ROWS = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.double)
"""A batch for `Quadratic`."""


class Quadratic(Oracle):
    """The mean over the rows a of the batch of f(w) = sum_i a_i (w_i - 1)^2 / 2, in closed form."""

    def __init__(self, *w: float) -> None:
        self.weights, self.names, self.state = Vector([torch.tensor(w, dtype=torch.double)]), ["w"], {}

    def ask(self, queries: Sequence[Query]) -> list[Evaluation]:
        return [self._answer(query.batch[0], query.take(), query.grad) for query in queries]

    def _answer(self, a: Tensor, at: Vector | None, grad: bool) -> Evaluation:
        (w,) = self.weights if at is None else self.weights + at
        return Evaluation((a * (w - 1) ** 2 / 2).sum(1), Vector([a.mean(0) * (w - 1)]) if grad else None)


class Recorder(Quadratic):
    """Also keeps the queries and the number of queries of each call."""

    def __init__(self, *w: float) -> None:
        super().__init__(*w)
        self.seen: list[tuple[Any, ...]] = []
        self.groups: list[int] = []
        self.layers, self.loss = ["LayerNorm"], cross_entropy
        self.parameters = [nn.Parameter(self.weights.tensors[0])]

    def ask(self, queries: Sequence[Query]) -> list[Evaluation]:
        self.groups.append(len(queries))
        self.seen += [(None if q.at is None else q.at.tensors[0].tolist(), q.grad, q.track) for q in queries]
        return super().ask(queries)


def shift(*values: float) -> Vector:
    return Vector([torch.tensor(values, dtype=torch.double)])


class Counting(View):
    """Counts queries that compute gradients, of a part of the weights or of all, and those that do not.

    The unit is a batch of `size` examples.
    """

    def __init__(self, oracle: Oracle, counts: dict[str, float], size: int) -> None:
        super().__init__(oracle)
        self.counts, self.size = counts, size

    def ask(self, queries: Sequence[Query]) -> list[Evaluation]:
        for query in queries:
            share = len(query.batch[0]) / self.size
            self.counts["gradients" if query.grad else "forwards"] += share
            self.counts["partial"] += share if query.grad and query.wrt is not None else 0
        return super().ask(queries)


# Actions in the k-th call.


def at_call(k: int, action: Callable[[], Any]) -> Callable[..., Any]:
    """A hook that acts on the k-th call."""
    calls = iter(range(1, 100))
    return lambda *_: action() if next(calls) == k else None


def throw(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


class ActingLoss:
    """Cross-entropy that runs `action` in its k-th call."""

    def __init__(self, k: int = 0, action: Callable[[Tensor], Tensor] = lambda losses: losses) -> None:
        self.k, self.action, self.calls = k, action, 0

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        losses = cross_entropy(outputs, targets)
        return self.action(losses) if self.calls == self.k else losses


def failing(objective: Callable[..., Tensor], check: Callable[[], Any]) -> Callable[..., Tensor]:
    """The objective, after `check`, which may raise."""

    def call(outputs: Tensor, targets: Tensor) -> Tensor:
        check()
        return objective(outputs, targets)

    return call


class Silent:
    """The progress of several runs: keeps each epoch, each measure and each end."""

    def __init__(self) -> None:
        self.started = (0, 0)
        self.begun: list[tuple[Any, int]] = []
        self.elsewhere: list[Any] = []
        self.epochs: list[tuple[Any, int]] = []
        self.measures: list[tuple[Any, str, int]] = []
        self.ended: dict[Any, str | None] = {}

    def starting(self, processes: int, runs: int) -> None:
        self.started = (processes, runs)

    def begins(self, recipe: Any, worker: int) -> None:
        self.begun.append((recipe, worker))

    def epoch(self, recipe: Any, epoch: int, validation: Any) -> None:
        self.epochs.append((recipe, epoch))

    def measuring(self, recipe: Any, measure: str, completed: int) -> None:
        self.measures.append((recipe, measure, completed))

    def done(self, recipe: Any, error: str | None, elsewhere: bool = False) -> None:
        self.ended[recipe] = error
        if elsewhere:
            self.elsewhere.append(recipe)
