"""Runs per minute of seeds that are trained at once, in a stack, relative to runs of their own in the same process.

python -m benchmarks.stacked
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.measure import (
    Parser,
    Times,
    at_least,
    interleaved,
    interval,
    judged,
    load,
    ratio,
    report,
    verdict,
    write,
)
from bisam.experiments.launch.work import train_or_explain, train_stack_or_explain
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.machine import Machine

ALONE = "a run of its own"
BAR = 3.0
"""The least gain of the largest stack."""
MACHINE = Machine(log=())


def rows(recipe: Recipe, stacks: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """One row for a run of its own and one for each size of a stack.

    `median` is the number of runs per minute relative to runs of their own. All that a run needs is part of its time:
    data, initial weights, training, test and files.
    """
    seeds = count()
    with tempfile.TemporaryDirectory() as folder:

        def alone() -> None:
            _check([train_or_explain(replace(recipe, seed=next(seeds)), Path(folder), MACHINE)])

        def stack(size: int) -> None:
            chosen = [replace(recipe, seed=next(seeds)) for _ in range(size)]
            _check(train_stack_or_explain(chosen, Path(folder), MACHINE))

        sizes = {ALONE: 1} | {f"a stack of {size}": size for size in stacks}
        calls = {ALONE: alone} | {f"a stack of {size}": partial(stack, size) for size in stacks}
        times = interleaved(calls, repeats)
    each = Times({name: [s / sizes[name] for s in found] for name, found in times.seconds.items()}, times.load)
    listed: list[dict[str, Any]] = []
    for name, size in sizes.items():
        gain, own = ratio(each, ALONE, name), ratio(each, name, ALONE).seconds
        bar = BAR if size == max(stacks) and name != ALONE else None
        row = {"contestant": name, "size": size, **judged(gain, bar, at_least=True)}
        listed.append(row | {"seconds": own, "runs_per_minute": 60 / own})
    return listed


def _check(outcomes: Sequence[Any]) -> None:
    for outcome in outcomes:
        if outcome.error is not None:
            raise RuntimeError(outcome.error)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        "benchmarks.stacked",
        "Runs per minute of BiSAM (-log) on scikit-learn's digits with the model mlp, in stacks of several seeds "
        "relative to runs of their own, one after the other in one process. Runs of their own write a checkpoint after "
        "each epoch and stacks write none.",
        "  python -m benchmarks.stacked\n"
        "  python -m benchmarks.stacked --stacks 12 30 --repeats 11 --json stacked.json",
        repeats=5,
    )
    parser.add_argument("--stacks", type=at_least(1), nargs="+", default=[12, 30], help="default: %(default)s")
    parser.add_argument("--epochs", type=at_least(1), default=30, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    parser.begin(arguments.threads)

    recipe = Recipe(model="mlp", method="bisam_log", rho=0.4, noise=0.4, label_smoothing=0.1, epochs=arguments.epochs)
    found = rows(recipe, arguments.stacks, arguments.repeats)
    report(
        "Runs per minute, relative to runs of their own",
        {
            "seeds": lambda r: f"{r['size']}",
            "training": lambda r: r["contestant"],
            "runs / min": lambda r: f"{r['runs_per_minute']:.1f}",
            "ratio": lambda r: f"{r['median']:.2f}",
            "95 % interval": lambda r: interval(r, 2),
            "verdict": verdict,
        },
        found,
        [f"{arguments.repeats} rounds, in which the contestants take turns; {arguments.epochs} epochs.", load(found)],
    )
    if arguments.json:
        settings = {"stacks": arguments.stacks, "epochs": arguments.epochs, "repeats": arguments.repeats}
        write(arguments.json, "stacked", settings, {"rows": found})


if __name__ == "__main__":
    main()
