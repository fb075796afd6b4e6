"""Adapters that hang or whose process dies, for the tests of the runner."""

from __future__ import annotations

import os
import signal
import threading

import torch.distributed as dist

from .reference import Looped, Reference


class Hangs(Reference):
    """Waits forever in a step of ASAM."""

    def step(self, *parts):
        if self.adaptive:
            threading.Event().wait()
        return super().step(*parts)


class Exits(Reference):
    """Exits in a step of ASAM."""

    def step(self, *parts):
        if self.adaptive:
            raise SystemExit(3)
        return super().step(*parts)


class Leaves(Reference):
    """With momentum, the second of two processes dies, as one that the system kills when memory runs out."""

    def average(self, gradients):
        if self.optimizer.defaults["momentum"] and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        super().average(gradients)


class Raises(Reference):
    """With momentum, the second of two processes raises an error, and the first waits for it."""

    def average(self, gradients):
        if self.optimizer.defaults["momentum"] and dist.get_rank() == 1:
            raise RuntimeError("no average")
        super().average(gradients)


hangs, exits, leaves, raises = (Looped(loop) for loop in (Hangs, Exits, Leaves, Raises))
