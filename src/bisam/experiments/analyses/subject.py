"""Subject: a trained model with the examples on which it is analysed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from bisam import ModelOracle
from bisam.experiments import data
from bisam.experiments.analyses.settings import Settings
from bisam.experiments.data.image_tensors import channels
from bisam.experiments.data.splits import Data, Split
from bisam.experiments.models.build import build
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Result, Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training.checks import check_data, check_model
from bisam.experiments.training.epoch import prepared
from bisam.experiments.training.optimizers import descent_loss
from bisam.experiments.training.trained import network, weights


@dataclass(frozen=True)
class Subject:
    """A trained model with the examples on which it is analysed.

    Attributes:
        recipe: what the model was trained with.
        oracle: the model with the descent loss of the recipe, in the precision of its weights: without autocast, whose
            rounding would exceed the differences that are measured.
        batches: inputs and labels of the chosen examples, on the device of the model.
        split: the chosen examples, for measures that need more than their batches.
        classes: number of classes.
        device: the device, as text.
    """

    recipe: Recipe
    oracle: ModelOracle
    batches: list[tuple[Any, Tensor]]
    split: Split
    classes: int
    device: str

    def shuffled(self, batch_size: int, seed: int) -> list[tuple[Any, Tensor]]:
        """Return batches of the same examples in random order, as samples of them; files are sorted by classes."""
        random = torch.Generator().manual_seed(seed)
        return [(prepared(x, self.recipe), labels) for x, labels in self.split.batches(batch_size, random)]


def of_run(run: Run, result: Result, settings: Settings, machine: Machine) -> Subject:
    """Return the model of a finished run with examples of its own data: with its label noise, without augmentation.

    Raises:
        RunError: the run has no checkpoint or no such weights, its checkpoint is damaged or that of another run, or its
            recipe has an earlier version, whose examples were others.
        ValueError: the data or the model cannot be loaded.
    """
    state = weights(run, result, settings.weights)
    return _subject(
        run.recipe,
        lambda classes, channels: network(run, state, classes, channels, machine.data_dir),
        settings,
        machine,
    )


def of_file(path: Path, recipe: Recipe, settings: Settings, machine: Machine) -> Subject:
    """Return a model with the weights of a file.

    Args:
        path: a state dict that torch.save or safetensors wrote.
        recipe: model and data.
        settings: which examples.
        machine: device and data folder.

    Raises:
        ValueError: the weights, the data or the model cannot be loaded, or they do not fit.
    """

    def make(classes: int, channels: int) -> nn.Module:
        return build(recipe.model, classes, channels=channels, weights=str(path), new_head=False, root=machine.data_dir)

    return _subject(recipe, make, settings, machine)


def _subject(recipe: Recipe, make: Callable[[int, int], nn.Module], settings: Settings, machine: Machine) -> Subject:
    device = machine.fabric().device
    splits = data.load(recipe, machine)
    check_data(recipe, splits, machine)
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn
        model = make(splits.classes, channels(splits.test))
    if recipe.precision != "64":
        check_model(model, splits, recipe)
    model = model.to(device).eval()
    if recipe.channels_last:
        model = cast(Any, model).to(memory_format=torch.channels_last)
    split = _chosen(splits, settings).to(device)
    batches = [(prepared(inputs, recipe), labels) for inputs, labels in split.batches(settings.batch_size)]
    oracle = ModelOracle(model, descent_loss(recipe.label_smoothing, splits.classes))
    return Subject(recipe, oracle, batches, split, splits.classes, str(device))


def _chosen(splits: Data, settings: Settings) -> Split:
    """The examples, in their own order: the same ones for all runs of one seed on the same data."""
    split: Split = getattr(splits, settings.split).unaugmented()
    if len(split) <= settings.examples:
        return split
    random = torch.Generator().manual_seed(settings.seed)
    return split.chosen(torch.randperm(len(split), generator=random)[: settings.examples].sort().values)
