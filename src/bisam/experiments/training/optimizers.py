"""Optimizers: the base optimizer of a recipe, its learning rate schedule, and the loss that is descended."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from bisam.experiments.recipes.recipe import Recipe

if TYPE_CHECKING:
    from lightning_fabric import Fabric  # its import takes seconds, and reports read a constant that comes with this


def build_optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    """Return the base optimizer of a recipe.

    Raises:
        ValueError: there is none of this name, or it does not take the parameters of the model.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    return recipe.base_optimizer.build(
        trained, recipe.learning_rate, weight_decay=recipe.weight_decay, momentum=recipe.momentum
    )


def to_train(optimizer: Any) -> None:
    """Set an optimizer that has other weights for evaluation (schedule-free) to those at which it takes gradients."""
    _set_mode(optimizer, "train")


def to_evaluate(optimizer: Any) -> None:
    """Set an optimizer that has other weights for evaluation (schedule-free) to these."""
    _set_mode(optimizer, "eval")


def _set_mode(optimizer: Any, mode: str) -> None:
    inner = getattr(optimizer, "optimizer", optimizer)  # as Fabric wraps it
    if callable(switch := getattr(inner, mode, None)):
        switch()


def build_scheduler(optimizer: Optimizer, recipe: Recipe, steps: int) -> LRScheduler:
    """Return the learning rate schedule of a recipe.

    Args:
        optimizer: the base optimizer.
        recipe: schedule, warm-up, and epochs or steps.
        steps: optimizer steps of the whole run.

    Raises:
        ValueError: the warm-up is longer than the run, or than its part before the decay.
    """
    if advances_by_epoch(recipe):
        return CosineAnnealingLR(optimizer, recipe.length)
    recipe.check_warmup(steps)

    def factor(step: int) -> float:
        if step < recipe.warmup:
            return (step + 1) / recipe.warmup
        left = max(0.0, (steps - step) / (steps - recipe.warmup))
        match recipe.schedule:
            case "linear":
                return left
            case "cosine":
                return 0.5 * (1 - math.cos(math.pi * left))
            case "wsd":  # Hu et al., 2024, https://arxiv.org/abs/2404.06395
                return min(1.0, (steps - step) / recipe.decay_steps(steps))
            case _:
                return 1.0

    return LambdaLR(optimizer, factor)


def advances_by_epoch(recipe: Recipe) -> bool:
    """Whether the schedule advances after each epoch (cosine, in a run of epochs) or after each optimizer step."""
    return recipe.schedule == "cosine" and recipe.steps is None


def descent_loss(smoothing: float, classes: int) -> nn.Module:
    """Return the cross-entropy per example, with the label smoothing spread over the wrong classes."""
    # The BiSAM authors spread it over the wrong classes, torch over all classes: the same with another constant.
    return nn.CrossEntropyLoss(label_smoothing=smoothing * classes / (classes - 1), reduction="none")


def grad_scaler(fabric: Fabric) -> torch.amp.GradScaler | None:
    """Return the gradient scaler, which precision 16 has."""
    return getattr(fabric._precision, "scaler", None)
