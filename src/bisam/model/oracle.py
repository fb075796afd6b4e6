"""ModelOracle: the oracle of a torch module.

After a query, also after one that failed, the weights are restored bit for bit and `.grad` is unchanged. Running
statistics have changed only if the query was at the weights themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from bisam import objectives
from bisam.batches import Batch, size
from bisam.distributed.placement import Scope, place
from bisam.evaluation import Evaluation
from bisam.model.buffers import Buffers
from bisam.model.gradients import LossScale, Scaler, check_strangers, check_trainable, filled, silenced
from bisam.model.parameters import inventory, layer_names, parameter_names
from bisam.model.rng import RandomState, SameNoise
from bisam.objectives import Count, Objective
from bisam.oracle import Oracle, Query
from bisam.validation import check_losses, describe
from bisam.vector import Layout, Vector

Forward = Callable[..., tuple[Any, Any]]
"""`(model, *batch) -> (outputs, targets)`."""


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """A forward pass of the model and its loss, with their graph.

    Attributes:
        outputs: the outputs of the model.
        targets: the targets that were passed to the objective.
        losses: one per example, or a scalar.
        count: number of losses that count.
        value: the mean of the losses that count.
        objective: the objective that was evaluated.
    """

    outputs: Any
    targets: Any
    losses: Tensor
    count: Count
    value: Tensor
    objective: Objective

    def detached(self) -> Evaluation:
        """Returns the pass as an Evaluation without gradient and graph."""
        outputs = self.outputs
        outputs = outputs.detach() if isinstance(outputs, Tensor) else tree_map_only(Tensor, Tensor.detach, outputs)
        losses, value = self.losses.detach(), self.value.detach()
        return Evaluation(losses, None, outputs, value, self.count, self.targets, self.objective)


class ModelOracle(Oracle):
    """The oracle of a torch module in its present state; create a new one for each training step.

    Args:
        model: the module. The weights are its trainable parameters, and those of the loss if the loss is a module.
        loss: `(outputs, targets) -> losses`, one per example or a scalar.
        forward: `(model, *batch) -> (outputs, targets)`. Default: the last element of the batch is the targets and the
            others are the inputs of the model.
        scaler: the `torch.amp.GradScaler` that scales float16 losses, or a callable that returns its factor.
        same_noise: if True, restore the random state before each query, so that all queries on a batch use the same
            dropout masks.
        scope: "global" averages gradients and values over ranks in each query, "local" does not. Default: as the
            distributed wrapper does.
        step: see `Oracle`.
        state: see `Oracle`.
        check: whether to check, in the first query, that the loss does not depend on tensors that would silently not be
            trained.

    Attributes:
        seen: answers of the queries that updated running statistics, each for this rank's batch.
        same_noise: the argument `same_noise`.
        module_buffers: the buffers of the model and the loss, which can be saved and restored.
        holes: positions of the parameters that the last gradient does not depend on.

    Example:
        >>> import torch
        >>> from bisam import ModelOracle, cross_entropy
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(4, 3)
        >>> oracle = ModelOracle(model, cross_entropy)
        >>> batch = torch.randn(8, 4), torch.randint(3, (8,))
        >>> answer = oracle.query(batch)
        >>> ahead = oracle.query(batch, at=answer.grad * 0.1)    # along the gradient the loss increases
        >>> bool(ahead.value > answer.value), model.weight.grad is None
        (True, True)
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Objective,
        forward: Forward | None = None,
        *,
        scaler: Scaler | None = None,
        same_noise: bool = False,
        scope: Scope | None = None,
        step: int = 0,
        state: dict[str, Any] | None = None,
        check: bool = True,
    ) -> None:
        self.model, self.loss, self.same_noise = model, loss, same_noise
        self.step, self.state = step, {} if state is None else state
        self.seen: list[Evaluation] = []
        self.holes: frozenset[int] = frozenset()
        self._forward = forward or _inputs_then_targets
        self._check = check
        found = inventory(model, loss)
        self.parameters: list[nn.Parameter] = found.parameters  # pyright: ignore[reportIncompatibleVariableOverride]
        self.module_buffers = Buffers(found.slots)
        self._placement = place(model, found.parameters, found.fsdp_modules, scope)
        self._hooks = [cast("dict[int, Any]", p._backward_hooks) for p in found.parameters if p._backward_hooks]
        self._hooks += self._placement.hooks(found.parameters)
        self._scale = None if scaler is None else LossScale(scaler)
        self._noise = SameNoise(found.parameters) if same_noise else None
        self.is_local = self._placement.is_local  # pyright: ignore[reportIncompatibleVariableOverride]
        self.position = self._placement.position  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def weights(self) -> Vector:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The trainable parameters; changing them changes the model."""
        # Not cached: a layer that constrains its weights may replace their memory in a forward pass.
        return self._placement.weights(self.parameters)

    @property
    def layout(self) -> Layout:
        """The layout of the weights."""
        return self._placement.layout

    @property
    def buffers(self) -> Sequence[Tensor]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The buffers of the model and of the loss."""
        return self.module_buffers.tensors

    @cached_property
    def names(self) -> Sequence[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The names of the parameters in the model; names of the loss's parameters begin with `loss.`."""
        self._drop_copies()  # the optimizer does not hold gathered parameters
        return parameter_names(self.model, self.loss, self.parameters)

    @cached_property
    def layers(self) -> Sequence[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The class names of the modules that the parameters belong to."""
        self._drop_copies()
        return layer_names(self.model, self.loss, self.parameters)

    @property
    def overflow(self) -> Tensor | None:
        """0 if all gradients so far were finite, else NaN; None if there is no scaler."""
        return None if self._scale is None else self._scale.overflow

    def averaged(self, value: Tensor, count: Count) -> tuple[Tensor, Count]:
        """See `Oracle.averaged`."""
        return self._placement.averaged(value, count, None)[:2]

    def agree(self, what: str, number: int) -> None:
        """See `Oracle.agree`."""
        self._placement.agree(what, number)

    def random_state(self) -> RandomState:
        """Returns the present state of the random generators that a forward pass draws from."""
        return RandomState(self.parameters)

    @contextmanager
    def fork(self, *key: int) -> Generator[None]:
        """A context in which `key` seeds the generators of forward passes; their state is restored at its end."""
        with self.random_state().forked(*key):
            yield

    def note_overflow(self, gradient: Vector) -> None:
        """Records an overflow in a scaled gradient, also in one of another rank, so that the scaler skips the step."""
        if self._scale is not None:
            self._scale.note(gradient)

    def ask(self, queries: Sequence[Query]) -> list[Evaluation]:
        """Answers the queries in series; see `Oracle.ask`.

        Raises:
            TypeError: `forward` or the objective returns a value of the wrong type.
            ValueError: the batch is empty; the losses have the wrong shape or no gradient; a gradient is sparse.
        """
        return [self._answer(query) for query in queries]

    def run(self, batch: Batch, objective: Objective | None = None) -> ForwardPass:
        """Runs a forward pass at the present weights and returns it with its graph.

        Args:
            batch: the batch.
            objective: objective to evaluate. Default: the training loss.

        Raises:
            TypeError: `forward` or the objective returns a value of the wrong type.
            ValueError: the batch is empty, or the losses have the wrong shape.
        """
        objective = self.loss if objective is None else objective
        if size(batch) == 0:
            raise ValueError("the batch is empty (0 examples): skip it, or use drop_last=True in the DataLoader")
        pair: Any = self._forward(self.model, *batch)
        if not (isinstance(pair, tuple) and len(pair) == 2):
            raise TypeError(
                f"`forward` must return a pair (outputs, targets), got {describe(pair)}: for example "
                "forward=lambda model, batch: (model(**batch['inputs']), batch['labels'])"
            )
        outputs, targets = pair
        mine, theirs = (getattr(o, "ignore_index", None) for o in (self.loss, objective))
        if mine != theirs and mine is not None and theirs is not None:
            raise ValueError(
                f"the loss leaves out label {mine}, and {objective!r} {theirs}: give both the same ignore_index"
            )
        losses = objective(outputs, targets)
        check_losses(losses, targets)
        count = objectives.count(losses, targets, objective) if losses.dim() else size(batch) or 1
        return ForwardPass(outputs, targets, losses, count, objectives.mean(losses, count), objective)

    def _answer(self, query: Query) -> Evaluation:
        track, at = query.tracks, query.take()
        untouched = self.module_buffers.untouched
        weights = None if at is None else self.weights
        saved = None if weights is None else weights.clone()
        buffers = None if track else self.module_buffers.remember()
        noise = None
        try:
            if at is not None and weights is not None:
                torch._foreach_add_(weights.tensors, at.tensors)
                at = None  # frees its memory for the forward pass, if the method has no reference either
                self._drop_copies()  # copies of the previous weights, in lower precision or gathered
            if self._noise is not None:
                noise = self._noise.begin(query.batch)
            answer = self._evaluate(query, track)
            if track:
                self.module_buffers.refresh()
            return answer
        except BaseException:
            buffers = untouched  # a step that fails must not change the model
            self._placement.recover(self.parameters)
            raise
        finally:
            if noise is not None:
                noise.restore()
            # Copied back, not subtracted: exact in every precision, and after a NaN.
            if saved is not None:
                torch._foreach_copy_(self.weights.tensors, saved.tensors)
            if saved is not None or not query.grad:
                self._drop_copies()  # copies of displaced weights, or copies without a graph
            if buffers is not None:
                self.module_buffers.restore(buffers)

    def _evaluate(self, query: Query, track: bool) -> Evaluation:
        gradient = None
        with torch.set_grad_enabled(query.grad), self._placement.forward_pass():
            made = self.run(query.batch, query.objective)
        if query.grad:
            self._check_graph(query.batch, made.losses)
            gradient = self._gradient(made.value)
        answer = made.detached()
        del made
        if track:
            self.seen.append(answer)  # for this rank's batch only: reading it must not need another rank
        value, count, gradient = self._placement.averaged(answer.value, answer.count, gradient)
        if gradient is not None:
            self.note_overflow(gradient)
        return replace(answer, grad=gradient, value=value.detach(), count=count)

    def _check_graph(self, batch: Batch, losses: Tensor) -> None:
        check_trainable(self.model, self.parameters, batch, losses)
        if self._check:
            gathered = self._placement.leaves()
            if gathered is not None:
                check_strangers(losses, [*self.parameters, *gathered])
            self._check = False

    def _gradient(self, value: Tensor) -> Vector:
        factor = None if self._scale is None else self._scale.factor(value.device)
        with silenced(self._hooks):
            grads = self._placement.gradients(value if factor is None else value * factor, self.parameters)
        gradient = filled(grads, self.layout, lambda: self.weights, lambda: self.names)
        self.holes = gradient.holes
        return gradient if factor is None else gradient / factor.to(gradient.tensors[0].device)

    def _drop_copies(self) -> None:
        """Frees copies of the weights that were made for a forward pass."""
        torch.clear_autocast_cache()
        self._placement.before_forward()


def _inputs_then_targets(model: nn.Module, *batch: Any) -> tuple[Any, Any]:
    if len(batch) < 2:
        raise TypeError(
            f"expected inputs and targets, as in sharp(x, y), got {len(batch)} argument(s): for any other batch give "
            "SharpnessAware a forward=lambda model, batch: (outputs, targets)"
        )
    return model(*batch[:-1]), batch[-1]
