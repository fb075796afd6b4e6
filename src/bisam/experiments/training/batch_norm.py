"""Batch normalisation: running statistics that are recomputed where weights are averages, which never trained."""

from __future__ import annotations

import torch
from lightning_fabric import Fabric
from torch import nn
from torch.optim.swa_utils import update_bn

from bisam.experiments.data.splits import Batches
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.training.epoch import prepared


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a model has layers with running statistics of batches."""
    kinds = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
    return any(isinstance(module, kinds) and module.track_running_stats for module in model.modules())


def update_statistics(model: nn.Module, split: Batches, recipe: Recipe, fabric: Fabric, seed: int) -> None:
    """Set the running statistics of a model to the means over the batches of an epoch, at its present weights.

    All processes read all examples, so that they have the same statistics.

    Args:
        model: its mode stays as it is.
        split: training examples, on the device; with their augmentation.
        recipe: batch size, and layout of the inputs.
        fabric: precision.
        seed: draws the batches.
    """
    batches = split.batches(recipe.batch_size, torch.Generator().manual_seed(seed))
    with fabric.autocast():
        update_bn(((prepared(inputs, recipe),) for inputs, _ in batches), model)
