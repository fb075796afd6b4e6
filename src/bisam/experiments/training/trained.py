"""Trained: the weights of a finished run, and its model with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bisam.experiments.errors import RunError, is_out_of_memory, unknown
from bisam.experiments.models.build import PRETRAINED, build
from bisam.experiments.models.frozen import with_frozen
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.checkpoint import CHECKPOINT
from bisam.experiments.runs.files import damaged
from bisam.experiments.runs.folder import Result, Run
from bisam.experiments.runs.results import WEIGHTS, checksum_of_rows, first_diverged


def result_of(run: Run) -> Result:
    """Return the result of a run whose weights can be used.

    Raises:
        RunError: the run is unfinished, or its loss is not finite.
    """
    if (result := run.result) is None:
        raise RunError(f"{run.folder} is not finished: the command that started the run resumes it")
    diverged = result["diverged"] if "diverged" in result else first_diverged(run.metrics())
    if diverged is not None:
        raise RunError(f"{run.folder} diverged: its loss is not finite from epoch {diverged} on")
    return result


def weights(run: Run, result: Result, which: str) -> dict[str, Tensor]:
    """Return the weights of a finished run, from its checkpoint, without those that were not trained.

    Args:
        run: its folder and recipe.
        result: its result, with which the checkpoint is compared.
        which: one of `WEIGHTS`.

    Raises:
        RunError: the run has no checkpoint or no such weights, or its checkpoint is damaged or not that of its end.
        ValueError: `which` is unknown.
    """
    if (state := run.checkpoint()) is None:
        raise RunError(
            f"{run.folder} has no {CHECKPOINT}, as copies of results without weights: train the run again to have them"
        )
    rows = state["history"]
    if ("stopped" not in result and run.recipe.completed(rows[-1]) != run.recipe.length) or (
        result.get("metrics", checksum_of_rows(rows)) != checksum_of_rows(rows)
    ):
        raise RunError(
            f"{run.folder}: {CHECKPOINT} is not that of the end of the run in result.json: delete result.json, and the "
            "command that started the run finishes it"
        )
    if which == "best":
        return state["best"]["weights"]
    if which == "last":
        return _below("model.", state["sharp"])
    if which not in WEIGHTS:
        raise unknown("weights of a run", which, WEIGHTS)
    if run.recipe.ema is None:
        raise RunError(f"{run.folder} has no average of the weights (--ema): its weights are best or last")
    return _below("module.", state["average"])


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


def _below(prefix: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
