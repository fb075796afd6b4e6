"""Peers: ranks whose batches are parts of one batch, and averages over these ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bisam.vector import Tensors, Vector


def world_size() -> int:
    """Returns the number of ranks of the default process group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def position() -> str:
    """Returns the number of this rank among all ranks, as "0 of 2"."""
    return f"{dist.get_rank() if world_size() > 1 else 0} of {world_size()}"


class Peers:
    """Ranks whose batches are parts of one batch: averages over the ranks are averages over the whole batch.

    Args:
        groups: process groups; averages are computed over one after the other.
        device: the device of the tensors that the ranks exchange.
    """

    def __init__(self, groups: Sequence[Any], device: torch.device) -> None:
        self._groups, self._device = groups, device

    @classmethod
    def of(cls, modules: Sequence[Any], parameters: Sequence[Tensor]) -> Peers | None:
        """Returns the ranks of the first module's process group, else all ranks; None for a single rank."""
        if not (parameters and dist.is_available() and dist.is_initialized()):
            return None
        group = next((module.process_group for module in modules), None) or dist.group.WORLD
        return None if dist.get_world_size(group) == 1 else cls([group], parameters[0].device)

    @property
    def ranks(self) -> list[int]:
        """The numbers of the ranks, including this one."""
        return sorted({rank for group in self._groups for rank in dist.get_process_group_ranks(group)})

    def answer(
        self,
        value: Tensor,
        count: int | Tensor,
        gradient: Vector | None,
        reduced: bool,
        wrt: Sequence[bool] | None = None,
    ) -> tuple[Tensor, Tensor, Vector | None]:
        """Returns the means over the ranks of an answer, and of its gradient unless that is already `reduced`.

        Only the gradients of the tensors `wrt` are exchanged, which are the same on all ranks (see `Query`).
        """
        wide = torch.promote_types(value.dtype, torch.float32)  # half precision cannot represent large counts
        counted = count.to(wide) if isinstance(count, Tensor) else torch.full_like(value, count, dtype=wide)
        both = torch.stack([value.to(wide), counted])
        if gradient is None or reduced:
            (both,) = self.mean([both])
            return both[0].to(value.dtype), both[1], gradient
        asked = [i for i in range(len(gradient)) if wrt is None or wrt[i]]
        holes = gradient.holes.intersection(asked)
        used = torch.ones(len(gradient), device=both.device)
        if holes:
            used[torch.tensor(sorted(holes), device=both.device)] = 0
        both, used, *means = self.mean([both, used, *[gradient.tensors[i] for i in asked]])
        if holes:  # a position is a hole only if it is one on all ranks; ranks without holes need no check
            holes = frozenset(i for i, share in enumerate(used.tolist()) if i in holes and not share)
        grads = [*gradient.tensors]
        for i, mean in zip(asked, means, strict=True):
            grads[i] = mean
        return both[0].to(value.dtype), both[1], gradient.like(grads, holes | gradient.holes.difference(asked))

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Returns the means of tensors over the ranks as new tensors, with one reduction for each type and device."""
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for i, t in enumerate(tensors):
            kinds.setdefault((t.dtype, t.device), []).append(i)
        means = list(tensors)
        for indices in kinds.values():
            these: Tensors = [tensors[i] for i in indices]
            flat = torch._C._nn.flatten_dense_tensors(these)  # pyright: ignore
            flat = flat.clone() if len(these) == 1 else flat  # flattening a single tensor returns that tensor
            for group in self._groups:
                flat /= dist.get_world_size(group)  # first, as DistributedDataParallel does: a sum may overflow
                dist.all_reduce(flat, group=group)
            for i, mean in zip(indices, torch._C._nn.unflatten_dense_tensors(flat, these), strict=True):  # pyright: ignore
                means[i] = mean
        return means

    def first(self, value: Tensor) -> Tensor:
        """Returns the value on the first of the ranks."""
        there = value.to(self._device).contiguous()
        for group in self._groups:
            dist.broadcast(there, dist.get_global_rank(group, 0), group=group)
        return there.to(value.device)

    def gathered(self, values: Tensor) -> Tensor:
        """Returns values (n, ...) of all ranks, one rank after the other; n may differ. It waits for the device."""
        there = values.to(self._device).contiguous()
        for group in self._groups:
            size = torch.tensor([len(there)], device=self._device)
            sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
            dist.all_gather(sizes, size, group=group)
            counts = [int(n) for n in torch.cat(sizes).tolist()]
            padded = there.new_zeros((max(counts), *there.shape[1:]))
            padded[: len(there)] = there
            parts = [torch.empty_like(padded) for _ in counts]
            dist.all_gather(parts, padded, group=group)
            there = torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])
        return there.to(values.device)

    def agree(self, what: str, number: int) -> None:
        """Checks that all ranks have the same number; synchronises the ranks.

        Raises:
            ValueError: they do not; raised on all ranks.
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
