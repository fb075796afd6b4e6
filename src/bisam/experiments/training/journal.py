"""Journal: the lines that a run writes to log.txt, one for each epoch and more within long epochs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from bisam.experiments.errors import Stopped, reason
from bisam.experiments.recipes.length import RunLength
from bisam.experiments.runs.durations import duration
from bisam.experiments.runs.folder import Row

EVERY: Final = 30.0
"""Seconds between two lines within an epoch."""

OnLine = Callable[[str], None]
"""Called with each line of a run."""


class Sums(Protocol):
    """The sums over the batches of an epoch until now, on the device."""

    def mean_loss(self) -> float:
        """The mean loss in this process; reading it waits for the device."""
        ...


class Journal:
    """Describes the progress of a run in lines with a time of day.

    The loss stays on the device until a line is due, so that a training step waits for nothing. The time left is
    estimated from what this process did: epochs that an earlier process trained do not count.

    Args:
        write: called with each line.
        length: epochs and losses of the run.
        device: where the run computes, and whose memory a line states.
        processes: number of processes of the run. A line within an epoch has the loss of the first of them.
        done: epochs that were completed before.
        every: seconds between two lines within an epoch.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        write: OnLine,
        length: RunLength,
        device: torch.device,
        processes: int = 1,
        done: int = 0,
        every: float = EVERY,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._write, self._length, self._device, self._processes = write, length, device, processes
        self._every, self._clock = every, clock
        self._before = self._losses_until(done)
        self._start = self._said = self._epoch_start = clock()
        self._epoch, self._rate, self._seen, self._unit, self._batches = done, 0.0, 0, "images", 0

    def say(self, text: str) -> None:
        """Write a line."""
        self._said = self._clock()
        self._write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}")

    def begin(self, slug: str, seed: int, device: str) -> None:
        """State what is trained, where, and whether it is resumed."""
        resumed = f", resumed after epoch {self._epoch}" if self._epoch else ""
        where = device if self._processes == 1 else f"{device}, {self._processes} processes"
        self.say(f"{slug} seed {seed}: {self._length.epochs} epochs on {where}{resumed}")

    def epoch_begins(self, epoch: int, learning_rate: float) -> None:
        """Begin to count the batches of an epoch."""
        self._epoch, self._rate, self._seen, self._batches = epoch, learning_rate, 0, 0
        self._epoch_start = self._clock()

    def batch(self, inputs: Any, sums: Sums, learning_rate: float) -> None:
        """Count a batch of this process, and write a line if the last one is long ago."""
        self._batches += 1
        size, self._unit = counted(inputs)
        self._seen += size * self._processes
        now = self._clock()
        if now - self._said < self._every or self._batches == self._length.losses_in(self._epoch):
            return
        loss = sums.mean_loss()  # waits for the device, so the time is read again
        seconds = self._clock() - self._epoch_start
        done = self._losses_until(self._epoch - 1) + self._batches
        self.say(
            f"epoch {self._epoch}/{self._length.epochs}, batch {self._batches}/{self._length.losses_in(self._epoch)}: "
            f"loss {loss:.4g}, {self._tail(learning_rate, seconds, done)}"
        )

    def epoch_ends(self, row: Row) -> None:
        """Write the line of a completed epoch."""
        average = f" ({100 * row['validation_ema']:.1f} % averaged)" if "validation_ema" in row else ""
        self.say(
            f"epoch {self._epoch}/{self._length.epochs}: loss {row['train_loss']:.4g}, "
            f"validation {100 * row['validation']:.1f} %{average}, "
            f"{self._tail(self._rate, row['seconds'], self._losses_until(self._epoch))}"
        )

    def finished(self, scores: Mapping[str, float]) -> None:
        """Write the test scores and the time that this process took."""
        said = ", ".join(f"{which} {100 * value:.1f} %" for which, value in scores.items())
        self.say(f"finished after {duration(self._clock() - self._start)}: test {said}")

    def validated(self, score: float) -> None:
        """Write the validation score of a run that is not tested, and the time that this process took."""
        took = duration(self._clock() - self._start)
        self.say(f"trained after {took}, without a test: validation {100 * score:.1f} %")

    def failed(self, error: BaseException) -> None:
        """Write why the run ended before its last epoch."""
        if isinstance(error, Stopped):
            self.say(f"stopped: {error}")
        elif isinstance(error, KeyboardInterrupt):
            self.say("interrupted: the same command resumes after the last completed epoch")
        else:
            self.say(f"failed: {type(error).__name__}: {reason(error)}")

    def _tail(self, learning_rate: float, seconds: float, done: int) -> str:
        """Learning rate, speed, memory and time left, after `done` losses of the run."""
        now, speed = self._clock(), self._seen / seconds if seconds > 0 else float("nan")
        rounded = f"{speed:,.0f}" if speed >= 1000 else f"{speed:.4g}"
        parts = [f"learning rate {learning_rate:.4g}", f"{rounded} {self._unit}/s"]
        if (used := peak_memory(self._device)) is not None:
            parts.append(f"{used / 2**30:.2f} GiB")
        left = (now - self._start) / max(1, done - self._before) * (self._length.losses - done)
        parts.append(f"{duration(left)} left" if left > 0 else f"{duration(now - self._start)} in all")
        return ", ".join(parts)

    def _losses_until(self, epoch: int) -> int:
        return min(self._length.losses, epoch * self._length.losses_per_epoch)


def counted(inputs: Any) -> tuple[int, str]:
    """Return the size of a batch and its unit: images, or tokens with the padding, whose number costs no waiting."""
    if isinstance(inputs, Mapping) and isinstance(ids := inputs.get("input_ids"), Tensor):  # pyright: ignore
        return ids.numel(), "tokens"
    return len(inputs), "images" if isinstance(inputs, Tensor) and inputs.dim() == 4 else "examples"


def peak_memory(device: torch.device) -> int | None:
    """Return the largest memory so far in bytes: of tensors on a GPU, else of this process; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        resource: Any = import_module("resource")
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
