"""Ball: the largest error in a ball around the weights, and what adversaries flip, at a few epochs of a run.

Equation 5 of Xie et al. (2024, https://arxiv.org/abs/2407.12993) is min over w of the largest 0-1 loss in a ball. A run
measures it after the `measured_epochs` of its recipe, on the same examples and in the same ball for all methods:

* on whole batches of the size of the run, in an order that its seed draws, until they are 1,000 training examples or
  more: the same after each epoch, with the labels that it trains on, without augmentation, in eval mode;
* in the L2 ball of radius 0.05, which is the paper's radius of SAM and BiSAM, whatever the radius of the method is, so
  that the columns of all methods are about the same set of displacements.

A measurement changes nothing in the run, and its time is not that of the epoch. It costs 94 gradients and 13 forward
passes of its examples.
"""

from __future__ import annotations

from itertools import islice
from math import nan

import torch
from lightning_fabric import Fabric
from torch import nn

from bisam import L2, ModelOracle
from bisam.analysis import flips, zero_one_sharpness
from bisam.analysis.flips import ADVERSARIES as FLIPPING
from bisam.analysis.samples import NonFiniteLossError
from bisam.analysis.zero_one import ADVERSARIES as CLIMBING
from bisam.experiments.data.splits import Split, batches_of
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Row
from bisam.experiments.runs.results import BALL
from bisam.experiments.training.epoch import prepared
from bisam.objectives import Objective

RADIUS = 0.05
EXAMPLES = 1000
STEPS = 30
"""Steps of ascent of each adversary of the largest error."""
GRADIENTS = len(CLIMBING) * STEPS + len(FLIPPING)
"""Gradients for each example of a measurement."""
FORWARDS = sum(map(len, CLIMBING.values())) + 1 + len(FLIPPING) + 1
"""Forward passes without gradient for each example of a measurement."""

_SHORT = {"loss": "sam", "cross-entropy": "cross_entropy", "-log": "log", "tanh": "tanh"}


def measured_batches(recipe: Recipe, examples: int) -> int:
    """Return the number of batches that a measurement reads, of a training set of `examples`."""
    return min(-(-EXAMPLES // recipe.batch_size), batches_of(examples, recipe.batch_size))


class Ball:
    """The measurement of a run.

    Args:
        fabric: devices and precision; all processes measure the same, and the first one decides.
        model: the model, not wrapped.
        loss: the training loss.
        train: the training examples.
        recipe: of the run.
    """

    def __init__(self, fabric: Fabric, model: nn.Module, loss: Objective, train: Split, recipe: Recipe) -> None:
        self._fabric, self._model, self._loss = fabric, model, loss
        self._train, self._recipe = train.unaugmented(), recipe

    def row(self) -> Row:
        """Return the columns `BALL` at the present weights; nan where the loss is not finite.

        All processes call it together.
        """
        return self._fabric.broadcast(self._row())

    def _row(self) -> Row:
        recipe, random = self._recipe, _generator(self._recipe.seed)
        count = measured_batches(recipe, len(self._train))
        batches = islice(self._train.batches(recipe.batch_size, random), count)
        pairs = [(prepared(inputs, recipe), labels) for inputs, labels in batches]
        oracle = ModelOracle(self._model, self._loss)
        try:
            with self._fabric.autocast():
                largest = zero_one_sharpness(oracle, pairs, L2(RADIUS), steps=STEPS)
                found = flips(oracle, pairs, L2(RADIUS))
        except NonFiniteLossError:  # the run has diverged, and continues to its end
            return dict.fromkeys(BALL, nan)
        row: Row = {"ball_error": largest.error, "ball_worst": largest.worst}
        row |= {f"flips_{_SHORT[name]}": flipped / found.examples for name, flipped in found.flipped.items()}
        row |= {f"cosine_{_SHORT[name]}": value for name, value in found.cosines["loss"].items() if name != "loss"}
        return {name: row[name] for name in BALL}


def unmeasured() -> Row:
    """Return the columns of an epoch that is not measured."""
    return dict.fromkeys(BALL, nan)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
