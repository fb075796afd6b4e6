"""Step metrics: loss, learning rate, speed and memory within an epoch, for the progress bar and for the loggers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

SHOWN: Final = 0.5
"""Seconds between two updates of the progress bar."""

STEP: Final = "step/"
"""Prefix of the names of step metrics in loggers, which tells them from the metrics of an epoch."""


@dataclass(frozen=True)
class StepMetrics:
    """The metrics of a run within an epoch.

    Attributes:
        epoch: number of the epoch, from 1.
        epochs: of the run.
        batch: number of batches of the epoch until now, in each process.
        batches: of the epoch.
        losses: number of batches of the run until now, in each process.
        loss: mean training loss: of the epoch until now, or in a logger since the step metrics before.
        learning_rate: of the first group of parameters.
        speed: images, tokens or examples per second in this epoch, over all processes.
        unit: what the speed counts.
        memory: largest memory so far in bytes, of tensors on a GPU, else of this process; None if unknown.
    """

    epoch: int
    epochs: int
    batch: int
    batches: int
    losses: int
    loss: float
    learning_rate: float
    speed: float
    unit: str
    memory: int | None

    def scalars(self) -> dict[str, float]:
        """Return what a logger gets, in the units above."""
        values = {"loss": self.loss, "learning_rate": self.learning_rate, f"{self.unit}_per_second": self.speed}
        if self.memory is not None:
            values["memory"] = float(self.memory)
        return {f"{STEP}{name}": value for name, value in values.items()}

    def words(self) -> str:
        """Return the metrics as text, without the counts."""
        return f"loss {self.loss:.4g}, {pace(self.learning_rate, self.speed, self.unit, self.memory)}"


OnStepMetrics = Callable[[StepMetrics], None]
"""Called with step metrics within an epoch."""


def pace(learning_rate: float, speed: float, unit: str, memory: int | None) -> str:
    """Return learning rate, speed and memory as text."""
    rounded = f"{speed:,.0f}" if speed >= 1000 else f"{speed:.4g}"
    parts = [f"learning rate {learning_rate:.4g}", f"{rounded} {unit}/s"]
    if memory is not None:
        parts.append(f"{memory / 2**30:.2f} GiB")
    return ", ".join(parts)
