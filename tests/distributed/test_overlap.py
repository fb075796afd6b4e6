"""Overlap: the wrapper inside a loss averages the last gradient of a step in the call, and `backward()` nothing."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

from bisam import (
    ASAM,
    ERM,
    ESAM,
    GSAM,
    KSAM,
    L2,
    MESA,
    MSAM,
    RSAM,
    SAM,
    Accumulated,
    BiSAM,
    During,
    Evaluation,
    Every,
    FilterNoise,
    LookSAM,
    MultiStepSAM,
    Oracle,
    SharpnessAware,
    Tilted,
    ZerothOrder,
    cross_entropy,
)
from bisam.batches import Batch
from bisam.distributed.ddp import gradients_of_reduction
from bisam.masks import RandomMask
from tests.support import cases, ranks
from tests.support.replicas import distance, identical, network

PART = 4
METHODS: dict[str, Callable[[], Any]] = {
    "ERM": ERM,
    "SAM": lambda: SAM(0.1),
    "BiSAM": lambda: BiSAM(0.1),
    "ASAM": lambda: ASAM(0.5),
    "MultiStepSAM": lambda: MultiStepSAM(L2(0.1), steps=2),
    "RSAM": lambda: RSAM(0.01, SAM(0.1)),
    "During": lambda: During(SAM(0.1), stop=3),
    "ESAM": lambda: ESAM(RandomMask(0.1, beta=0.6), gamma=0.5),
    "KSAM": lambda: KSAM(3, SAM(0.1)),
    "MESA": lambda: MESA(SAM(0.1), decay=0.5),
    "Every": lambda: Every(2, SAM(0.1)),
    "ZerothOrder": lambda: ZerothOrder(0.1),
    "FilterNoise": lambda: FilterNoise(0.1),
}
WRAPPERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "views of buckets": {"gradient_as_bucket_view": True},
    "small buckets": {"bucket_cap_mb": 1e-4},
}


def part(step: int) -> tuple[Tensor, ...]:
    first = dist.get_rank() * PART
    return tuple(t[first : first + PART] for t in cases.batch(step, PART * dist.get_world_size()))


def reductions(ddp: DDP) -> list[int]:
    """Counts the reductions of a wrapper from now on."""
    count = [0]

    def hook(state, bucket):  # no annotations: DDP checks them and does not resolve strings
        count[0] += 1
        work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    ddp.register_comm_hook(None, hook)
    return count


def trained(make: Callable[[], Any], overlap: bool, wrapper: str = "plain", **arguments: Any) -> Any:
    """Weights and gradients of a few steps, and the reductions in calls and in backward passes."""
    torch.manual_seed(1)
    ddp = DDP(network(), **WRAPPERS[wrapper])
    torch.manual_seed(dist.get_rank())
    sharp = SharpnessAware(ddp, make(), cross_entropy, overlap=overlap, **arguments)
    optimizer, counted = torch.optim.SGD(ddp.parameters(), 0.1, momentum=0.9), reductions(ddp)
    kept: list[Tensor] = []
    within = [0, 0]
    for step in range(6):
        optimizer.zero_grad()
        before = counted[0]
        loss = sharp(*part(step))
        called = counted[0]
        (3 * loss).backward()
        within = [within[0] + called - before, within[1] + counted[0] - called]
        kept += [p.grad.clone() for p in ddp.parameters() if p.grad is not None]
        optimizer.step()
    same = identical(list(ddp.parameters()))
    return [*kept, *(p.detach().clone() for p in ddp.parameters())], within, same


def equal_to_backward(name: str, wrapper: str) -> dict[str, Any]:
    (ours, within, same), (theirs, before, _) = (trained(METHODS[name], overlap, wrapper) for overlap in (True, False))
    assert len(ours) == len(theirs)
    return {"far": distance(ours, theirs), "within": within, "before": before, "same": same}


def check(found: dict[str, Any]) -> None:
    assert found["far"] < 1e-12
    assert found["same"]
    calls, backward = found["within"]
    assert (calls > 0, backward) == (True, 0)
    assert found["before"][0] == 0


def test_every_method_that_returns_its_last_answer_has_the_same_gradient():
    for found in ranks.run(2, all_methods):
        assert found.keys() == METHODS.keys()
        for one in found.values():
            check(one)


def all_methods() -> dict[str, Any]:
    return {name: equal_to_backward(name, "plain") for name in METHODS}


def all_wrappers() -> dict[str, Any]:
    return {wrapper: equal_to_backward("BiSAM", wrapper) for wrapper in WRAPPERS}


def test_wrappers_of_every_kind():
    for found in ranks.run(2, all_wrappers):
        for one in found.values():
            check(one)
        assert found["small buckets"]["within"][0] > found["plain"]["within"][0]


def accumulated(overlap: bool, clear: bool) -> tuple[list[Tensor], list[int]]:
    """Two micro-batches for each step of the optimizer, the first under `no_sync()`."""
    torch.manual_seed(1)
    ddp = DDP(network())
    sharp = SharpnessAware(ddp, SAM(0.1), cross_entropy, overlap=overlap)
    optimizer, counted, calls = torch.optim.SGD(ddp.parameters(), 0.1), reductions(ddp), list[int]()
    for step in range(4):
        with ddp.no_sync():
            sharp(*part(2 * step)).backward()
        before = counted[0]
        loss = sharp(*part(2 * step + 1))
        calls.append(counted[0] - before)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=clear)
    return [p.detach() for p in ddp.parameters()], calls


def with_gradients_in_place() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for clear in (True, False):
        (ours, calls), (theirs, _) = (accumulated(overlap, clear) for overlap in (True, False))
        found[f"clear {clear}"] = distance(ours, theirs), sum(calls)
    return found


def test_gradients_that_are_there_already_are_averaged_with_the_new_one():
    for found in ranks.run(2, with_gradients_in_place):
        assert all(far < 1e-12 and calls == 0 for far, calls in found.values())


def around_a_step() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for overlap in (False, True):
        torch.manual_seed(1)
        ddp = DDP(network())
        ran: list[str] = []
        weight = next(ddp.parameters())
        weight.register_hook(lambda g, ran=ran: ran.append("gradient"))
        weight.register_post_accumulate_grad_hook(lambda p, ran=ran: ran.append("accumulated"))
        sharp = SharpnessAware(
            ddp, BiSAM(0.1), cross_entropy, overlap=overlap, scaler=lambda: 1024.0, stats=True, same_noise=True
        )
        before = [p.detach().clone() for p in ddp.parameters()]
        loss = sharp(*part(0))
        restored = all(torch.equal(a, b) for a, b in zip(before, ddp.parameters(), strict=True))
        empty = all(p.grad is None for p in ddp.parameters())
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in ddp.parameters()]).norm()
        found[f"{overlap}"] = ran, restored, empty, norm, sharp.stats.descent_norm
    return found


def test_hooks_run_once_and_weights_and_gradients_are_as_before_the_call():
    for found in ranks.run(2, around_a_step):
        for ran, restored, empty, *_ in found.values():
            assert (ran, restored, empty) == (["gradient", "accumulated"], True, True)
        (*_, today, _), (*_, norm, stats) = found["False"], found["True"]
        torch.testing.assert_close(norm, today, rtol=1e-12, atol=0)
        torch.testing.assert_close(stats, norm, rtol=1e-12, atol=0)  # of the averaged gradient


def after_an_error() -> float:
    """A call that fails in the second pass on all ranks, and is tried again."""
    found: list[list[Tensor]] = []
    for fails in (True, False):
        torch.manual_seed(1)
        ddp, armed, passes = DDP(network()), [fails], [0]

        def fail(*_: Any, armed: list[bool] = armed, passes: list[int] = passes) -> None:
            passes[0] += 1
            if armed[0] and passes[0] == 4:
                armed[0] = False
                raise RuntimeError("boom")

        ddp.register_forward_pre_hook(fail)
        sharp = SharpnessAware(ddp, SAM(0.1), cross_entropy, overlap=True)
        optimizer = torch.optim.SGD(ddp.parameters(), 0.1)
        for step in range(4):
            optimizer.zero_grad()
            try:
                loss = sharp(*part(step))
            except RuntimeError:
                loss = sharp(*part(step))
            loss.backward()
            optimizer.step()
        found.append([p.detach() for p in ddp.parameters()])
    return distance(*found)


def test_a_call_that_failed_can_be_tried_again():
    assert ranks.run(2, after_an_error) == [0.0, 0.0]


def along_the_descent(oracle: Oracle, batch: Batch) -> Evaluation:
    """A method of a user that goes on after a query which another method has declared to be the last."""
    g = SAM(0.1)(oracle, batch).gradient
    return oracle.query(batch, at=g * (0.1 / g.norm()), last=True)


def with_the_ascent(oracle: Oracle, batch: Batch) -> Evaluation:
    """A method of a user that returns another gradient than that of the query which it has declared to be the last."""
    g = oracle.query(batch).gradient
    answer = oracle.query(batch, at=g * (0.1 / g.norm()), last=True)
    return replace(answer, grad=answer.gradient + g)


class Part(nn.Module):
    """A model of which the loss does not need all parameters."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.used, self.other, self.recompute = network(), nn.Linear(2, 2).double(), recompute
        self.first = nn.Linear(6, 6).double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return checkpoint(self.used, x, use_reentrant=True) if self.recompute else self.used(x)


def refused_models() -> list[str]:
    messages: list[str] = []
    for method in (ERM(), SAM(0.1)):
        for recompute in (False, True):
            model = Part(recompute)
            model.other.requires_grad_(not recompute)
            sharp = SharpnessAware(DDP(model), method, cross_entropy, overlap=True)
            with pytest.raises(ValueError, match=r"use_reentrant=False" if recompute else r"other.weight, other.bias"):
                sharp(*part(0))
            messages += [name for name, p in model.named_parameters() if p.grad is not None]
    return messages


def test_unused_parameters_and_re_entrant_checkpoints_have_a_clear_error():
    assert ranks.run(2, refused_models) == [[], []]


def interrupted() -> list[bool]:
    """Interrupts a call where it clears `.grad`; returns which parameters have a gradient afterwards."""
    code = gradients_of_reduction.__code__
    lines, first = inspect.getsourcelines(code)
    at = first + max(i for i, line in enumerate(lines) if "p.grad = None" in line)

    def within(frame: Any, event: str, _: Any) -> Any:
        if event == "line" and frame.f_lineno == at:
            sys.settrace(None)
            raise KeyboardInterrupt
        return within

    ddp = DDP(network())
    sharp = SharpnessAware(ddp, ERM(), cross_entropy, overlap=True)
    sys.settrace(lambda frame, *_: within if frame.f_code is code else None)
    try:
        with pytest.raises(KeyboardInterrupt):
            sharp(*part(0))
    finally:
        sys.settrace(None)
    return [p.grad is not None for p in ddp.parameters()]


def test_an_interrupted_call_leaves_no_gradient():
    (found,) = ranks.run(1, interrupted)
    assert found
    assert not any(found)


REFUSED: dict[str, Callable[[], Any]] = {
    "GSAM": lambda: GSAM(0.1),
    "LookSAM": lambda: LookSAM(0.1, k=2),
    "Every": lambda: Every(2, GSAM(0.1)),
    "MSAM": lambda: MSAM(2, SAM(0.1)),
    "Accumulated": lambda: Accumulated(2, SAM(0.1)),
    "Tilted": lambda: Tilted(2, SAM(0.1)),
    "a function": lambda: lambda oracle, batch: oracle.query(batch),
    "a query after the last": lambda: along_the_descent,
    "a sum with the last": lambda: with_the_ascent,
}


def refused() -> dict[str, str]:
    messages: dict[str, str] = {}
    for name, make in REFUSED.items():
        sharp = SharpnessAware(DDP(network()), make(), cross_entropy, overlap=True)
        with pytest.raises(ValueError, match="overlap=True") as error:
            sharp(*part(0))
        messages[name] = str(error.value)
    for build in (
        lambda: DDP(SharpnessAware(network(), SAM(0.1), cross_entropy, overlap=True)),
        lambda: SharpnessAware(network(), SAM(0.1), cross_entropy, overlap=True),
        lambda: SharpnessAware(DDP(network()), SAM(0.1), cross_entropy, overlap=True, scope="global"),
    ):
        with pytest.raises(ValueError, match=r"SharpnessAware\(DistributedDataParallel\(model\), ...\)"):
            build()(*part(0))
    unused = DDP(network(), find_unused_parameters=True)
    with pytest.raises(ValueError, match="leave one of the two arguments out"):
        SharpnessAware(unused, SAM(0.1), cross_entropy, overlap=True)(*part(0))
    return messages


def test_other_methods_and_nestings_are_refused():
    for messages in ranks.run(2, refused):
        assert "GSAM" in messages["GSAM"]
        assert "BiSAM" in messages["GSAM"]


def test_one_process_has_nothing_to_overlap():
    sharp = SharpnessAware(network(), SAM(0.1), cross_entropy, overlap=True)
    with pytest.raises(ValueError, match="overlap=True lets the wrapper inside the loss"):
        sharp(*cases.batch(0))
