"""Pair: two ranks that share each step, and the messages that they exchange.

Ranks 0 and 1 are a pair, ranks 2 and 3 are a pair, and so on. Before the ranks exchange tensors, the processes exchange
a description of their queries and any error, so that an error on one rank is raised on both and no rank waits forever.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bisam.batches import Batch, leaves, tensors
from bisam.evaluation import Evaluation
from bisam.model.oracle import ModelOracle
from bisam.objectives import Objective
from bisam.oracle import Oracle
from bisam.vector import WHOLE, Vector, with_zeros


@dataclass(frozen=True)
class Form:
    """Types and shapes of an answer, from which another rank allocates memory for it."""

    losses: tuple[torch.Size, torch.dtype]
    value: torch.dtype
    count: int | torch.dtype
    holes: frozenset[int] | None  # None where no gradient was asked for

    @classmethod
    def of(cls, answer: Evaluation) -> Form:
        """Returns the form of an answer."""
        count = answer.count.dtype if isinstance(answer.count, Tensor) else answer.count
        holes = None if answer.grad is None else answer.grad.holes
        return cls((answer.losses.shape, answer.losses.dtype), answer.value.dtype, count, holes)

    def templates(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Returns tensors with the layout of those that are sent."""
        (shape, dtype), scalars = self.losses, [self.value]
        if isinstance(self.count, torch.dtype):
            scalars.append(self.count)
        numbers = [torch.empty(shape, dtype=dtype, device="meta")]
        numbers += [torch.empty((), dtype=dtype, device="meta") for dtype in scalars]
        return numbers if self.holes is None else [*numbers, *self._outside(parameters)]

    def parts(self, answer: Evaluation) -> list[Tensor]:
        """Returns the tensors that are sent."""
        count = [answer.count] if isinstance(answer.count, Tensor) else []
        return [answer.losses, answer.value, *count, *self._outside(answer.grad or ())]

    def _outside(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Returns the tensors outside of the holes."""
        return [t for i, t in enumerate(tensors) if i not in (self.holes or ())]

    def answer(
        self, parts: list[Tensor], own: Evaluation | None, objective: Objective, parameters: Sequence[Tensor]
    ) -> Evaluation:
        """Returns the answer with these parts; other attributes are those of the rank's own answer, if there is one."""
        losses, value, *rest = parts
        count = self.count if isinstance(self.count, int) else rest.pop(0)
        grad = None
        if self.holes is not None:
            sent = iter(rest)
            tensors = [None if i in self.holes else next(sent) for i in range(len(parameters))]
            grad = Vector(with_zeros(tensors, parameters), self.holes)
        blank = Evaluation(losses, None, None, value, count, None, objective)
        return replace(own or blank, losses=losses, grad=grad, value=value, count=count)


@dataclass(frozen=True)
class Note:
    """The description that two processes exchange after each has answered its share of some queries."""

    place: tuple[int, ...]  # numbers of the call, of the exchange in it, of the step and of the queries
    shapes: list[list[tuple[int, ...]]] = field(default_factory=list[list[tuple[int, ...]]])  # of their batches
    drawn: list[str] = field(default_factory=list[str])  # the state of each generator that has changed in this step
    buffers: str = ""
    forms: list[Form | None] = field(default_factory=list["Form | None"])
    error: str = ""


@dataclass(eq=False)
class Pair:
    """A pair of ranks, from the point of view of one of them.

    Args:
        rank: this rank.
        host: process group of both, for descriptions and for tensors on the CPU.
        device: process group of both, for tensors on other devices.
    """

    rank: int
    host: dist.ProcessGroup
    device: dist.ProcessGroup
    calls: int = 0
    steps: WeakKeyDictionary[nn.Module, int] = field(default_factory=WeakKeyDictionary[nn.Module, int])

    @property
    def member(self) -> int:
        """0 for the even rank and 1 for the odd rank."""
        return self.rank % 2

    def begin(self, below: ModelOracle, oracle: Oracle, batch: Batch) -> None:
        """Counts a step, and at some steps checks that both ranks begin it in the same state.

        Raises:
            ValueError: their states differ, or the model is not supported.
        """
        self.calls += 1
        step = self.steps.get(below.model, 0) + 1
        if step & (step - 1) == 0:
            check_model(below)
            mine = {
                "weights or buffers": digest([below.weights, *below.buffers]),
                "memories of the method": digest([oracle.step, oracle.state]),
                f"batches, of shapes {shapes_of(batch)} on rank {self.rank}": digest(batch),
            }
            for (what, own), theirs, remedy in zip(mine.items(), self.swap([*mine.values()]), _REMEDIES, strict=True):
                if own != theirs:
                    raise ValueError(f"{self}, which share a step, have different {what} (call {step}): {remedy}")
        self.steps[below.model] = step

    def swap(self, mine: Any) -> Any:
        """Sends an object to the other process and returns the object of the other.

        Raises:
            RuntimeError: the other rank does not respond.
        """
        both: list[Any] = [None, None]
        try:
            dist.all_gather_object(both, mine, group=self.host)
        except RuntimeError as error:
            raise self._gone() from error
        return both[1 - self.member]

    def exchange(self, away: Sequence[Tensor], here: Sequence[Tensor]) -> None:
        """Sends messages and fills others with those of the other rank, all at once.

        Raises:
            RuntimeError: the other rank does not respond.
        """
        group = self.host if all(m.is_cpu for m in (*away, *here)) else self.device
        sent = [dist.P2POp(dist.isend, m, self.rank ^ 1, group) for m in away]
        received = [dist.P2POp(dist.irecv, m, self.rank ^ 1, group) for m in here]
        try:
            for work in dist.batch_isend_irecv(sent + received):
                work.wait()  # on a GPU the stream waits, not the process
        except RuntimeError as error:
            raise self._gone() from error

    def check(self, mine: Note, theirs: Note) -> None:
        """Checks that the other rank has answered its share of the same queries.

        Raises:
            RuntimeError: it has failed, or is at another step.
            ValueError: it has other batches or random numbers.
        """
        if theirs.error:
            raise RuntimeError(
                f"rank {self.rank ^ 1}, which shares this step with rank {self.rank}, failed: {theirs.error}. The "
                "weights are as before the step"
            )
        if mine.place != theirs.place:
            raise RuntimeError(
                f"{self}, which share a step, are at different ones (call, exchange, step and queries are {mine.place} "
                f"on rank {self.rank} and {theirs.place} on the other): one left out a batch, or went on alone after "
                "an error. Start both again from a checkpoint"
            )
        if mine.shapes != theirs.shapes:
            raise ValueError(
                f"{self}, which share a step, have batches of different shapes ({mine.shapes} on rank {self.rank}, "
                f"{theirs.shapes} on the other): {_REMEDIES[-1]}"
            )
        if mine.drawn != theirs.drawn:
            raise ValueError(
                f"the method draws random numbers, and the generators of {self}, which share a step, differ: seed both "
                "alike, torch.manual_seed(...), and draw the same on both"
            )
        if mine.buffers != theirs.buffers:
            raise ValueError(
                "a forward pass at the weights gave the model's buffers other shapes, so that the other rank cannot "
                "take them: use the method alone, without InPairs"
            )

    def __str__(self) -> str:
        return f"ranks {self.rank - self.member} and {self.rank - self.member + 1}"

    def _gone(self) -> RuntimeError:
        return RuntimeError(
            f"rank {self.rank ^ 1}, which shares this step with rank {self.rank}, is gone or does not answer: see its "
            "own error. The weights are as before the step"
        )


_REMEDIES = (
    "make the model from the same seed on both, or load the same checkpoint of loss and optimizer on both; "
    "DistributedDataParallel(sharp) sends the weights of rank 0 to all",
    "load the same checkpoint on both, or begin anew on both",
    "give both the same part of the data, DistributedSampler(data, num_replicas=replicas(), rank=replica()), and "
    "augment it alike",
)
"""The remedies for different weights, states and batches."""

_pairs: WeakKeyDictionary[dist.ProcessGroup, Pair] = WeakKeyDictionary()
"""The pair of this process for each group of all ranks, with the lifetime of the group."""


def rank_and_size() -> tuple[int, int]:
    """Returns the rank of this process and the number of ranks.

    Raises:
        ValueError: there is no process group with an even number of ranks.
    """
    remedy = "start them with torchrun --nproc-per-node 2, or use the method alone, without InPairs"
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "InPairs needs two processes for a step, and there is no process group: call "
            f"torch.distributed.init_process_group() in two processes; {remedy}"
        )
    size = dist.get_world_size()
    if size % 2:
        raise ValueError(f"InPairs needs two processes for a step, and of {size} one is left over: {remedy}")
    return dist.get_rank(), size


def own_pair() -> Pair:
    """Returns the pair of this rank; at the first call all ranks must call it."""
    rank, _ = rank_and_size()
    world = cast("dist.ProcessGroup", dist.group.WORLD)
    if world not in _pairs:
        # The timeout of init_process_group, which later groups do not inherit.
        options = getattr(world._get_backend(world._device_types[0]), "options", None)
        timeout = getattr(options, "_timeout", None)
        host, _ = dist.new_subgroups(2, backend="gloo", timeout=timeout)
        device = host if is_gloo() else dist.new_subgroups(2, timeout=timeout)[0]
        _pairs[world] = Pair(rank, host, device)
    return _pairs[world]


def is_gloo() -> bool:
    """Whether gloo is the only backend, which sends tensors on the CPU only."""
    return dist.get_backend() == "gloo"


def check_model(below: ModelOracle) -> None:
    """Checks that a rank can run the model without the other ranks.

    Raises:
        ValueError: a wrapper has collectives in its forward pass, or the backend cannot send tensors of this device.
    """
    if any(isinstance(module, DistributedDataParallel) for module in below.model.modules()):
        raise ValueError(
            "the model is in DistributedDataParallel, whose forward passes need all ranks, and the two ranks of a pair "
            "run different ones: wrap the other way round, DistributedDataParallel(SharpnessAware(model, ...))"
        )
    if below.layout is not WHOLE:
        raise ValueError(
            "sharded parameters (FSDP2, tensor parallelism) and scope='global' need all ranks in each query, "
            "and the two ranks of a pair make different ones: use DistributedDataParallel(SharpnessAware(model, ...)), "
            "without the argument"
        )
    if is_gloo() and (kind := below.weights.tensors[0].device.type) != "cpu":
        raise ValueError(
            f"the model is on {kind}, and gloo sends between pairs what is on the CPU: "
            'torch.distributed.init_process_group("cpu:gloo,cuda:nccl") for CUDA'
        )


def message_like(templates: Sequence[Tensor], device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Allocates memory that is sent in one piece, and tensors in it that have the layout of the templates."""
    sizes = [-(-t.nbytes // _ALIGNMENT) * _ALIGNMENT for t in templates]
    message = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    parts = [
        piece[: t.nbytes].view(t.dtype).as_strided(t.shape, _strides(t))
        for piece, t in zip(message.split(sizes), templates, strict=True)
    ]
    return message, parts


_ALIGNMENT = 64  # bytes, the alignment of torch on the CPU: views in a message are then as fast as separate tensors


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Returns the strides of a tensor in the same memory format without gaps."""
    return tensor.stride() if tensor.is_contiguous() else torch.empty_like(tensor, device="meta").stride()


def shapes_of(batch: Batch) -> list[tuple[int, ...]]:
    """Returns the shapes of the tensors of a batch."""
    return [tuple(t.shape) for t in tensors(batch)]


def digest(tree: Any) -> str:
    """Returns a hash of a nest of tensors, Vectors and plain values, which is equal for equal bits."""
    digest = blake2b(digest_size=16)
    for leaf in leaves(tree):
        for part in leaf if isinstance(leaf, Vector) else [leaf]:
            if isinstance(part, Tensor):
                digest.update(repr((part.shape, part.dtype)).encode() + _bytes(part))
            else:  # the repr of other objects may contain an address
                digest.update((repr(part) if isinstance(part, _PLAIN) else type(part).__name__).encode())
    return digest.hexdigest()


_PLAIN = int | float | complex | str | bytes | torch.Size | torch.dtype | None


def _bytes(tensor: Tensor) -> bytes:
    if tensor.layout is not torch.strided or tensor.is_nested:
        return b""
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.nbytes else b""
