"""Failures: a rank whose step failed must not begin the next one while other ranks wait for it in the failed one.

Where ranks exchange tensors within a step, a rank that catches its own error and goes on sends the tensors of the next
step to ranks that expect those of the failed one. Some backends end the process then, without an error. So each failure
is noted in the store of the process group, and before the next step the rank looks for the notes of the others:

    failures.note(peers, step, error)      # the step failed on this rank
    failures.check()                       # before the next step: raises unless it failed on the others too

A step that succeeds costs nothing.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from bisam.distributed.peers import Peers

LIMIT = 10.0
"""The time in seconds that ranks have to note the same failure."""


@dataclass
class _Notes:
    """The failures of this process in its present process group."""

    group: Any = None
    counts: dict[str, int] = field(default_factory=dict[str, int])
    open: tuple[str, list[int], str] | None = None
    """The key of the failure that was not checked yet, the ranks that it concerns, and the error."""
    lost: str = ""
    """The message of the error, once a failure was on this rank alone."""

    def follow(self) -> None:
        """Forgets the failures of an earlier process group."""
        if self.group is not (group := dist.group.WORLD):
            self.group, self.counts, self.open, self.lost = group, {}, None, ""


_notes = _Notes()


def note(peers: Peers | None, step: int, error: BaseException) -> None:
    """Notes that a step failed on this rank.

    Args:
        peers: the ranks that wait for each other within a step, if any do.
        step: the number of the step.
        error: the error.
    """
    if peers is None or not dist.is_initialized():
        return
    _notes.follow()
    if _notes.open is not None:
        return  # raised by `check`
    ranks = peers.ranks
    group = ",".join(map(str, ranks))
    number = _notes.counts[group] = _notes.counts.get(group, 0) + 1
    _notes.open = f"bisam/failures/{group}/{number}/{step}/", ranks, f"{type(error).__name__}: {error}"[:200]
    with suppress(RuntimeError):  # the store may have ended with another rank: the error to be raised is this one
        dist.distributed_c10d._get_default_store().set(f"{_notes.open[0]}{dist.get_rank()}", "")


def check() -> None:
    """Checks before a step that the last one did not fail on this rank alone.

    Raises:
        RuntimeError: it failed on this rank, and not within `LIMIT` on all ranks that share the step.
    """
    if _notes.open is None:
        return
    if not dist.is_initialized() or _notes.group is not dist.group.WORLD:
        _notes.open = None  # of a process group that has ended
        return
    if _notes.lost:
        raise RuntimeError(_notes.lost)
    key, ranks, error = _notes.open
    store, deadline = dist.distributed_c10d._get_default_store(), time.monotonic() + LIMIT
    while missing := [rank for rank in ranks if not store.check([f"{key}{rank}"])]:
        if time.monotonic() > deadline:
            _notes.lost = (
                f"a step failed on rank {dist.get_rank()} ({error}) and not on rank {missing[0]}, which waits for it "
                "in that step: do not catch the error, or end this process and start all ranks again from a checkpoint"
            )
            raise RuntimeError(_notes.lost)
        time.sleep(0.05)
    _notes.open = None
