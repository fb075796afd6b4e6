"""Time of methods other than SAM, relative to the passes and optimizer steps that they need.

A row is a cycle of a method: the training steps after which its queries repeat. Its limit is the same number of
forward-backward passes and optimizer steps in a plain loop. The rest is the overhead: vector arithmetic, copies of
stored vectors, and the check that they are finite.

    python -m benchmarks.overhead
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Parser, interleaved, interval, judged, load, ratio, report, write
from benchmarks.models import batch_for
from benchmarks.step import CASES, SGD, ours
from bisam import ESAM, FSAM, GSAM, SAM, WSAM, LookSAM, MomentumSAM
from bisam.masks import RandomMask
from bisam.methods import Method


@dataclass(frozen=True)
class Cycle:
    """A method, and the passes and steps of a cycle.

    Attributes:
        method: the method.
        passes: forward-backward passes of a cycle, each for the whole batch.
        steps: training steps of a cycle.
        forwards: further forward passes of a cycle.
        chosen: examples of one more pass, of a batch of n.
    """

    method: Method
    passes: int
    steps: int = 1
    forwards: int = 0
    chosen: Callable[[int], int] = lambda n: 0

    def passes_of(self, n: int) -> float:
        """Returns the passes, in batches of n examples."""
        return self.passes + self.chosen(n) / n


CYCLES: Mapping[str, Cycle] = {
    "SAM": Cycle(SAM(0.05), 2),
    "F-SAM": Cycle(FSAM(0.05), 2),
    "GSAM": Cycle(GSAM(0.05), 2),
    "WSAM": Cycle(WSAM(0.05), 2),
    "MomentumSAM": Cycle(MomentumSAM(0.05), 1),
    "LookSAM, 5 steps": Cycle(LookSAM(0.05, k=5), 6, steps=5),
    # Its mask is of all weights, so that its first pass is a whole one. It takes what is above the median loss.
    "ESAM": Cycle(ESAM(RandomMask(0.05, beta=1.0), gamma=0.5), 1, forwards=1, chosen=lambda n: n // 2 - 1),
}


def cycle_of(cycle: Cycle, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Returns a cycle of the method."""
    training = ours(cycle.method, model, F.cross_entropy)

    def call() -> None:
        for _ in range(cycle.steps):
            training.step(x, y)

    return call


def limit_of(cycle: Cycle, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Returns a plain loop with the passes and steps of a cycle."""
    base, part = SGD(model.parameters()), cycle.chosen(len(x))
    first = cycle.passes - cycle.steps + (part > 0)  # each optimizer step follows one of the last passes

    def backward(n: int) -> None:
        base.zero_grad()
        F.cross_entropy(model(x[:n]), y[:n]).backward()

    def call() -> None:
        with torch.no_grad():
            for _ in range(cycle.forwards):
                F.cross_entropy(model(x), y, reduction="none")
        for i in range(cycle.passes):
            backward(len(x))
            if i >= first:
                base.step()
        if part:
            backward(part)
            base.step()
        base.zero_grad()

    return call


def measured(model: nn.Module, n: int, repeats: int) -> list[dict[str, Any]]:
    """Returns one row for each method."""
    x, y = batch_for(model, n)
    contestants: dict[str, Callable[[], None]] = {}
    for name, cycle in CYCLES.items():
        contestants[name] = cycle_of(cycle, copy.deepcopy(model), x, y)
        contestants[f"limit of {name}"] = limit_of(cycle, copy.deepcopy(model), x, y)
    times = interleaved(contestants, repeats)
    return [
        {
            "contestant": name,
            "passes": cycle.passes_of(n),
            "forwards": cycle.forwards,
            "steps": cycle.steps,
            **judged(ratio(times, name, f"limit of {name}"), None),
        }
        for name, cycle in CYCLES.items()
    ]


def needed(row: Mapping[str, Any]) -> str:
    """Returns the passes and steps of a cycle, in words."""
    words = [f"{row['passes']:.3g} pass{'' if row['passes'] == 1 else 'es'}"]
    if row["forwards"]:
        words.append(f"{row['forwards']} forward pass")
    return ", ".join([*words, f"{row['steps']} step{'s' if row['steps'] > 1 else ''}"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        "benchmarks.overhead",
        "Time of methods other than SAM, relative to the passes and optimizer steps that they need.",
        "  python -m benchmarks.overhead\n"
        "  python -m benchmarks.overhead --models mlp-32 --repeats 101 --json overhead.json",
        repeats=31,
    )
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=["resnet56", "mlp-32"])
    arguments = parser.parse_args(argv)
    parser.begin(arguments.threads)

    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        torch.manual_seed(0)
        case = CASES[name]
        own = [{"model": name, "batch": case.n, **row} for row in measured(case.model(), case.n, arguments.repeats)]
        rows += own
        report(
            f"Time relative to the passes and steps that a method needs: {name}, batch {case.n}",
            {
                "method": lambda r: r["contestant"],
                "needs": needed,
                "ratio": lambda r: f"{r['median']:.3f}",
                "95 % interval": interval,
            },
            own,
            [load(own)],
        )
    if arguments.json:
        write(arguments.json, "overhead", {"repeats": arguments.repeats}, {"rows": rows})


if __name__ == "__main__":
    main()
