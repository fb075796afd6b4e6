"""Placement: where parameters and batches are, and how weights, gradients and averages are computed there.

There is one class for each way of distributing a training step. All have the same methods, so that the oracle of a
model need not distinguish them:

    placement = place(model, parameters, fsdp_modules=[], scope=None)
    placement.weights(parameters)                   # a Vector in the layout of the parameters
    placement.gradients(loss, parameters)           # of this rank's loss, or of the mean of all ranks' losses
    placement.averaged(value, count, gradient)      # an answer of this rank, averaged over the whole batch
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bisam.distributed import failures
from bisam.distributed.ddp import (
    Averaging,
    BufferBroadcasts,
    apart,
    averaging,
    check_join,
    communicating,
    gradients_of_reduction,
    replicas_of,
)
from bisam.distributed.fsdp import FSDPModules, accumulation_hooks
from bisam.distributed.layout import ReplicatedLayout, ShardedLayout, local
from bisam.distributed.peers import Peers, position
from bisam.objectives import Count
from bisam.vector import WHOLE, Layout, Vector

Scope = Literal["local", "global"]
"""Whether a rank perturbs for its own part of the batch ("local") or for the whole batch ("global")."""


class Local:
    """Whole parameters, and answers for this rank's batch only: a single process or a data-parallel replica.

    Attributes:
        layout: the layout of Vectors of weights and gradients.
        is_local: whether an answer is for this rank's batch only.
        replicas: the ranks that average their gradients for the same optimizer step, if they are known and each answers
            for its own batch; else None.
        position: see `Oracle.position`.
    """

    layout: Layout = WHOLE
    is_local: bool = True
    replicas: Peers | None = None

    @property
    def position(self) -> str:
        """See `Oracle.position`."""
        return "0 of 1" if self.is_local else position()

    def weights(self, parameters: Sequence[Tensor]) -> Vector:
        """Returns the data of the parameters; changing it changes the model."""
        # .data, not .detach(): a graph that the user still holds would detect the displacement, which is undone later.
        return Vector([p.data for p in parameters], layout=self.layout)

    def gradients(
        self, loss: Tensor, parameters: Sequence[Tensor], wrt: Sequence[bool] | None = None
    ) -> Sequence[Tensor | None]:
        """Returns the gradients of `loss`; `.grad` is unchanged.

        Args:
            loss: a scalar with its graph.
            parameters: the trainable parameters.
            wrt: see `Query`; at least one.

        Returns:
            None for parameters that `loss` does not depend on, and for those that were not asked for.

        Raises:
            ValueError: the model uses re-entrant activation checkpointing.
        """
        asked = parameters if wrt is None else [p for p, ask in zip(parameters, wrt, strict=True) if ask]
        # autograd.grad, not backward: it leaves .grad to the user, and starts no reducer of a distributed wrapper.
        with _without_reentrance():
            found = torch.autograd.grad(loss, asked, allow_unused=True)
        if wrt is None:
            return found
        each = iter(found)
        return [next(each) if ask else None for ask in wrt]

    def averaging(self, parameters: Sequence[Tensor]) -> Averaging | None:
        """Returns the averaging of gradients over replicas, also where that is not in this call; call it in a step."""
        return None

    def averages_last(self, parameters: Sequence[Tensor]) -> bool:
        """Whether `last_gradients` averages over the replicas in this step."""
        return False

    def last_gradients(self, loss: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Returns the gradients of `loss`, averaged over the replicas if `averages_last`; see `gradients`."""
        return self.gradients(loss, parameters)

    def averaged(
        self, value: Tensor, count: Count, gradient: Vector | None, wrt: Sequence[bool] | None = None
    ) -> tuple[Tensor, Count, Vector | None]:
        """Returns value, count and gradient of this rank's answer, averaged over the ranks that share the batch."""
        return value, count, gradient

    def gathered(self, values: Tensor) -> Tensor:
        """Returns values (n, ...) of all ranks that share the batch, in the order of the ranks."""
        return values

    def over_ranks(self, values: Tensor) -> Tensor | None:
        """Returns the mean of values over all ranks that train the same weights; see `Oracle.over_ranks`."""
        return values

    def agree(self, what: str, number: int) -> None:
        """Checks that all ranks that share a batch have the same `number` of `what`.

        Raises:
            ValueError: the numbers differ, which would make the ranks wait for each other forever.
        """

    def before_forward(self) -> None:
        """Frees copies of the weights that were gathered for an earlier pass, because the weights have changed."""

    def forward_pass(self, *, evaluates: bool = False) -> AbstractContextManager[None]:
        """Returns a context for each forward pass of a query; `evaluates` is True in eval mode."""
        return nullcontext()

    def recover(self, parameters: Sequence[Tensor]) -> None:
        """Resets the state that an interrupted forward or backward pass has left."""

    def leaves(self) -> list[Tensor] | None:
        """Returns the leaves of a graph that replace parameters; None if they cannot be determined."""
        return []

    def hooks(self, parameters: Sequence[Tensor]) -> list[dict[int, Any]]:
        """Returns hooks, in addition to those of tensors, that the computation of a gradient would run."""
        return []


@contextmanager
def _without_reentrance() -> Generator[None]:
    """A context for a backward pass of some leaves only.

    Raises:
        ValueError: the model uses re-entrant activation checkpointing.
    """
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise ValueError(
            "re-entrant activation checkpointing supports backward() only, which would change .grad: "
            "call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
        ) from error


class Replica(Local):
    """Whole parameters, and answers for this rank's batch only, in data-parallel training.

    Args:
        inside: the wrappers inside the loss.
        waiting: the ranks that wait for each other in every forward pass (SyncBatchNorm); None if no rank waits.
        replicas: see `Local`.
        apart: whether there are replicas that average no gradients in this call, as under `no_sync()`.
    """

    def __init__(
        self, inside: Sequence[Any], waiting: Peers | None, replicas: Peers | None, apart: bool = False
    ) -> None:
        self._inside, self._waiting, self.replicas, self._apart = inside, waiting, replicas, apart
        self._broadcasts = BufferBroadcasts(inside)

    def averaging(self, parameters: Sequence[Tensor]) -> Averaging | None:
        """See `Local.averaging`."""
        return averaging(self._inside, parameters)

    def over_ranks(self, values: Tensor) -> Tensor | None:
        """See `Local.over_ranks`."""
        if self._apart:
            return None
        return values if self.replicas is None else self.replicas.mean([values])[0]

    def agree(self, what: str, number: int) -> None:
        """See `Local.agree`; checks the ranks that wait for each other in every forward pass."""
        if self._waiting is not None:
            self._waiting.agree(what, number)

    def forward_pass(self, *, evaluates: bool = False) -> AbstractContextManager[None]:
        """See `Local.forward_pass`."""
        return self._broadcasts.never() if evaluates else self._broadcasts.once()


class OverlappingReplica(Replica):
    """A replica whose wrapper averages the last gradient of a step bucket by bucket, while it is computed."""

    _uses_grad = False  # whether `.grad`, which was None, may have gradients of this call

    def averages_last(self, parameters: Sequence[Tensor]) -> bool:
        """See `Local.averages_last`; a gradient that is accumulated already has to be averaged with the new one."""
        return all(p.grad is None for p in parameters)

    def last_gradients(self, loss: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """See `Local.last_gradients`."""
        self._uses_grad = True
        with _without_reentrance():
            grads = gradients_of_reduction(loss, parameters, self._inside)
        self._uses_grad = False
        return grads

    def recover(self, parameters: Sequence[Tensor]) -> None:
        """See `Local.recover`."""
        if self._uses_grad:
            for p in parameters:
                p.grad = None

    def hooks(self, parameters: Sequence[Tensor]) -> list[dict[int, Any]]:
        """See `Local.hooks`."""
        return accumulation_hooks(parameters)


class Replicated(Local):
    """Whole parameters on all ranks, and answers that are averaged over the batches of all ranks.

    Args:
        peers: the ranks.
        broadcasts: the broadcasts of buffers in the forward passes.
    """

    is_local = False

    def __init__(self, peers: Peers, broadcasts: BufferBroadcasts) -> None:
        self._peers, self._broadcasts = peers, broadcasts
        self.layout = ReplicatedLayout(peers)

    def forward_pass(self, *, evaluates: bool = False) -> AbstractContextManager[None]:
        """See `Local.forward_pass`."""
        return self._broadcasts.never() if evaluates else self._broadcasts.once()

    def averaged(
        self, value: Tensor, count: Count, gradient: Vector | None, wrt: Sequence[bool] | None = None
    ) -> tuple[Tensor, Count, Vector | None]:
        """See `Local.averaged`."""
        return self._peers.answer(value, count, gradient, reduced=False, wrt=wrt)

    def gathered(self, values: Tensor) -> Tensor:
        """See `Local.gathered`."""
        return self._peers.gathered(values)

    def over_ranks(self, values: Tensor) -> Tensor | None:
        """See `Local.over_ranks`."""
        return self._peers.mean([values])[0]

    def agree(self, what: str, number: int) -> None:
        """See `Local.agree`."""
        self._peers.agree(what, number)


class TensorParallel(Local):
    """Parameters that are sharded over ranks, all of which compute on the same batch.

    Args:
        layout: the layout of the parameters.
    """

    def __init__(self, layout: ShardedLayout) -> None:
        self.layout = self._shards = layout

    def weights(self, parameters: Sequence[Tensor]) -> Vector:
        """See `Local.weights`; returns the local parts."""
        return Vector([local(p.data) for p in parameters], layout=self.layout)

    def gradients(
        self, loss: Tensor, parameters: Sequence[Tensor], wrt: Sequence[bool] | None = None
    ) -> Sequence[Tensor | None]:
        """See `Local.gradients`; returns the local parts."""
        return self._shards.parts(super().gradients(loss, parameters, wrt))


class FullySharded(Local):
    """Modules under FSDP2, which gathers weights for each pass and reduces gradients before they are stored in `.grad`.

    Args:
        modules: the modules to which `fully_shard` was applied.
        layout: the layout of the trainable parameters; None if FSDP2 holds frozen parameters only.
        peers: the ranks to average over if the trainable parameters are not sharded.
    """

    def __init__(self, modules: FSDPModules, layout: ShardedLayout | None, peers: Peers | None) -> None:
        self._modules, self._shards = modules, layout
        self._peers = layout.peers if layout is not None else peers
        self.layout = layout or (ReplicatedLayout(peers) if peers else WHOLE)
        self.is_local = self._peers is None

    def weights(self, parameters: Sequence[Tensor]) -> Vector:
        """See `Local.weights`; returns the local parts."""
        return Vector([local(p.data) for p in parameters], layout=self.layout)

    def gradients(
        self, loss: Tensor, parameters: Sequence[Tensor], wrt: Sequence[bool] | None = None
    ) -> Sequence[Tensor | None]:
        """See `Local.gradients`; returns gradients of the mean of all ranks' losses.

        Raises:
            ValueError: gradients of another loss are not reduced yet, and would be added to these.
        """
        grads = self._modules.gradients(loss, parameters, wrt)
        return grads if self._shards is None else self._shards.parts(grads)

    def averaged(
        self, value: Tensor, count: Count, gradient: Vector | None, wrt: Sequence[bool] | None = None
    ) -> tuple[Tensor, Count, Vector | None]:
        """See `Local.averaged`."""
        if self._peers is None:
            return value, count, gradient
        return self._peers.answer(value, count, gradient, reduced=self._shards is not None, wrt=wrt)

    def gathered(self, values: Tensor) -> Tensor:
        """See `Local.gathered`."""
        return values if self._peers is None else self._peers.gathered(values)

    def over_ranks(self, values: Tensor) -> Tensor | None:
        """See `Local.over_ranks`."""
        return values if self._peers is None else self._peers.mean([values])[0]

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
        """See `Local.leaves`; returns the gathered parameters."""
        return self._modules.leaves()

    def hooks(self, parameters: Sequence[Tensor]) -> list[dict[int, Any]]:
        """See `Local.hooks`."""
        return accumulation_hooks(parameters)


_LOCAL = Local()


def place(
    model: nn.Module,
    parameters: Sequence[Tensor],
    fsdp_modules: Sequence[Any],
    scope: Scope | None,
    *,
    overlap: bool = False,
) -> Local:
    """Returns the placement of a model for one training step.

    Args:
        model: the model, with the wrappers inside it.
        parameters: its trainable parameters.
        fsdp_modules: its modules to which `fully_shard` was applied, outer ones first.
        scope: "global" averages answers over all ranks, "local" does not. None: as the wrapper does. Under FSDP2 and
            tensor parallelism the wrapper determines the scope (`bisam.model.compatibility` refuses the other value).
        overlap: whether the wrapper inside averages the last gradient of the step while it is computed.

    Raises:
        ValueError: the context `join()` of a DistributedDataParallel is active, and ranks would wait for each other.
        RuntimeError: the last step failed on this rank and not on the ranks that wait for it.
    """
    failures.check()
    shards = ShardedLayout.of(parameters)
    if shards is not None:
        return FullySharded(FSDPModules(fsdp_modules), shards, None) if fsdp_modules else TensorParallel(shards)
    inside, norms = communicating(model)
    check_join(inside, together=scope == "global")
    peers = Peers.of(inside, parameters) if scope == "global" else None
    if fsdp_modules:
        return FullySharded(FSDPModules(fsdp_modules), None, peers)
    if peers is not None:
        return Replicated(peers, BufferBroadcasts(inside))
    wrappers, separate = replicas_of(inside), apart(inside)
    if not (inside or norms or wrappers or separate):
        return _LOCAL
    waiting, replicas = (Peers.of(modules, parameters) if modules else None for modules in (norms, wrappers))
    kind = OverlappingReplica if overlap and wrappers else Replica
    return kind(inside, waiting, replicas, separate)
