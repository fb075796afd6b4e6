"""Placement: where parameters and batches are, and what that means for weights, gradients and averages.

One class for each way of distributing a training step. All of them answer the same questions, so that the oracle of a
model never asks which one it has:

    placement = place(model, parameters, fsdp_modules=[], scope=None)
    placement.weights(parameters)                   # a Vector in the layout of the parameters
    placement.gradients(loss, parameters)           # of this rank's loss, or of the mean of all ranks' losses
    placement.averaged(value, count, gradient)      # an answer of this rank as that of the whole batch
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bisam.distributed.fsdp import FSDPModules, accumulation_hooks
from bisam.distributed.layout import ReplicatedLayout, ShardedLayout, local
from bisam.distributed.peers import Peers
from bisam.objectives import Count
from bisam.vector import WHOLE, Layout, Vector

Scope = Literal["local", "global"]
"""Whether a rank perturbs for its own part of the batch, or for the whole batch."""


class Local:
    """Whole parameters, and answers for this rank's batch alone: one process, or a replica of data-parallel training.

    Attributes:
        layout: the layout of Vectors of weights and gradients.
        is_local: whether an answer is that of this rank's batch alone.
    """

    layout: Layout = WHOLE
    is_local: bool = True

    def weights(self, parameters: Sequence[Tensor]) -> Vector:
        """The parameters' data; changing it changes the model."""
        # .data, not .detach(): displacements are undone, and a graph that the user still holds must not see them.
        return Vector([p.data for p in parameters], layout=self.layout)

    def gradients(self, loss: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """The gradients of `loss`, None for parameters that it does not depend on; `.grad` is left alone.

        Raises:
            ValueError: the model uses re-entrant activation checkpointing.
        """
        # autograd.grad, not backward: .grad stays the user's, and no reducer of a distributed wrapper wakes up.
        try:
            return torch.autograd.grad(loss, parameters, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise ValueError(
                "re-entrant activation checkpointing takes no gradient but by backward(), which would fill .grad: "
                "call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            ) from error

    def averaged(self, value: Tensor, count: Count, gradient: Vector | None) -> tuple[Tensor, Count, Vector | None]:
        """Value, count and gradient of this rank's answer as those of the batch that its batch is a part of."""
        return value, count, gradient

    def agree(self, what: str, number: int) -> None:
        """Check that all ranks whose batches are the parts of one have the same `number` of `what`.

        Raises:
            ValueError: they do not, and would wait for each other for ever.
        """

    def before_forward(self) -> None:
        """Drop copies of the weights that were gathered for an earlier pass, because the weights have moved."""

    def recover(self, parameters: Sequence[Tensor]) -> None:
        """Reset what a forward or backward pass left behind that was interrupted."""

    def leaves(self) -> list[Tensor] | None:
        """Leaves that a graph has in place of parameters; None where they cannot be known."""
        return []

    def hooks(self, parameters: Sequence[Tensor]) -> list[dict[int, Any]]:
        """Hooks, besides those of tensors, that computing a gradient would run."""
        return []


class Replicated(Local):
    """Whole parameters on all ranks, and answers that are averaged over the batches of all of them.

    Args:
        peers: the ranks.
    """

    is_local = False

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self.layout = ReplicatedLayout(peers)

    def averaged(self, value: Tensor, count: Count, gradient: Vector | None) -> tuple[Tensor, Count, Vector | None]:
        """See `Local.averaged`."""
        return self._peers.answer(value, count, gradient, reduced=False)

    def agree(self, what: str, number: int) -> None:
        """See `Local.agree`."""
        self._peers.agree(what, number)


class TensorParallel(Local):
    """Parameters in parts on several ranks, which all compute on the same batch.

    Args:
        layout: the layout of the parameters.
    """

    def __init__(self, layout: ShardedLayout) -> None:
        self.layout = self._shards = layout

    def weights(self, parameters: Sequence[Tensor]) -> Vector:
        """See `Local.weights`; the local parts."""
        return Vector([local(p.data) for p in parameters], layout=self.layout)

    def gradients(self, loss: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """See `Local.gradients`; the local parts."""
        return self._shards.parts(super().gradients(loss, parameters))


class FullySharded(Local):
    """Modules under FSDP2, which gathers weights for each pass and reduces gradients on their way into `.grad`.

    Args:
        modules: the modules that `fully_shard` was applied to.
        layout: the layout of the trainable parameters; None if FSDP2 holds frozen parameters only.
        peers: ranks to average over where the trainable parameters are not sharded.
    """

    def __init__(self, modules: FSDPModules, layout: ShardedLayout | None, peers: Peers | None) -> None:
        self._modules, self._shards = modules, layout
        self._peers = layout.peers if layout is not None else peers
        self.layout = layout or (ReplicatedLayout(peers) if peers else WHOLE)
        self.is_local = self._peers is None

    def weights(self, parameters: Sequence[Tensor]) -> Vector:
        """See `Local.weights`; the local parts."""
        return Vector([local(p.data) for p in parameters], layout=self.layout)

    def gradients(self, loss: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """See `Local.gradients`; those of the mean of all ranks' losses.

        Raises:
            ValueError: gradients of another loss wait for their reduction, and would become part of these.
        """
        grads = self._modules.gradients(loss, parameters)
        return grads if self._shards is None else self._shards.parts(grads)

    def averaged(self, value: Tensor, count: Count, gradient: Vector | None) -> tuple[Tensor, Count, Vector | None]:
        """See `Local.averaged`."""
        if self._peers is None:
            return value, count, gradient
        return self._peers.answer(value, count, gradient, reduced=self._shards is not None)

    def agree(self, what: str, number: int) -> None:
        """See `Local.agree`."""
        if self._peers is not None:
            self._peers.agree(what, number)

    def before_forward(self) -> None:
        """See `Local.before_forward`."""
        self._modules.reshard()

    def recover(self, parameters: Sequence[Tensor]) -> None:
        """See `Local.recover`."""
        self._modules.recover(parameters)

    def leaves(self) -> list[Tensor] | None:
        """See `Local.leaves`; the gathered parameters."""
        return self._modules.leaves()

    def hooks(self, parameters: Sequence[Tensor]) -> list[dict[int, Any]]:
        """See `Local.hooks`."""
        return accumulation_hooks(parameters)


_LOCAL = Local()


def place(model: nn.Module, parameters: Sequence[Tensor], fsdp_modules: Sequence[Any], scope: Scope | None) -> Local:
    """The placement of a model.

    Args:
        model: the model, with the wrappers inside it.
        parameters: its trainable parameters.
        fsdp_modules: the modules in it that `fully_shard` was applied to, outer ones first.
        scope: "global" averages answers over all ranks, "local" does not; None is what the wrapper does. Under FSDP2
            and tensor parallelism the wrapper decides (`bisam.model.compatibility` refuses to ask for the other).
    """
    shards = ShardedLayout.of(parameters)
    if shards is not None:
        return FullySharded(FSDPModules(fsdp_modules), shards, None) if fsdp_modules else TensorParallel(shards)
    peers = Peers.of(model, parameters) if scope == "global" else None
    if fsdp_modules:
        return FullySharded(FSDPModules(fsdp_modules), None, peers)
    return _LOCAL if peers is None else Replicated(peers)
