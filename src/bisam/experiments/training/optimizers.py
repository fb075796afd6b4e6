"""Optimizers: the base optimizer of a recipe, its schedule, and the loss that is descended."""

from __future__ import annotations

import torch
from lightning_fabric import Fabric
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from bisam.experiments.recipes.recipe import Recipe


def optimizer_of(model: nn.Module, recipe: Recipe) -> Optimizer:
    """The base optimizer of a recipe."""
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        model.parameters(), recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )


def scheduler_of(optimizer: Optimizer, recipe: Recipe, steps: int) -> LRScheduler:
    """The schedule of a recipe's learning rate over the steps of its run.

    Raises:
        ValueError: its warm-up does not end.
    """
    if recipe.schedule == "cosine":
        return CosineAnnealingLR(optimizer, recipe.epochs)
    if recipe.warmup >= steps:
        raise ValueError(f"warmup {recipe.warmup} does not end within the {steps} steps of the run: make it shorter")
    falls = recipe.schedule == "linear"

    def factor(step: int) -> float:
        if step < recipe.warmup:
            return (step + 1) / recipe.warmup
        return max(0.0, (steps - step) / (steps - recipe.warmup)) if falls else 1.0

    return LambdaLR(optimizer, factor)


def descent_loss(smoothing: float, classes: int) -> nn.Module:
    """The cross-entropy per example, smoothed over the wrong classes."""
    # The authors spread the smoothing over the wrong classes, torch over all: the same thing with another constant.
    return nn.CrossEntropyLoss(label_smoothing=smoothing * classes / (classes - 1), reduction="none")


def scaler_of(fabric: Fabric) -> torch.amp.GradScaler | None:
    """The scaler of float16 gradients, if there is one."""
    return getattr(fabric._precision, "scaler", None)
