"""Interrupts: signals at random moments inside a call of the loss, after which everything must be as before the call.

A timer's handler raises an exception at whatever instruction the call has reached, as Ctrl-C does. In a part of the
calls a second signal follows while the first one is handled. What must be the same to the bit: weights, gradients,
buffers, the hooks of parameters, `requires_grad`, the modes of modules, and the state of the method. Random generators
may have advanced.
"""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bisam import SharpnessAware, cross_entropy
from tests.support import cases as family

from .attack import Attack, Finding, Options

METHODS = (
    "SAM",
    "ABiSAM",
    "GSAM",
    "LookSAM",
    "SAMPa",
    "ESAM",
    "RSAM",
    "MSAM",
    "BSAM",
    "AESAM",
    "MomentumSAM",
    "FisherSAM",
    "MESA",
    "SAF-SAM",
    "KSAM-RSAM-EBiSAM",
)
TWICE = 0.25
"""The share of calls that a second signal follows."""


class Signalled(BaseException):
    """Raised by the handler of the timer."""


class Timer:
    """A handler that raises while the loss is called, and a timer that runs it once or twice.

    A signal that arrives before the call, or after it has returned, does nothing.
    """

    def __init__(self) -> None:
        self.armed, self.raised = False, 0
        self.again: float | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not (self.armed and _inside_call(frame)):
            return
        self.raised += 1
        again, self.again = self.again, None
        if again is not None:  # started here, not as an interval, which would interrupt this handler without end
            signal.setitimer(signal.ITIMER_REAL, again)
        raise Signalled

    @contextmanager
    def installed(self) -> Iterator[None]:
        before = signal.signal(signal.SIGALRM, self)
        try:
            yield
        finally:
            self.stop()
            signal.signal(signal.SIGALRM, before)

    def start(self, delay: float, again: float | None) -> None:
        """Starts the timer: a signal after `delay` seconds, and another one `again` seconds after it has raised."""
        self.armed, self.again, self.raised = True, again, 0
        signal.setitimer(signal.ITIMER_REAL, max(delay, 1e-6))

    def stop(self) -> None:
        self.armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)


def _inside_call(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code is SharpnessAware.forward.__code__:
            return True
        frame = frame.f_back
    return False


class Victim:
    """A small model in training, with everything that an interrupted call may leave changed."""

    def __init__(self, make: Callable[[torch.optim.Optimizer], Any]) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(6, 8),
            nn.BatchNorm1d(8),
            nn.Tanh(),
            nn.Dropout(0.2),
            nn.Linear(8, 8),
            nn.LayerNorm(8),
            nn.Linear(8, 4),
        )
        self.model[4].bias.requires_grad_(False)
        self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
        self.sharp = SharpnessAware(self.model, make(self.optimizer), cross_entropy, stats=True)
        for p in self.optimizer.param_groups[0]["params"]:
            p.register_hook(lambda grad: grad * 1.0)
            p.register_post_accumulate_grad_hook(lambda p: None)
        self.batches = [(x.float(), y) for x, y in (family.batch(i) for i in range(8))]
        self.number, self.seconds = 0, 1e-3
        self.train()
        self.train()

    def train(self) -> None:
        """A step of training, which is not interrupted; leaves gradients of the last step."""
        begin = time.perf_counter()
        loss = self.sharp(*self.batch)
        self.seconds += 0.2 * (time.perf_counter() - begin - self.seconds)
        self.finish(loss)

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        return self.batches[self.number % len(self.batches)]

    def finish(self, loss: Tensor) -> None:
        self.number += 1
        self.optimizer.zero_grad(set_to_none=self.number % 2 == 0)
        loss.backward()
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """Everything that a call must leave, by kind; tensors as one flat tensor of bytes."""
        parameters = list(self.model.parameters())
        extra = self.sharp.get_extra_state()
        return {
            "weights": _bytes(parameters),
            "gradients": ([id(p.grad) for p in parameters], _bytes([p.grad for p in parameters if p.grad is not None])),
            "buffers": ([id(b) for b in self.model.buffers()], _bytes(list(self.model.buffers()))),
            "hooks": [
                [sorted((key, id(hook)) for key, hook in (hooks or {}).items())]
                for p in parameters
                for hooks in (p._backward_hooks, p._post_accumulate_grad_hooks)
            ],
            "requires_grad": [p.requires_grad for p in parameters],
            "modes": [m.training for m in self.model.modules()],
            "state of the method": _leaves(extra),
            "grad mode": torch.is_grad_enabled(),
        }


def _bytes(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1).view(torch.uint8) for t in tensors]).clone() if tensors else torch.empty(0)


def _leaves(state: Any) -> tuple[Tensor, list[Any]]:
    leaves = tree_leaves(state)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return _bytes(tensors), [leaf for leaf in leaves if not isinstance(leaf, Tensor)]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return all(_same(*pair) for pair in zip(a, b, strict=True)) if isinstance(a, tuple) else a == b


def attacked(
    name: str,
    make: Callable[[torch.optim.Optimizer], Any],
    count: int,
    chance: random.Random,
    make_victim: Any = Victim,
) -> Finding:
    """Interrupts `count` calls, and counts what each has left changed."""
    counts = Counter({"calls": 0, "interrupted": 0, "interrupted twice": 0, "with differences": 0})
    facts: Counter[str] = Counter()
    victim, timer = Victim(make), Timer()
    with timer.installed():
        for i in range(count):
            if i % 20 == 0:
                victim.train()
            before = victim.state()
            again = chance.uniform(1e-6, 1e-4) if chance.random() < TWICE else None
            loss = _call(victim, timer, chance.uniform(0, 1.1 * victim.seconds), again)
            counts["calls"] += 1
            if loss is not None:
                victim.finish(loss)
                continue
            counts["interrupted"] += 1
            counts["interrupted twice"] += timer.raised == 2
            torch.set_grad_enabled(True)
            after = victim.state()
            if wrong := [kind for kind in before if not _same(before[kind], after[kind])]:
                counts["with differences"] += 1
                facts.update(f"{kind} after {'two signals' if timer.raised == 2 else 'one signal'}" for kind in wrong)
                victim = Victim(make)
    n, shown = counts["with differences"], ", ".join(f"{kind} ({n})" for kind, n in sorted(facts.items()))
    wrong = f"{n} of {counts['interrupted']} interrupted calls left changed: {shown}" if n else ""
    return Finding(name, wrong, counts + facts, dict(facts))


def _call(victim: Victim, timer: Timer, delay: float, again: float | None) -> Tensor | None:
    """Returns the loss, or None if the call was interrupted."""
    try:
        timer.start(delay, again)
        return victim.sharp(*victim.batch)
    except Signalled:
        return None
    finally:
        timer.stop()


def run(
    names: Sequence[str], options: Options, methods: Mapping[str, tuple[Any, Any]] = family.FAMILY
) -> Iterator[Finding]:
    """Attacks each method in turn, with its share of the calls."""
    for i, name in enumerate(names):
        chance = random.Random(f"{options.seed} {name}")
        share = (options.count + i) // len(names)  # whose sum is `count`
        yield attacked(name, methods[name][0], share, chance)


ATTACK = Attack("interrupts", "signals at random moments inside a call of the loss", METHODS, run)
