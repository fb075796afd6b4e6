"""DDP: the DistributedDataParallel wrappers inside and around a loss. All private names of DDP are in this file."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bisam.distributed.peers import Peers


class Communicating(NamedTuple):
    """The modules of a model that communicate in their forward passes.

    Attributes:
        wrappers: the DistributedDataParallel wrappers, which may broadcast buffers.
        norms: the SyncBatchNorm layers, which average statistics in every pass.
    """

    wrappers: list[Any]
    norms: list[Any]


def communicating(model: nn.Module) -> Communicating:
    """Returns the modules that communicate in a forward pass of a model; none without a process group."""
    found = Communicating([], [])
    if dist.is_available() and dist.is_initialized():
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):
                found.wrappers.append(module)
            elif isinstance(module, nn.SyncBatchNorm):
                found.norms.append(module)
    return found


def check_join(inside: Sequence[Any], together: bool) -> None:
    """Checks that no rank may run out of batches while another one waits for it in the middle of a step.

    In the context `with ddp.join():` a rank without further batches takes part in the reductions of one forward and one
    backward pass of the wrapper. A method makes several passes.

    Args:
        inside: the wrappers inside the loss.
        together: whether queries wait for all ranks, as with scope "global".

    Raises:
        ValueError: the context was entered for a wrapper inside the loss, or for one around it and `together` is True.
    """
    if any(_joins(ddp) for ddp in inside):
        raise ValueError(
            "in the context `with model.join():` a rank without further batches takes part in one forward pass of a "
            "step, and the method in SharpnessAware(DistributedDataParallel(model), ...) may make several: wrap the "
            "other way round, DistributedDataParallel(SharpnessAware(model, ...)), which supports join. The wrapper "
            "stays in this mode when the context ends: then make a new one"
        )
    if together and _joins(DistributedDataParallel._get_active_ddp_module()):
        raise ValueError(
            "in the context `with model.join():` a rank without further batches takes no part in queries, and with "
            'scope="global" each query waits for all ranks: leave out scope, or give all ranks the same number of '
            "batches (a DistributedSampler)"
        )


def check_no_join(model: nn.Module) -> None:
    """Checks that no rank may take part in the gradients of a step without its own call of the loss.

    Raises:
        ValueError: the context `with ddp.join():` was entered, for a wrapper inside the loss or for the one around it.
    """
    if any(_joins(ddp) for ddp in _wrappers_of(communicating(model).wrappers)):
        raise ValueError(
            "in the context `with model.join():` a rank without further batches would not apply the decoupled term of "
            "the others: give all ranks the same number of batches (a DistributedSampler), or use WSAM without decouple"
        )


def replicas_of(inside: Sequence[Any]) -> list[Any]:
    """Returns the wrappers that average the gradients of this call: those inside the loss, else the one around it.

    None in the contexts `no_sync()` and `join()`, where some replicas may make no call.
    """
    return [ddp for ddp in _wrappers_of(inside) if ddp.require_backward_grad_sync and not _joins(ddp)]


class Averaging(NamedTuple):
    """The averaging of gradients over replicas, also in a call whose gradients are averaged in a later one.

    Attributes:
        peers: the replicas.
        wrappers: the wrappers that average.
    """

    peers: Peers
    wrappers: list[Any]

    def is_in_this_pass(self) -> bool:
        """Whether the wrappers average the gradients of a backward pass that follows their last forward pass."""
        return all(ddp.require_forward_param_sync for ddp in self.wrappers)


def averaging(inside: Sequence[Any], parameters: Sequence[Tensor]) -> Averaging | None:
    """Returns the averaging by the wrappers inside the loss, else by the one around it; None for a single replica."""
    wrappers = _wrappers_of(inside)
    peers = Peers.of(wrappers, parameters) if wrappers else None
    return None if peers is None else Averaging(peers, wrappers)


def apart(inside: Sequence[Any]) -> bool:
    """Whether a wrapper as in `replicas_of` does not average the gradients of this call: `no_sync()`, or `join()`."""
    return len(replicas_of(inside)) < len(_wrappers_of(inside))


def _wrappers_of(inside: Sequence[Any]) -> list[Any]:
    wrappers = list(inside) or [cast(Any, DistributedDataParallel._get_active_ddp_module())]
    return [ddp for ddp in wrappers if ddp is not None]


def _joins(ddp: Any) -> bool:
    return ddp is not None and ddp._join_config.enable


@contextmanager
def synchronising_as_before(model: nn.Module) -> Generator[None]:
    """A context for evaluations between two steps, after which wrappers in a model broadcast buffers as before it.

    A forward pass without gradients tells a wrapper not to broadcast in the next one, which is that of training.
    """
    before = [(ddp, ddp.require_forward_param_sync) for ddp in communicating(model).wrappers]
    try:
        yield
    finally:
        for ddp, was in before:
            ddp.require_forward_param_sync = was


def gradients_of_reduction(loss: Tensor, parameters: Sequence[Tensor], wrappers: Sequence[Any]) -> list[Tensor | None]:
    """Returns gradients that the wrapper in the graph of a loss has averaged over its ranks, as in a plain loop.

    The wrapper reduces each bucket of gradients as soon as it is complete, while the backward pass goes on. Afterwards
    it expects no gradient until its next forward pass, so that those that reach `.grad` are not averaged again.

    Args:
        loss: a scalar with its graph; the wrapper's last forward pass is in it.
        parameters: the trainable parameters, whose `.grad` is None, and is None again afterwards.
        wrappers: the wrappers inside the loss.

    Raises:
        ValueError: the loss does not depend on a parameter that a wrapper averages, and for which it waits.
    """
    try:
        torch.autograd.backward(loss, inputs=list(parameters))
        unused = {id(p) for p in parameters if p.grad is None}
        if unused and (names := [name for ddp in wrappers for name, p in _averaged(ddp) if id(p) in unused]):
            raise ValueError(
                f"the loss does not depend on {len(names)} parameters that DistributedDataParallel waits for "
                f"({', '.join(names[:3])}): freeze them before the model is wrapped, or leave overlap out and use "
                "DistributedDataParallel(SharpnessAware(model, ...), find_unused_parameters=True)"
            )
        # A wrapper may return views of its buckets, which the next reduction writes to.
        return [None if p.grad is None else p.grad.clone() if p.grad._is_view() else p.grad for p in parameters]
    finally:
        for p in parameters:
            p.grad = None


def _averaged(ddp: Any) -> list[tuple[str, Tensor]]:
    """Returns the parameters whose gradients a wrapper averages, with their names."""
    ignored = ddp.parameters_to_ignore
    return [(name, p) for name, p in ddp.module.named_parameters() if p.requires_grad and name not in ignored]


class BufferBroadcasts:
    """The broadcasts of buffers by wrappers inside a loss: in the first forward pass of a step, as in a plain loop.

    The later passes do not broadcast, so that ranks with different numbers of passes never wait for each other.

    Args:
        inside: the wrappers.
    """

    def __init__(self, inside: Sequence[Any]) -> None:
        self._inside, self._first = inside, True

    @contextmanager
    def once(self) -> Generator[None]:
        """A context for a forward pass."""
        if self._first:
            self._first = False
            yield
            return
        with self.never():
            yield

    @contextmanager
    def never(self) -> Generator[None]:
        """A context for a forward pass that does not broadcast, for example one with other buffers."""
        before = [ddp.require_forward_param_sync for ddp in self._inside]
        try:
            for ddp in self._inside:
                ddp.require_forward_param_sync = False
            yield
        finally:
            # A forward pass sets this attribute for the next one: False under no_sync(), and also without gradients.
            for ddp, was in zip(self._inside, before, strict=True):
                ddp.require_forward_param_sync = ddp.require_forward_param_sync or was
