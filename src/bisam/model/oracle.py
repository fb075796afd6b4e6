"""ModelOracle: the oracle of a torch module.

After a query, also after one that failed, the weights are restored bit for bit and `.grad` is unchanged. Running
statistics and other state of the module have changed only if the query was at the weights themselves
(`bisam.model.module_state`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from bisam import objectives
from bisam.batches import Batch, Keywords, handed, is_empty, mapped, size, tensors
from bisam.distributed.ddp import Averaging
from bisam.distributed.peers import Peers
from bisam.distributed.placement import Scope, place
from bisam.evaluation import Evaluation, versions_of
from bisam.model import passes
from bisam.model.displacement import Redrawn, Saved
from bisam.model.eval_mode import EvalMode
from bisam.model.gradients import Hooks, LossScale, Scaler, Strangers, check_trainable, filled
from bisam.model.inputs import Inputs
from bisam.model.module_state import Known, ModuleState
from bisam.model.parameters import inventory, layer_names, owners_of, parameter_names
from bisam.model.rng import RandomState, SameNoise
from bisam.objectives import Count, Objective
from bisam.oracle import Oracle, Query
from bisam.seeded import Seeded
from bisam.validation import check_losses, describe
from bisam.vector import Layout, Vector, same_values

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
        versions: those of the outputs before that, see `Evaluation`.
    """

    outputs: Any
    targets: Any
    losses: Tensor
    count: Count
    value: Tensor
    objective: Objective
    versions: tuple[int, ...]

    def detached(self) -> Evaluation:
        """Returns the pass as an Evaluation without gradient and graph."""
        outputs, targets = mapped(_detached, self.outputs), mapped(_detached, self.targets)
        losses, value = self.losses.detach(), self.value.detach()
        made = losses, None, outputs, value, self.count, targets, self.objective
        return Evaluation(*made, versions=self.versions)


@dataclass
class Findings:
    """Facts about a model and its loss that the oracles of earlier steps have found out.

    Attributes:
        known: the tensors that forward passes change.
        strangers: the check of the first graphs.
        differentiates: whether forward passes compute derivatives themselves, so that they need a graph.
        initialised: whether the first pass of training has been made.
        steady: whether that pass has changed no weights.
        constrains: whether that pass has changed weights, and does so again in a second pass.
    """

    known: Known = field(default_factory=Known)
    strangers: Strangers = field(default_factory=Strangers)
    differentiates: bool = False
    initialised: bool = False
    steady: bool = False
    constrains: bool = False


class WeightsInitialised(Exception):
    """The first pass of training has initialised weights, so that the step must begin again."""


class ModelOracle(Oracle):
    """The oracle of a torch module in its present state; create a new one for each training step.

    Args:
        model: the module. The weights are its trainable parameters, and those of the loss if the loss is a module.
        loss: `(outputs, targets) -> losses`, one per example or a scalar.
        forward: `(model, *batch) -> (outputs, targets)`. Default: the last element of the batch is the targets and the
            others are the inputs of the model; a keyword argument `indices` is left out.
        scaler: the `torch.amp.GradScaler` that scales float16 losses, or a callable that returns its factor.
        same_noise: if True, restore the random state before each query, so that all queries on a batch use the same
            dropout masks.
        scope: "global" averages gradients and values over ranks in each query, "local" does not. Default: as the
            distributed wrapper does.
        step: see `Oracle`.
        state: see `Oracle`.
        overlap: whether a DistributedDataParallel inside averages the gradient of a query that is the last of its step
            over the replicas, while it is computed; see `Query`.
        findings: facts that the oracles of earlier steps have found out; each oracle adds to them. Default: none, for a
            model that is not in its first training step.

    Attributes:
        seen: answers of the queries that updated running statistics, each for this rank's batch.
        same_noise: the argument `same_noise`.
        module_state: the buffers and other state of the model and the loss.
        holes: positions of the parameters that the last loss with a gradient does not depend on, of those asked for.
        is_averaged: whether the last gradient is averaged over the replicas already.

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
        overlap: bool = False,
        findings: Findings | None = None,
    ) -> None:
        self.model, self.loss, self.same_noise = model, loss, same_noise
        self.step, self.state = step, {} if state is None else state
        self.seen: list[Evaluation] = []
        self.holes: frozenset[int] = frozenset()
        self.is_averaged = False
        self._forward = forward or _inputs_then_targets
        self._findings = findings or Findings(initialised=True)
        known = self._findings.known
        found = inventory(model, loss, None if known.thorough else known.with_attributes)
        self.parameters: list[nn.Parameter] = found.parameters  # pyright: ignore[reportIncompatibleVariableOverride]
        if known.thorough:
            known.budget = sum([p.nbytes for p in found.parameters])
        self.module_state = ModuleState(found.places, known, next(iter(found.parameters), None))
        self._placement = place(model, found.parameters, found.fsdp_modules, scope, overlap=overlap)
        hooks = [cast("dict[int, Any]", p._backward_hooks) for p in found.parameters if p._backward_hooks]
        self._hooks = Hooks(hooks + self._placement.hooks(found.parameters))
        self._inputs = Inputs(thorough=not self._findings.initialised)
        self._origin: Saved | Redrawn | None = None  # how the weights are restored, while they are displaced
        self._last_gradient: Vector | None = None  # the gradient of the last query
        self._eval_mode = EvalMode([m for m in (model, loss) if isinstance(m, nn.Module)], self.module_state)
        self._scale = None if scaler is None else LossScale(scaler)
        self._noise = SameNoise(found.parameters) if same_noise else None
        self.is_local = self._placement.is_local  # pyright: ignore[reportIncompatibleVariableOverride]
        self.position = self._placement.position  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def has_default_forward(self) -> bool:
        """Whether the last element of a batch is the targets, and the others are the inputs of the model."""
        return self._forward is _inputs_then_targets

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
        return self.module_state.buffers

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
    def averages_last(self) -> bool:
        """Whether the gradient of a query that is the last of its step would be averaged; see `overlap`."""
        return self._placement.averages_last(self.parameters)

    def is_last_gradient(self, gradient: Vector) -> bool:
        """Whether a gradient is that of the last query itself, whose tensors are no other Vector's."""
        return gradient is self._last_gradient

    @property
    def overflow(self) -> Tensor | None:
        """0 if all gradients so far were finite, else NaN; None if there is no scaler."""
        return None if self._scale is None else self._scale.overflow

    def scale(self, device: torch.device) -> Tensor | None:
        """The factor by which the scaler will multiply the loss of this step; None if there is no scaler."""
        return None if self._scale is None else self._scale.factor(device)

    def averaged(self, value: Tensor, count: Count) -> tuple[Tensor, Count]:
        """See `Oracle.averaged`."""
        return self._placement.averaged(value, count, None)[:2]

    def gathered(self, values: Tensor) -> Tensor:
        """See `Oracle.gathered`."""
        return self._placement.gathered(values)

    def over_ranks(self, values: Tensor) -> Tensor | None:
        """See `Oracle.over_ranks`."""
        return self._placement.over_ranks(values)

    def agree(self, what: str, number: int) -> None:
        """See `Oracle.agree`."""
        self._placement.agree(what, number)

    @property
    def replicas(self) -> Peers | None:
        """The ranks that average their gradients for the same optimizer step, if each answers for its own batch."""
        return self._placement.replicas

    def averaging(self) -> Averaging | None:
        """Returns the averaging of gradients over replicas, also in a call whose gradients a later one averages."""
        return self._placement.averaging(self.parameters)

    def of_all_replicas(self, flag: Tensor) -> Tensor:
        """Returns NaN if `flag`, which is 0 or NaN, is NaN on one of `replicas`; they call it together.

        It does not wait for a GPU.
        """
        return flag if self.replicas is None else self.replicas.mean([flag])[0]

    def random_state(self) -> RandomState:
        """Returns the present state of the random generators that a forward pass draws from."""
        return RandomState(self.parameters)

    @contextmanager
    def fork(self, *key: int) -> Generator[None]:
        """A context in which `key` seeds the generators of forward passes; their state is restored at its end."""
        with self.random_state().forked(*key):
            yield

    def next_part(self) -> None:
        """See `Oracle.next_part`."""
        self.module_state.next_part()
        self._inputs.next_part()

    def check_inputs(self) -> None:
        """See `Oracle.check_inputs`."""
        self._inputs.check()

    def rollback(self) -> None:
        """Restores weights, hooks and module state; also after an interruption at any moment, and more than once."""
        self._eval_mode.leave()
        self._hooks.restore()
        self._restore_weights()
        self.module_state.rollback()
        passes.mark(additional=False)

    def note_overflow(self, gradient: Vector) -> None:
        """Records an overflow in a scaled gradient, also in one of another rank, so that the scaler skips the step."""
        if self._scale is not None:
            self._scale.note(gradient)

    def ask(self, queries: Sequence[Query]) -> list[Evaluation]:
        """Answers the queries in series; see `Oracle.ask`.

        Raises:
            TypeError: `forward` or the objective returns a value of the wrong type.
            ValueError: the batch is empty; the losses have the wrong shape or no gradient; a gradient is sparse; `wrt`
                has another length than the weights; weights cannot be restored by subtracting seeded noise; the last
                gradient of the step is averaged already (see `overlap`).
            RuntimeError: a forward pass changes weights that seeded noise displaces.
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
        objective = objectives.at_step(self.loss if objective is None else objective, self.step)
        if is_empty(batch):
            raise ValueError("the batch is empty (0 examples): skip it, or use drop_last=True in the DataLoader")
        given = handed(batch)
        named = given[-1] if given and isinstance(given[-1], Keywords) else {}
        pair: Any = self._forward(self.model, *(given[:-1] if named else given), **named)
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
        versions = versions_of(outputs)
        losses = objective(outputs, targets)
        check_losses(losses, targets)
        if losses.dim():
            count = objectives.count(losses, targets, objective)
        elif (count := objectives.count_of_mean(targets, objective)) is None:
            # Where the inputs disagree, as images and their boxes do, the others tell.
            count = next((n for part in (batch, targets, outputs) if (n := size(part))), 1)
        return ForwardPass(outputs, targets, losses, count, objectives.mean(losses, count), objective, versions)

    def training_value(self, answer: Evaluation) -> Tensor:
        """Returns the value of the training loss for the outputs of an answer to a query with another objective.

        It needs no forward pass. The state of a loss that is a module, and the random generators, are as before. If not
        `is_local` it is the mean over the ranks, which make the call together.
        """
        own = inventory(self.loss, None).places if isinstance(self.loss, nn.Module) else []
        # Not that of the step, which copies only what passes were seen to change: the loss may be called here first.
        state = ModuleState(own, Known(budget=sum([p.nbytes for p in self.parameters])))
        with self.random_state().kept(), passes.marked(additional=True):
            try:
                state.enter(track=False)
                plain = answer.under(self.loss)
                state.leave(track=False)
            except BaseException:
                state.rollback()
                raise
        return self.averaged(plain.value, plain.count)[0]

    def _answer(self, query: Query) -> Evaluation:
        if query.wrt is not None and len(query.wrt) != len(self.parameters):
            raise ValueError(
                f"wrt has {len(query.wrt)} values, and the model {len(self.parameters)} trainable parameters: give one "
                "for each, in the order of oracle.names"
            )
        if self.is_averaged:
            raise ValueError(
                "overlap=True averages the gradient of the query with last=True, and the method makes another query "
                "after it: leave overlap out, or last=True if the method is your own"
            )
        track, at, state, noise = query.tracks, query.take(), self.module_state, None
        self._last_gradient = None  # frees its memory
        self._inputs.begin(query.batch)
        first = not self._findings.initialised
        if first and at is not None:
            self._initialise(query)
        was, sums = passes.displaced(), self._sums() if first and at is None else None
        try:
            state.enter(track)
            passes.mark(additional=not track)
            if at is not None:
                self._displace(at)
                at = None  # frees its memory for the forward pass, if the method has no reference either
                self._drop_copies()  # copies of the previous weights, in lower precision or gathered
            if self._noise is not None:
                noise = self._noise.begin(query.batch)
            if query.buffers is not None:
                self._eval_mode.enter(query.buffers)
            answer = self._evaluate(query, track)
            self._eval_mode.leave()
            if isinstance(self._origin, Redrawn):
                self._origin.check(self.parameters, self.weights)
            if sums is not None:
                state.keep(self._initialised_modules(query, sums))
            state.leave(track, evaluates=query.buffers is not None)
            self._findings.initialised = True
            return answer
        except BaseException:
            self._eval_mode.leave()
            self.module_state.rollback()  # a step that fails must not change the model
            self._placement.recover(self.parameters)
            raise
        finally:
            if noise is not None:
                noise.restore()
            passes.mark(was)
            self._inputs.end()
            displaced = self._restore_weights()
            if displaced or not query.differentiates:
                self._drop_copies()  # copies of displaced weights, or copies without a graph

    def _displace(self, at: Vector | Seeded) -> None:
        weights = self.weights
        if isinstance(at, Seeded):
            if self._findings.constrains:
                raise ValueError(
                    "a layer changes its weights in each forward pass, as nn.Embedding(max_norm=...) does, so that "
                    "subtracting a displacement does not restore them: use restore='copy'"
                )
            self._origin = redrawn = Redrawn(self.parameters, weights, at)
            redrawn.displace()
        else:
            self._origin = saved = Saved(weights, at, steady=self._findings.steady)
            saved.displace(weights, at)

    def _restore_weights(self) -> bool:
        if self._origin is None:
            return False
        self._origin.restore(self.weights)
        self._origin = None
        return True

    def _evaluate(self, query: Query, track: bool) -> Evaluation:
        gradient, wrt = None, None if query.wrt is None or all(query.wrt) else query.wrt
        made = self._run_for(query)
        if query.differentiates:
            self._check_graph(query.batch, made.losses)
            gradient = self._gradient(made.value, wrt, last=query.last and wrt is None)
        elif query.grad:
            gradient = self.weights.confined([False] * len(self.parameters))
        answer = made.detached()
        del made
        if track:
            self.seen.append(answer)  # for this rank's batch only: reading it must not need another rank
        value, count, gradient = self._placement.averaged(answer.value, answer.count, gradient, wrt)
        if gradient is not None:
            self.note_overflow(gradient)
            self._last_gradient = gradient
        return replace(answer, grad=gradient, value=value.detach(), count=count)

    def _run_for(self, query: Query) -> ForwardPass:
        graph = query.differentiates or self._findings.differentiates
        evaluates = query.buffers is not None
        with torch.set_grad_enabled(graph), self._placement.forward_pass(evaluates=evaluates):
            try:
                return self.run(query.batch, query.objective)
            except RuntimeError as error:
                if torch.is_grad_enabled() or "does not require grad" not in str(error):
                    raise
        # The pass computes derivatives itself, as a physics-informed loss does.
        self._findings.differentiates = True
        self.module_state.again()
        if self._noise is not None:
            self._noise.begin(query.batch)
        with torch.enable_grad(), self._placement.forward_pass(evaluates=evaluates):
            return self.run(query.batch, query.objective)

    def _check_graph(self, batch: Batch, losses: Tensor) -> None:
        check_trainable(self.model, self.parameters, losses, self._inputs.need_gradients)
        if not self._findings.strangers.done:
            gathered = self._placement.leaves()
            if gathered is not None:
                self._findings.strangers.check(losses, [*self.parameters, *gathered, *tensors(batch)])

    def _initialise(self, query: Query) -> None:
        """Runs the first pass of training at the weights, where layers that initialise themselves must do it.

        Raises:
            WeightsInitialised: weights have changed; the displacement of the query belongs to the previous ones.
        """
        state, sums = self.module_state, self._sums()
        try:
            with self.random_state().kept(), passes.marked(additional=True):
                state.enter(track=False)
                with torch.no_grad():
                    self._run_for(replace(query, at=None, grad=False, track=False, buffers=None))
                modules = self._initialised_modules(query, sums)
                state.keep(modules)
                state.leave(track=False)
        except BaseException:
            state.rollback()
            raise
        finally:
            self._drop_copies()
        self._findings.initialised = True
        if modules & owners_of(self.model, self.loss, [p for p, *_ in self._changed(sums)]):
            raise WeightsInitialised

    def _initialised_modules(self, query: Query, sums: Sums) -> set[nn.Module]:
        """Returns the modules that the first pass has initialised: they have changed, and do not in a second pass."""
        state = self.module_state
        state.look()
        changed = self._changed(sums)
        self._findings.steady = not changed
        if not self._anywhere(bool(changed) or state.changed):
            return set()
        weights, again, before = self.weights.clone(), state.present(), self._sums()
        with self.random_state().kept(), passes.marked(additional=True), torch.no_grad():
            self._run_for(replace(query, at=None, grad=False, track=False, buffers=None))
        state.look()
        once = state.modules(state.once(state.read, again))
        twice = {id(p) for p, *_ in self._changed(before)}
        self._findings.constrains = bool(twice)
        state.restore(again)
        torch._foreach_copy_(self.weights.tensors, weights.tensors)
        self._drop_copies()
        return once | owners_of(self.model, self.loss, [p for p, *_ in changed if id(p) not in twice])

    def _anywhere(self, here: bool) -> bool:
        """Whether something is so on a rank that shares the batch: all must run the model equally often."""
        if self.is_local or not self.parameters:
            return here
        flag = torch.tensor(float(here), device=self.weights.tensors[0].device)
        return bool(self.averaged(flag, 1)[0] > 0)

    def _sums(self) -> Sums:
        """Returns a version and a norm of each weight, by which a change is noticed."""
        norms = torch._foreach_norm(self.weights.tensors) if self.parameters else []
        return [(p, p._version, norm) for p, norm in zip(self.parameters, norms, strict=True)]

    def _changed(self, sums: Sums) -> Sums:
        """Returns those of the weights that have changed."""
        changed: Sums = []
        for (p, version, norm), (_, version_now, norm_now) in zip(sums, self._sums(), strict=True):
            if version != version_now or not same_values(norm, norm_now):
                changed.append((p, version_now, norm_now))
        return changed

    def _gradient(self, value: Tensor, wrt: Sequence[bool] | None, *, last: bool) -> Vector:
        factor, place = None if self._scale is None else self._scale.factor(value.device), self._placement
        scaled = value if factor is None else value * factor
        self.is_averaged = last and place.averages_last(self.parameters)
        with self._hooks.silenced():
            try:
                if self.is_averaged:
                    grads = place.last_gradients(scaled, self.parameters)
                else:
                    grads = place.gradients(scaled, self.parameters, wrt)
            except RuntimeError as error:
                if "a second time" not in str(error):
                    raise
                raise RuntimeError(
                    "the loss contains the graph of an earlier forward pass, which is gone: a method runs several "
                    "queries per step, at the weights and at displaced weights, and each pass must build its own graph "
                    "anew. Clear lists and attributes that `forward` fills at its beginning, and detach states that "
                    "are carried from batch to batch"
                ) from error
        gradient = filled(grads, self.layout, lambda: self.weights, lambda: self.names, wrt)
        self.holes = gradient.holes if wrt is None else frozenset([i for i in gradient.holes if wrt[i]])
        return gradient if factor is None else gradient / factor.to(gradient.tensors[0].device)

    def _drop_copies(self) -> None:
        """Frees copies of the weights that were made for a forward pass."""
        torch.clear_autocast_cache()
        self._placement.before_forward()


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


Sums = list[tuple[nn.Parameter, int, Tensor]]
"""For each weight the parameter, its version and its norm."""


def _inputs_then_targets(model: nn.Module, *batch: Any, **named: Any) -> tuple[Any, Any]:
    named.pop("indices", None)  # the numbers of the examples, for methods that remember examples
    if named:
        raise TypeError(
            f"the batch has keyword arguments ({', '.join(named)}), and which one is the targets is not known: give "
            "SharpnessAware a forward=lambda model, **batch: (outputs, targets)"
        )
    if len(batch) < 2:
        raise TypeError(
            f"expected inputs and targets, as in sharp(x, y), got {len(batch)} argument(s): for any other batch give "
            "SharpnessAware a forward=lambda model, batch: (outputs, targets)"
        )
    return model(*batch[:-1]), batch[-1]
