"""Broadcasts of buffers: once in a step, and what a wrapper has set for its next forward pass is kept."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from bisam.distributed.ddp import BufferBroadcasts


def run(broadcasts: BufferBroadcasts, ddp: SimpleNamespace, after: bool, fails: bool = False) -> bool:
    """Whether a pass broadcasts; `after` is what the wrapper sets for the next one."""
    try:
        with broadcasts.once():
            now = ddp.require_forward_param_sync
            if fails:
                raise ValueError
            ddp.require_forward_param_sync = after
    except ValueError:
        pass
    return now


@pytest.mark.parametrize(
    ("before", "passes", "broadcast", "at_the_end"),
    [
        (True, [True, True], [True, False], True),
        (True, [True, True, False], [True, False, False], True),  # without gradients at the end, as XSAM
        (True, [False, True], [True, False], True),  # without gradients at the beginning, as KSAM
        (True, [False, False], [True, False], False),  # no_sync(): the next step does not broadcast
        (False, [True, True], [False, False], True),  # the step after it
    ],
)
def test_a_step_broadcasts_in_its_first_pass(before, passes, broadcast, at_the_end):
    ddp = SimpleNamespace(require_forward_param_sync=before)
    step = BufferBroadcasts([ddp])
    assert [run(step, ddp, after) for after in passes] == broadcast
    assert ddp.require_forward_param_sync == at_the_end


def test_a_pass_that_fails_leaves_the_wrapper_as_before():
    ddp = SimpleNamespace(require_forward_param_sync=True)
    step = BufferBroadcasts([ddp])
    assert run(step, ddp, True)
    assert not run(step, ddp, True, fails=True)
    assert ddp.require_forward_param_sync
