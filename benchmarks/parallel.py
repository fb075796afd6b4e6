"""Speed of a SAMPa step on a pair of processes, relative to a SAM step on one process.

Each process has one thread, or `--threads` threads, so the pair uses twice the cores of one process, as two GPUs would
replace one. While the single process is timed, the other one waits and computes nothing. The limit is a step of SGD on
both at once, with nothing exchanged; it is below 2 where two processes on one machine slow each other down.

    python -m benchmarks.parallel
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from benchmarks.measure import Parser, Times, interleaved, interval, judged, load, ratio, report, verdict, write
from benchmarks.models import batch_for, mlp, resnet56
from bisam import ERM, SAM, SAMPa, SharpnessAware, cross_entropy, next_step
from bisam.integrations.pairs import InPairs
from bisam.methods import Method

REFERENCE = "SAM, one process"
OURS = "SAMPa, a pair"
LIMIT = "SGD, two at once"
SGD = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
PATIENCE = timedelta(hours=2)

Step = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """A model, its batch size, and the speed-up that a pair must reach."""

    model: Callable[[], nn.Module]
    n: int
    bar: float | None = None


CASES = {
    "resnet56": Case(resnet56, 32, 1.8),
    "resnet56-128": Case(resnet56, 128, 1.8),
    "mlp-128": Case(mlp, 128),
}


def in_two(work: Callable[..., Any], *arguments: Any) -> Any:
    """Run `work(rank, *arguments)` on two processes over gloo; the result of rank 0, passed through JSON."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with TemporaryDirectory() as folder:
        path = Path(folder, "result.json")
        mp.spawn(_process, (store.port, path, torch.get_num_threads(), work, arguments), nprocs=2)
        return json.loads(path.read_text())


def _process(
    rank: int, port: int, path: Path, threads: int, work: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    store = dist.TCPStore("127.0.0.1", port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=PATIENCE)
    result = work(rank, *arguments)
    if rank == 0:
        path.write_text(json.dumps(result))
    dist.barrier()
    os._exit(0)  # torch 2.6 sometimes hangs when it destroys the group


def taking_turns(rank: int, alone: Mapping[str, Step], both: Mapping[str, Step], repeats: int) -> dict[str, Any] | None:
    """The times of the steps that rank 0 runs alone, and of those that both ranks run, as `Times.to_dict` gives them.

    Rank 0 measures them.
    """
    names, turn = list(both), torch.zeros((), dtype=torch.int64)
    if rank == 1:
        while True:
            dist.recv(turn, 0)
            if turn < 0:
                return None
            both[names[int(turn)]]()
            dist.send(turn, 0)

    def lead(number: int) -> None:
        dist.send(torch.tensor(number), 1)
        both[names[number]]()
        dist.recv(turn, 1)

    steps = {**alone, **{name: partial(lead, i) for i, name in enumerate(names)}}
    times = interleaved(steps, repeats, processes=2)
    dist.send(torch.tensor(-1), 1)
    return times.to_dict()


def step(model: nn.Module, n: int, method: Callable[[torch.optim.Optimizer], Method]) -> Step:
    """A training step of a copy of the model, on one batch."""
    model = copy.deepcopy(model)
    optimizer = SGD(model.parameters())
    sharp, batch = SharpnessAware(model, method(optimizer), cross_entropy), batch_for(model, n)

    def call() -> None:
        sharp(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def measured(rank: int, name: str, repeats: int) -> dict[str, Any] | None:
    case = CASES[name]
    model = case.model()
    make = partial(step, model, case.n)
    alone = {
        REFERENCE: make(lambda _: SAM()),
        "SAMPa, one process": make(lambda optimizer: SAMPa(ahead=next_step(optimizer))),
        "SGD, one process": make(lambda _: ERM()),
    }
    torch.manual_seed(1)  # the same batch on both
    both = {OURS: make(lambda optimizer: InPairs(SAMPa(ahead=next_step(optimizer)))), LIMIT: make(lambda _: ERM())}
    return taking_turns(rank, alone, both, repeats)


def rows(name: str, repeats: int) -> list[dict[str, Any]]:
    """One row per implementation; `median` is its speed relative to the reference."""
    times, case = Times.from_dict(in_two(measured, name, repeats)), CASES[name]
    found: list[dict[str, Any]] = []
    for contestant in times.seconds:
        speed, own = ratio(times, REFERENCE, contestant), ratio(times, contestant, REFERENCE).seconds
        bar = case.bar if contestant == OURS else None
        row = {"model": name, "batch": case.n, "contestant": contestant}
        found.append(row | judged(speed, bar, at_least=True) | {"seconds": own})
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        "benchmarks.parallel",
        "Speed of a SAMPa step on a pair of processes, relative to a SAM step on one process; over gloo, on this "
        "machine.",
        "  python -m benchmarks.parallel\n"
        "  python -m benchmarks.parallel --models resnet56 --repeats 101 --json parallel.json",
        repeats=31,
    )
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES), help="default: all")
    arguments = parser.parse_args(argv)
    parser.begin(arguments.threads)

    found: list[dict[str, Any]] = []
    for name in arguments.models:
        own = rows(name, arguments.repeats)
        found += own
        report(
            f"Speed relative to SAM on one process: {name}, batch {CASES[name].n}",
            {
                "implementation": lambda r: r["contestant"],
                "time": lambda r: f"{r['seconds'] * 1e3:.2f} ms",
                "speed": lambda r: f"{r['median']:.3f}",
                "95 % interval": interval,
                "verdict": verdict,
            },
            own,
            [load(own)],
        )
    if arguments.json:
        write(arguments.json, "parallel", {"repeats": arguments.repeats}, {"rows": found})


if __name__ == "__main__":
    main()
