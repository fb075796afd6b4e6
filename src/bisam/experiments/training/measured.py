"""Measured: the measurements of a run's weights after the `measured_epochs` of its recipe.

ball.py     the largest error in a ball, and what adversaries flip
ascents.py  what five adversaries do with the same weights

Each kind measures whole batches of the size of the run, in an order that its seed draws, until they are 1,000 training
examples or more: the same after each epoch and for all methods, with the labels that the run trains on, without
augmentation, in eval mode.

A measurement changes nothing in the run, and its time is not that of the epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import nan

import torch
from lightning_fabric import Fabric
from torch import nn

from bisam import ModelOracle
from bisam.analysis.samples import NonFiniteLossError
from bisam.batches import Batch
from bisam.experiments.data.splits import Split, batches_of
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Row
from bisam.experiments.runs.results import BALL, BY_ASCENT
from bisam.experiments.training import ascents, ball
from bisam.experiments.training.epoch import prepared
from bisam.objectives import Objective


@dataclass(frozen=True)
class Kind:
    """What is measured.

    Attributes:
        columns: of a row.
        gradients: for each example.
        forwards: forward passes without gradient for each example.
        row: `(the model with its training loss, batches, number of classes) -> the columns`.
    """

    columns: Sequence[str]
    gradients: int
    forwards: int
    row: Callable[[ModelOracle, Sequence[Batch], int], Row]


KINDS: Mapping[str, Kind] = {
    "ball": Kind(BALL, ball.GRADIENTS, ball.FORWARDS, lambda oracle, batches, classes: ball.row(oracle, batches)),
    "ascents": Kind(BY_ASCENT, ascents.GRADIENTS, ascents.FORWARDS, ascents.row),
}
"""By the name in the recipe's field `measured`."""


def cost(recipe: Recipe) -> tuple[int, int]:
    """Return the gradients and the forward passes without gradient of a measurement, for each of its examples."""
    kind = KINDS[recipe.measured]
    return kind.gradients, kind.forwards


def measured_batches(recipe: Recipe, examples: int) -> int:
    """Return the number of batches that a measurement reads, of a training set of `examples`."""
    return min(-(-ball.EXAMPLES // recipe.batch_size), batches_of(examples, recipe.batch_size))


class Measured:
    """The measurement of a run.

    Args:
        fabric: devices and precision; all processes measure the same, and the first one decides.
        model: the model, not wrapped.
        loss: the training loss.
        train: the training examples.
        classes: number of classes.
        recipe: of the run.
    """

    def __init__(
        self, fabric: Fabric, model: nn.Module, loss: Objective, train: Split, classes: int, recipe: Recipe
    ) -> None:
        self._fabric, self._model, self._loss = fabric, model, loss
        self._train, self._classes, self._recipe = train.unaugmented(), classes, recipe
        self._kind = KINDS[recipe.measured]

    def row(self, epoch: int, epochs: int) -> Row:
        """Return the columns of the recipe's kind at the present weights; nan where the loss is not finite.

        They are nan too after an epoch that is not measured. All processes call it together.

        Args:
            epoch: that is completed, numbered from 1.
            epochs: of the run.
        """
        if not self._recipe.is_measured(epoch, epochs):
            return self._unknown()
        return self._fabric.broadcast(self._measure())

    def _unknown(self) -> Row:
        return dict.fromkeys(self._kind.columns, nan)

    def _measure(self) -> Row:
        recipe, random = self._recipe, torch.Generator().manual_seed(self._recipe.seed)
        count = measured_batches(recipe, len(self._train))
        batches = islice(self._train.batches(recipe.batch_size, random), count)
        pairs = [(prepared(inputs, recipe), labels) for inputs, labels in batches]
        oracle = ModelOracle(self._model, self._loss)
        try:
            with self._fabric.autocast():
                found = self._kind.row(oracle, pairs, self._classes)
        except NonFiniteLossError:  # the run has diverged, and continues to its end
            return self._unknown()
        return {name: found[name] for name in self._kind.columns}
