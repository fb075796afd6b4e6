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

Weights that are not trained (`Recipe.frozen`) are left out: they are those that the recipe names.

`bisam.experiments.training.state` makes all but the recipe, and restores it.

The file is a zip archive, as `torch.save` writes it. Its comment, which zip readers ignore, holds a checksum of all
other bytes. Files of bisam 0.1 have no comment: there the checksums of the archive's members are compared.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from hashlib import blake2b
from math import isfinite
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from bisam.experiments.errors import DamagedError, RunError, is_out_of_memory, reason, reason_not_loaded
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.files import damaged, read_bytes
from bisam.experiments.runs.results import COLUMNS, rows_fault

CHECKPOINT = "checkpoint.pt"
"""The latest checkpoint of a run."""
PREVIOUS = "checkpoint-previous.pt"
"""The checkpoint before it, with which a run resumes if the latest one is damaged."""
DAMAGED = "checkpoint-damaged.pt"
"""A latest checkpoint that was found damaged."""

_LABEL = b"bisam checkpoint blake2b "
_DIGITS = 64  # of the checksum, in hexadecimal
_END = b"PK\5\6"  # begins the last 22 bytes of a zip archive without comment; the last two are the comment's length


def serialized(state: Mapping[str, Any], recipe: Recipe) -> bytes:
    """Return the content of a checkpoint file."""
    buffer = io.BytesIO()
    torch.save({**state, "recipe": recipe.to_dict()}, buffer)
    buffer.seek(-2, io.SEEK_END)
    buffer.write((len(_LABEL) + _DIGITS).to_bytes(2, "little") + _LABEL)
    buffer.write(_checksum(buffer.getbuffer()))
    return buffer.getvalue()


def _checksum(content: bytes | memoryview) -> bytes:
    return blake2b(content, digest_size=_DIGITS // 2).hexdigest().encode()


def content_fault(content: bytes) -> str | None:
    """Return how the content of a checkpoint file differs from what was written, or None."""
    if content[-len(_LABEL) - _DIGITS : -_DIGITS] == _LABEL:
        return None if content[-_DIGITS:] == _checksum(memoryview(content)[:-_DIGITS]) else "its checksum differs"
    if content[-22:-18] != _END or content[-2:] != b"\0\0":
        return "it has no checksum at its end"
    try:
        member = zipfile.ZipFile(io.BytesIO(content)).testzip()
    except Exception as error:  # a broken archive raises errors of many types
        return reason(error)
    return None if member is None else f"the checksum of {member} differs"


def file_fault(path: Path) -> str | None:
    """Return how a checkpoint file differs from what was written, or None.

    Raises:
        RunError: there is no permission to read it.
    """
    try:
        content = read_bytes(path)
    except DamagedError as error:  # of the disk, or a folder in its place
        return error.reason
    return "it is missing" if content is None else content_fault(content)


def read_checkpoint(path: Path) -> tuple[dict[str, Any], Recipe]:
    """Return the state in a checkpoint file, on the CPU, and the recipe that it belongs to.

    Raises:
        RunError: the file is damaged, or it is of a later version.
    """
    content = read_bytes(path)
    if (fault := "it is missing" if content is None else content_fault(content)) is not None:
        raise damaged(path, ValueError(fault))
    assert content is not None
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises errors of many types
        if is_out_of_memory(error):
            raise
        raise damaged(path, ValueError(reason_not_loaded(error))) from error
    try:
        recipe = Recipe.from_dict(state.pop("recipe"))
    except RunError as error:  # a recipe of a later version
        raise RunError(f"{path}: {error}") from error
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise damaged(path, error) from error
    if (fault := _state_fault(state, recipe)) is not None:
        raise damaged(path, ValueError(fault))
    return state, recipe


def _state_fault(state: dict[Any, Any], recipe: Recipe) -> str | None:
    """Return what is wrong with the entries of a checkpoint, as far as it can be told without the model."""
    kinds: dict[str, type] = {
        "sharp": dict,
        "memories": list,
        "optimizer": dict,
        "scheduler": dict,
        "history": list,
        "best": dict,
        **({"average": dict} if recipe.ema is not None else {}),
        **({"scaler": dict} if recipe.precision == "16" else {}),
    }
    for name, kind in kinds.items():
        if not isinstance(state.get(name), kind):
            return f"it has no {name}" if name not in state else f"its {name} is not a {kind.__name__}"
    if not isinstance(state.get("sharded", False), bool):
        return "its sharded is not a bool"
    if (fault := rows_fault(state["history"], recipe, COLUMNS)) is not None:
        return f"its history: {fault}"
    return _memories_fault(state["memories"]) or _best_fault(state["best"], len(state["history"]))


def _memories_fault(memories: list[Any]) -> str | None:
    if not memories:
        return "its memories are empty"
    for memory in memories:
        entries = cast("dict[str, Any]", memory) if isinstance(memory, dict) else {}
        if (
            type(step := entries.get("step")) is not int
            or step < 0
            or not isinstance(entries.get("method", 0), str | None)
            or not isinstance(entries.get("state"), dict)
        ):
            return "one of its memories is not the step, the name and the state of a method"
    return None


def _best_fault(best: dict[str, Any], epochs: int) -> str | None:
    score, epoch, weights = best.get("score"), best.get("epoch"), best.get("weights")
    if not isinstance(score, float) or not isfinite(score) or abs(score) > 1:
        return "its best has no score"
    if type(epoch) is not int or not 1 <= epoch <= epochs:
        return "its best is of no completed epoch"
    if not isinstance(weights, dict) or not all(
        isinstance(v, Tensor) for v in cast("dict[str, Any]", weights).values()
    ):
        return "its best has no weights"
    return None
