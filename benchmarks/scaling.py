"""Weak scaling: cost of DistributedDataParallel for a step of plain training and a step of SAM, on two processes.

The processes communicate over gloo. Each has its own batch and one thread, or `--threads` threads. The reference is the
same step on one process with the same batch, while the other process waits and computes nothing.

    python -m benchmarks.scaling
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.measure import Parser, Times, interval, load, ratio, report, write
from benchmarks.models import batch_for
from benchmarks.parallel import CASES, SGD, Step, in_two, taking_turns
from bisam import ERM, SAM, SharpnessAware, cross_entropy
from bisam.methods import Method

METHODS: dict[str, Method] = {"ERM": ERM(), "SAM": SAM()}
ALONE, OUTSIDE, INSIDE = "one process", "DDP(SharpnessAware(model))", "SharpnessAware(DDP(model))"


def loss(model: nn.Module, method: Method, nesting: str) -> tuple[nn.Module, DistributedDataParallel | None]:
    """The loss of a copy of the model, and the DDP wrapper around or inside it."""
    model = copy.deepcopy(model)
    if nesting == INSIDE:
        wrapper = DistributedDataParallel(model)
        return SharpnessAware(wrapper, method, cross_entropy), wrapper
    sharp = SharpnessAware(model, method, cross_entropy)
    if nesting == ALONE:
        return sharp, None
    wrapper = DistributedDataParallel(sharp)
    return wrapper, wrapper


def step(sharp: nn.Module, batch: Sequence[Tensor]) -> Step:
    """A training step."""
    optimizer = SGD(sharp.parameters())

    def call() -> None:
        sharp(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def reductions(model: nn.Module, batch: Sequence[Tensor], method: Method, nesting: str) -> int:
    """Number of all-reduce calls in the third step, because DDP rebuilds its buckets after the first."""
    sharp, wrapper = loss(model, method, nesting)
    if wrapper is None:
        return 0
    calls = [0]

    def hook(state, bucket):  # no annotations: DDP checks them and does not resolve strings
        calls[0] += 1
        work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    wrapper.register_comm_hook(None, hook)
    call = step(sharp, batch)
    for _ in range(3):
        calls[0] = 0
        call()
    return calls[0]


def measured(rank: int, name: str, repeats: int) -> dict[str, Any]:
    case = CASES[name]
    model = case.model()
    batch = batch_for(model, case.n)
    each = [(method, nesting) for method in METHODS for nesting in (ALONE, OUTSIDE, INSIDE)]
    steps = {f"{m}, {n}": step(loss(model, METHODS[m], n)[0], batch) for m, n in each}
    counts = {f"{m}, {n}": reductions(model, batch, METHODS[m], n) for m, n in each}
    alone, both = ({k: v for k, v in steps.items() if k.endswith(ALONE) == single} for single in (True, False))
    return {"times": taking_turns(rank, alone, both, repeats), "reductions": counts}


def rows(name: str, repeats: int) -> list[dict[str, Any]]:
    """One row per method and nesting; `median` is its time relative to the same method on one process."""
    found, case = in_two(measured, name, repeats), CASES[name]
    times, counts = Times.from_dict(found["times"]), found["reductions"]
    return [
        {
            "model": name,
            "batch": case.n,
            "method": method,
            "contestant": nesting,
            **vars(ratio(times, f"{method}, {nesting}", f"{method}, {ALONE}")),
            "reductions": counts[f"{method}, {nesting}"],
            "passed": counts[f"{method}, {nesting}"] == counts[f"ERM, {nesting}"],
        }
        for method in METHODS
        for nesting in (ALONE, OUTSIDE, INSIDE)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        "benchmarks.scaling",
        "Step time on two processes under DistributedDataParallel, relative to one process with the batch of one of "
        "them, for plain training (ERM) and SAM, in both nestings; and the number of all-reduce calls.",
        "  python -m benchmarks.scaling\n"
        "  python -m benchmarks.scaling --models resnet56 --repeats 101 --json scaling.json",
        repeats=31,
    )
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES), help="default: all")
    arguments = parser.parse_args(argv)
    parser.begin(arguments.threads)

    found: list[dict[str, Any]] = []
    shown: dict[str, Callable[[Any], str]] = {
        "method": lambda r: r["method"],
        "processes": lambda r: r["contestant"],
        "time": lambda r: f"{r['seconds'] * 1e3:.2f} ms",
        "ratio": lambda r: f"{r['median']:.3f}",
        "95 % interval": interval,
        "all-reduces": lambda r: str(r["reductions"]),
        "as ERM": lambda r: "[green]pass[/]" if r["passed"] else "[red]fail[/]",
    }
    for name in arguments.models:
        own = rows(name, arguments.repeats)
        found += own
        report(
            f"Step time on two processes relative to one: {name}, batch {CASES[name].n} each", shown, own, [load(own)]
        )
    if arguments.json:
        write(arguments.json, "scaling", {"repeats": arguments.repeats}, {"rows": found})


if __name__ == "__main__":
    main()
