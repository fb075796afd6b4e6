"""Results: the content of result.json and metrics.csv, and its check before anything uses it.

A result holds a checksum of itself and one of the metrics, and the name of its recipe. Results of bisam 0.1 have none
of them: there the types and the ranges alone are checked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan
from pathlib import Path
from typing import Any, Literal, Required, TypedDict, cast, get_origin, get_type_hints

from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.files import checksum, damaged, read_json, read_rows
from bisam.validation import shown

Row = dict[str, float]
"""Metrics of an epoch."""

Headline = Literal["best", "last"]
"""The weights whose test score a report shows and compares: of the best validation epoch, or of the last epoch."""

Stopped = Literal["diverged", "patience"]
"""Why a run ended early: its weights are not finite, or validation did not improve for `Recipe.patience` epochs."""

ENOUGH = 2000
"""Validation examples from which on the best epoch is the headline; with fewer its choice is largely chance."""


TITLES = {
    "accuracy": "accuracy",
    "top5": "top-5 accuracy",
    "f1": "F1",
    "matthews": "Matthews correlation",
    "balanced": "balanced accuracy",
    "many": "many-example classes",
    "medium": "medium classes",
    "few": "few-example classes",
    "exact_match": "exact match",
    "likelihood": "likelihood of a token",
}
"""The metrics, as they are written in reports."""
IN_PER_CENT = {"accuracy", "top5", "balanced", "many", "medium", "few", "exact_match"}
"""Metrics that are shares of examples, or means of such shares."""


class Result(TypedDict, total=False):
    """The result of a finished run; scores are in [-1, 1]."""

    test_best: Required[float]
    """Test score with the weights of the best validation epoch, the latest one of several; results of recipes before
    version 3 have the first one."""
    test_last: Required[float]
    """Test score with the weights of the last epoch."""
    test_ema: float
    """Test score with the average of the weights."""
    validation_best: Required[float]
    validation_ties: int
    """Epochs whose validation score is the best one; absent in results of recipes before version 3, as the next two."""
    validation_examples: int
    headline: Headline
    """Which test score is shown and compared, see `headline`."""
    best_epoch: Required[int]
    diverged: int | None
    """First epoch with a loss that is not finite, or None; absent in results of 0.1."""
    stopped: Stopped
    """Why the run ended before the last epoch of its recipe; absent if it did not."""
    message: str
    """What a user should know of how the run ended, such as "loss is nan since epoch 2: ..."; absent if nothing."""
    metric: str
    """Metric of the scores above; accuracy if it is absent."""
    scores: dict[str, dict[str, float]]
    """All scores, by weights (best, last, ema) and metric."""
    examples: int
    """Training examples."""
    labels: int
    """Training labels that count, where an example has several, as a text has tokens; absent otherwise."""
    seconds_per_epoch: Required[float]
    relative_time: Required[float]
    """Time of a step, relative to plain training."""
    gradients_per_step: Required[float]
    forwards_per_step: Required[float]
    processes: int
    device: str
    stacked: int
    """Number of runs that were trained at once, in a stack; times are those of the stack divided by it. Absent in
    results of runs that were trained alone."""
    bisam: str
    torch: str
    python: str
    hardware: str
    commit: str
    finished: Required[str]
    """Time of the end in UTC, 2026-01-02T03:04:05Z."""
    recipe: str
    """Name of the recipe's folder and seed; absent in results of 0.1, as the checksums."""
    metrics: str
    """Checksum of the rows of metrics.csv."""
    checksum: str
    """Checksum of all other entries."""


@dataclass(frozen=True)
class _Number:
    """The type and range of a number."""

    kind: type[int] | type[float] = float
    least: float = 0.0
    most: float = inf

    def fault(self, value: Any) -> str | None:
        """Return what is wrong with a value, or None."""
        if isinstance(value, bool) or not isinstance(value, int if self.kind is int else int | float):
            return "is not a whole number" if self.kind is int else "is not a number"
        return None if _is_number(value) and self.least <= value <= self.most and value < inf else "is out of range"


@dataclass(frozen=True)
class _Text:
    """The pattern of a text."""

    pattern: str = ".{1,500}"

    def fault(self, value: Any) -> str | None:
        """Return what is wrong with a value, or None."""
        fits = isinstance(value, str) and value.isprintable() and re.fullmatch(self.pattern, value)
        return None if fits else "is not the text it should be"


_LARGE = 1e12  # beyond any time or number of a run, and far from where figures and means would overflow
_SCORE, _COUNT, _SIZE = _Number(least=-1, most=1), _Number(int, 1), _Number(most=_LARGE)
_TIME, _TEXT, _SUM = _Number(least=1e-12, most=_LARGE), _Text(), _Text("[0-9a-f]{32}")
_ENTRIES: Mapping[str, _Number | _Text] = {
    **dict.fromkeys(("test_best", "test_last", "test_ema", "validation_best"), _SCORE),
    **dict.fromkeys(("best_epoch", "diverged", "examples", "labels", "processes", "stacked"), _COUNT),
    "validation_ties": _COUNT,
    "validation_examples": _Number(int),
    "headline": _Text("best|last"),
    "stopped": _Text("diverged|patience"),
    **dict.fromkeys(("seconds_per_epoch", "relative_time"), _TIME),
    **dict.fromkeys(("gradients_per_step", "forwards_per_step"), _SIZE),
    **dict.fromkeys(("metric", "device", "bisam", "torch", "python", "hardware", "commit", "recipe", "message"), _TEXT),
    **dict.fromkeys(("metrics", "checksum"), _SUM),
    "finished": _Text(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"),
}
_REQUIRED = {name for name, hint in get_type_hints(Result, include_extras=True).items() if get_origin(hint) is Required}
_SUMS = {"recipe", "metrics", "checksum"}
_COLUMNS = ("epoch", "validation", "flipped")  # of the oldest metrics that are read
COLUMNS = (*_COLUMNS, "train_loss", "gradients", "forwards", "losses", "seconds", "relative_time")
"""Columns that the metrics of a run have if it is resumed."""
_ANY = ("learning_rate",)  # the user's
BALL = (
    *("ball_error", "ball_worst"),
    *("flips_sam", "flips_cross_entropy", "flips_log", "flips_tanh"),
    *("cosine_cross_entropy", "cosine_log", "cosine_tanh"),
)
"""Columns of a run that measures a ball, see `bisam.experiments.training.ball`; nan in all but the measured epochs."""
PLAIN_ASCENT = "cross_entropy"
"""The ascent that others are compared with."""
ASCENTS = (PLAIN_ASCENT, "smoothed", "tanh", "log", "log_5")
"""Names of the adversaries in columns, see `bisam.experiments.training.ascents`."""
QUANTITIES = ("flips_near", "flips", "repaired", "rise", "cosine", "worst")
"""Measured quantities, a column for each ascent."""
BY_ASCENT = (
    "ascents_error",
    *(f"{name}_by_{ascent}" for name in QUANTITIES for ascent in ASCENTS),
)
"""Columns of a run that measures what adversaries do, nan in all but the measured epochs."""
_NOT_ALWAYS_FINITE = (
    "train_loss",
    "flipped",
    *BALL,
    *BY_ASCENT,
)  # after a divergence; where a method leaves examples out


WEIGHTS = ("best", "last", "ema")
"""The weights of a run: of the best validation epoch, of the last epoch, and their moving average."""


def headline(result: Result) -> Headline:
    """Return which test score of a run is shown and compared, `headline_score`.

    It is that of the best validation epoch, or of the last epoch where validation has fewer than `ENOUGH` examples;
    results of recipes before version 3 were all reported with that of the best validation epoch.
    """
    return result.get("headline", "best")


def headline_score(result: Result) -> float:
    """Return the test score of a run that is shown and compared."""
    return result["test_best"] if headline(result) == "best" else result["test_last"]


def training_labels(result: Result) -> float:
    """Return the number of labels that are predicted in an epoch; nan where a result of 0.1 does not have it."""
    return result.get("labels", result.get("examples", nan))


def headline_for(validation_examples: int) -> Headline:
    """Return the entry `headline` of a result, by the number of validation examples."""
    return "best" if validation_examples >= ENOUGH else "last"


@dataclass(frozen=True)
class Validated:
    """The end of a run that is not tested.

    Attributes:
        score: validation score of the weights whose test score would be the headline.
        epoch: the epoch that has them.
        headline: which weights these are.
        diverged: the first epoch whose loss, or whose last weights, are not finite; None if all are.
        metric: of the score.
        examples: validation examples.
        seconds: time of its training steps.
    """

    score: float
    epoch: int
    headline: Headline
    diverged: int | None
    metric: str
    examples: int
    seconds: float


def name_of(recipe: Recipe) -> str:
    """Return the entry `recipe` of a result."""
    return f"{recipe.slug}/seed-{recipe.seed}"


def with_checksums(values: Mapping[str, Any], recipe: Recipe, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the content of result.json for a run with these metrics."""
    complete = {**values, "recipe": name_of(recipe), "metrics": checksum_of_rows(rows)}
    return {**complete, "checksum": checksum(complete)}


def checksum_of_rows(rows: Sequence[Row]) -> str:
    """Return the checksum of the rows of metrics.csv, from which they are read as floats."""
    return checksum([{name: float(value) for name, value in row.items()} for row in rows])


def read_result(folder: Path, recipe: Recipe) -> Result | None:
    """Return the result of the run of `recipe` in a folder, or None if there is none.

    Raises:
        RunError: the file is damaged, or it belongs to another recipe.
    """
    path = folder / "result.json"
    if (values := read_json(path)) is None:
        return None
    try:
        fault = _fault(values, recipe)
    except RecursionError:  # of the checksum
        fault = "it is nested too deeply"
    if fault is not None:
        raise damaged(path, ValueError(fault))
    return cast(Result, values)


def _fault(values: Mapping[str, Any], recipe: Recipe) -> str | None:
    needed = {*_REQUIRED, *(_SUMS if _SUMS & values.keys() else ())}
    if missing := sorted(needed - values.keys()):
        return f"it has no {', '.join(missing)}"
    if values.get("checksum") not in (None, checksum({k: v for k, v in values.items() if k != "checksum"})):
        return "its checksum differs"
    for name, entry in _ENTRIES.items():
        absent = name not in values or (name == "diverged" and values[name] is None)
        if not absent and (fault := entry.fault(values[name])) is not None:
            return f"{name} {fault}: {shown(values[name])}"
    for name in ("best_epoch", "diverged", "validation_ties"):
        if (values.get(name) or 0) > recipe.length:  # of a run of steps too: an epoch has at least one
            return f"{name} is {values[name]}, and the recipe has {recipe.length} {recipe.unit}"
    if not _are_scores(values.get("scores", {})):
        return "scores are not numbers by weights and metric"
    if values.get("recipe", name_of(recipe)) != name_of(recipe):
        return f"it belongs to another recipe, {values['recipe']}, and recipe.json is that of {name_of(recipe)}"
    return None


def _are_scores(scores: Any) -> bool:
    if not isinstance(scores, dict):
        return False
    parts = list(cast("dict[str, Any]", scores).values())
    if not all(isinstance(part, dict) for part in parts):
        return False
    return all(
        _TEXT.fault(metric) is None and _SCORE.fault(score) is None for part in parts for metric, score in part.items()
    )


def read_metrics(folder: Path, recipe: Recipe, result: Result | None = None) -> list[Row]:
    """Return the metrics of the completed epochs of a run; with its result, of all that it has trained.

    Raises:
        RunError: the file is missing or damaged.
    """
    path = folder / "metrics.csv"
    rows = read_rows(path)
    fault = rows_fault(rows, recipe)
    if fault is None and result is not None:
        if "stopped" not in result and recipe.completed(rows[-1]) != recipe.length:
            fault = f"it does not have the {recipe.length} {recipe.unit} of the recipe"
        elif result.get("metrics", checksum_of_rows(rows)) != checksum_of_rows(rows):
            fault = "its checksum differs"
    if fault is not None:
        raise damaged(path, ValueError(fault))
    return rows


def rows_fault(rows: Any, recipe: Recipe, columns: Sequence[str] = _COLUMNS) -> str | None:
    """Return what is wrong with the metrics of the first epochs of a run, or None.

    Args:
        rows: the metrics.
        recipe: of the run.
        columns: names that each row must have; those of a run of steps have the number of the last step too.
    """
    if recipe.steps is not None:
        columns = (*columns, "step")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in cast("list[Any]", rows)):
        return "it has no epoch"
    if len(rows := cast("list[dict[Any, Any]]", rows)) > recipe.length:
        return f"it has more than the {recipe.length} {recipe.unit} of the recipe"
    step = 0
    for epoch, row in enumerate(rows, 1):
        if missing := [name for name in columns if name not in row]:
            return f"epoch {epoch} has no {', '.join(missing)}"
        if row.keys() != rows[0].keys():
            return f"epoch {epoch} has other columns than epoch 1"
        for name, value in row.items():
            if not isinstance(name, str) or not _is_number(value):
                return f"{shown(name)} of epoch {epoch} is not a number: {shown(value)}"
            if name not in _NOT_ALWAYS_FINITE and not (isfinite(value) and (name in _ANY or abs(value) <= _LARGE)):
                return f"{shown(name)} of epoch {epoch} is out of range: {shown(value)}"
        if row["epoch"] != epoch:
            return f"epoch {shown(row['epoch'])} stands in the place of epoch {epoch}"
        if recipe.steps is not None:
            if row["step"] % 1 or not step < row["step"] <= recipe.steps:
                return f"step of epoch {epoch} is not between {step + 1} and {recipe.steps}: {shown(row['step'])}"
            step = int(row["step"])
    return None


def _is_number(value: Any) -> bool:
    """Whether it is a float, or an integer that a float can hold."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def first_diverged(rows: Sequence[Row]) -> int | None:
    """Return the first epoch whose training loss is not finite, or None."""
    return next((int(row["epoch"]) for row in rows if not isfinite(row.get("train_loss", 0.0))), None)


def words_of_divergence(recipe: Recipe, rows: Sequence[Row], epoch: int) -> str:
    """Return the entry `message` of a run that has diverged, with the settings that prevent it.

    Args:
        recipe: of the run.
        rows: its metrics.
        epoch: the first one whose loss, or after which the weights, are not finite.
    """
    loss = rows[epoch - 1].get("train_loss", nan)
    what = f"loss is {loss} since epoch {epoch}"
    if isfinite(loss):
        what = f"the weights are not finite after epoch {epoch}"
    remedies = ["--learning-rate"]
    if recipe.setting("rho"):
        remedies.append("--rho" if "rho" in recipe.settings else "radius in --method")
    precise = ", or another --precision" if recipe.precision == "16" else ""
    return f"{what}: a smaller {' or '.join(remedies)}{precise}"


def since_better(rows: Sequence[Row]) -> int:
    """Return the number of epochs since the validation score last rose above all scores before it."""
    scores = [row["validation"] for row in rows]
    return len(scores) - 1 - scores.index(max(scores)) if scores else 0
