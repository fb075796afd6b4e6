"""Distributed: ranks that are killed, fail, go on after an error, run out of batches, or have uneven or empty ones.

A case is right if the result equals the expected one, or if every rank that survives ends with an error in words within
`LIMIT` seconds after the fault. A rank that hangs, or whose process dies without an error, is wrong. Cases are named
RANKS-FAULT-NESTING-METHOD, where the nesting `overlap` is `inside` with `overlap=True`:

    killed          the last rank gets SIGKILL in the middle of a step
    error           it raises an error there
    caught          it catches its error and begins the next step
    empty           its batch has no examples
    uneven          the ranks' batches have different numbers of examples
    counts          so that the ranks have different numbers of forward passes, of a model with buffers
    joins           ranks have different numbers of batches, in the context `join()` of DistributedDataParallel
    bfloat16        weights in bfloat16
    resumed         a checkpoint is loaded by as many ranks, or by a single one
"""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._pytree import tree_leaves

from bisam import AESAM, ESAM, MSAM, SAM, BiSAM, LookSAM, NegLog, SAMPa, SharpnessAware, cross_entropy, next_step
from bisam.distributed import failures
from bisam.integrations.checkpoint import make_room
from bisam.masks import RandomMask
from bisam.perturbations import L2
from tests.support import cases, ranks
from tests.support.replicas import distance, identical, network, sharded, whole_weights

from .attack import Attack, Finding, Options

NESTINGS = ("inside", "outside", "inside_global", "outside_global", "fsdp2")
LOCAL = ("inside", "outside", "overlap")
OVERLAPPING = ("SAM", "BiSAM", "ESAM")
"""Methods for the nesting `overlap`, which others do not support."""
METHODS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "SAM": lambda o: SAM(L2(0.1)),
    "BiSAM": lambda o: BiSAM(0.1),
    "LookSAM": lambda o: LookSAM(L2(0.1), k=3),
    "SAMPa": lambda o: SAMPa(L2(0.1), ahead=next_step(o)),
    "ESAM": lambda o: ESAM(RandomMask(L2(0.1), beta=0.6)),
    "MSAM": lambda o: MSAM(2, SAM(L2(0.1))),
    "AESAM": lambda o: AESAM(L2(0.1), steps=9, first=-1.0, last=-1.0, delta=0.5),
}
STEPS, PART, FAULT = 8, 4, 3
LIMIT = 20.0
"""Seconds from a fault to the end of every rank."""
PATIENCE = timedelta(seconds=8)
"""How long a rank waits in a collective; by default torch waits for half an hour."""
CLEAR = re.compile(
    r"(closed|reset) by peer|Broken pipe|Timed out waiting|a step failed on rank \d|boom|the batch is empty|"
    r"ranks differ in micro-batches|`with model\.join\(\):`|Application timeout"
)


class Boom(Exception):
    """The error of the rank that fails."""


Part = Callable[[int, int], tuple[Tensor, ...]]
"""The batch of a rank in a step, `(step, rank)`."""


def even(step: int, rank: int) -> tuple[Tensor, ...]:
    return tuple(t[rank * PART : (rank + 1) * PART] for t in cases.batch(step, PART * dist.get_world_size()))


def uneven(step: int, rank: int) -> tuple[Tensor, ...]:
    """Four examples on the first rank, two on the others."""
    return tuple(t[: PART if rank == 0 else 2] for t in even(step, rank))


@dataclass(frozen=True)
class Built:
    """A loss in a nesting: the module that is called, the wrapper that joins, and the optimizer."""

    outer: Any
    wrapper: Any
    optimizer: torch.optim.Optimizer


def built(nesting: str, model: nn.Sequential, make: Callable[[torch.optim.Optimizer], Any]) -> Built:
    order, _, scope = nesting.partition("_")
    if order == "fsdp2":
        sharded(model)
    optimizer = sgd(model)  # of the shards
    overlap, arguments = order == "overlap", dict[str, Any](scope="global" if scope else None)
    inside = DDP(model) if order in ("inside", "overlap") else model
    stats = dist.get_world_size() == 4  # which communicate: four ranks record them, two do not
    sharp = SharpnessAware(inside, make(optimizer), cross_entropy, stats=stats, overlap=overlap, **arguments)
    outer = DDP(sharp) if order == "outside" else sharp
    return Built(outer, outer if order == "outside" else inside, optimizer)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return cases.OPTIMIZERS["sgd"](model.parameters())


# Faults that end the training of all ranks.


def faulty(fault: str, nesting: str, method: str, mark: str) -> None:
    """Trains; the last rank has its fault inside the second forward pass of a step, or its batch is the fault."""
    failures.LIMIT = 2.0
    rank, world = dist.get_rank(), dist.get_world_size()
    last, step, calls = rank == world - 1, 0, 0

    def strike(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if last and step == FAULT and calls == 2 and fault != "empty":
            Path(mark).write_text(str(time.time()))
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise Boom("boom")

    try:
        model = network()
        always = AESAM(L2(0.1), steps=9, first=-1e9, last=-1e9)  # so that a step has a second pass
        it = built(nesting, model, (lambda o: always) if method == "AESAM" else METHODS[method])
        model[3].register_forward_pre_hook(strike)
        for step in range(STEPS):
            calls = 0
            batch = even(step, rank)
            if last and step == FAULT and fault == "empty":
                Path(mark).write_text(str(time.time()))
                batch = tuple(t[:0] for t in batch)
            with suppress(Boom) if fault == "caught" else nullcontext():
                it.optimizer.zero_grad()
                it.outer(*batch).backward()
                it.optimizer.step()
    finally:
        Path(f"{mark}.{rank}").write_text(str(time.time()))


def judged(every: Sequence[ranks.End], fault: str, mark: Path) -> tuple[str, dict[str, Any]]:
    """Returns what is wrong with the ends of ranks, in words, and the facts."""
    last, wrong, said, seconds = len(every) - 1, [], [], []
    for rank, end in enumerate(every):
        text = _last_line(end) if end.error else ""
        said.append(text[:160])
        if rank == last and fault == "killed":
            continue
        if end.late:
            wrong.append(f"rank {rank} hangs")
        elif end.done and not (rank == last and fault == "caught"):
            wrong.append(f"rank {rank} ended as if nothing had happened")
        elif not (end.done or end.error):
            wrong.append(f"rank {rank} died without an error")
        elif end.error and not CLEAR.search(end.error):
            wrong.append(f"rank {rank} ended with another error: {text[:160]}")
        elif mark.exists() and (ended := Path(f"{mark}.{rank}")).exists():
            seconds.append(float(ended.read_text()) - float(mark.read_text()))
    if seconds and max(seconds) > LIMIT:
        wrong.append(f"a rank ended {max(seconds):.1f} s after the fault")
    return "; ".join(wrong), {"said": said, "seconds": round(max(seconds, default=0.0), 2)}


def refused(nesting: str, method: str, fault: str) -> str:
    """Returns the error of a first call that must be refused before any rank waits, the same on all ranks."""
    it = built(nesting, network(), METHODS[method])
    try:
        with it.wrapper.join() if fault == "joins" else nullcontext():
            it.outer(*(even if fault == "joins" else uneven)(0, dist.get_rank())).backward()
    except ValueError as error:
        return str(error)
    return ""


# Conditions under which training goes on, and what it is compared with.


def trained(
    nesting: str, method: str, batch: Part, counts: Sequence[int], make: Callable[[], Any] = network
) -> list[Tensor]:
    """The weights after a run; `counts` are the numbers of batches of the ranks."""
    rank = dist.get_rank()
    torch.manual_seed(1)
    model = make()
    it = built(nesting, model, METHODS[method])
    torch.manual_seed(5 + rank)
    with it.wrapper.join() if len(set(counts)) > 1 else nullcontext():
        for step in range(counts[rank]):
            it.optimizer.zero_grad()
            it.outer(*batch(step, rank)).backward()
            it.optimizer.step()
    return whole_weights(model)


def by_hand(method: str, batch: Part, counts: Sequence[int]) -> list[Tensor]:
    """Replicas in one process: gradients are summed over those that have a batch, and divided by the number of all."""
    models = [network() for _ in counts]
    optimizers = [sgd(model) for model in models]
    sharps = [SharpnessAware(m, METHODS[method](o), cross_entropy) for m, o in zip(models, optimizers, strict=True)]
    streams = [torch.Generator().manual_seed(5 + rank).get_state() for rank in range(len(counts))]
    for step in range(max(counts)):
        there = [rank for rank, count in enumerate(counts) if step < count]
        for rank in there:
            torch.set_rng_state(streams[rank])
            optimizers[rank].zero_grad()
            sharps[rank](*batch(step, rank)).backward()
            streams[rank] = torch.get_rng_state()
        for same in zip(*[models[rank].parameters() for rank in there], strict=True):
            mean = sum(p.grad for p in same) / len(counts)
            for p in same:
                p.grad.copy_(mean)
        for rank in there:
            optimizers[rank].step()
    return whole_weights(models[counts.index(max(counts))])


@dataclass(frozen=True, eq=False)
class Weighted:
    """An objective on the batches of all ranks together whose mean is the mean over ranks of their means."""

    objective: Any
    weights: Tensor

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.objective(outputs, targets) * self.weights


def in_one_process(method: str, batch: Part, steps: int) -> list[Tensor]:
    """The weights of training on the batches of all ranks together, each rank's with the same weight."""
    world = dist.get_world_size()
    sizes = [len(batch(0, rank)[0]) for rank in range(world)]
    weights = torch.cat([torch.full((n,), sum(sizes) / (world * n), dtype=torch.double) for n in sizes])
    model = network()
    optimizer = sgd(model)
    climbing = SAM(L2(0.1), ascent=Weighted(NegLog(), weights))
    sharp = SharpnessAware(
        model, climbing if method == "BiSAM" else METHODS[method](optimizer), Weighted(cross_entropy, weights)
    )
    for step in range(steps):
        optimizer.zero_grad()
        sharp(*[torch.cat(same) for same in zip(*[batch(step, rank) for rank in range(world)], strict=True)]).backward()
        optimizer.step()
    return whole_weights(model)


def right(nesting: str, method: str, fault: str, folder: str) -> str:
    """Returns how a run differs from the expected one; empty if it does not."""
    world = dist.get_world_size()
    counts = [STEPS - rank if fault == "joins" else STEPS for rank in range(world)]
    if fault == "bfloat16":
        return halved(method)
    if fault == "resumed":
        return resumed(method, folder)
    if fault == "counts":
        batch = uneven if method == "MSAM" else even
        ours, expected = (trained(order, method, batch, counts, cases.convnet) for order in (nesting, "outside"))
    else:
        batch = even if fault == "joins" else uneven
        ours = trained(nesting, method, batch, counts)
        local = nesting in LOCAL
        expected = by_hand(method, batch, counts) if local else in_one_process(method, batch, STEPS)
    off = distance(ours, expected)
    if not identical(ours):
        return "replicas differ"
    return "" if off < 1e-12 else f"weights differ by {off:.1e}"


def halved(method: str) -> str:
    """Weights in bfloat16 under FSDP2 train as those of one process do, as far as rounding allows."""
    runs = []
    for many in (True, False):
        model = network().to(torch.bfloat16)
        optimizer = sgd(sharded(model) if many else model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the perturbation is partly lost to rounding
            sharp, values = SharpnessAware(model, METHODS[method](optimizer), cross_entropy), []
            for step in range(STEPS):
                x, y = even(step, dist.get_rank()) if many else cases.batch(step, PART * dist.get_world_size())
                optimizer.zero_grad()
                loss = sharp(x.to(torch.bfloat16), y)
                loss.backward()
                optimizer.step()
                values.append(loss.detach().float())
        runs.append((whole_weights(model), torch.stack(values)))
    off = (runs[0][1] - runs[1][1]).abs().max().item()
    if not identical([t.float() for t in runs[0][0]]):
        return "ranks differ"
    return "" if off < 0.05 else f"losses differ by {off:.3f}"


def resumed(method: str, folder: str) -> str:
    """A run that is interrupted, and one that is not: the same bits. The checkpoint is then read by a single rank."""

    def train(first: int, load: bool) -> Any:
        model = sharded(network())
        optimizer = sgd(model)
        sharp = SharpnessAware(model, METHODS[method](optimizer), cross_entropy)
        if load:
            make_room(sharp, path)
            state = {"sharp": sharp.state_dict(), "optimizer": get_optimizer_state_dict(sharp, optimizer)}
            checkpoint.load(state, checkpoint_id=path)
            sharp.load_state_dict(state["sharp"])
            set_optimizer_state_dict(sharp, optimizer, state["optimizer"])
        for step in range(first, STEPS):
            torch.manual_seed(step)
            optimizer.zero_grad()
            sharp(*even(step, dist.get_rank())).backward()
            optimizer.step()
            if step == FAULT and not load:
                state = {"sharp": sharp.state_dict(), "optimizer": get_optimizer_state_dict(sharp, optimizer)}
                checkpoint.save(state, checkpoint_id=path)
                torch.save((whole_weights(model), shared(sharp)), f"{path}.{dist.get_rank()}")
        return whole_weights(model)

    path = os.path.join(folder, method)
    expected, ours = train(0, load=False), train(FAULT + 1, load=True)
    return "" if all(map(torch.equal, ours, expected)) else f"weights differ by {distance(ours, expected):.1e}"


def read_by_one(methods: Sequence[str], folder: str) -> dict[str, str]:
    """Reads checkpoints of several ranks in a single one: the same weights and state, and a next step that works."""
    found = {}
    for method in methods:
        path = os.path.join(folder, method)
        model = network()
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        sharp = SharpnessAware(model, METHODS[method](sgd(model)), cross_entropy)
        make_room(sharp, path)
        state = {"sharp": sharp.state_dict()}
        checkpoint.load(state, checkpoint_id=path)
        sharp.load_state_dict(state["sharp"])
        weights, memory = torch.load(f"{path}.0")
        same = all(map(torch.equal, whole_weights(model) + shared(sharp), weights + memory))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            sharp(*cases.batch(0)).backward()
        warned = any("without the batch of this rank" in str(w.message) for w in said)
        found[method] = (
            "" if same and warned == (method == "SAMPa") else f"state {'is' if same else 'differs'}, warned: {warned}"
        )
    return found


def shared(sharp: SharpnessAware) -> list[Tensor]:
    """The part of the state of a method that all ranks share, gathered."""
    state = {name: value for name, value in sharp.get_extra_state()["state"].items() if name != "batch"}
    leaves = [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
    return [leaf.full_tensor() if isinstance(leaf, DTensor) else leaf for leaf in leaves]


def several(function: Callable[..., str], nesting: str, methods: Sequence[str], *arguments: Any) -> dict[str, str]:
    """The results of a function for several methods, in one launch of ranks."""
    return {method: function(nesting, method, *arguments) for method in methods}


# The cases.


@dataclass(frozen=True)
class Case:
    """A case: the number of ranks, the fault, the nesting and the method, and what must come of it."""

    world: int
    fault: str
    nesting: str
    method: str
    verdict: Literal["right", "error"]

    @property
    def name(self) -> str:
        return f"{self.world}-{self.fault}-{self.nesting}-{self.method}"

    @property
    def launch(self) -> tuple[Any, ...]:
        """Cases that are equal in this share the launch of ranks: those in which no rank ends early."""
        alone = self.fault in ENDING
        return self.world, self.fault, self.nesting, self.verdict, self.method if alone else ""


ENDING = ("killed", "error", "caught", "empty")


def _cases() -> Iterator[Case]:
    chosen = {
        "killed": METHODS,
        "caught": METHODS,
        "error": ("SAM", "LookSAM", "SAMPa"),
        "empty": ("SAM", "MSAM", "AESAM"),
    }
    for world in (2, 4):
        for nesting in (*NESTINGS, "overlap"):
            local, of = nesting in LOCAL, OVERLAPPING if nesting == "overlap" else tuple(METHODS)
            for fault, methods in chosen.items():
                for method in (method for method in methods if method in of and (world == 2 or method == "SAM")):
                    yield Case(world, fault, nesting, method, "error")
            for method in of:
                if local or method not in ("ESAM", "MSAM"):  # ESAM chooses examples of a rank: other tests compare it
                    yield Case(world, "uneven", nesting, method, "right")
                if method == "MSAM" and not local:
                    yield Case(world, "counts", nesting, method, "error")
                if nesting != "fsdp2":
                    yield Case(world, "joins", nesting, method, "right" if nesting == "outside" else "error")
        for method in ("MSAM", "AESAM"):
            yield Case(world, "counts", "inside", method, "right")
        for method in ("SAM", "BiSAM", "LookSAM", "SAMPa"):
            yield Case(world, "bfloat16", "fsdp2", method, "right")
        for method in METHODS:
            yield Case(world, "resumed", "fsdp2", method, "right")


CASES = {case.name: case for case in _cases()}


def run(names: Sequence[str], options: Options) -> Iterator[Finding]:
    """Runs cases, several of them in one launch of ranks where that is possible."""
    launches: dict[tuple[Any, ...], list[Case]] = {}
    for name in names:
        launches.setdefault(CASES[name].launch, []).append(CASES[name])
    for together in launches.values():
        with tempfile.TemporaryDirectory() as folder:
            yield from _launched(together, Path(folder))


def _launched(together: Sequence[Case], folder: Path) -> Iterator[Finding]:
    case, methods = together[0], [case.method for case in together]

    def ends(world: int, function: Any, *arguments: Any, seconds: float) -> list[ranks.End]:
        return ranks.ends(world, function, *arguments, seconds=seconds, patience=PATIENCE)

    if case.fault in ENDING:
        mark = folder / "fault"
        every = ends(case.world, faulty, case.fault, case.nesting, case.method, str(mark), seconds=3 * LIMIT)
        wrong, facts = judged(every, case.fault, mark)
        yield _finding(case, wrong, facts)
        return
    arguments: tuple[Any, ...] = (refused, case.nesting, methods, case.fault)
    if case.verdict == "right":
        arguments = (right, case.nesting, methods, case.fault, str(folder))
    every = ends(case.world, several, *arguments, seconds=10 * LIMIT)
    broken = [f"rank {rank}: {_last_line(end)}" for rank, end in enumerate(every) if not end.done]
    later = {}
    if case.fault == "resumed" and not broken:
        (end,) = ends(1, read_by_one, methods, str(folder), seconds=10 * LIMIT)
        later = end.value or {}
        broken += [] if end.done else [f"a single rank: {_last_line(end)}"]
    for each in together:
        said = ["" if broken else end.value[each.method] for end in every]
        if broken:
            wrong = "; ".join(broken)
        elif case.verdict == "error":
            wrong = "; ".join(f"rank {r} says {text!r}" for r, text in enumerate(said) if not CLEAR.search(text))
        else:
            wrong = "; ".join(text for text in [*said, later.get(each.method, "")] if text)
        yield _finding(each, wrong, {"said": [text[:160] for text in said]})


def _last_line(end: ranks.End) -> str:
    return (end.error.strip() or "no result").splitlines()[-1]


def _finding(case: Case, wrong: str, facts: dict[str, Any]) -> Finding:
    kind = {"right": "right", "error": "with a clear error"}[case.verdict]
    return Finding(case.name, wrong, Counter() if wrong else Counter({kind: 1}), facts)


ATTACK = Attack("distributed", "ranks that die, fail, run out of batches, or have uneven ones", tuple(CASES), run)
