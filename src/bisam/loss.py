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
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from bisam import state as memories
from bisam.distributed.layout import Shards, reshard
from bisam.evaluation import Evaluation, join
from bisam.methods import Method
from bisam.model import compatibility
from bisam.model.oracle import Forward, ModelOracle, Scale, Scope
from bisam.objectives import Objective
from bisam.validation import instance


class SharpnessAware(nn.Module):
    """The loss of `model` at the point that `method` chooses, with the gradient that `method` computes.

    Called on a batch in training mode it returns a scalar that is differentiable with respect to the model's trainable
    parameters, once: scale it, divide it, add to it, call `backward()`. In eval mode, or under `no_grad`, it is the
    plain loss. The mode is the model's, however it was set. If a call fails, weights, gradients and buffers are as
    before it.

    Args:
        model: the module to be trained. It stays the user's: save it, move it, wrap it as always.
        method: `ERM()`, `SAM()`, `BiSAM()`, ... or any `(oracle, batch) -> Evaluation`.
        loss: `(outputs, targets) -> losses`, one per example or a scalar. Some methods need one per example.
        forward: `(model, *batch) -> (outputs, targets)`, for batches other than `(*inputs, targets)`.
        scale: the `torch.amp.GradScaler` in use with float16, or a callable that returns its factor.
        same_noise: whether all forward passes on a batch see the same dropout masks, as in the JAX original. By default
            they are fresh, as in every PyTorch implementation.
        perturbation: in data-parallel training, whether a rank perturbs for its own part of the batch ("local") or all
            of them for the whole ("global", at the price of a reduction in each query, over the ranks of the
            DistributedDataParallel inside, or else all). None is what the host does: local under
            DistributedDataParallel, as in the paper of SAM, and global under FSDP2, which cannot otherwise. Means are
            over ranks, which are taken to have equal parts.

    Raises:
        TypeError: an argument is not what it should be (a class in place of an instance, say).
        ValueError: `perturbation` is neither.

    Called, it raises:
        TypeError: `forward` or `loss` return something else than they should.
        ValueError: no parameter is trainable, or others than the method remembers are; the batch is empty; targets do
            not fit; losses have the wrong shape or no gradient; a gradient is sparse; the loss depends on tensors that
            need a gradient and would not get one; the model's wrapper or its parameters are of a kind that this version
            cannot serve.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        loss: Objective,
        forward: Forward | None = None,
        *,
        scale: Scale | None = None,
        same_noise: bool = False,
        perturbation: Scope | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(cast(Any, model), nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        instance("method", method, "SAM(), BiSAM() or another (oracle, batch) -> Evaluation")
        instance("loss", loss, "bisam.cross_entropy or another (outputs, targets) -> losses")
        if forward is not None:
            instance("forward", forward, "a function (model, *batch) -> (outputs, targets)")
        if scale is not None:
            instance(
                "scale", scale, "a torch.amp.GradScaler or a function that returns the factor", torch.amp.GradScaler
            )
        if perturbation not in ("local", "global", None):
            raise ValueError(
                f"perturbation must be 'local', 'global' or None, got {perturbation!r}: the geometry is the method's, "
                "SAM(L2(0.1))"
            )
        self.model = model
        self.method = method
        self.loss = loss
        self._forward = forward
        self._scale = scale
        self._same_noise = same_noise
        self._perturbation: Scope | None = perturbation
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
            compatibility.check(self, self.method, self._perturbation)
        memory.seen, memory.clean = [], None  # the last step's outputs need not live through this one
        oracle = ModelOracle(
            self.model,
            self.loss,
            self._forward,
            scale=self._scale,
            same_noise=self._same_noise,
            perturbation=self._perturbation,
            step=memory.step,
            state=dict(memory.state),  # what the method writes counts once the step has succeeded
            check=not memory.checked,
        )
        try:
            if not (_innermost(self.model).training and torch.is_grad_enabled()):
                value = oracle.plain(batch)
            else:
                if not memory.checked:
                    _warn_of_half(oracle)
                if memory.state and memory.trained != (trained := [id(p) for p in oracle.parameters]):
                    memories.check(memory.state, oracle.weights)
                    memory.trained = trained
                layout, before = oracle.weights.layout, memory.state
                if layout is not None:
                    before = memories.laid_out(before, layout)
                    oracle.state = dict(before)
                value = oracle.differentiable(self.method(oracle, batch))
                after = memories.settled(oracle.state, before, oracle.overflow)
                memory.state = after if layout is None else memories.laid_out(after, None)
                memory.step, memory.checked = memory.step + 1, True
        except BaseException:
            oracle.rollback()
            raise
        memory.seen = oracle.seen
        return value

    @property
    def clean(self) -> Evaluation:
        """Training losses and outputs at the unperturbed weights in the last call, detached: metrics at no extra pass.

        Of a method that makes no query there (`RSAM`, `MomentumSAM`, `SAMPa`, `BSAM`), those at the point that stands
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
        layout = Shards.of(self._trained()) if self._memory.state else None
        return {"step": self._memory.step, **memories.save(self._memory.state, self.method, layout)}

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
            stacklevel=5,
        )
