"""Notes of failures: after a step that failed on all ranks another one may follow, and not after other failures."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch.distributed as dist

from bisam import SAM, SharpnessAware, cross_entropy
from bisam.distributed import failures
from tests.support import cases


def peers(*ranks: int) -> SimpleNamespace:
    return SimpleNamespace(ranks=list(ranks))


@pytest.fixture
def store(monkeypatch):
    """The store of a process group of one rank, to which a test adds the notes of others."""
    monkeypatch.setattr(failures, "LIMIT", 0.0)
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.distributed_c10d._get_default_store()
    if dist.is_initialized():
        dist.destroy_process_group()
    failures.check()


def test_a_failure_on_all_ranks_is_forgotten(store):
    for number in (1, 2):
        failures.note(peers(0, 1), 5, ValueError("wrong"))
        store.set(f"bisam/failures/0,1/{number}/5/1", "")
        failures.check()
        failures.check()


@pytest.mark.parametrize("other", ["0,1/1/4/1", "0,1/2/5/1", "0,1,2/1/5/1", ""])
def test_a_failure_on_this_rank_alone_is_an_error_until_the_group_ends(store, other):
    if other:
        store.set(f"bisam/failures/{other}", "")  # of another step, another time or other ranks
    failures.note(peers(0, 1), 5, ValueError("wrong"))
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"failed on rank 0 \(ValueError: wrong\) and not on rank 1, which waits"
        ):
            failures.check()
        failures.note(peers(0, 1), 5, KeyError("later"))
    dist.destroy_process_group()
    failures.check()


def test_the_error_of_the_first_failure_is_kept(store):
    failures.note(peers(0, 1), 5, ValueError("wrong"))
    failures.note(peers(0, 1), 6, ValueError("again"))
    with pytest.raises(RuntimeError, match="ValueError: wrong"):
        failures.check()


def test_ranks_that_share_no_step_note_nothing(store):
    failures.note(None, 5, ValueError("wrong"))
    failures.check()


def test_a_step_that_failed_here_alone_stops_the_next_call_of_a_loss(store):
    sharp = SharpnessAware(cases.mlp(), SAM(), cross_entropy)
    failures.note(peers(0, 1), 0, ValueError("wrong"))
    with pytest.raises(RuntimeError, match="do not catch the error"):
        sharp(*cases.batch())
