"""SharpnessAware: a training loss whose gradient is the sharpness-aware one.

SAM minimises max over small e of L(w + e), and the gradient of that is the gradient of L at w + e (Danskin): SAM is a
loss. So it goes where the loss goes, and the rest of a training loop stays as it is:

    sharp = SharpnessAware(model, BiSAM(rho=0.05), loss=cross_entropy)
    loss = sharp(x, y)                       # was: criterion(model(x), y)
    loss.backward()
    optimizer.step()
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from bisam import state as memories
from bisam.distributed.fsdp import reshard
from bisam.distributed.layout import ShardedLayout
from bisam.distributed.placement import Scope
from bisam.evaluation import Batch, Evaluation, join
from bisam.methods import Method
from bisam.model import compatibility
from bisam.model.gradients import Scaler
from bisam.model.oracle import Forward, ModelOracle
from bisam.objectives import Objective
from bisam.validation import instance
from bisam.vector import WHOLE, Tensors


class SharpnessAware(nn.Module):
    """The loss of `model` at the point that `method` chooses, with the gradient that `method` computes.

    Called on a batch in training mode it returns a scalar that is differentiable with respect to the model's trainable
    parameters, once: scale it, divide it, add to it, call `backward()`. In eval mode, or under `no_grad`, it is the
    plain loss. The mode is the model's, however it was set. If a call fails, weights, gradients and buffers are as
    before the call.

    Args:
        model: the module to be trained. It stays yours: save it, move it, wrap it as always.
        method: `ERM()`, `SAM()`, `BiSAM()`, ... or any `(oracle, batch) -> Evaluation`.
        loss: `(outputs, targets) -> losses`, one per example or a scalar. Some methods need one per example.
        forward: `(model, *batch) -> (outputs, targets)`, for batches other than `(*inputs, targets)`.
        scaler: the `torch.amp.GradScaler` that scales float16 losses, or a callable that returns its factor.
        same_noise: whether all forward passes on a batch see the same dropout masks, as in the JAX original. By default
            each pass draws new ones, as in every PyTorch implementation.
        scope: in data-parallel training, whether each rank perturbs for its own part of the batch ("local") or all
            ranks for the whole batch ("global"). Global costs a reduction in each query, over the ranks of the
            DistributedDataParallel inside the loss, or else all ranks. None is what the wrapper does: local under
            DistributedDataParallel, as in the paper of SAM, and global under FSDP2, which allows nothing else. Means
            are over ranks, which are taken to have equal parts of the batch.

    Raises:
        TypeError: an argument is not what it should be (a class in place of an instance, say).
        ValueError: `scope` is neither.

    Called, it raises:
        TypeError: `forward` or `loss` return something else than they should.
        ValueError: no parameter is trainable, or the method remembers other parameters than those that are; the batch
            is empty; targets do not fit; losses have the wrong shape or no gradient; a gradient is sparse; the loss
            depends on tensors that need a gradient and would not get one; the model's wrapper or its parameters are of
            a kind that is not supported.
    """

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
    ) -> None:
        super().__init__()
        if not isinstance(cast(Any, model), nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        instance("method", method, "SAM(), BiSAM() or another (oracle, batch) -> Evaluation")
        instance("loss", loss, "bisam.cross_entropy or another (outputs, targets) -> losses")
        if forward is not None:
            instance("forward", forward, "a function (model, *batch) -> (outputs, targets)")
        if scaler is not None:
            instance(
                "scaler", scaler, "a torch.amp.GradScaler or a function that returns the factor", torch.amp.GradScaler
            )
        if scope not in ("local", "global", None):
            raise ValueError(f"scope must be 'local', 'global' or None, got {scope!r}")
        self.model = model
        self.method = method
        self.loss = loss
        self._forward = forward
        self._scaler = scaler
        self._same_noise = same_noise
        self._scope: Scope | None = scope
        self._memory = _Memory()

    def forward(self, *batch: Any) -> Tensor:
        """The loss of a batch.

        Args:
            *batch: inputs and targets, as `forward` takes them; by default `(*inputs, targets)`.

        Returns:
            A scalar: in training the loss at the displaced weights, else the plain loss.
        """
        memory = self._memory
        if not memory.checked:
            compatibility.check(self, self.method, self._scope)
        memory.seen, memory.clean = [], None  # the last step's outputs need not live through this one
        oracle = ModelOracle(
            self.model,
            self.loss,
            self._forward,
            scaler=self._scaler,
            same_noise=self._same_noise,
            scope=self._scope,
            step=memory.step,
            check=not memory.checked,
        )
        try:
            if _innermost(self.model).training and torch.is_grad_enabled():
                value = self._step(oracle, batch)
            else:
                value = _plain(oracle, batch)
        except BaseException:
            oracle.module_buffers.rollback()
            raise
        memory.seen = oracle.seen
        return value

    def _step(self, oracle: ModelOracle, batch: Batch) -> Tensor:
        """The sharpness-aware loss; what the method remembers changes only if all of it succeeds."""
        memory = self._memory
        if not memory.checked:
            _warn_of_half(oracle)
        if memory.state and memory.trained != (trained := [id(p) for p in oracle.parameters]):
            memories.check(memory.state, oracle.weights)
            memory.trained = trained
        layout, before = oracle.layout, memory.state
        if layout is not WHOLE:
            before = memories.laid_out(before, layout)
        oracle.state = dict(before)
        value = _differentiable(oracle, self.method(oracle, batch))
        after = memories.settled(oracle.state, before, oracle.overflow)
        memory.state = after if layout is WHOLE else memories.laid_out(after)
        memory.step, memory.checked = memory.step + 1, True
        return value

    @property
    def clean(self) -> Evaluation:
        """Losses and outputs at the unperturbed weights in the last call, detached: metrics without another pass.

        For a method that makes no query there (`RSAM`, `MomentumSAM`, `SAMPa`, `BSAM`), those at the point that stands
        in for the weights, where running statistics move.

        Raises:
            RuntimeError: there was no call yet, or its method made no query that moves running statistics.
        """
        if not self._memory.seen:
            raise RuntimeError(
                "nothing was evaluated at the weights yet: `clean` is filled by calling the loss on a batch"
            )
        if self._memory.clean is None:
            self._memory.clean = join([evaluation.under(self.loss) for evaluation in self._memory.seen])
        return self._memory.clean

    def extra_repr(self) -> str:
        """The method, for print(sharp)."""
        return f"method={self.method!r}"

    def get_extra_state(self) -> dict[str, Any]:
        """The step count and what the method remembers, as tensors and plain containers."""
        layout = ShardedLayout.of(self._trained()) if self._memory.state else None
        return {"step": self._memory.step, **memories.save(self._memory.state, self.method, layout or WHOLE)}

    def set_extra_state(self, state: Any) -> None:
        """Continue from `get_extra_state`; used by `load_state_dict`.

        Raises:
            ValueError: the state is the memory of another method or belongs to another model.
        """
        self._memory.state = memories.load(state, self.method, self._trained())
        self._memory.step = int(state["step"])

    def _trained(self) -> list[nn.Parameter]:
        reshard(self)
        return [p for p in self.parameters() if p.requires_grad]


@dataclass
class _Memory:
    """What changes from call to call."""

    step: int = 0
    state: dict[str, Any] = field(default_factory=dict[str, Any])
    seen: list[Evaluation] = field(default_factory=list[Evaluation])
    clean: Evaluation | None = None
    trained: list[int] = field(default_factory=list[int])
    checked: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: everything but the last batch's outputs."""
        return {**self.__dict__, "seen": [], "clean": None}


class WithGradient(torch.autograd.Function):
    """`apply(value, overflow, gradient, wraps, *parameters)`: `value`, with `gradient` for the parameters.

    The chain rule does the rest. `overflow` is added to the factor that `backward` gets: 0, or NaN. `wraps` make the
    parameters' type of tensor from the local parts of the gradient; None where these are ordinary tensors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        overflow: Tensor | None,
        gradient: Tensors,
        wraps: Sequence[Callable[[Tensor], Tensor]] | None,
        *_: Tensor,
    ) -> Tensor:
        """The value, and what is kept for `backward`."""
        ctx.overflow, ctx.wraps = overflow, wraps
        ctx.save_for_backward(*gradient)  # freed by backward(): a loss that is kept for logging holds no memory
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *factors: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradient, times the factor that autograd has come to."""
        factor = factors[0] if ctx.overflow is None else factors[0] + ctx.overflow
        if ctx.wraps is None:
            return None, None, None, None, *torch._foreach_mul(ctx.saved_tensors, factor)
        # Here and not before: parts can be multiplied in one call, DTensors of several meshes cannot.
        parts = torch._foreach_mul(ctx.saved_tensors, factor.to(ctx.saved_tensors[0].device))
        return None, None, None, None, *[wrap(part) for wrap, part in zip(ctx.wraps, parts, strict=True)]


def _plain(oracle: ModelOracle, batch: Batch) -> Tensor:
    """The training loss at the weights with its graph, as a loop without this library computes it."""
    if oracle.model.training:  # under no_grad, where running statistics move all the same
        _ = oracle.module_buffers.untouched
    made = oracle.run(batch)
    oracle.seen.append(made.detached())
    return made.value


def _differentiable(oracle: ModelOracle, evaluation: Evaluation) -> Tensor:
    """`evaluation.value` as a loss whose gradient with respect to the parameters is `evaluation.grad`."""
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
    return cast(Tensor, WithGradient.apply(evaluation.value, oracle.overflow, tensors, wraps, *parameters))


def _innermost(model: nn.Module) -> nn.Module:
    """The user's own module inside DistributedDataParallel and its like, which hold it as `module` and nothing else."""
    while list(model._modules) == ["module"] and not model._parameters and not model._buffers:
        model = cast(nn.Module, model._modules["module"])
    return model


def _warn_of_half(oracle: ModelOracle) -> None:
    half = {p.dtype for p in oracle.parameters} & {torch.bfloat16, torch.float16}
    if half:
        warnings.warn(
            f"the model has {half.pop()} parameters: a perturbation is much smaller than the weights and partly rounds "
            "away, so that the method is weaker than its rho says. Keep the parameters in float32 and run the model "
            "under torch.autocast instead",
            stacklevel=6,
        )
