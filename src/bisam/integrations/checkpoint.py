"""torch.distributed.checkpoint: room for what a method remembers, in a loss that remembers nothing yet.

torch.distributed.checkpoint loads into the tensors that are there, and a new loss has none for its method's memory:

    make_room(sharp, "checkpoints/3")
    state = {"sharp": sharp.state_dict()}
    torch.distributed.checkpoint.load(state, checkpoint_id="checkpoints/3")
    sharp.load_state_dict(state["sharp"])

Weights and memory may have been saved by another number of ranks, or sharded in another way.
"""

from __future__ import annotations

import os
from typing import Any, cast

import torch
from torch.distributed.checkpoint import FileSystemReader, StorageReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from bisam.loss import SharpnessAware

_EXTRA = "_extra_state"  # torch.nn.Module's name for what is neither parameter nor buffer


def make_room(
    sharp: SharpnessAware, checkpoint: str | os.PathLike[str] | StorageReader, key: str | None = None
) -> None:
    """Give a loss a memory of zeros of the shape that a checkpoint has, to be loaded into.

    Nothing happens where the checkpoint has no memory, as of `SAM` or `BiSAM`.

    Args:
        sharp: the loss, made as the one that was saved: its model sharded, if it is to be, and frozen where it was.
        checkpoint: the checkpoint's folder, or what reads it.
        key: in a checkpoint of several losses, where this one is, as in `"sharp"`.

    Raises:
        ValueError: there are several losses in the checkpoint and no `key`, or none at `key`; or the memory is of
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
    """By the name of the place, what each loss of a checkpoint has beside its weights, filled with zeros."""
    found: dict[str, dict[str, Any]] = {}
    paths = cast("dict[str, tuple[str | int, ...]]", metadata.planner_data)
    for flat, path in paths.items():
        at = next((i for i, part in enumerate(path) if str(part).endswith(_EXTRA)), None)
        if at is None or at + 1 == len(path) or path[at + 1] not in ("step", "method", "state"):
            continue
        memory = found.setdefault(".".join(map(str, path[: at + 1])), {"step": 0, "method": None, "state": {}})
        stored = metadata.state_dict_metadata[flat]
        if isinstance(stored, TensorStorageMetadata):
            zero = torch.zeros((), dtype=stored.properties.dtype)  # of which only this rank's part will take memory
            _put(memory, path[at + 1 :], zero.expand(stored.size))
        elif path[at + 1] == "state":
            _put(memory, path[at + 1 :], [] if path[-1] == "holes" else 0)
    return found


def _put(into: Any, path: tuple[str | int, ...], value: Any) -> None:
    """Set `into[path[0]][path[1]]...`, making dictionaries, and lists where the path has numbers."""
    for part, following in zip(path, [*path[1:], None], strict=True):
        if isinstance(part, int):
            into.extend([None] * (part + 1 - len(into)))
        missing = into[part] is None if isinstance(part, int) else part not in into
        if following is None:
            into[part] = value
        elif missing:
            into[part] = [] if isinstance(following, int) else {}
        into = into[part]
