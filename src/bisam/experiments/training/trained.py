"""Trained: the model of a finished run, with its weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from bisam.experiments.errors import RunWarning, is_out_of_memory
from bisam.experiments.models.build import PRETRAINED, build
from bisam.experiments.models.frozen import with_frozen
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.checkpoint import CHECKPOINT
from bisam.experiments.runs.files import damaged
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.weights import result_of as result_of, weights as weights


def network(run: Run, state: Mapping[str, Tensor], classes: int, channels: int, root: Path | None) -> nn.Module:
    """Return the model of a run with given weights, on the CPU, in training mode.

    Args:
        run: its folder and recipe.
        state: see `weights`.
        classes: number of logits.
        channels: of the images.
        root: folder of the data sets, see `build`.

    Raises:
        RunError: the weights are not those of such a model.
        ValueError: the model cannot be loaded.
    """
    recipe: Recipe = run.recipe
    # Pretrained models of torchvision can differ from others by more than their values. The values in a file are
    # needed only where some are not trained.
    source = recipe.weights if recipe.weights == PRETRAINED or recipe.frozen is not None else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RunWarning)  # about a new head, which was trained
        model = build(
            recipe.model,
            classes,
            channels=channels,
            weights=source,
            frozen=recipe.frozen,  # what was not trained is not displaced
            root=root,
        )
    model = model.double() if recipe.precision == "64" else model
    try:
        model.load_state_dict(with_frozen(state, model))
    except Exception as error:  # torch raises errors of several types for a state of another form
        if is_out_of_memory(error):
            raise
        raise damaged(run.folder / CHECKPOINT, error) from error
    return model
