"""SharpnessAware: a training loss whose gradient is the sharpness-aware one.

SAM minimises max over small e of L(w + e), and the gradient of that is the gradient of L at w + e (Danskin): SAM is a
loss. It replaces the loss in a training loop; the rest of the loop is unchanged:

    sharp = SharpnessAware(model, BiSAM(rho=0.05), loss=cross_entropy)
    loss = sharp(x, y)                       # was: criterion(model(x), y)
    loss.backward()
    optimizer.step()
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence, Set as AbstractSet
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from bisam import state as method_state
from bisam.batches import Batch, Keywords
from bisam.distributed import failures
from bisam.distributed.ddp import check_no_join
from bisam.distributed.fsdp import reshard
from bisam.distributed.layout import ShardedLayout
from bisam.distributed.peers import Peers
from bisam.distributed.placement import Scope
from bisam.evaluation import Evaluation, join
from bisam.methods import ERM, Method
from bisam.methods.method import decouples, stateful
from bisam.model import compatibility
from bisam.model.gradients import Scaler
from bisam.model.oracle import Findings, Forward, ModelOracle, WeightsInitialised
from bisam.model.saved_tensors import are_shared, keeps_graph
from bisam.objectives import Objective, at_step
from bisam.optim.decoupled import DecoupledTerm
from bisam.statistics import Observed, Recorder, StepStats
from bisam.validation import flag, instance, shown, whole
from bisam.vector import WHOLE, Layout, Tensors, Vector, known


class SharpnessAware(nn.Module):
    """A training loss of `model` with the gradient that a sharpness-aware `method` computes.

    In training mode, a call on a batch returns a scalar that is differentiable once with respect to the trainable
    parameters of the model. It can be scaled, divided and added to other losses before `backward()`. In eval mode, or
    under `no_grad`, a call returns the plain loss. The mode is that of the model, see `in_eval_mode`. If a call raises
    an error or is interrupted, weights, gradients, buffers and the state of the method are as before the call. If
    the gradient of a step is not finite, the state of the method is as before the step, which counts as a step; the
    training loop or its GradScaler should skip the optimizer step.

    Args:
        model: the module to train. It is not copied or changed: save it, move it and wrap it as usual.
        method: `ERM()`, `SAM()`, `BiSAM()`, ... or any callable `(oracle, batch) -> Evaluation`.
        loss: `(outputs, targets) -> losses`, one per example or a scalar. Some methods need one per example.
        forward: `(model, *batch) -> (outputs, targets)`. Default: the last element of the batch is the targets and the
            others are the inputs of the model; a keyword argument `indices`, the numbers of the examples, is left out.
        scaler: the `torch.amp.GradScaler` that scales float16 losses, or a callable that returns its factor.
        same_noise: if True, all forward passes on a batch use the same dropout masks, as in the original JAX
            implementation. Default: each pass draws new masks, as in all PyTorch implementations.
        scope: in data-parallel training, whether each rank perturbs for its own part of the batch ("local") or all
            ranks perturb for the whole batch ("global"). With "global" each query includes a reduction over the ranks
            of the DistributedDataParallel inside the loss, or else over all ranks. Default: "local" under
            DistributedDataParallel, as in the paper of SAM, and "global" under FSDP2, which supports nothing else.
            Means are over ranks, which are assumed to have equal parts of the batch.
        in_eval_mode: whether the method is also applied while the model is in eval mode and the loss itself is in
            training mode, as after `sharp.train()` and `model.eval()`: for fine-tuning with frozen running statistics
            and without dropout. Then `sharp.eval()` gives the plain loss. Default: the plain loss, with a warning if a
            call looks like training.
        stats: whether each training step records its statistics, see `stats`. They do not change the step, and need no
            pass of the model: three norms and an inner product, and one more tensor of the size of each weight during
            the descent pass. Default: nothing is computed.
        accumulation: number of losses for each step of the optimizer (gradient accumulation), >= 1. Schedules, and the
            methods that count steps (`LookSAM`, `Every`, `During`, `FisherSAM` and others), count the steps of the
            optimizer: all micro-batches of one have the same number. Averages that a method keeps are still updated by
            each micro-batch. Default: each loss is a step.
        overlap: for `SharpnessAware(DistributedDataParallel(model), ...)`, whether the wrapper averages the gradient
            during the last backward pass of the method, inside the call, as it does in a plain loop. Then slow links
            cost less time, and `backward()` has nothing to communicate. The loss must be the only one of the step
            with a graph through the model, and multiplied by the same factor on all ranks; hooks of parameters get the
            averaged gradient. Where `.grad` has a gradient already, as that of micro-batches under `no_sync()`,
            `backward()` averages both. Only for methods whose gradient is that of their last query: `ERM`, `SAM` and
            its combinations. Default: `backward()` averages the gradient.

    Raises:
        TypeError: an argument has the wrong type (for example a class in place of an instance).
        ValueError: `scope` is neither "local", "global" nor None, `loss` has a schedule, or `accumulation` is less than
            1.

    Raises when called:
        TypeError: `forward` or `loss` returns a value of the wrong type.
        ValueError: no parameter is trainable, or the state of the method belongs to other parameters than the trainable
            ones; the batch is empty; the targets do not match; the losses have the wrong shape or no gradient; a
            gradient is sparse; the loss depends on tensors that require a gradient but would not be trained; the
            wrapper of the model or its parameters are of a type that is not supported; the context `join()` of a
            DistributedDataParallel is active where ranks would wait for each other; the method cannot use the state
            that was loaded.
        RuntimeError: the last step failed on this rank, and other ranks still wait for it in that step.

    Example:
        >>> import torch
        >>> from bisam import BiSAM, SharpnessAware, cross_entropy
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sharp = SharpnessAware(model, BiSAM(rho=0.05), cross_entropy)
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     loss = sharp(x, y)
        ...     loss.backward()
        ...     optimizer.step()
        >>> sharp.clean.outputs.shape        # logits at the unperturbed weights, for metrics
        torch.Size([8, 3])
    """

    _in_eval_mode: bool = False  # of pickles of earlier versions, as the next
    _records: bool = False
    _accumulation: int = 1
    _term: DecoupledTerm | None = None
    _overlap: bool = False

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        loss: Objective,
        forward: Forward | None = None,
        *,
        scaler: Scaler | None = None,
        same_noise: bool = False,
        scope: Scope | None = None,
        in_eval_mode: bool = False,
        stats: bool = False,
        accumulation: int = 1,
        overlap: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(cast(Any, model), nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        instance("method", method, "SAM(), BiSAM() or another (oracle, batch) -> Evaluation")
        instance("loss", loss, "bisam.cross_entropy or another (outputs, targets) -> losses")
        if at_step(loss, 0) is not loss:
            raise ValueError(
                f"the training loss has a schedule, {loss!r}, and must be the same in each step: a schedule for mu is "
                "for the adversary, BiSAM(rho, NegLog(mu=...))"
            )
        if forward is not None:
            instance("forward", forward, "a function (model, *batch) -> (outputs, targets)")
        if scaler is not None:
            instance(
                "scaler", scaler, "a torch.amp.GradScaler or a function that returns the factor", torch.amp.GradScaler
            )
        if scope not in ("local", "global", None):
            raise ValueError(f"scope must be 'local', 'global' or None, got {scope!r}")
        whole("accumulation", accumulation)
        flags = {"same_noise": same_noise, "in_eval_mode": in_eval_mode, "stats": stats, "overlap": overlap}
        for name, value in flags.items():
            flag(name, value)
        self.model = model
        self.method = method
        self.loss = loss
        self._forward = forward
        self._scaler = scaler
        self._same_noise = same_noise
        self._scope: Scope | None = scope
        self._in_eval_mode = in_eval_mode
        self._records = stats
        self._accumulation = accumulation
        self._overlap = overlap
        self._memory = _Memory()

    def forward(self, *batch: Any, **named: Any) -> Tensor:
        """Returns the loss of a batch.

        Args:
            *batch: the batch, as the argument `forward` of the constructor takes it; by default `(*inputs, targets)`.
            **named: keyword arguments of that `forward`; and `indices` (n,), the numbers of the examples in the data
                set, where the method needs them (`SAF`).

        Returns:
            A scalar: in training the loss at the displaced weights, else the plain loss.
        """
        if named:
            batch = (*batch, Keywords(named))
        memory, with_grad = self._memory, torch.is_grad_enabled()
        if not memory.checked:
            compatibility.check(self, self.method, self._scope, overlap=self._overlap)
        memory.seen, memory.clean = [], None  # free the outputs of the last step
        oracle = ModelOracle(
            self.model,
            self.loss,
            self._forward,
            scaler=self._scaler,
            same_noise=self._same_noise,
            scope=self._scope,
            step=memory.step // self._accumulation,
            overlap=self._overlap,
            findings=memory.findings,
        )
        try:
            if with_grad and self._is_training(oracle):
                return self._step(oracle, batch)
            value = _plain(oracle, batch)
            self._memory = replace(memory, seen=oracle.seen)
            return value
        except BaseException:  # an interruption too, at any moment
            try:
                self._undo(oracle, memory, with_grad)
            except BaseException:  # a second one, while the first is undone
                self._undo(oracle, memory, with_grad)
            raise

    def _undo(self, oracle: ModelOracle, memory: _Memory, with_grad: bool) -> None:
        """Restores all that a call has changed; may be called again after it was interrupted itself."""
        oracle.rollback()
        torch.set_grad_enabled(with_grad)
        self._memory = memory

    def _is_training(self, oracle: ModelOracle) -> bool:
        """Whether a call with gradients is a training step; warns if that is not clear."""
        if _innermost(self.model).training:
            return True
        looks_like_training = self.training and oracle.parameters and not isinstance(self.method, ERM)
        if looks_like_training and not self._in_eval_mode and not self._memory.warned:
            self._memory.warned = True
            warnings.warn(
                "SharpnessAware computes the plain loss (no SAM), because the model is in eval mode, as after "
                "from_pretrained(): call model.train() to train it. If running statistics and dropout are to stay as "
                "in eval mode, pass SharpnessAware(..., in_eval_mode=True). To evaluate, use torch.no_grad() or "
                "sharp.eval()",
                stacklevel=5,
            )
        return self.training and self._in_eval_mode

    def _step(self, oracle: ModelOracle, batch: Batch) -> Tensor:
        """Computes the sharpness-aware loss; the state of the method changes only if the whole step succeeds."""
        memory = self._memory
        memory.findings.initialised |= memory.step > 0
        if not memory.checked:
            _warn_of_half(oracle)
        trained = memory.trained
        if memory.state and trained != (trained := [id(p) for p in oracle.parameters]):
            method_state.check(memory.state, oracle.weights)
        layout, before = oracle.layout, memory.state
        if layout is not WHOLE:
            before = method_state.laid_out(before, layout)
        together = oracle.replicas is not None and bool(stateful(self.method))  # they share the decision below
        recorder = Recorder(oracle.training_value) if self._records else None
        try:
            answer = self._asked(oracle, before, batch, recorder)
            if oracle.averages_last and not (oracle.is_averaged and oracle.is_last_gradient(answer.gradient)):
                raise ValueError(
                    "overlap=True averages the gradient of a method's last query, and the gradient of "
                    f"{shown(self.method)} is made of others too: leave overlap out, or use SAM, BiSAM, ASAM or "
                    "another method that returns the answer of Query(..., last=True)"
                )
            stats = None if recorder is None else recorder.finish(answer)
            value = _differentiable(oracle, answer, self._term)
        except BaseException as error:
            failures.note(oracle.replicas if together else _peers(layout), memory.step, error)
            raise
        of_all = oracle.of_all_replicas if together else None
        after = method_state.settled(oracle.state, before, answer.gradient, oracle.overflow, of_all)
        after = after if layout is WHOLE else method_state.laid_out(after)
        # One assignment: an interruption leaves all of it as before, or all as after the step.
        self._memory = replace(
            memory,
            step=memory.step + 1,
            state=after,
            seen=oracle.seen,
            stats=stats,
            trained=trained,
            checked=True,
            loaded=False,
        )
        return value

    def _asked(
        self, oracle: ModelOracle, before: dict[str, Any], batch: Batch, recorder: Recorder | None
    ) -> Evaluation:
        """Returns the answer of the method, which begins again if the first pass of training initialises weights."""
        oracle.state = dict(before)
        try:
            if recorder is None:
                return self.method(oracle, batch)
            observed = Observed(oracle, recorder)
            answer = self.method(observed, batch)
            oracle.state = observed.state  # which a method of the user may have assigned
            return answer
        except WeightsInitialised:  # once at most, in the first query
            return self._asked(oracle, before, batch, recorder)
        except (AttributeError, LookupError, TypeError) as error:
            if not (before and self._memory.loaded):
                raise
            raise method_state.StateError(error, self.method) from error

    def oracle(self) -> ModelOracle:
        """Returns the oracle of the model in its present state, with the settings of this loss: see `bisam.analysis`.

        Its queries are independent of the method and its state.

        Example:
            >>> import torch
            >>> from bisam import SAM, SharpnessAware, cross_entropy
            >>> sharp = SharpnessAware(torch.nn.Linear(4, 3), SAM(), cross_entropy)
            >>> batch = torch.randn(8, 4), torch.randint(3, (8,))
            >>> sharp.oracle().query(batch).grad
            Vector(2 tensors, 15 entries)
        """
        return ModelOracle(
            self.model,
            self.loss,
            self._forward,
            same_noise=self._same_noise,
            scope=self._scope,
            step=self._memory.step // self._accumulation,
        )

    def decoupled_term(self) -> DecoupledTerm:
        """Returns where `backward()` adds the decoupled term of the method, for the optimizer `Decoupled`.

        Raises:
            ValueError: the method has none.
        """
        if not decouples(self.method):
            raise ValueError(
                f"the method {self.method!r} has no term that an optimizer would apply: use "
                "WSAM(0.05, gamma=0.9, decouple=True)"
            )
        if self._term is None:
            self._term = DecoupledTerm()
        return self._term

    @property
    def clean(self) -> Evaluation:
        """Losses and outputs at the unperturbed weights in the last call, detached, for metrics without a forward pass.

        Methods that make no query at the weights (`RSAM`, `TSAM`, `MomentumSAM`, `OptSAM`, `SAMDB`, `SAMPa`, `BSAM`,
        `ZerothOrder`, `FilterNoise`) report the evaluation at the point where they update running statistics.

        Raises:
            RuntimeError: the loss was not called yet, or its method made no query that updates running statistics.
        """
        if not self._memory.seen:
            raise RuntimeError(
                "nothing was evaluated at the weights yet: `clean` is filled by calling the loss on a batch"
            )
        if self._memory.clean is None:
            self._memory.clean = join([evaluation.under(self.loss) for evaluation in self._memory.seen])
        return self._memory.clean

    @property
    def stats(self) -> StepStats:
        """Statistics of the last training step of a loss with `stats=True`: norms, rise of the loss, cosine.

        They are computed on the device and nothing waits for them, until `stats.to_dict()`. An evaluation does not
        change them. With gradient accumulation they are those of the last micro-batch. In data-parallel training each
        rank has those of its own part of the batch, but with `overlap=True` the descent gradient is the averaged one.
        With `scope="global"` and under FSDP2 they are those of the whole batch, the same on all ranks. They are not
        saved in checkpoints, copies and pickles.

        Raises:
            RuntimeError: the loss was made without `stats=True`, or has made no training step yet.

        Example:
            >>> import torch
            >>> from bisam import L2, SAM, SharpnessAware, cross_entropy
            >>> _ = torch.manual_seed(0)
            >>> sharp = SharpnessAware(torch.nn.Linear(4, 3), SAM(L2(0.05)), cross_entropy, stats=True)
            >>> sharp(torch.randn(8, 4), torch.randint(3, (8,))).backward()
            >>> sharp.stats.displacement_norm
            tensor(0.0500)
            >>> sorted(sharp.stats.to_dict())
            ['ascent_norm', 'cosine', 'descent_norm', 'displacement_norm', 'rise']
        """
        if not self._records:
            raise RuntimeError("no statistics are recorded: make the loss with SharpnessAware(..., stats=True)")
        if self._memory.stats is None:
            raise RuntimeError("there are no statistics yet: a training step, sharp(x, y) in train mode, records them")
        return self._memory.stats

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Restores the result of `state_dict`, the model and the state of the method; see `torch.nn.Module`.

        Raises:
            RuntimeError: it is the state of the model alone, or torch finds that it does not fit.
            ValueError: it belongs to another method or to another model.
        """
        if (place := _place_of_weights(self.model, state_dict.keys())) is not None:
            raise RuntimeError(
                f"these are the weights of the model alone: {place}.load_state_dict(...) loads them, and the method "
                "begins without a memory. SharpnessAware loads what its own state_dict() returned, whose names begin "
                "with 'model.'"
            )
        return super().load_state_dict(state_dict, strict, assign)

    def extra_repr(self) -> str:
        """Returns the method, for `print(sharp)`."""
        return f"method={self.method!r}"

    def get_extra_state(self) -> dict[str, Any]:
        """Returns the step count and the state of the method, as tensors and plain containers."""
        layout = ShardedLayout.of(self._trained()) if self._memory.state else None
        saved = method_state.save(self._memory.state, self.method, layout or WHOLE)
        return method_state.ExtraState({"step": self._memory.step, **saved})

    def set_extra_state(self, state: Any) -> None:
        """Restores the result of `get_extra_state`; called by `load_state_dict`.

        Raises:
            ValueError: the state belongs to another method or to another model.
        """
        loaded = method_state.load(state, self.method, self._trained())
        self._memory = replace(self._memory, step=int(state["step"]), state=loaded, loaded=True)

    def _trained(self) -> list[nn.Parameter]:
        reshard(self)
        return [p for p in self.parameters() if p.requires_grad]


@dataclass
class _Memory:
    """The attributes that change from call to call."""

    step: int = 0
    state: dict[str, Any] = field(default_factory=dict[str, Any])
    seen: list[Evaluation] = field(default_factory=list[Evaluation])
    clean: Evaluation | None = None
    stats: StepStats | None = None
    trained: list[int] = field(default_factory=list[int])
    checked: bool = False
    loaded: bool = False  # that the state is from a file, and no step has used it
    warned: bool = False  # that the model is in eval mode
    findings: Findings = field(default_factory=Findings)

    def __getstate__(self) -> dict[str, Any]:
        """Returns what copies and pickles contain: nothing of the last batch, and no findings about this model."""
        left_out = "seen", "clean", "stats", "findings"
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({**_Memory().__dict__, **state})


class WithGradient(torch.autograd.Function):
    """An autograd function that returns `value` and has `gradient` as its gradient with respect to the parameters.

    Call `apply(value, overflow, gradient, wraps, owned, decoupled, *parameters)`. `overflow` (0 or NaN) is added to the
    factor that `backward` receives. `wraps` convert the local parts of the gradient to the tensor type of the
    parameters; None if the parameters are ordinary tensors. If `owned`, the tensors of the gradient themselves may be
    multiplied in place and become `.grad`, where nothing else refers to them. `decoupled` takes the factor of each
    backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        overflow: Tensor | None,
        gradient: Tensors,
        wraps: Sequence[Callable[[Tensor], Tensor]] | None,
        owned: bool,
        decoupled: _TermOfStep | None,
        *_: Tensor,
    ) -> Tensor:
        """Returns the value, and saves the gradient for `backward`."""
        ctx.overflow, ctx.wraps, ctx.owned, ctx.decoupled = overflow, wraps, owned, decoupled
        ctx.save_for_backward(*gradient)  # freed by backward(): a loss that is stored for logging keeps no gradient
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *factors: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the gradient times the incoming factor.

        Raises:
            RuntimeError: autograd records a graph of the gradient (`create_graph=True`).
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a SharpnessAware loss can be differentiated once, and create_graph=True asks for a graph of its "
                "gradient: that gradient was computed at the displaced weights, in the call of the loss, and is a "
                "constant here. Leave out create_graph, and compute terms that contain derivatives, such as a gradient "
                "penalty, inside `forward` or `loss`"
            )
        factor = factors[0] if ctx.overflow is None else factors[0] + ctx.overflow
        if ctx.decoupled is not None:
            ctx.decoupled.add(factor, ctx.next_functions)
        if ctx.wraps is None:
            gradient = ctx.saved_tensors
            # With retain_graph=True autograd.grad returns what is returned here, and it is needed again.
            owned = ctx.owned and not keeps_graph()
            if not (owned and _is_one(factor)):
                # In place where nothing else needs it: a second gradient could be the peak of the step's memory.
                if owned and not are_shared(gradient):
                    torch._foreach_mul_(gradient, factor)
                else:
                    gradient = torch._foreach_mul(gradient, factor)
            return None, None, None, None, None, None, *gradient
        # Multiply before wrapping: local parts take one call, which DTensors of several meshes do not allow.
        parts = torch._foreach_mul(ctx.saved_tensors, factor.to(ctx.saved_tensors[0].device))
        return None, None, None, None, None, None, *[wrap(part) for wrap, part in zip(ctx.wraps, parts, strict=True)]


class _TermOfStep:
    """The decoupled term of a step, which each backward pass adds to that of the optimizer.

    Args:
        oracle: the oracle of the step.
        vector: the term.
        to: where it is added.

    Raises:
        ValueError: no optimizer applies the term, or ranks may have no call of the loss in this step.
    """

    def __init__(self, oracle: ModelOracle, vector: Vector, to: DecoupledTerm | None) -> None:
        if to is None or not to.is_applied:
            raise ValueError(
                "the method leaves its sharpness term to the optimizer (decouple=True), and no optimizer applies it: "
                "wrap that of the training loop, optimizer = Decoupled(optimizer, sharp), with this loss and not a "
                "copy of it"
            )
        check_no_join(oracle.model)
        self._to, self._parameters = to, oracle.parameters
        self._averaging, self._averaged = oracle.averaging(), oracle.replicas is not None
        self._vector: Vector | None = vector
        self._scale = oracle.scale(vector.tensors[0].device)

    def add(self, factor: Tensor, following: Sequence[tuple[Any, int]]) -> None:
        """Adds the term times the factor of the backward pass, without that of the scaler.

        Args:
            factor: the factor.
            following: the nodes of the graph that follow that of the loss.
        """
        if (vector := self._vector) is None:
            raise RuntimeError("a second backward pass of one loss needs retain_graph=True in the first")
        factor = factor if self._scale is None else factor / self._scale.to(factor.device)
        # Replicas exchange all tensors, because they may have used different ones.
        kept = [i for i in range(len(vector)) if self._averaging is not None or i not in vector.holes]
        terms = torch._foreach_mul([vector.tensors[i] for i in kept], factor) if kept else []
        nodes = {node.variable: node for node, _ in following if hasattr(node, "variable")}
        self._to.add([self._parameters[i] for i in kept], terms, nodes, self._averaging, self._averaged)
        if not keeps_graph():
            self._vector = None  # frees its memory, where the loss is stored for logging


def _is_one(factor: Tensor) -> bool:
    """Whether a factor is known to be 1; that of another device is not waited for."""
    return not torch.compiler.is_compiling() and known(factor == 1) is True


def _peers(layout: Layout) -> Peers | None:
    """Returns the ranks that wait for each other in the queries of a step."""
    return getattr(layout, "peers", None)


def _plain(oracle: ModelOracle, batch: Batch) -> Tensor:
    """Returns the training loss at the weights with its graph, as a loop without this library computes it."""
    if oracle.model.training:  # under no_grad, where running statistics are updated too
        oracle.module_state.begin()
    try:
        made = oracle.run(batch)
    except BaseException as error:
        if oracle.layout.sharded:
            failures.note(_peers(oracle.layout), oracle.step, error)
        raise
    oracle.seen.append(made.detached())
    return made.value


def _differentiable(oracle: ModelOracle, evaluation: Evaluation, term: DecoupledTerm | None) -> Tensor:
    """Returns `evaluation.value` as a loss whose gradient with respect to the parameters is `evaluation.grad`."""
    grad, parameters = evaluation.gradient, oracle.parameters
    if grad.holes != oracle.holes and any(getattr(m, "find_unused_parameters", False) for m in oracle.model.modules()):
        raise ValueError(
            "DistributedDataParallel(find_unused_parameters=True) inside the loss looks at the last query alone, "
            "and this model or method may use different parameters in different queries: wrap the other way round, "
            "DistributedDataParallel(SharpnessAware(model, ...), find_unused_parameters=True)"
        )
    tensors, wraps, layout = grad.tensors, None, oracle.layout
    if layout.sharded:
        wraps = [partial(layout.wrapped, i) for i in range(len(grad)) if i not in grad.holes]
    if grad.holes:
        kept = [i for i in range(len(grad)) if i not in grad.holes]
        tensors, parameters = [tensors[i] for i in kept], [parameters[i] for i in kept]
    owned = oracle.is_last_gradient(grad) and method_state.is_empty(oracle.state)  # which may have views of it
    decoupled, overflow = None, oracle.overflow
    if evaluation.decoupled is not None:
        decoupled = _TermOfStep(oracle, evaluation.decoupled, term)
        infinite = evaluation.decoupled.norm() * 0  # or NaN: then so is the gradient, which loops and scalers look at
        overflow = infinite if overflow is None else overflow + infinite
    return cast(Tensor, WithGradient.apply(evaluation.value, overflow, tensors, wraps, owned, decoupled, *parameters))


def _innermost(model: nn.Module) -> nn.Module:
    """Returns the user's module inside wrappers such as DistributedDataParallel, whose only member is `module`."""
    while list(model._modules.keys()) == ["module"] and not model._parameters and not model._buffers:
        model = cast(nn.Module, model._modules["module"])
    return model


def _place_of_weights(model: nn.Module, names: AbstractSet[str]) -> str | None:
    """Returns which module in a loss has the state dict with these names, `sharp.model`; None if it is of the loss."""
    if "_extra_state" in names or names & {f"model.{name}" for name in _names(model)}:
        return None
    place = "sharp.model"
    while not names & _names(model):
        wrapper = next((name for name in ("module", "_orig_mod") if name in model._modules), None)
        if wrapper is None:
            return None
        model, place = cast(nn.Module, model._modules[wrapper]), f"{place}.{wrapper}"
    return place


def _names(model: nn.Module) -> set[str]:
    return {name for of in (model.named_parameters, model.named_buffers) for name, _ in of(remove_duplicate=False)}


def _warn_of_half(oracle: ModelOracle) -> None:
    half = {p.dtype for p in oracle.parameters} & {torch.bfloat16, torch.float16}
    if half:
        warnings.warn(
            f"the model has {half.pop()} parameters: a perturbation is much smaller than the weights and partly rounds "
            "away, so that the method is weaker than its rho says. Keep the parameters in float32 and run the model "
            "under torch.autocast instead",
            stacklevel=6,
        )
