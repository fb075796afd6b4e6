"""Weights: those of a finished run, from its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bisam.experiments.errors import RunError, unknown
from bisam.experiments.runs.checkpoint import CHECKPOINT
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


def _below(prefix: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
