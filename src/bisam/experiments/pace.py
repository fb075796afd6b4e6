"""Pace: how fast this machine is now, by steps of plain training."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from torch import nn

from bisam import ERM, SharpnessAware
from bisam.experiments.data import Split
from bisam.experiments.epochs import train_epoch
from bisam.experiments.optimization import optimizer_of, scaler_of
from bisam.experiments.recipes import Recipe
from bisam.experiments.sharded import shard
from bisam.experiments.watch import Watch

PACE = 8
"""Plain steps beside each epoch."""


class Pace:
    """Plain training beside the run, on a copy of its model: of noisy times, a ratio of neighbours is the least so."""

    def __init__(self, fabric: Fabric, model: nn.Module, split: Split, recipe: Recipe, steps: int = PACE) -> None:
        copied = copy.deepcopy(model)
        shard(copied, fabric)
        if recipe.compile:
            copied.compile()
        self._fabric, self._watch = fabric, Watch(ERM())
        self._split = split.first(steps * recipe.batch_size)
        self._recipe = replace(recipe, accumulate=1, clip=None)
        loss = SharpnessAware(copied, self._watch, nn.CrossEntropyLoss(reduction="none"), scale=scaler_of(fabric))
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
