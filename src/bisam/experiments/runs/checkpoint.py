"""Checkpoint: the file from which an interrupted run resumes, `checkpoint.pt` in its folder.

It is a dict that `torch.load(path, weights_only=True)` reads. Tensors are unsharded and on the CPU.

    recipe      fields of the recipe (`Recipe.to_dict`); a checkpoint of another recipe is refused
    sharp       state_dict of the SharpnessAware loss: the model, and the method of the first process
    memories    state of the method in each process
    sharded     whether the run uses FSDP
    optimizer   state_dict of the base optimizer
    scheduler   state_dict of the learning rate schedule
    history     rows of metrics of the completed epochs
    best        score, epoch and weights of the best validation epoch
    average     state_dict of the moving average of the weights, with --ema only
    scaler      state_dict of the gradient scaler, with --precision 16 only

`bisam.experiments.training.state` makes all but the recipe, and restores it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bisam.experiments.errors import RunError
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.files import damaged


def serialized(state: Mapping[str, Any], recipe: Recipe) -> bytes:
    """Return the content of a checkpoint file."""
    buffer = io.BytesIO()
    torch.save({**state, "recipe": recipe.to_dict()}, buffer)
    return buffer.getvalue()


def read_checkpoint(path: Path) -> tuple[dict[str, Any], Recipe]:
    """Return the state in a checkpoint file, on the CPU, and the recipe that it belongs to.

    Raises:
        RunError: the file is damaged.
    """
    content = path.read_bytes()
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        recipe = Recipe.from_dict(state.pop("recipe"))
    except RunError as error:  # a recipe of a later version
        raise RunError(f"{path}: {error}") from error
    except Exception as error:  # torch's unpickler raises errors of many types
        raise damaged(path, error) from error
    return state, recipe
