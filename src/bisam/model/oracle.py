"""Model oracle: the oracle of a torch module, and all that is easy to get wrong about answering for one.

After a query, whatever happened in it, weights are as they were bit for bit, `.grad` was not touched, and running
statistics have moved only if the query was at the weights themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from bisam import objectives
from bisam.bridge import WithGradient
from bisam.distributed.layout import FullyShard, Peers, Replicas, Shards, fully_sharded_kind, local
from bisam.evaluation import Batch, Evaluation, size
from bisam.model.buffers import Buffers, Slot
from bisam.model.rng import RandomState
from bisam.objectives import Count, Objective
from bisam.oracle import Oracle, Query
from bisam.validation import check_losses, check_strangers, describe
from bisam.vector import Layout, Tensors, Vector

Forward = Callable[..., tuple[Any, Any]]
"""`(model, *batch) -> (outputs, targets)`."""

Scope = Literal["local", "global"]
"""Whether a rank perturbs for its own part of the batch, or for the whole."""

Scale = torch.amp.GradScaler | Callable[[], float | Tensor]
"""What float16 gradients are multiplied by: a GradScaler, or a callable that returns the factor."""


class ModelOracle(Oracle):
    """The oracle of a torch module, as the module is now: make one for each training step.

    Args:
        model: the module. Its trainable parameters (and the loss's, if the loss is a module) are the weights.
        loss: `(outputs, targets) -> losses`, one per example or a scalar.
        forward: `(model, *batch) -> (outputs, targets)`; by default all but the last element of the batch are inputs.
        scale: a `torch.amp.GradScaler`, or a callable that returns the factor, by which float16 gradients are scaled.
        same_noise: replay the random state, so that all queries on a batch see the same dropout masks.
        perturbation: "global" averages gradients and values over ranks in each query, "local" does not; None as the
            host does it.
        step: see `Oracle`.
        state: see `Oracle`.
        check: look, once, for what would go wrong silently; it takes a walk over the graph of the first query.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Objective,
        forward: Forward | None = None,
        *,
        scale: Scale | None = None,
        same_noise: bool = False,
        perturbation: Scope | None = None,
        step: int = 0,
        state: dict[str, Any] | None = None,
        check: bool = True,
    ) -> None:
        self.model, self.loss = model, loss
        self._check = check
        self.step, self.state = step, {} if state is None else state
        self.seen: list[Evaluation] = []
        self._forward = forward or _inputs_then_targets
        self._scale = scale
        self._same_noise = same_noise
        self._noise: tuple[Batch, RandomState] | None = None
        self._holes: frozenset[int] = frozenset()  # of the last gradient
        self._overflow: Tensor | None = None  # 0 while the inner gradients are finite, else NaN

        # As nn.Module.parameters() and buffers(), without the names that those build on the way: this runs every step.
        parameters: dict[int, nn.Parameter] = {}  # by identity: tied parameters count once
        slots: list[Slot] = []
        fully, gathers = list[Any](), fully_sharded_kind()
        todo = [root for root in (cast(Any, loss), model) if isinstance(root, nn.Module)]
        seen: set[nn.Module] = set()
        while todo:
            module = todo.pop()
            if module in seen:
                continue
            seen.add(module)
            if gathers and isinstance(module, gathers):
                fully.append(module)
                cast(Any, module).reshard()  # after an evaluation, say, it has gathered parameters in place of its own
            if children := module._modules:
                todo += [m for m in reversed(children.values()) if m is not None]
            if own := module._parameters:
                for p in own.values():
                    if p is not None and p.requires_grad:
                        parameters[id(p)] = p
            if buffers := module._buffers:
                for name, buffer in buffers.items():
                    if buffer is not None:
                        slots.append((buffers, name, buffer))
        self.parameters: list[nn.Parameter] = list(parameters.values())  # pyright: ignore[reportIncompatibleVariableOverride]
        self._buffers = Buffers(slots)
        self._hooks = [cast("dict[int, Any]", p._backward_hooks) for p in self.parameters if p._backward_hooks]
        self._fully = FullyShard(fully) if fully else None
        self._shards = Shards.of(self.parameters)
        if self._fully is not None:  # it calls these too
            hooks = (getattr(p, "_post_accumulate_grad_hooks", None) for p in self.parameters)
            self._hooks += [of_one for of_one in hooks if of_one]
        self._peers: Peers | None = None
        if self._fully is not None and self._shards is not None:
            self._peers = self._shards.peers
        elif perturbation == "global":
            self._peers = Peers.of(model, self.parameters)
        self._layout: Layout | None = self._shards or (Replicas(self._peers) if self._peers else None)
        self.alone = self._peers is None  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def weights(self) -> Vector:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The trainable parameters; changing them changes the model."""
        # .data, not .detach(): moves are undone, and a graph that the user still holds must not see them. New each
        # time: a layer that constrains its weights may give them other memory in a forward pass.
        tensors = [p.data for p in self.parameters]
        return Vector(tensors if self._shards is None else [local(t) for t in tensors], layout=self._layout)

    def averaged(self, value: Tensor, count: Count) -> tuple[Tensor, Count]:
        """See `Oracle.averaged`."""
        return (value, count) if self._peers is None else self._peers.answer(value, count, None, reduced=True)[:2]

    def agree(self, what: str, number: int) -> None:
        """See `Oracle.agree`."""
        if self._peers is not None:
            self._peers.agree(what, number)

    @property
    def buffers(self) -> Sequence[Tensor]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The model's buffers and the loss's."""
        return self._buffers.tensors

    @cached_property
    def names(self) -> Sequence[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The parameters' names in the model; those of the loss begin with `loss.`."""
        self._forget()  # gathered parameters have no place in the optimizer
        named = {id(p): name for name, p in self.model.named_parameters()}
        if isinstance(self.loss, nn.Module):
            named = {id(p): f"loss.{name}" for name, p in self.loss.named_parameters()} | named
        return [named[id(p)] for p in self.parameters]

    @cached_property
    def layers(self) -> Sequence[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The class names of the modules that the parameters belong to."""
        self._forget()
        roots = [root for root in (cast(Any, self.loss), self.model) if isinstance(root, nn.Module)]
        owners = {
            id(p): type(module).__name__
            for root in roots
            for module in root.modules()
            for p in module.parameters(recurse=False)
        }
        return [owners[id(p)] for p in self.parameters]

    @property
    def overflow(self) -> Tensor | None:
        """0 while all inner gradients were finite, else NaN; None where no scale is in use."""
        return self._overflow

    def ask(self, queries: Sequence[Query]) -> list[Evaluation]:
        """See `Oracle.ask`; in series.

        Raises:
            TypeError: `forward` or the objective return something else than they should.
            ValueError: the batch is empty; the losses have the wrong shape or no gradient; a gradient is sparse.
        """
        return [self._answer(query) for query in queries]

    def _answer(self, query: Query) -> Evaluation:
        batch, grad, track, at = query.batch, query.grad, query.tracks, query.take()
        objective = self.loss if query.objective is None else query.objective
        untouched = self._buffers.untouched
        weights = None if at is None else self.weights
        saved = None if weights is None else weights.clone()
        replayed = self._same_noise and self._noise is not None and self._noise[0] is batch
        noise = RandomState(self.parameters) if replayed else None
        buffers = None if track else self._buffers.remember()
        try:
            if at is not None and weights is not None:
                torch._foreach_add_(weights.tensors, at.tensors)
                at = None  # its memory is free for the forward pass, if the method has let go of it too
                self._forget()  # of the weights as they were, in lower precision or gathered
            if self._same_noise:
                self._replay(batch)
            answer = self._evaluate(batch, objective, grad, track)
            if track:
                self._buffers.refresh()
            return answer
        except BaseException:
            buffers = untouched  # a step that fails leaves nothing behind
            if self._fully is not None:
                self._fully.recover(self.parameters)
            raise
        finally:
            if noise is not None:
                noise.restore()  # what was drawn between two queries, a mask say, stays drawn
            # Copied back, not subtracted: exact in every precision, and after a NaN.
            if saved is not None:
                torch._foreach_copy_(self.weights.tensors, saved.tensors)
            if saved is not None or not grad:
                self._forget()  # of displaced weights, or that have no graph
            if buffers is not None:
                self._buffers.restore(buffers)

    def plain(self, batch: Batch) -> Tensor:
        """The training loss at the weights with its graph, as a loop without this library computes it."""
        if self.model.training:  # under no_grad, where running statistics move all the same
            _ = self._buffers.untouched
        outputs, targets, losses = self._run(batch, self.loss)
        counted = self._count(batch, losses, targets, self.loss)
        value = objectives.mean(losses, counted)
        self.seen.append(
            Evaluation(losses.detach(), None, _detached(outputs), value.detach(), counted, targets, self.loss)
        )
        return value

    def differentiable(self, evaluation: Evaluation) -> Tensor:
        """`evaluation.value` as a loss whose gradient with respect to the parameters is `evaluation.grad`."""
        grad, parameters = evaluation.gradient, self.parameters
        if grad.holes != self._holes and any(getattr(m, "find_unused_parameters", False) for m in self.model.modules()):
            raise ValueError(
                "DistributedDataParallel(find_unused_parameters=True) inside the loss looks at the last query alone, "
                "and this model or method may use different parameters in different queries: wrap the other way round, "
                "DistributedDataParallel(SharpnessAware(model, ...), find_unused_parameters=True)"
            )
        tensors, wraps = grad.tensors, None
        if (shards := self._shards) is not None:
            wraps = [partial(shards.wrapped, i) for i in range(len(grad)) if i not in grad.holes]
        if grad.holes:
            kept = [i for i in range(len(grad)) if i not in grad.holes]
            tensors, parameters = [tensors[i] for i in kept], [parameters[i] for i in kept]
        return cast(Tensor, WithGradient.apply(evaluation.value, self._overflow, tensors, wraps, *parameters))

    def _forget(self) -> None:
        """Drop copies of the weights that were made for a forward pass."""
        torch.clear_autocast_cache()
        if self._fully is not None:
            self._fully.reshard()

    def rollback(self) -> None:
        """Undo what queries did to running statistics: for a step that failed between two of them."""
        self._buffers.restore(self._buffers.untouched)

    def _evaluate(self, batch: Batch, objective: Objective, grad: bool, track: bool) -> Evaluation:
        with torch.set_grad_enabled(grad):
            outputs, targets, losses = self._run(batch, objective)
            counted = self._count(batch, losses, targets, objective)
            value = objectives.mean(losses, counted)
        if grad:
            self._check_trainable(batch, losses)
        gradient = self._gradient(value) if grad else None
        answer = Evaluation(losses.detach(), None, _detached(outputs), value.detach(), counted, targets, objective)
        if track:
            self.seen.append(answer)  # of this rank's own batch: whoever reads it reads it alone
        if self._peers is not None:
            reduced = self._fully is not None and self._shards is not None
            value, counted, gradient = self._peers.answer(value.detach(), counted, gradient, reduced)
        if gradient is not None and self._scale is not None:
            # Any entry that overflowed makes the sharp loss's gradient NaN, so that the GradScaler skips the step.
            overflow = gradient.norm() * 0
            self._overflow = overflow if self._overflow is None else self._overflow + overflow
        return replace(answer, grad=gradient, value=value.detach(), count=counted)

    def _count(self, batch: Batch, losses: Tensor, targets: Any, objective: Objective) -> Count:
        return objectives.count(losses, targets, objective) if losses.dim() else size(batch) or 1

    def _run(self, batch: Batch, objective: Objective) -> tuple[Any, Any, Tensor]:
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
        return outputs, targets, losses

    def _check_trainable(self, batch: Batch, losses: Tensor) -> None:
        if not self.parameters:
            raise ValueError(
                f"{type(self.model).__name__} has no trainable parameter: call requires_grad_() on those to be "
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
        if self._check:
            gathered = [] if self._fully is None else self._fully.leaves()
            if gathered is not None:
                check_strangers(losses, [*self.parameters, *gathered])
            self._check = False

    def _gradient(self, value: Tensor) -> Vector:
        factor = None if self._scale is None else _factor(self._scale, value.device)
        with _silenced(self._hooks):
            grads: Sequence[Any] = self._gradients(value if factor is None else value * factor)
        holes: frozenset[int] = frozenset()
        if type(None) in {type(g) for g in grads}:
            holes = frozenset([i for i, g in enumerate(grads) if g is None])
            grads = [torch.zeros_like(w) if grads[i] is None else grads[i] for i, w in enumerate(self.weights)]
        if {g.layout for g in grads} != {torch.strided}:
            i, layout = next((i, g.layout) for i, g in enumerate(grads) if g.layout is not torch.strided)
            raise ValueError(
                f"the gradient of {self.names[i]} is sparse ({layout}), and a displacement of the weights is dense: "
                "use sparse=False in the embedding"
            )
        self._holes = holes
        gradient = Vector(cast(Tensors, grads), holes, self._layout)
        if factor is None:
            return gradient
        return gradient / factor.to(gradient.tensors[0].device)

    def _gradients(self, loss: Tensor) -> Sequence[Tensor | None]:
        if self._fully is not None:
            grads: Sequence[Tensor | None] = self._fully.gradients(loss, self.parameters)
        else:
            # autograd.grad, not backward: .grad stays the user's, and no reducer of a distributed wrapper wakes up.
            try:
                grads = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            except RuntimeError as error:
                if "use_reentrant" not in str(error):
                    raise
                raise ValueError(
                    "re-entrant activation checkpointing takes no gradient but by backward(), which would fill .grad: "
                    "call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
                ) from error
        return grads if self._shards is None else self._shards.parts(grads)

    def _replay(self, batch: Batch) -> None:
        if self._noise is not None and self._noise[0] is batch:
            self._noise[1].restore()
        else:
            self._noise = batch, RandomState(self.parameters)


@contextmanager
def _silenced(hooks: Sequence[dict[int, Any]]) -> Generator[None]:
    """Without these hooks of parameters: they act on the gradient that reaches `.grad`, once."""
    kept = [dict(of_one) for of_one in hooks]
    for of_one in hooks:
        of_one.clear()
    try:
        yield
    finally:
        for of_one, contents in zip(hooks, kept, strict=True):
            of_one.update(contents)


def _inputs_then_targets(model: nn.Module, *batch: Any) -> tuple[Any, Any]:
    if len(batch) < 2:
        raise TypeError(
            f"expected inputs and targets, as in sharp(x, y), got {len(batch)} argument(s): for any other batch give "
            "SharpnessAware a forward=lambda model, batch: (outputs, targets)"
        )
    return model(*batch[:-1]), batch[-1]


def _factor(scale: Scale, device: torch.device) -> Tensor:
    one = torch.ones((), device=device)
    if isinstance(scale, torch.amp.GradScaler):
        if scale.is_enabled() and scale._device != device.type:
            raise ValueError(
                f"the scaler belongs to losses on {scale._device}, and this one is on {device.type}: give the loss and "
                f"the loop the same torch.amp.GradScaler({device.type!r})"
            )
        return scale.scale(one)  # not get_scale(), which waits for the device
    return one * scale()


def _detached(outputs: Any) -> Any:
    return outputs.detach() if isinstance(outputs, Tensor) else tree_map_only(Tensor, Tensor.detach, outputs)
