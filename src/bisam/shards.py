"""Shards: parameters that are spread over ranks, and batches that are.

FSDP2 (`fully_shard`) and tensor parallelism keep parameters as DTensors. A method sees the parts that are here, as
tensors like any other, and the `Layout` of their Vector knows how they make up the whole:

    shards = Shards.of(parameters)                  # None where they are ordinary tensors
    shards.total(parts)                             # so that a norm is that of all of it
    FullyShard.of(modules).gradients(loss, ...)     # FSDP2 gathers weights, and reduces gradients on their way to .grad

`Peers` are the ranks whose batches are the parts of one.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bisam.vector import Tensors, Vector


def sharded_kind() -> type | tuple[()]:
    """The type of sharded parameters, DTensor; where its module was not imported nobody has made one."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())


def fully_sharded_kind() -> type | tuple[()]:
    """The type of modules that `fully_shard` was applied to, likewise."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that is here, sharing its memory; an ordinary tensor is its own."""
    return cast(Any, tensor).to_local() if isinstance(tensor, sharded_kind()) else tensor


class Shards:
    """How DTensors of the same layout as `tensors` are made of parts; a `bisam.vector.Layout`.

    Args:
        tensors: the trainable parameters.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._wholes: list[Any] = [t.detach() for t in tensors]
        groups: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
        for i, t in enumerate(self._wholes):
            split = tuple(d for d, placement in enumerate(t.placements) if placement.is_shard())
            groups.setdefault((t.device_mesh, split), []).append(i)
        self._sums = [
            (indices, mesh.device_type, [mesh.get_group(d) for d in split]) for (mesh, split), indices in groups.items()
        ]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Shards | None:
        """Theirs; None if they are ordinary tensors.

        Raises:
            ValueError: some are and some are not.
        """
        kind = sharded_kind()
        if not kind:
            return None
        sharded = [isinstance(t, kind) for t in tensors]
        if not any(sharded):
            return None
        if not all(sharded):
            raise ValueError(
                f"{sharded.count(False)} trainable parameters are ordinary tensors and {sharded.count(True)} are "
                "DTensors, and no rank could know the length of a gradient: shard all of them, fully_shard(model), or "
                "freeze the others"
            )
        return cls(tensors)

    def total(self, parts: Tensor) -> Tensor:
        """See `Layout.total`."""
        sums: list[Tensor] = []
        for indices, device, groups in self._sums:
            of_these = parts if len(self._sums) == 1 else torch.stack([parts[i] for i in indices])
            sums.append(of_these.sum().to(device))
            for group in groups:
                dist.all_reduce(sums[-1], group=group)
        return sums[0].to(parts.device) if len(sums) == 1 else torch.stack(sums).sum().to(parts.device)

    def whole(self, i: int, part: Tensor) -> Tensor:
        """See `Layout.whole`."""
        return self.wrapped(i, part).full_tensor()

    def part(self, i: int, whole: Tensor) -> Tensor:
        """See `Layout.part`."""
        from torch.distributed.tensor import DTensor, Replicate

        like = self._wholes[i]
        everywhere = DTensor.from_local(whole, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
        return everywhere.redistribute(placements=like.placements).to_local().clone()  # not a view of the whole

    def unfilled(self, i: int, part: Tensor) -> Tensor:
        """See `Layout.unfilled`."""
        return torch.empty(self._wholes[i].shape, dtype=part.dtype, device=part.device)

    def drawn(self, i: int, whole: Tensor) -> Tensor:
        """See `Layout.drawn`; each part is another rank's."""
        return self.part(i, whole)

    def first(self, value: Tensor) -> Tensor:
        """See `Layout.first`."""
        return self.peers.first(value)

    def wrapped(self, i: int, part: Tensor) -> Any:
        """Tensor `i` as a DTensor, of its part here."""
        from torch.distributed.tensor import DTensor

        like = self._wholes[i]
        return DTensor.from_local(
            part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )

    def parts(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The parts here of gradients, of which autograd may have left some spread in another way."""
        return [
            None
            if g is None
            else local(g if g.placements == like.placements else g.redistribute(placements=like.placements))
            for g, like in zip(cast("Sequence[Any]", grads), self._wholes, strict=True)
        ]

    @property
    def peers(self) -> Peers:
        """The ranks that they are spread over."""
        meshes = {t.device_mesh for t in self._wholes}
        groups = [mesh.get_group(d) for mesh in meshes for d in range(mesh.ndim)]
        return Peers(groups, torch.device(self._wholes[0].device_mesh.device_type))


class FullyShard:
    """The modules that `fully_shard` was applied to.

    Args:
        modules: outer before inner ones.
    """

    def __init__(self, modules: Sequence[Any]) -> None:
        self._modules = modules

    def reshard(self) -> None:
        """Drop gathered weights: they are of another point, or will be."""
        for module in self._modules:
            module.reshard()

    def gradients(self, loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Of the mean of all ranks' losses; what is in `.grad` stays there."""
        kept = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        try:
            with self._reduced():
                loss.backward()
            return [p.grad for p in parameters]
        finally:
            for p, grad in zip(parameters, kept, strict=True):
                p.grad = grad

    def leaves(self) -> list[Tensor] | None:
        """The gathered parameters, which a graph has in place of the sharded ones; None where this torch hides them."""
        groups = [group for module in self._modules for group in _groups(module)]
        if any(not hasattr(group, "fsdp_params") for group in groups):
            return None
        found = (getattr(p, "_unsharded_param", None) for group in groups for p in group.fsdp_params)
        return [leaf for leaf in found if leaf is not None]

    def recover(self, parameters: Sequence[Tensor]) -> None:
        """Begin afresh after a forward or backward pass that did not come to its end, where this torch can."""
        kept = [p.grad for p in parameters]
        for module in self._modules:
            if hasattr(module, "reset_iter_state") and getattr(module._get_fsdp_state(), "_is_root", False):
                module.reset_iter_state()
        for p, grad in zip(parameters, kept, strict=True):
            p.grad = grad

    @contextmanager
    def _reduced(self) -> Generator[None]:
        """A loop that accumulates asks for no reduction until its last batch, and a method needs each gradient."""
        asked = [
            (module, [(group.reduce_grads, group.all_reduce_grads) for group in _groups(module)])
            for module in self._modules
        ]
        off = [(module, flags[0]) for module, flags in asked if flags and not all(flags[0])]
        for module, _ in off:
            module.set_requires_gradient_sync(True, recurse=False)
        try:
            yield
        finally:
            for module, (reduce, all_reduce) in off:
                module.set_requires_gradient_sync(reduce, recurse=False)
                module.set_requires_all_reduce(all_reduce, recurse=False)


def _groups(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # before torch 2.12
        groups = [state._fsdp_param_group] if getattr(state, "_fsdp_param_group", None) else []
    return list(groups)


class Peers:
    """Ranks whose batches are the parts of one: what is averaged over them is that of the whole.

    Args:
        groups: process groups, averaged over one after the other.
        device: where what they tell each other has to be.
    """

    def __init__(self, groups: Sequence[Any], device: torch.device) -> None:
        self._groups, self._device = groups, device

    @classmethod
    def of(cls, model: nn.Module, parameters: Sequence[Tensor]) -> Peers | None:
        """Those of DistributedDataParallel, or all; None on one rank."""
        if not (parameters and dist.is_available() and dist.is_initialized()):
            return None
        found = (getattr(m, "process_group", None) for m in model.modules() if hasattr(m, "reducer"))
        group = next(found, None) or dist.group.WORLD
        return None if dist.get_world_size(group) == 1 else cls([group], parameters[0].device)

    def answer(
        self, value: Tensor, count: int | Tensor, gradient: Vector | None, reduced: bool
    ) -> tuple[Tensor, Tensor, Vector | None]:
        """Means over the ranks of an answer to a query; of its gradient too, unless that was reduced already."""
        counted = count.to(value.dtype) if isinstance(count, Tensor) else torch.full_like(value, count)
        if gradient is None or reduced:
            value, counted = self.mean([torch.stack([value, counted])])[0].unbind()
            return value, counted, gradient
        both, *grads = self.mean([torch.stack([value, counted]), *gradient])
        return both[0], both[1], gradient.like(grads)  # no holes: what is unused here may be used elsewhere

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Their means over the ranks, all of them together; new tensors."""
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for i, t in enumerate(tensors):
            kinds.setdefault((t.dtype, t.device), []).append(i)
        means = list(tensors)
        for indices in kinds.values():
            these: Tensors = [tensors[i] for i in indices]
            flat = torch._C._nn.flatten_dense_tensors(these)  # pyright: ignore
            for group in self._groups:
                dist.all_reduce(flat, group=group)
                flat /= dist.get_world_size(group)
            for i, mean in zip(indices, torch._C._nn.unflatten_dense_tensors(flat, these), strict=True):  # pyright: ignore
                means[i] = mean
        return means

    def first(self, value: Tensor) -> Tensor:
        """The value that the first of them has."""
        there = value.to(self._device)
        for group in self._groups:
            dist.broadcast(there, dist.get_global_rank(group, 0), group=group)
        return there

    def agree(self, what: str, number: int) -> None:
        """Make sure that all ranks have the same number; waits for them.

        Raises:
            ValueError: they do not; on all ranks.
        """
        extremes = torch.tensor([number, -number], device=self._device)
        for group in self._groups:
            dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
        most, least = extremes.tolist()[0], -extremes.tolist()[1]
        if most != least:
            raise ValueError(
                f"ranks differ in {what} ({least} to {most}), and would wait for each other: give them batches of the "
                "same size (drop_last=True in the DataLoader, or a DistributedSampler)"
            )


class Replicas:
    """Whole tensors that all ranks have, and go on having the same; a `bisam.vector.Layout`.

    Args:
        peers: the ranks.
    """

    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    def total(self, parts: Tensor) -> Tensor:
        """See `Layout.total`."""
        return parts.sum()

    def whole(self, i: int, part: Tensor) -> Tensor:
        """See `Layout.whole`."""
        return part

    def part(self, i: int, whole: Tensor) -> Tensor:
        """See `Layout.part`."""
        return whole

    def unfilled(self, i: int, part: Tensor) -> Tensor:
        """See `Layout.unfilled`."""
        return part

    def drawn(self, i: int, whole: Tensor) -> Tensor:
        """See `Layout.drawn`."""
        return self._peers.first(whole)

    def first(self, value: Tensor) -> Tensor:
        """See `Layout.first`."""
        return self._peers.first(value)

    def wrapped(self, i: int, part: Tensor) -> Tensor:
        """See `Layout.wrapped`."""
        return part
