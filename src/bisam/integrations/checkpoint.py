"""Checkpoint: loading the state of a method with torch.distributed.checkpoint.

torch.distributed.checkpoint loads into existing tensors, and a new loss has no tensors for the state of its method.
`make_room` creates them:

    make_room(sharp, "checkpoints/3")
    state = {"sharp": sharp.state_dict()}
    torch.distributed.checkpoint.load(state, checkpoint_id="checkpoints/3")
    sharp.load_state_dict(state["sharp"])

Weights and state may have been saved by another number of ranks, or with another sharding.
"""

from __future__ import annotations

import os
import re
from typing import Any, cast

import torch
from torch.distributed.checkpoint import FileSystemReader, StorageReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from bisam.distributed.peers import position
from bisam.loss import SharpnessAware

_EXTRA = "_extra_state"  # the key of torch.nn.Module for state that is neither parameter nor buffer


def make_room(
    sharp: SharpnessAware, checkpoint: str | os.PathLike[str] | StorageReader, key: str | None = None
) -> None:
    """Creates the state of a loss, filled with zeros, in the shapes that a checkpoint has, so that it can be loaded.

    It does nothing if the state in the checkpoint is empty, as that of `SAM` or `BiSAM`. What each rank has saved for
    itself, as the batch of `SAMPa`, is loaded by the rank of the same number if the number of ranks is the same.

    Args:
        sharp: the loss, constructed as the one that was saved: with its model sharded, if it will be, and with the same
            frozen parameters.
        checkpoint: the folder of the checkpoint, or a reader of it.
        key: the key of this loss in a checkpoint of several losses, for example `"sharp"`.

    Raises:
        ValueError: the checkpoint has several losses and `key` is None, or none at `key`; or the state belongs to
            another model.
    """
    reader = checkpoint if isinstance(checkpoint, StorageReader) else FileSystemReader(checkpoint)
    found = _memories(reader.read_metadata())
    names = sorted(found)
    if key is not None:
        found = {name: memory for name, memory in found.items() if key in name.split(".")}
    if not names:
        raise ValueError(
            "the checkpoint has no state of a SharpnessAware: save sharp.state_dict(), not the model's alone"
        )
    if len(found) != 1:
        raise ValueError(f"the checkpoint has losses at {names}, give key= one of them, got {key!r}")
    (memory,) = found.values()
    sharp.set_extra_state({"step": 0, "method": None, **memory})


def _memories(metadata: Metadata) -> dict[str, dict[str, Any]]:
    """Returns the extra state of each loss in a checkpoint, filled with zeros, by the path of the loss."""
    found: dict[str, dict[str, Any]] = {}
    paths = cast("dict[str, tuple[str | int, ...]]", metadata.planner_data)
    for flat, path in paths.items():
        at = next((i for i, part in enumerate(path) if str(part).endswith(_EXTRA)), None)
        if at is None or at + 1 == len(path) or path[at + 1] not in ("step", "method", "state"):
            continue
        if any(_of_one_rank(part) for part in path[at + 1 :]) and position() not in path and "0 of 1" not in path:
            continue
        memory = found.setdefault(".".join(map(str, path[: at + 1])), {"step": 0, "method": None, "state": {}})
        stored = metadata.state_dict_metadata[flat]
        if isinstance(stored, TensorStorageMetadata):
            zero = torch.zeros((), dtype=stored.properties.dtype)  # expanded, so that only this rank's part uses memory
            _put(memory, path[at + 1 :], zero.expand(stored.size))
        elif path[at + 1] == "state":
            _put(memory, path[at + 1 :], [] if path[-1] == "holes" else 0)
    return found


def _of_one_rank(part: str | int) -> bool:
    """Whether a key is that of a value of one rank, see `Oracle.keep`."""
    return isinstance(part, str) and re.fullmatch(r"\d+ of \d+", part) is not None


def _put(into: Any, path: tuple[str | int, ...], value: Any) -> None:
    """Sets `into[path[0]][path[1]]...`; creates dictionaries, and lists where the path has numbers."""
    for part, following in zip(path, [*path[1:], None], strict=True):
        if isinstance(part, int):
            into.extend([None] * (part + 1 - len(into)))
        missing = into[part] is None if isinstance(part, int) else part not in into
        if following is None:
            into[part] = value
        elif missing:
            into[part] = [] if isinstance(following, int) else {}
        into = into[part]
