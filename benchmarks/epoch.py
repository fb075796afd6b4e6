"""Shares of an epoch's time: what of `bisam train` is spent in the step, and what around it.

    python -m benchmarks.epoch

Training runs under a profiler of Python functions, which slows everything but torch's operators: without it the share
of the step is a little larger.
"""

from __future__ import annotations

import cProfile
import pstats
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.measure import Load, Parser, at_least, load, report, verdict, write
from bisam.experiments.measurements.timing import verdict as judge
from bisam.experiments.recipes.presets import CIFAR
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run, Writer
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training import train as training
from bisam.experiments.training.reference_speed import ReferenceSpeed

RECIPE = replace(CIFAR, model="resnet20", method="sam")
BAR = 0.97
STEP, BATCHES, REST = "step: loss, gradients, optimizer", "batches: order, augmentation", "other"
TRAINING, VALIDATION, SPEED, SAVED = "training", "validation", "reference speed", "metrics, checkpoint"

_CALLED = {
    # `train_epoch` calls these: file, function.
    ("module.py", "_wrapped_call_impl"): STEP,
    ("fabric.py", "backward"): STEP,
    ("fabric.py", "clip_gradients"): STEP,
    ("wrappers.py", "step"): STEP,
    ("optimizer.py", "zero_grad"): STEP,
    ("epoch.py", "prepared"): BATCHES,
}


class Shares:
    """The time of the epochs of a training run, by parts."""

    def __init__(self) -> None:
        self._profile = cProfile.Profile()
        self._around = Counter[str]()
        self._ended = Counter[str]()  # those until the last epoch ended
        self._begin = self._end = 0.0

    def train(self, recipe: Recipe, machine: Machine) -> None:
        """Trains in a temporary folder."""
        timed = self._timed
        with ExitStack() as stack:
            for holder, name, part in (
                (training, "train_epoch", TRAINING),
                (training, "predict", VALIDATION),
                (ReferenceSpeed, "seconds_per_loss", SPEED),
                (Writer, "save", SAVED),
            ):
                stack.enter_context(patch.object(holder, name, timed(getattr(holder, name), part)))
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            training.train(Run.under(Path(folder), recipe), machine, self._epoch_ends)

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        if part == TRAINING:
            function = partial(self._profile.runcall, function)

        def call(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            self._begin = self._begin or began
            try:
                return function(*arguments, **named)
            finally:
                self._around[part] += time.perf_counter() - began

        return call

    def _epoch_ends(self, row: Mapping[str, Any]) -> None:
        self._end, self._ended = time.perf_counter(), Counter(self._around)  # a test follows

    def of_training(self) -> dict[str, float]:
        """The shares of the parts of the training epochs."""
        stats: dict[Any, Any] = pstats.Stats(self._profile).stats  # pyright: ignore[reportAttributeAccessIssue]
        outer = next(key for key in stats if key[2] == "train_epoch")
        whole, seconds = stats[outer][3], Counter[str]()
        for (file, _, name), (*_, callers) in stats.items():
            if outer in callers:
                default = BATCHES if name == "indexed" else REST
                seconds[_CALLED.get((Path(file).name, name), default)] += callers[outer][3]
        seconds[REST] = whole - seconds[STEP] - seconds[BATCHES]
        return {part: seconds[part] / whole for part in (STEP, BATCHES, REST)}

    def of_epoch(self) -> dict[str, float]:
        """The shares of training and of what follows it in each epoch."""
        whole, parts = self._end - self._begin, (TRAINING, VALIDATION, SPEED, SAVED)
        return {part: self._ended[part] / whole for part in parts} | {REST: 1 - self._ended.total() / whole}


def rows(recipe: Recipe, machine: Machine) -> list[dict[str, Any]]:
    """One row for each part of a training epoch and of a whole epoch; the one of the step has a bar."""
    before, shares = Load.now(), Shares()
    shares.train(recipe, machine)
    seen = before.and_now(1)
    found: list[dict[str, Any]] = []
    for whole, parts in (("training epoch", shares.of_training()), ("epoch", shares.of_epoch())):
        for part, share in parts.items():
            bar = BAR if part == STEP else None
            met = None if bar is None else judge(share, share, seen, bar, at_least=True)
            row = {"whole": whole, "part": part, "share": share, "bar": bar, "verdict": met}
            found.append(row | {"load": seen.highest, "cores": seen.cores})
    return found


def percent(row: Mapping[str, Any]) -> str:
    """The share of a row."""
    return f"{100 * row['share']:.2f} %"


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        "benchmarks.epoch",
        "Shares of the time of the epochs of one run of bisam train that the step and everything else take. A round is "
        "an epoch.",
        "  python -m benchmarks.epoch\n"
        "  python -m benchmarks.epoch --dataset digits --model convnet --repeats 5 --json epoch.json",
        repeats=1,
    )
    parser.add_argument("--dataset", default=RECIPE.dataset, help="default: %(default)s, in the folder BISAM_DATA")
    parser.add_argument("--model", default=RECIPE.model, help="default: %(default)s")
    parser.add_argument("--method", default=RECIPE.method, help="default: %(default)s")
    parser.add_argument("--batch-size", type=at_least(1), default=RECIPE.batch_size, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    settings = {name: getattr(arguments, name) for name in ("dataset", "model", "method", "batch_size")}
    parser.begin(arguments.threads)
    try:
        found = rows(replace(RECIPE, **settings, epochs=arguments.repeats), Machine(log=()))
    except ValueError as error:
        parser.error(str(error))
    report(
        "Shares of the time of an epoch",
        {"of": lambda r: r["whole"], "part": lambda r: r["part"], "share": percent, "verdict": verdict},
        found,
        [load(found)],
    )
    if arguments.json:
        write(arguments.json, "epoch", {**settings, "epochs": arguments.repeats}, {"rows": found})


if __name__ == "__main__":
    main()
