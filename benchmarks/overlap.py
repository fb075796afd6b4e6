"""Overlap: what averaging gradients during the last backward pass of a step saves where links are slow.

Two processes train over gloo under DistributedDataParallel. On one machine an all-reduce takes almost no time, so a
slow link is simulated: after its all-reduce, each bucket of gradients waits for its turn on the link and for a time in
proportion to its size, without using a core. The reference is a step of SAM without the link.

    python -m benchmarks.overlap
"""

from __future__ import annotations

import copy
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from benchmarks.measure import Parser, Times, interval, judged, load, ratio, report, seconds, write
from benchmarks.models import batch_for
from benchmarks.parallel import CASES, in_two, taking_turns
from benchmarks.scaling import step
from bisam import ERM, SAM, SharpnessAware, cross_entropy
from bisam.methods import Method

BUCKET = 0.25  # MiB: ResNet-56 has 3.3, and the default of 25 would be one bucket, which nothing can overlap
LINKS = (0.25, 0.5, 1.0)
REFERENCE = "SAM, no link"


@dataclass(frozen=True)
class Contestant:
    """A training step: its method, whether there is a link, and the argument `overlap` of its loss."""

    method: Method
    link: bool = True
    overlap: bool = False


CONTESTANTS = {
    "ERM, no link": Contestant(ERM(), link=False),
    "ERM": Contestant(ERM()),
    "ERM, overlap": Contestant(ERM(), overlap=True),
    REFERENCE: Contestant(SAM(), link=False),
    "SAM": Contestant(SAM()),
    "SAM, overlap": Contestant(SAM(), overlap=True),
}


class Link:
    """A link that carries one bucket after the other.

    Attributes:
        seconds: time of one entry of a gradient.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._waiting = queue.SimpleQueue[tuple[Any, torch.Tensor, Any]]()
        threading.Thread(target=self._carry, daemon=True).start()

    def reduce(self, state, bucket):  # no annotations: DDP checks them and does not resolve strings
        """The communication hook of a wrapper."""
        done, gradients = Future[torch.Tensor](), bucket.buffer().div_(dist.get_world_size())
        self._waiting.put((dist.all_reduce(gradients, async_op=True), gradients, done))
        return done

    def _carry(self) -> None:
        while True:
            work, gradients, done = self._waiting.get()
            work.wait()
            time.sleep(self.seconds * gradients.numel())
            done.set_result(gradients)


def measured(rank: int, name: str, share: float, repeats: int) -> dict[str, Any] | None:
    """The times of all steps; the link carries a whole gradient in `share` of a step of ERM."""
    case = CASES[name]
    model, link = case.model(), Link()
    batch = batch_for(model, case.n)

    def made(one: Contestant) -> Callable[[], None]:
        ddp = DistributedDataParallel(copy.deepcopy(model), bucket_cap_mb=BUCKET)
        if one.link:
            ddp.register_comm_hook(None, link.reduce)
        return step(SharpnessAware(ddp, one.method, cross_entropy, overlap=one.overlap), batch)

    steps = {key: made(one) for key, one in CONTESTANTS.items()}
    plain = steps["ERM, no link"]
    plain()
    whole = torch.tensor(min(seconds(plain) for _ in range(3)))
    dist.broadcast(whole, 0)
    link.seconds = share * whole.item() / sum(p.numel() for p in model.parameters())
    return taking_turns(rank, {}, steps, repeats)


def rows(name: str, share: float, repeats: int) -> list[dict[str, Any]]:
    """One row for each step; `median` is its time relative to the reference."""
    times = Times.from_dict(in_two(measured, name, share, repeats))
    found = {key: ratio(times, key, REFERENCE) for key in CONTESTANTS}
    shared = {"model": name, "batch": CASES[name].n, "link": share}
    return [{**shared, "contestant": key, **judged(r, None), "hidden": hidden(key, found)} for key, r in found.items()]


def hidden(key: str, found: Mapping[str, Any]) -> float | None:
    """The share of the time of the link that a step with overlap saves."""
    method, _, overlap = key.partition(", ")
    if overlap != "overlap":
        return None
    free, linked, own = (found[one].median for one in (f"{method}, no link", method, key))
    return (linked - own) / (linked - free)


def saved(row: Mapping[str, Any]) -> str:
    """Cell of the hidden share."""
    return "" if row["hidden"] is None else f"{row['hidden']:.2f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        "benchmarks.overlap",
        "Step time on two processes under DistributedDataParallel with a simulated slow link, relative to a step of "
        "SAM without it: with and without SharpnessAware(..., overlap=True).",
        "  python -m benchmarks.overlap\n"
        "  python -m benchmarks.overlap --models mlp-128 --links 0.5 --repeats 51 --json overlap.json",
        repeats=15,
    )
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=["resnet56"], help="default: resnet56")
    parser.add_argument(
        "--links", nargs="+", type=float, default=LINKS, help="times of a whole gradient on the link, in steps of ERM"
    )
    arguments = parser.parse_args(argv)
    if any(share <= 0 for share in arguments.links):
        parser.error(f"argument --links: must be positive, got {min(arguments.links):g}")
    parser.begin(arguments.threads)
    found = [
        row for name in arguments.models for share in arguments.links for row in rows(name, share, arguments.repeats)
    ]
    report(
        "Step time on two processes with a slow link, relative to SAM without it",
        {
            "model": lambda r: f"{r['model']}, batch {r['batch']}",
            "step": lambda r: r["contestant"],
            "link": lambda r: f"{r['link']:g}",
            "time": lambda r: f"{r['seconds'] * 1e3:.1f} ms",
            "ratio": lambda r: f"{r['median']:.3f}",
            "95 % interval": interval,
            "hidden": saved,
        },
        found,
        [load(found)],
    )
    if arguments.json:
        write(arguments.json, "overlap", {"repeats": arguments.repeats, "bucket_mib": BUCKET}, {"rows": found})


if __name__ == "__main__":
    main()
