"""Checks: whether a recipe, its data, its model and the devices fit together, before a run starts."""

from __future__ import annotations

import torch
from torch import nn

from bisam.experiments.data.glue import Texts
from bisam.experiments.data.image_tensors import Images
from bisam.experiments.data.sequences import Sequences
from bisam.experiments.data.splits import Data, batches_of
from bisam.experiments.errors import is_out_of_memory
from bisam.experiments.recipes.expressions import least_classes
from bisam.experiments.recipes.length import run_length
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training.batch_norm import has_batch_norm
from bisam.experiments.training.optimizers import advances_by_epoch


def check_data(recipe: Recipe, splits: Data, machine: Machine) -> None:
    """Check that the recipe can be trained on the data.

    Raises:
        ValueError: the label smoothing is too large for the number of classes, the method needs more of them, a batch
            is too small for the number of devices, the warm-up is longer than the run, or something is measured that
            tokens do not have.
    """
    most = (splits.classes - 1) / splits.classes
    if recipe.label_smoothing > most:
        raise ValueError(
            f"label_smoothing must be at most {most:.3g} with {splits.classes} classes, got {recipe.label_smoothing}"
        )
    if (least := least_classes(recipe.expression)) > splits.classes:
        raise ValueError(
            f"method {recipe.method!r} is for {least} classes or more, and {recipe.dataset} has {splits.classes}"
        )
    if recipe.measured_epochs and isinstance(splits.train, Sequences):
        raise ValueError(
            f"measured_epochs {recipe.measured_epochs} measure the error of one class for each example, and "
            f"{recipe.dataset} has tokens: leave it out"
        )
    processes = machine.devices * machine.nodes
    batches = batches_of(len(splits.train), recipe.batch_size, processes)
    if not batches:
        examples = min(recipe.batch_size, len(splits.train))
        raise ValueError(f"batches of {examples} cannot be shared by {processes} devices: give a larger batch_size")
    if not advances_by_epoch(recipe):
        recipe.check_warmup(run_length(recipe, batches).steps)


@torch.no_grad()
def check_model(model: nn.Module, splits: Data, recipe: Recipe) -> None:
    """Check that the model accepts the images or tokens, by one forward pass; it is in training mode afterwards.

    Raises:
        ValueError: it does not, or it has no layers that a field of the recipe concerns.
    """
    if recipe.update_bn and not has_batch_norm(model):
        raise ValueError(f"model {recipe.model!r} has no batch normalisation to update: leave update_bn out")
    if isinstance(splits.test, Texts):
        return
    kind = "images"
    if isinstance(splits.test, Sequences):
        images, kind = splits.test.tokens[:2], "tokens"
    elif isinstance(splits.test, Images):
        images = splits.test.enlarged(splits.test.images[:2].float())
    else:
        images = torch.zeros(2, 3, recipe.image_size, recipe.image_size)
    try:
        outputs = model.eval()(images)
        if kind == "tokens" and outputs.shape[1:] != (splits.classes, *images.shape[1:]):
            raise ValueError(f"its outputs have the shape {tuple(outputs.shape[1:])}, and no logits for each token")
    except Exception as error:  # each network raises another type of error
        if is_out_of_memory(error):
            raise
        shape, reason = " x ".join(map(str, images.shape[1:])), " ".join(str(error).split())[:200]
        raise ValueError(
            f"model {recipe.model!r} does not accept the {kind} of {recipe.dataset}, {shape}: {reason}"
        ) from error
    model.train()
