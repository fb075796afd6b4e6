"""Journal: the lines that a run writes to log.txt, one for each epoch and more within long epochs.

It counts the batches, so it also computes the step metrics for the progress bar and the loggers (`StepMetrics`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from bisam.experiments.errors import StoppedError, reason
from bisam.experiments.models.logits import HIDDEN
from bisam.experiments.recipes.length import RunLength
from bisam.experiments.runs.durations import duration
from bisam.experiments.runs.folder import Row
from bisam.experiments.runs.signals import past_tense
from bisam.experiments.training.step_metrics import SHOWN, OnStepMetrics, StepMetrics, pace

EVERY: Final = 30.0
"""Seconds between two lines within an epoch."""

RESUMES: Final = "the same command resumes after the last completed epoch"

OnLine = Callable[[str], None]
"""Called with each line of a run."""


def line_of(text: str) -> str:
    """Return a line of log.txt, with the time of day."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}"


class Sums(Protocol):
    """The sums over the batches of an epoch until now, on the device."""

    def totals(self) -> tuple[float, float]:
        """The sum of the losses of the examples in this process, and their number; reading them waits for the device.

        A loss is in the unit of the descent loss.
        """
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
        show: called with the step metrics every half second within an epoch.
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
        show: OnStepMetrics | None = None,
    ) -> None:
        self._write, self._length, self._device, self._processes = write, length, device, processes
        self._every, self._clock = every, clock
        self._before = self._losses_until(done)
        self._start = self._said = self._epoch_start = clock()
        self._epoch, self._rate, self._seen, self._unit, self._batches = done, 0.0, 0, "images", 0
        self._show, self._shown = show, self._start
        self._log: OnStepMetrics | None = None
        self._log_every, self._logged = 0, (0.0, 0.0)

    def log_steps(self, log: OnStepMetrics, every: int) -> None:
        """Call `log` with step metrics after every `every` losses of the run, except the last of an epoch."""
        self._log, self._log_every = log, every

    def say(self, text: str) -> None:
        """Write a line."""
        self._said = self._clock()
        self._write(line_of(text))

    def begin(self, slug: str, seed: int, device: str) -> None:
        """State what is trained, where, and whether it is resumed."""
        resumed = f", resumed after epoch {self._epoch}" if self._epoch else ""
        where = device if self._processes == 1 else f"{device}, {self._processes} processes"
        count = f"{self._length.epochs} epoch{'s' if self._length.epochs != 1 else ''}"
        self.say(f"{slug} seed {seed}: {count} on {where}{resumed}")

    def epoch_begins(self, epoch: int, learning_rate: float) -> None:
        """Begin to count the batches of an epoch."""
        self._epoch, self._rate, self._seen, self._batches = epoch, learning_rate, 0, 0
        self._epoch_start, self._logged = self._clock(), (0.0, 0.0)

    def batch(self, inputs: Any, sums: Sums, learning_rate: float) -> None:
        """Count a batch of this process, and tell where the run is if it is time to.

        What tells it the end of the epoch is the row of its metrics.
        """
        self._batches += 1
        size, self._unit = counted(inputs)
        self._seen += size * self._processes
        if self._batches == self._length.losses_in(self._epoch):
            return
        now, done = self._clock(), self._losses_until(self._epoch - 1) + self._batches
        speaks = now - self._said >= self._every
        shows = self._show is not None and now - self._shown >= SHOWN
        logs = self._log is not None and done % self._log_every == 0
        if not (speaks or shows or logs):
            return
        total, examples = sums.totals()  # waits for the device, so the time is read again
        seconds = self._clock() - self._epoch_start
        metrics = self._metrics(total / examples, learning_rate, seconds, done)
        if self._log is not None and logs:
            (before, some), self._logged = self._logged, (total, examples)
            self._log(replace(metrics, loss=(total - before) / (examples - some)))
        if self._show is not None and shows:
            self._shown = self._clock()
            self._show(metrics)
        if speaks:
            counts = f"epoch {metrics.epoch}/{metrics.epochs}, batch {metrics.batch}/{metrics.batches}"
            self.say(f"{counts}: {metrics.words()}, {self._left(done)}")

    def epoch_ends(self, row: Row) -> None:
        """Write the line of a completed epoch."""
        average = f" ({100 * row['validation_ema']:.1f} % averaged)" if "validation_ema" in row else ""
        self.say(
            f"epoch {self._epoch}/{self._length.epochs}: loss {row['train_loss']:.4g}, "
            f"validation {100 * row['validation']:.1f} %{average}, "
            f"{pace(self._rate, self._speed(row['seconds']), self._unit, peak_memory(self._device))}, "
            f"{self._left(self._losses_until(self._epoch))}"
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
        if isinstance(error, StoppedError):
            self.say(f"stopped: {error}")
        elif isinstance(error, KeyboardInterrupt):
            self.say(f"{past_tense(error)}: {RESUMES}")
        else:
            self.say(f"failed: {type(error).__name__}: {reason(error)}")

    def out_of_time(self) -> None:
        """Write that the time for training is over."""
        self.say(f"--max-time is over: {RESUMES}")

    def _metrics(self, loss: float, learning_rate: float, seconds: float, done: int) -> StepMetrics:
        return StepMetrics(
            self._epoch,
            self._length.epochs,
            self._batches,
            self._length.losses_in(self._epoch),
            done,
            loss,
            learning_rate,
            self._speed(seconds),
            self._unit,
            peak_memory(self._device),
        )

    def _speed(self, seconds: float) -> float:
        return self._seen / seconds if seconds > 0 else float("nan")

    def _left(self, done: int) -> str:
        """The time that is left after `done` losses of the run, or that of the whole run after the last one."""
        now = self._clock()
        left = (now - self._start) / max(1, done - self._before) * (self._length.losses - done)
        return f"{duration(left)} left" if left > 0 else f"{duration(now - self._start)} in all"

    def _losses_until(self, epoch: int) -> int:
        return min(self._length.losses, epoch * self._length.losses_per_epoch)


def counted(inputs: Any) -> tuple[int, str]:
    """Return the size of a batch and its unit: images, or tokens with the padding, whose number costs no waiting."""
    if isinstance(inputs, Tensor) and inputs.dim() == 2 and not inputs.is_floating_point():
        return inputs.numel(), "tokens"
    for name in ("input_ids", HIDDEN) if isinstance(inputs, Mapping) else ():
        if isinstance(texts := inputs.get(name), Tensor):  # pyright: ignore
            return texts.shape[:2].numel(), "tokens"
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
