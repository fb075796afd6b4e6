"""Train: several seeds of one recipe at once, from their folders to their results.

The course of a stack is that of `bisam.experiments.training.train`, and so are the rows of metrics and the results. No
checkpoint is written: a stack of small networks takes seconds, and one that is interrupted begins again.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from bisam import ERM
from bisam.experiments.data.image_tensors import Images
from bisam.experiments.data.splits import Data, Split, batches_of
from bisam.experiments.errors import OutOfTimeError
from bisam.experiments.recipes.length import run_length
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Result, Row, Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.runs.results import first_diverged
from bisam.experiments.training.counting import CountedMethod
from bisam.experiments.training.epoch import prepared
from bisam.experiments.training.metrics import ranked, scores
from bisam.experiments.training.optimizers import advances_by_epoch, build_optimizer, build_scheduler, descent_loss
from bisam.experiments.training.reference_speed import LatestSpeed
from bisam.experiments.training.stacked.checks import check
from bisam.experiments.training.stacked.network import Stack
from bisam.experiments.training.stacked.oracle import StackedOracle
from bisam.experiments.training.train import device_name, prepare, summary
from bisam.methods import Method

REFERENCE_STEPS = 2
"""Plain training steps of a copy of the stack after each epoch, the unit of the relative time."""

OnRows = Callable[[Sequence[Row]], None]
"""Called with the rows of metrics of an epoch, one for each run."""


def train_stack(runs: Sequence[Run], machine: Machine = Machine(), on_epoch: OnRows | None = None) -> list[Result]:  # noqa: B008
    """Train runs of one recipe with different seeds at once, and return their results.

    A run whose loss is not finite changes nothing in the others; its result says so (`diverged`), and has its epochs
    until then unless `Machine.stop_on_nan` is False.

    Args:
        runs: at least one; their folders are locked already (`Run.open`), and none is finished.
        machine: where to compute.
        on_epoch: called after each epoch.

    Raises:
        ValueError: the recipe cannot be stacked, or the data sets of the seeds differ in size.
        RunError: a folder was deleted or replaced. Runs before it are finished.
        OutOfTimeError: `Machine.max_time` is over before the last epoch.
        OSError: the disk is full or read-only. The same.
    """
    recipes = [run.recipe for run in runs]
    check(recipes[0], machine)
    if len({replace(recipe, seed=0) for recipe in recipes}) > 1:
        raise ValueError("the runs of a stack differ in their seeds alone")
    writers = [run.writer() for run in runs]
    found = StackTraining(recipes, machine).train(on_epoch)
    return [writer.finish(result, rows) for writer, (result, rows) in zip(writers, found, strict=True)]


class StackTraining:
    """A stack in progress.

    Args:
        recipes: one recipe with different seeds.
        machine: where to compute.

    Raises:
        ValueError: the data sets of the seeds differ in size.
    """

    def __init__(self, recipes: Sequence[Recipe], machine: Machine) -> None:
        self._recipe, self._seeds = recipes[0], [recipe.seed for recipe in recipes]
        recipe = self._recipe
        self._device = device = machine.fabric(recipe.precision).device
        loaded, models = zip(*(prepare(one, machine) for one in recipes), strict=True)
        self._data: list[Data] = list(loaded)
        _check_sizes(self._data)
        wide = recipe.precision == "64"
        self._stack = stack = Stack([(model.double() if wide else model).to(device) for model in models])
        self._train = [splits.train.to(device) for splits in loaded]
        self._validation = self._examples([splits.validation for splits in loaded])
        self._length = length = run_length(recipe, batches_of(len(loaded[0].train), recipe.batch_size))
        self._loss = descent_loss(recipe.label_smoothing, loaded[0].classes)
        self._optimizer = build_optimizer(stack.weights, recipe)
        self._scheduler = build_scheduler(self._optimizer, recipe, length.steps)
        method = recipe.build_method(
            optimizer=self._optimizer,
            steps=length.losses,
            epoch=length.losses_per_epoch,
            examples=len(loaded[0].train),
        )
        self._method, self._steps = CountedMethod(method), 0
        self._reference, self._latest_speed = _Reference(stack, recipe), LatestSpeed()
        self._histories: list[list[Row]] = [[] for _ in recipes]
        self._best_scores = torch.full((len(recipes),), -2.0, dtype=torch.float64)  # below any score
        self._best_epochs = [0] * len(recipes)
        self._stop_on_nan, self._max_time, self._start = machine.stop_on_nan, machine.max_time, time.monotonic()
        self._alive = torch.ones(len(recipes), dtype=torch.bool)
        self._best = {name: tensor.clone() for name, tensor in stack.state().items()}

    def train(self, on_epoch: OnRows | None = None) -> list[tuple[dict[str, Any], list[Row]]]:
        """Train all epochs and test; return for each seed the result and the rows of metrics."""
        longest = 0.0
        for epoch in range(1, self._length.epochs + 1):
            began = time.monotonic()
            if self._max_time is not None and longest and began - self._start + longest > self._max_time:
                raise OutOfTimeError("--max-time is over: the same command begins the stack again")
            rows = self._epoch(epoch)
            longest = max(longest, time.monotonic() - began)
            for history, row, alive in zip(self._histories, rows, self._alive.tolist(), strict=True):
                if alive:
                    history.append(row)
            if on_epoch is not None:
                on_epoch(rows)
            if self._stop_on_nan and not all(isfinite(row["train_loss"]) for row in rows):
                # As of a run alone: it has ended. What the others compute does not depend on it.
                self._alive &= self._stack.finite().cpu() | torch.tensor([isfinite(row["train_loss"]) for row in rows])
                if not self._alive.any():
                    break
        return self._test()

    def _epoch(self, epoch: int) -> list[Row]:
        recipe, count = self._recipe, self._stack.count
        shared: Row = {"epoch": epoch, "learning_rate": float(self._scheduler.get_last_lr()[0])}
        if recipe.steps is not None:
            shared["step"] = self._length.steps_until(epoch)
        losses, by_epoch = self._length.losses_in(epoch), advances_by_epoch(recipe)
        sums = _Sums(count, self._device)
        self._method.counts.clear()
        # As of a run alone: the order of the batches depends on the seed and the epoch.
        randoms = [torch.Generator().manual_seed(seed * 1_000_003 + epoch) for seed in self._seeds]
        start, first = time.perf_counter(), list[tuple[Tensor, Tensor]]()
        for inputs, labels in itertools.islice(self._batches(randoms), losses):
            oracle = StackedOracle(self._stack, self._loss, self._steps)
            _step(oracle, self._method, self._optimizer, (inputs, labels))
            self._steps += 1
            if not by_epoch:
                self._scheduler.step()
            sums.add(oracle, self._method.outputs, labels)
            if len(first) < REFERENCE_STEPS:
                first.append((inputs, labels))
        rows = sums.rows(self._method.counts[True], self._method.counts[False])  # waits for the device
        seconds = time.perf_counter() - start
        plain = self._latest_speed.after(losses, partial(self._reference.seconds_per_loss, first))
        relative = seconds / losses / plain
        shared_after: Row = {"losses": losses, "seconds": seconds / count, "relative_time": relative}
        if by_epoch:
            self._scheduler.step()
        found = [score[0] for score in self._scores(*self._validation)]
        self._note_best(found, epoch)
        return [shared | row | shared_after | {"validation": score} for row, score in zip(rows, found, strict=True)]

    def _note_best(self, found: Sequence[float], epoch: int) -> None:
        score = torch.tensor(found, dtype=torch.float64)
        # As of a run alone: ties go to the latest epoch, except to weights that are not finite.
        better = (score > self._best_scores) | ((score == self._best_scores) & self._stack.finite().cpu())
        better &= self._alive
        self._best_scores = torch.where(better, score, self._best_scores)
        chosen = better.nonzero().flatten().tolist()
        for i in chosen:
            self._best_epochs[i] = epoch
        index = torch.tensor(chosen, dtype=torch.long, device=self._device)
        for name, tensor in self._stack.state().items():
            self._best[name].index_copy_(0, index, tensor.index_select(0, index))

    def _batches(self, randoms: Sequence[torch.Generator]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs (S N, ...) and labels (S N,), the examples of one seed after those of the other."""
        size, splits = self._recipe.batch_size, self._train
        if all(isinstance(split, Images) and split.augmentation is None for split in splits):
            # Nothing but the order is random: drawn as one batch, an epoch is the same and takes fewer operations.
            whole = [next(iter(s.batches(len(s), r))) for s, r in zip(splits, randoms, strict=True)]
            x, y = self._stacked(whole)
            for inputs, labels in zip(x.split(size, 1), y.split(size, 1), strict=True):
                yield inputs.flatten(0, 1), labels.flatten()
            return
        for parts in zip(*(s.batches(size, r) for s, r in zip(splits, randoms, strict=True)), strict=True):
            x, y = self._stacked(parts)
            yield x.flatten(0, 1), y.flatten()

    def _stacked(self, parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return torch.stack([prepared(x, self._recipe) for x, _ in parts]), torch.stack([y for _, y in parts])

    def _examples(self, splits: Sequence[Split]) -> tuple[Tensor, Tensor]:
        """All examples of splits in their order: inputs (S, N, ...) and labels (S, N)."""
        return self._stacked([next(iter(split.to(self._device).batches(len(split)))) for split in splits])

    def _scores(self, inputs: Tensor, labels: Tensor) -> list[list[float]]:
        """Return the scores of each network for the metrics of the data set."""
        metrics, classes = self._data[0].metrics, self._data[0].classes
        logits = torch.cat([self._stack.predict_logits(part) for part in inputs.split(1024, 1)], 1)
        pairs = zip(logits.cpu(), labels.cpu(), strict=True)
        return [scores(metrics, ranked(one, metrics), y, classes) for one, y in pairs]

    def _test(self) -> list[tuple[dict[str, Any], list[Row]]]:
        """Test the last and the best weights; return the results of all seeds with their metrics."""
        test = self._examples([splits.test for splits in self._data])  # used here and nowhere else
        last, finite = self._scores(*test), self._stack.finite().tolist()
        self._stack.load(self._best)
        best = self._scores(*test)
        found: list[tuple[dict[str, Any], list[Row]]] = []
        for i, rows in enumerate(self._histories):
            diverged = first_diverged(rows) or (None if finite[i] else len(rows))
            chosen = {"score": float(self._best_scores[i]), "epoch": self._best_epochs[i]}
            tested = {"last": last[i], "best": best[i]}
            stopped = "diverged" if len(rows) < self._length.epochs else None
            result = summary(self._recipe, self._data[i], rows, tested, chosen, diverged, stopped)
            made = {"device": device_name(self._device), "processes": 1, "stacked": self._stack.count}
            found.append((result | made, rows))
        return found


class _Reference:
    """Plain training of a copy of a stack, on the first batches of an epoch."""

    def __init__(self, stack: Stack, recipe: Recipe) -> None:
        self._stack = copy.deepcopy(stack)
        self._optimizer = build_optimizer(self._stack.weights, recipe)
        self._loss = nn.CrossEntropyLoss(reduction="none")

    def seconds_per_loss(self, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
        """Measure the present speed."""
        start = time.perf_counter()
        for batch in batches:
            _step(StackedOracle(self._stack, self._loss), ERM(), self._optimizer, batch)
        self._stack.finite().any().item()  # waits for the device
        return (time.perf_counter() - start) / len(batches)


def _step(
    oracle: StackedOracle, method: Method, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]
) -> None:
    """Take one step of the optimizer with all networks."""
    gradient = method(oracle, batch).gradient
    for parameter, own in zip(oracle.parameters, gradient, strict=True):
        parameter.grad = own
    optimizer.step()


class _Sums:
    """Sums of loss, correct and flipped predictions of each network over the batches of an epoch.

    See `bisam.experiments.training.metrics.TrainingSums`.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self._count = count
        self._loss, self._correct, self._flipped = (torch.zeros(count, device=device) for _ in range(3))
        self._examples = 0

    def add(self, oracle: StackedOracle, outputs: Tensor, labels: Tensor) -> None:
        """Add a batch, whose outputs where the method took its descent gradient are `outputs`."""
        clean, size = oracle.clean(), len(labels) // self._count
        correct = (clean.outputs.argmax(1) == labels).view(self._count, -1)
        wrong = (outputs.argmax(1) != labels).view(self._count, -1)
        self._loss += clean.value * size
        self._correct += correct.sum(1)
        self._flipped += (correct & wrong).sum(1)
        self._examples += size

    def rows(self, gradients: int, forwards: int) -> list[Row]:
        """The metrics of each network; the counts are those of the examples of all networks."""
        examples, all_examples = self._examples, self._examples * self._count
        columns = (self._loss.tolist(), self._correct.tolist(), self._flipped.tolist())
        return [
            {
                "train_loss": loss / examples,
                "train_accuracy": correct / examples,
                "flipped": flipped,
                "gradients": gradients / all_examples,
                "forwards": forwards / all_examples,
            }
            for loss, correct, flipped in zip(*columns, strict=True)
        ]


def _check_sizes(loaded: Sequence[Data]) -> None:
    for name in ("train", "validation", "test"):
        sizes = sorted({len(getattr(splits, name)) for splits in loaded})
        if len(sizes) > 1:
            raise ValueError(
                f"--stack needs data of one size, and the {name} parts of the seeds have {sizes[0]} to {sizes[-1]} "
                "examples: leave --stack out"
            )
