"""Trials: what a search has tried, as values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

State = Literal["complete", "pruned", "diverged", "failed", "unfinished"]

WORST = -1.0
"""The score of a trial that diverged: the smallest that any metric has."""


@dataclass(frozen=True)
class Trial:
    """One combination of values.

    Attributes:
        number: in the order in which trials began, from 0.
        values: of what is searched, by name.
        state: how it ended; "failed" with an error, "unfinished" if it was interrupted. The same command resumes both.
        scores: validation scores of its seeds; a trial that is pruned has none.
        reported: validation scores of the first seed, by completed epochs or steps.
        epochs: the epoch of each score.
        diverged: first epoch of a seed whose loss is not finite, or None.
        metric: of the scores.
        headline: the weights that have the scores, best or last.
        examples: validation examples of a run.
        seconds: time of its training steps.
        error: why it failed, or None.
        repeats: number of the trial that had the same recipe before, whose scores it has; or None.
    """

    number: int
    values: Mapping[str, Any]
    state: State
    scores: tuple[float, ...] = ()
    reported: Mapping[int, float] | None = None
    epochs: tuple[int, ...] = ()
    diverged: int | None = None
    metric: str = "accuracy"
    headline: str = "last"
    examples: int = 0
    seconds: float = 0.0
    error: str | None = None
    repeats: int | None = None

    @property
    def score(self) -> float:
        """Mean validation score over its seeds; `WORST` if it diverged.

        Raises:
            ValueError: it has none, because it is pruned, failed or unfinished.
        """
        if self.state == "diverged":
            return WORST
        if self.state != "complete":
            raise ValueError(f"a trial that is {self.state} has no score")
        return fmean(self.scores)

    @property
    def ended(self) -> bool:
        """Whether nothing is left to do."""
        return self.state in ("complete", "pruned", "diverged")


def ranked(trials: Iterable[Trial]) -> list[Trial]:
    """The complete trials, the best first; of equal ones the earlier."""
    complete = [trial for trial in trials if trial.state == "complete"]
    return sorted(complete, key=lambda trial: (-trial.score, trial.number))


def count(trials: Sequence[Trial], state: State) -> int:
    """The number of trials in a state."""
    return sum(trial.state == state for trial in trials)


def settings(values: Mapping[str, Any]) -> str:
    """The values of a trial in words."""
    return ", ".join(f"{name} {written(value)}" for name, value in values.items())


def written(value: Any) -> str:
    """A value as text."""
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def outcome(trial: Trial, unit: str = "epochs") -> str:
    """How a trial ended, in words; a run has so many epochs, or steps, as `unit` says."""
    if trial.state == "complete":
        same = "" if trial.repeats is None else f", as trial {trial.repeats}, which is the same run"
        return f"validation {100 * trial.score:.2f} %{same}"
    if trial.state == "pruned":
        last = max(trial.reported or {0: 0})
        return f"pruned after {last} {unit if last != 1 else unit.removesuffix('s')}"
    if trial.state == "diverged":
        return f"diverged: the loss is not finite from epoch {trial.diverged} on"
    return f"failed: {trial.error}" if trial.state == "failed" else "unfinished"
