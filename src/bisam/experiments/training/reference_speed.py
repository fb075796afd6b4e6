"""Reference speed: how fast this machine is now, by steps of plain training."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from bisam import ERM, SharpnessAware
from bisam.experiments.data.splits import Split
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.training.counting import Watch
from bisam.experiments.training.epoch import train_epoch
from bisam.experiments.training.fsdp import shard
from bisam.experiments.training.optimizers import optimizer_of, scaler_of

PACE = 8
"""Plain steps beside each epoch."""


class Begun:
    """A split whose first batch is ready when its batches are asked for: processes that read files have started.

    They start once in an epoch, and would be most of the time of a few steps.
    """

    def __init__(self, split: Split) -> None:
        self._split = split

    def __len__(self) -> int:
        return len(self._split)

    def batches(
        self, size: int, generator: torch.Generator | None = None, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[Any, Tensor]]:
        """As of the split; see `Split.batches`."""
        batches = self._split.batches(size, generator, rank, ranks)
        return itertools.chain([next(batches)], batches)


class Pace:
    """Plain training beside the run, on a copy of its model: of noisy times, a ratio of neighbours is the least so."""

    def __init__(self, fabric: Fabric, model: nn.Module, split: Split, recipe: Recipe, steps: int = PACE) -> None:
        copied = copy.deepcopy(model)
        shard(copied, fabric)
        if recipe.compile:
            copied.compile(dynamic=False)
        self._fabric, self._watch = fabric, Watch(ERM())
        self._split = Begun(split.first(steps * recipe.batch_size))
        self._recipe = replace(recipe, accumulate=1, clip=None)
        loss = SharpnessAware(copied, self._watch, nn.CrossEntropyLoss(reduction="none"), scaler=scaler_of(fabric))
        self._sharp, self._optimizer = fabric.setup(loss, optimizer_of(copied, recipe))

    def seconds(self) -> float:
        """Seconds per loss, now."""
        device, scaler = self._fabric.device, scaler_of(self._fabric)
        scale = None if scaler is None else scaler.state_dict()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            row = train_epoch(
                self._fabric,
                self._sharp,
                self._watch,
                self._optimizer,
                self._split,
                self._recipe,
                torch.Generator().manual_seed(0),
            )
        if scaler is not None:
            scaler.load_state_dict(cast(Any, scale))  # which is the run's
        return row["seconds"] / row["losses"]
