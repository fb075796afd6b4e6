"""Checks: which recipes can be trained in a stack, and what keeps others from it."""

from __future__ import annotations

from typing import Any

import torch

from bisam import ERM, L2, SAM, Adaptive, NegLog, Tanh
from bisam.experiments.models.build import NETWORKS
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training.stacked.network import layers_fault
from bisam.methods.method import follows_flips
from bisam.objectives import CrossEntropy

FITS = (
    "sgd, sam, sam_ce, bisam_log, bisam_tanh, asam, abisam_log and abisam_tanh with the optimizer sgd in precision 32 "
    "or 64, model mlp, data sets digits and cifar, on one device"
)
"""The recipes that can be stacked, for messages."""


def check(recipe: Recipe, machine: Machine) -> None:
    """Check that seeds of a recipe can be trained in a stack.

    Raises:
        ValueError: they cannot; the message says what is in the way, and what can be stacked.
    """
    if faults := misfits(recipe, machine):
        raise ValueError(f"--stack does not train {', '.join(faults)}; it trains {FITS}: leave --stack out")


def misfits(recipe: Recipe, machine: Machine) -> list[str]:
    """Return what keeps seeds of a recipe from being trained in a stack; nothing if they can be."""
    defaults = Recipe()
    plain = (
        *("accumulate", "clip", "ema", "update_bn", "compile", "channels_last", "measured_epochs", "patience"),
        *("randaugment", "erasing", "mixup", "cutmix"),
    )
    faults = [f"{name} {getattr(recipe, name)}" for name in plain if getattr(recipe, name) != getattr(defaults, name)]
    if not _has_batched_method(recipe):
        faults.append(f"method {recipe.method}")
    if recipe.optimizer != "sgd":
        faults.append(f"optimizer {recipe.optimizer}")
    if recipe.precision not in ("32", "64"):
        faults.append(f"precision {recipe.precision}")
    if recipe.dataset.partition(":")[0] not in ("digits", "cifar10", "cifar100"):
        faults.append(f"dataset {recipe.dataset}")
    if not _has_batched_layers(recipe.model):
        faults.append(f"model {recipe.model}")
    if machine.parallel:
        faults.append("runs on several devices")
    if machine.stats:
        faults.append("with --stats")
    return faults


def _has_batched_layers(name: str) -> bool:
    if name not in NETWORKS:
        return False
    with torch.device("meta"):  # shapes alone
        return layers_fault(NETWORKS[name][0](2, 1)) is None


def _has_batched_method(recipe: Recipe) -> bool:
    """Whether the method is plain training, or SAM in a ball or ellipsoid with an adversary that needs no state."""
    try:
        method: Any = recipe.build_method()
    except ValueError:  # it needs the optimizer, or the length of the run
        return False
    if type(method) is ERM:
        return True
    if type(method) is not SAM or method.descent is not None:
        return False
    ball: Any = method.perturb
    inside = type(ball) is L2 or (type(ball) is Adaptive and ball.where is None)
    return (
        inside
        and not follows_flips(method)
        and (method.ascent is None or type(method.ascent) in (CrossEntropy, NegLog, Tanh))
    )
