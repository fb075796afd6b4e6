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
from typing import Any, NamedTuple, cast

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


def reshard(model: nn.Module) -> None:
    """Let go of what was gathered for an evaluation: till then a model has it in place of its own parameters."""
    if kind := fully_sharded_kind():
        FullyShard([module for module in model.modules() if isinstance(module, kind)]).reshard()


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that is here, sharing its memory; an ordinary tensor is its own."""
    return cast(Any, tensor).to_local() if isinstance(tensor, sharded_kind()) else tensor


class _Form(NamedTuple):
    """How a DTensor is spread; kept without it, for it holds memory."""

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    @property
    def split(self) -> tuple[int, ...]:
        """The dimensions of the mesh that it is in parts over; over the others are copies of these."""
        return tuple(d for d, placement in enumerate(self.placements) if not placement.is_replicate())


class Shards:
    """How DTensors of the same layout as `tensors` are made of parts; a `bisam.vector.Layout`.

    Args:
        tensors: the trainable parameters. Ordinary tensors among them are taken to be the same on all ranks, as those
            beside a plan of tensor parallelism are.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        kind = sharded_kind()
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
    def of(cls, tensors: Sequence[Tensor]) -> Shards | None:
        """Theirs; None if they are ordinary tensors."""
        kind = sharded_kind()
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

    def unfilled(self, i: int, part: Tensor) -> Tensor:
        """See `Layout.unfilled`."""
        form = self._forms[i]
        return torch.empty(part.shape if form is None else form.shape, dtype=part.dtype, device=part.device)

    def drawn(self, i: int, whole: Tensor) -> Tensor:
        """See `Layout.drawn`; a part is drawn by each rank, and by the first of those that have copies of it."""
        if (form := self._forms[i]) is None:
            return self.peers.first(whole)
        others = [d for d in range(form.mesh.ndim) if d not in form.split and form.mesh.size(d) > 1]
        part = self.part(i, whole)
        if not others:
            return part
        device = torch.device(form.mesh.device_type)
        return Peers([form.mesh.get_group(d) for d in others], device).first(part)

    def first(self, value: Tensor) -> Tensor:
        """See `Layout.first`."""
        return self.peers.first(value)

    def wrapped(self, i: int, part: Tensor) -> Any:
        """See `Layout.wrapped`."""
        if (form := self._forms[i]) is None:
            return part
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            part, form.mesh, form.placements, run_check=False, shape=form.shape, stride=form.stride
        )

    def parts(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The parts here of gradients, of which autograd may have left some spread in another way."""
        return [g if g is None or form is None else _as(g, form) for g, form in zip(grads, self._forms, strict=True)]

    @property
    def peers(self) -> Peers:
        """The ranks that they are spread over."""
        meshes = dict.fromkeys(form.mesh for form in self._forms if form is not None)  # in an order that ranks agree on
        groups = [mesh.get_group(d) for mesh in meshes for d in range(mesh.ndim)]
        return Peers(groups, torch.device(next(iter(meshes)).device_type))


def _as(tensor: Any, form: _Form) -> Tensor:
    alike = tensor.placements == form.placements
    return local(tensor if alike else tensor.redistribute(placements=form.placements))


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
            for group in _groups(module):
                if getattr(group, "_all_gather_result", None) is not None:
                    group.wait_for_unshard()  # else what was asked for ahead would arrive after the weights have moved
            module.reshard()

    def gradients(self, loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Of the mean of all ranks' losses; what is in `.grad` stays there.

        Raises:
            ValueError: gradients of another loss wait for their reduction, and would become part of these.
        """
        if any(leaf.grad is not None for leaf in self.leaves() or ()):
            raise ValueError(
                "gradients of another loss were not reduced yet, and would become part of the perturbation: leave out "
                "set_requires_gradient_sync(False) around that loss"
            )
        kept = [p.grad for p in parameters]
        try:
            for p in parameters:
                p.grad = None
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
        contexts = [module._get_fsdp_state()._state_ctx for module in self._modules]
        last = [context.is_last_backward for context in contexts]
        for module, _ in off:
            module.set_requires_gradient_sync(True, recurse=False)
        for context in contexts:
            context.is_last_backward = True  # else nothing would wait for the reductions
        try:
            yield
        finally:
            for context, was in zip(contexts, last, strict=True):
                context.is_last_backward = was
            for module, (reduce, all_reduce) in off:
                module.set_requires_gradient_sync(reduce, recurse=False)
                module.set_requires_all_reduce(all_reduce, recurse=False)


def _groups(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # an older torch has one
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
        """Those of DistributedDataParallel inside the model, or else all; None on one rank."""
        if not (parameters and dist.is_available() and dist.is_initialized()):
            return None
        found = (getattr(m, "process_group", None) for m in model.modules() if hasattr(m, "reducer"))
        group = next(found, None) or dist.group.WORLD
        return None if dist.get_world_size(group) == 1 else cls([group], parameters[0].device)

    def answer(
        self, value: Tensor, count: int | Tensor, gradient: Vector | None, reduced: bool
    ) -> tuple[Tensor, Tensor, Vector | None]:
        """Means over the ranks of an answer to a query; of its gradient too, unless that was reduced already."""
        wide = torch.promote_types(value.dtype, torch.float32)  # half precision cannot count
        counted = count.to(wide) if isinstance(count, Tensor) else torch.full_like(value, count, dtype=wide)
        both = torch.stack([value.to(wide), counted])
        if gradient is None or reduced:
            (both,) = self.mean([both])
            return both[0].to(value.dtype), both[1], gradient
        holes = gradient.holes
        used = torch.ones(len(gradient), device=both.device)
        if holes:
            used[torch.tensor(sorted(holes), device=both.device)] = 0
        both, used, *grads = self.mean([both, used, *gradient])
        if holes:  # a hole is one everywhere, or none; only who has some needs to look
            holes = frozenset(i for i, share in enumerate(used.tolist()) if i in holes and not share)
        return both[0].to(value.dtype), both[1], gradient.like(grads, holes)

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Their means over the ranks, all of them together; new tensors."""
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for i, t in enumerate(tensors):
            kinds.setdefault((t.dtype, t.device), []).append(i)
        means = list(tensors)
        for indices in kinds.values():
            these: Tensors = [tensors[i] for i in indices]
            flat = torch._C._nn.flatten_dense_tensors(these)  # pyright: ignore
            flat = flat.clone() if len(these) == 1 else flat  # of one tensor it is that tensor
            for group in self._groups:
                flat /= dist.get_world_size(group)  # first, as DistributedDataParallel does: a sum may overflow
                dist.all_reduce(flat, group=group)
            for i, mean in zip(indices, torch._C._nn.unflatten_dense_tensors(flat, these), strict=True):  # pyright: ignore
                means[i] = mean
        return means

    def first(self, value: Tensor) -> Tensor:
        """The value that the first of them has."""
        there = value.to(self._device).contiguous()
        for group in self._groups:
            dist.broadcast(there, dist.get_global_rank(group, 0), group=group)
        return there.to(value.device)

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
