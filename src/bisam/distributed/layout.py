"""Layouts: how the tensors of a Vector that several ranks share are made of the parts on each rank.

FSDP2 (`fully_shard`) and tensor parallelism store parameters as DTensors. A method uses the local parts as ordinary
tensors, and the `Layout` of their Vector combines them:

    layout = ShardedLayout.of(parameters)           # None if the parameters are ordinary tensors
    layout.total(parts)                             # the sum over all ranks, for norms and inner products
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from bisam.distributed.peers import Peers
from bisam.vector import Layout


def dtensor_type() -> type | tuple[()]:
    """Returns the class DTensor, or () if its module was not imported, so that no DTensor can exist."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """Returns the local part of a DTensor, which shares its memory; any other tensor unchanged."""
    return cast(Any, tensor).to_local() if isinstance(tensor, dtensor_type()) else tensor


class _Form(NamedTuple):
    """How a DTensor is distributed over ranks; stored in place of the DTensor, which would keep its memory."""

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    @property
    def split(self) -> tuple[int, ...]:
        """The dimensions of the mesh over which the tensor is sharded; it is replicated over the others."""
        return tuple(d for d, placement in enumerate(self.placements) if not placement.is_replicate())


class ShardedLayout(Layout):
    """The layout of DTensors that are distributed as `tensors` are.

    Args:
        tensors: the trainable parameters. Ordinary tensors among them are assumed to be the same on all ranks, as they
            are under a plan of tensor parallelism.
    """

    sharded = True

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        kind = dtensor_type()
        self._forms = [
            _Form(t.device_mesh, t.placements, t.shape, t.stride()) if isinstance(t, kind) else None
            for t in cast("Sequence[Any]", tensors)
        ]
        groups: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
        for i, form in enumerate(self._forms):
            groups.setdefault((None, ()) if form is None else (form.mesh, form.split), []).append(i)
        self._sums = [
            (indices, [mesh.get_group(d) for d in split], mesh.device_type if split else None)
            for (mesh, split), indices in groups.items()
        ]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> ShardedLayout | None:
        """Returns the layout of these tensors, or None if all of them are ordinary tensors."""
        kind = dtensor_type()
        return cls(tensors) if kind and any(isinstance(t, kind) for t in tensors) else None

    def total(self, parts: Tensor) -> Tensor:
        """See `Layout.total`."""
        sums: list[Tensor] = []
        for indices, groups, device in self._sums:
            own = (parts if len(self._sums) == 1 else torch.stack([parts[i] for i in indices])).sum()
            there = own if device is None else own.to(device)
            for group in groups:
                dist.all_reduce(there, group=group)
            sums.append(there.to(parts.device))
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum()

    def whole(self, i: int, part: Tensor) -> Tensor:
        """See `Layout.whole`."""
        if (form := self._forms[i]) is None:
            return part
        return self.wrapped(i, part.to(form.mesh.device_type)).full_tensor().to(part.device)

    def part(self, i: int, whole: Tensor) -> Tensor:
        """See `Layout.part`."""
        if (form := self._forms[i]) is None:
            return whole
        from torch.distributed.tensor import DTensor, Replicate

        there = whole.to(form.mesh.device_type)
        everywhere = DTensor.from_local(there, form.mesh, [Replicate()] * form.mesh.ndim, run_check=False)
        part = everywhere.redistribute(placements=form.placements).to_local()
        return part.clone().to(whole.device)  # not a view of the whole

    def empty(self, i: int, part: Tensor) -> Tensor:
        """See `Layout.empty`."""
        form = self._forms[i]
        return torch.empty(part.shape if form is None else form.shape, dtype=part.dtype, device=part.device)

    def random(self, i: int, whole: Tensor) -> Tensor:
        """See `Layout.random`; a shard keeps the draw of its rank, replicas of a shard that of the first replica."""
        if (form := self._forms[i]) is None:
            return self.peers.first(whole)
        others = [d for d in range(form.mesh.ndim) if d not in form.split and form.mesh.size(d) > 1]
        part = self.part(i, whole)
        if not others:
            return part
        device = torch.device(form.mesh.device_type)
        return Peers([form.mesh.get_group(d) for d in others], device).first(part)

    def from_first_rank(self, value: Tensor) -> Tensor:
        """See `Layout.from_first_rank`."""
        return self.peers.first(value)

    def wrapped(self, i: int, part: Tensor) -> Any:
        """See `Layout.wrapped`; returns a DTensor."""
        if (form := self._forms[i]) is None:
            return part
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            part, form.mesh, form.placements, run_check=False, shape=form.shape, stride=form.stride
        )

    def parts(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Returns the local parts of gradients, which autograd may have sharded in another way than the parameters."""
        return [g if g is None or form is None else _as(g, form) for g, form in zip(grads, self._forms, strict=True)]

    @property
    def peers(self) -> Peers:
        """The ranks over which the tensors are distributed."""
        meshes = dict.fromkeys(form.mesh for form in self._forms if form is not None)  # in an order that ranks agree on
        groups = [mesh.get_group(d) for mesh in meshes for d in range(mesh.ndim)]
        return Peers(groups, torch.device(next(iter(meshes)).device_type))


def _as(tensor: Any, form: _Form) -> Tensor:
    alike = tensor.placements == form.placements
    return local(tensor if alike else tensor.redistribute(placements=form.placements))


class ReplicatedLayout(Layout):
    """The layout of whole tensors of which all ranks have identical copies.

    Args:
        peers: the ranks.

    Attributes:
        peers: the argument `peers`.
    """

    def __init__(self, peers: Peers) -> None:
        self.peers = peers

    def random(self, i: int, whole: Tensor) -> Tensor:
        """See `Layout.random`."""
        return self.peers.first(whole)

    def from_first_rank(self, value: Tensor) -> Tensor:
        """See `Layout.from_first_rank`."""
        return self.peers.first(value)
