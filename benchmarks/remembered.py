"""Time of methods that keep something between steps, relative to the passes and optimizer steps that they must do.

A row is a turn of a method: as many training steps as its queries take to repeat. Its limit is the same number of
forward-backward passes and optimizer steps in a plain loop, so that what is left is what the method remembers: the
arithmetic with stored vectors, their copies, and the check that they are finite.

    python -m benchmarks.remembered
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
class Turn:
    """A method and what a turn of it must do.

    Attributes:
        method: the method.
        passes: forward-backward passes of a turn, each for the whole batch.
        steps: training steps of a turn.
        forwards: further forward passes of a turn.
        chosen: examples of one more pass, of a batch of n.
    """

    method: Method
    passes: int
    steps: int = 1
    forwards: int = 0
    chosen: Callable[[int], int] = lambda n: 0

    def passes_of(self, n: int) -> float:
        """The passes in batches of n."""
        return self.passes + self.chosen(n) / n


TURNS: Mapping[str, Turn] = {
    "SAM": Turn(SAM(0.05), 2),
    "F-SAM": Turn(FSAM(0.05), 2),
    "GSAM": Turn(GSAM(0.05), 2),
    "WSAM": Turn(WSAM(0.05), 2),
    "MomentumSAM": Turn(MomentumSAM(0.05), 1),
    "LookSAM, 5 steps": Turn(LookSAM(0.05, k=5), 6, steps=5),
    # Its mask is of all weights, so that its first pass is a whole one. It takes what is above the median loss.
    "ESAM": Turn(ESAM(RandomMask(0.05, beta=1.0), gamma=0.5), 1, forwards=1, chosen=lambda n: n // 2 - 1),
}


def turn_of(turn: Turn, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """A turn of the method."""
    training = ours(turn.method, model, F.cross_entropy)

    def call() -> None:
        for _ in range(turn.steps):
            training.step(x, y)

    return call


def limit_of(turn: Turn, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """What a turn must do, in a plain loop."""
    base, part = SGD(model.parameters()), turn.chosen(len(x))
    first = turn.passes - turn.steps + (part > 0)  # each optimizer step follows one of the last passes

    def backward(n: int) -> None:
        base.zero_grad()
        F.cross_entropy(model(x[:n]), y[:n]).backward()

    def call() -> None:
        with torch.no_grad():
            for _ in range(turn.forwards):
                F.cross_entropy(model(x), y, reduction="none")
        for i in range(turn.passes):
            backward(len(x))
            if i >= first:
                base.step()
        if part:
            backward(part)
            base.step()
        base.zero_grad()

    return call


def measured(model: nn.Module, n: int, repeats: int) -> list[dict[str, Any]]:
    """One row for each method."""
    x, y = batch_for(model, n)
    contestants: dict[str, Callable[[], None]] = {}
    for name, turn in TURNS.items():
        contestants[name] = turn_of(turn, copy.deepcopy(model), x, y)
        contestants[f"limit of {name}"] = limit_of(turn, copy.deepcopy(model), x, y)
    times = interleaved(contestants, repeats)
    return [
        {
            "contestant": name,
            "passes": turn.passes_of(n),
            "forwards": turn.forwards,
            "steps": turn.steps,
            **judged(ratio(times, name, f"limit of {name}"), None),
        }
        for name, turn in TURNS.items()
    ]


def must(row: Mapping[str, Any]) -> str:
    """What a turn must do, in words."""
    words = [f"{row['passes']:.3g} passes"]
    if row["forwards"]:
        words.append(f"{row['forwards']} forward pass")
    return ", ".join([*words, f"{row['steps']} step{'s' if row['steps'] > 1 else ''}"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        "benchmarks.remembered",
        "Time of methods that keep something between steps, relative to the passes that they must do.",
        "  python -m benchmarks.remembered\n"
        "  python -m benchmarks.remembered --models mlp-32 --repeats 101 --json remembered.json",
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
            f"Time relative to what must be done: {name}, batch {case.n}",
            {
                "method": lambda r: r["contestant"],
                "must do": must,
                "ratio": lambda r: f"{r['median']:.3f}",
                "95 % interval": interval,
            },
            own,
            [load(own)],
        )
    if arguments.json:
        write(arguments.json, "remembered", {"repeats": arguments.repeats}, {"rows": rows})


if __name__ == "__main__":
    main()
