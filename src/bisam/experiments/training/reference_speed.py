"""Reference speed: seconds of a plain training step on this machine now, the unit of `relative_time`.

Wall-clock times of a shared or throttled machine vary; the ratio of two times measured directly after each other varies
least. So epochs are followed by a few steps of plain training on a copy of the model: each epoch if it is long, one in
a while if epochs are short, so that these steps are a small part of the run.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from bisam import ERM, SharpnessAware
from bisam.experiments.data.splits import Split, without_index
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.training.counting import CountedMethod
from bisam.experiments.training.epoch import train_epoch
from bisam.experiments.training.fsdp import shard
from bisam.experiments.training.optimizers import build_optimizer, grad_scaler

REFERENCE_STEPS = 8
"""Plain training steps of one measurement."""
RENEWED = 16 * REFERENCE_STEPS
"""Losses of a run between two measurements, at least."""


class LatestSpeed:
    """The latest measurement of the reference speed, which is renewed after an epoch if it is old."""

    def __init__(self) -> None:
        self._seconds: float | None = None
        self._losses = 0  # since the latest measurement

    def after(self, losses: int, measure: Callable[[], float]) -> float:
        """Return the seconds of a plain step.

        Args:
            losses: number of losses of the epoch that has ended.
            measure: measures the present speed.
        """
        self._losses += losses
        if self._seconds is None:
            measure()  # the first steps of a process are slower
        elif self._losses < RENEWED:
            return self._seconds
        self._seconds, self._losses = measure(), 0
        return self._seconds


def measurements(epochs: int, losses: int) -> int:
    """Return how often a run of `epochs` with so many `losses` in each measures its speed, warm-up included."""
    return 2 + (epochs - 1) // -(-RENEWED // losses)


class PrefetchedSplit:
    """A split that loads its first batch when an iterator over its batches is made.

    Processes that read files start once in an epoch. Their start would dominate the time of a few steps.
    """

    def __init__(self, split: Split) -> None:
        self._split = split

    def __len__(self) -> int:
        return len(self._split)

    def batches(
        self, size: int, generator: torch.Generator | None = None, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[Any, Tensor]]:
        """Return the batches of the split; see `Split.batches`."""
        return without_index(self.indexed(size, generator, rank, ranks))

    def indexed(
        self, size: int, generator: torch.Generator | None = None, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[Tensor, Any, Tensor]]:
        """Return the batches of the split with the numbers of their examples; see `Split.indexed`."""
        batches = self._split.indexed(size, generator, rank, ranks)
        return itertools.chain([next(batches)], batches)


class ReferenceSpeed:
    """Plain training of a copy of a run's model, on the first batches of its data.

    Args:
        fabric: devices and precision of the run.
        model: the run's model; it is copied, and so must not be sharded yet.
        split: training examples.
        recipe: the run's recipe.
        steps: training steps of one measurement.
    """

    def __init__(
        self, fabric: Fabric, model: nn.Module, split: Split, recipe: Recipe, steps: int = REFERENCE_STEPS
    ) -> None:
        copied = copy.deepcopy(model)
        shard(copied, fabric)
        if recipe.compile:
            copied.compile(dynamic=False, mode=recipe.compile_mode)
        self._fabric, self._method = fabric, CountedMethod(ERM())
        self._split = PrefetchedSplit(split.first(steps * recipe.batch_size))
        self._recipe = replace(recipe, accumulate=1, clip=None)
        loss = SharpnessAware(copied, self._method, nn.CrossEntropyLoss(reduction="none"), scaler=grad_scaler(fabric))
        self._sharp, self._optimizer = fabric.setup(loss, build_optimizer(copied, recipe))

    def seconds_per_loss(self) -> float:
        """Measure the present speed. The run's random state and gradient scaler are left unchanged."""
        device, scaler = self._fabric.device, grad_scaler(self._fabric)
        scaler_state = None if scaler is None else scaler.state_dict()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            row = train_epoch(
                self._fabric,
                self._sharp,
                self._method,
                self._optimizer,
                self._split,
                self._recipe,
                torch.Generator().manual_seed(0),
            )
        if scaler is not None:
            scaler.load_state_dict(cast(Any, scaler_state))
        return row["seconds"] / row["losses"]
