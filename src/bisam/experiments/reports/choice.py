"""Choice: the value of a setting with the best validation score, for each method of a study that tries several."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from bisam.experiments.markdown import escaped, table
from bisam.experiments.recipes.entries import SETTINGS
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.reports.groups import Place, grouped, place, places, title
from bisam.experiments.runs.folder import Finished
from bisam.experiments.runs.results import headline

_UNITS = {"rho": "rho", "weight_decay": "weight decay"}


@dataclass(frozen=True)
class Trial:
    """One setting that was tried.

    Attributes:
        values: of the settings that vary, in the order of `Choice.settings`.
        score: mean validation score over the seeds, of the weights that are tested.
        seeds: the seeds.
    """

    values: tuple[float, ...]
    score: float
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """What was tried for a method, and what is best.

    Attributes:
        place: data set, network and noise.
        method: its title.
        settings: the fields that vary.
        trials: sorted by their values.
    """

    place: Place
    method: str
    settings: tuple[str, ...]
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial:
        """The trial with the largest score; of equal ones the one with the smallest values."""
        return max(self.trials, key=lambda trial: round(trial.score, 9))  # the first of those that rounding separates

    @property
    def at_an_end(self) -> bool:
        """Whether the best value of a single setting is the smallest or the largest that was tried."""
        return len(self.settings) == 1 and self.best in (self.trials[0], self.trials[-1])

    @property
    def unequal(self) -> bool:
        """Whether the trials have different seeds, as in an unfinished study."""
        return len({trial.seeds for trial in self.trials}) > 1


def validation_score(run: Finished) -> float:
    """The validation score of the weights whose test score is the headline: of the last epoch, or of the best one."""
    if headline(run.result) == "last":
        return run.metrics[-1]["validation"]
    return run.result["validation_best"]


def choices(runs: Iterable[Finished]) -> list[Choice]:
    """A choice for each method and place in which a setting varies; see `Entry.tuned` for those besides SETTINGS."""
    kin: dict[tuple[Place, str], dict[Recipe, Sequence[Finished]]] = defaultdict(dict)
    for recipe, group in grouped(runs).items():
        kin[place(recipe), title(recipe)][recipe] = group
    found: list[Choice] = []
    for (at, method), groups in kin.items():
        fields = dict.fromkeys((*SETTINGS, *(name for recipe in groups for name in recipe.tuned)))
        varying = tuple(name for name in fields if len({recipe.setting(name) for recipe in groups}) > 1)
        if not varying:
            continue
        trials = [
            Trial(
                tuple(_number(recipe.setting(name)) for name in varying),
                fmean(map(validation_score, group)),
                tuple(run.recipe.seed for run in group),
            )
            for recipe, group in groups.items()
        ]
        found.append(Choice(at, method, varying, tuple(sorted(trials, key=lambda trial: trial.values))))
    return found


def section(runs: Iterable[Finished]) -> str:
    """The choices as Markdown; empty if nothing varies."""
    runs = list(runs)
    if not (found := choices(runs)):
        return ""
    titles = places(run.recipe for run in runs)
    several = len(titles) > 1
    head = (*(["setting"] * several), "method", "chosen", "tried: validation score × 100", "note")
    lines = [
        (
            *([titles[one.place]] * several),
            one.method,
            _written(one, one.best),
            ", ".join(map(_tried, one.trials)),
            "unfinished" if one.unequal else "at an end" if one.at_an_end else "",
        )
        for one in found
    ]
    ends = sum(one.at_an_end for one in found)
    words = "The value with the largest mean validation score, of equal ones the smallest. " + (
        "All are inside their grids." if not ends else f"{ends} of {len(found)} are at an end of their grid."
    )
    return "\n\n".join(["## Chosen settings", words, table(head, lines)])


def answer(runs: Iterable[Finished]) -> str:
    """The sentence of a report on what was chosen, in Markdown; "" if nothing varies."""
    if not (found := choices(runs)):
        return ""
    state = "**Unfinished, so far chosen**" if any(one.unequal for one in found) else "**Chosen**"
    said = f"{state} by validation score, without a test: settings of {len(found)} methods"
    if len(found) <= _FEW:
        listed = (f"{escaped(one.method)} {_written(one, one.best)}" for one in found)
        said = f"{state} by validation score, without a test: {', '.join(listed)}"
    ends = sum(one.at_an_end for one in found)
    return f"{said}; {ends or 'none'} of {len(found)} {'is' if ends < 2 else 'are'} at an end of the grid."


_FEW = 8  # more choices are counted


def rows(runs: Iterable[Finished]) -> list[dict[str, Any]]:
    """A row for each trial, for a CSV file."""
    found = choices(runs)
    imbalanced = any(one.place.imbalance > 1 for one in found)
    return [
        {
            "dataset": one.place.dataset,
            "model": one.place.model,
            "noise": one.place.noise,
            **({"imbalance": one.place.imbalance} if imbalanced else {}),
            "method": one.method,
            "settings": " ".join(one.settings),
            "values": " ".join(f"{value:g}" for value in trial.values),
            "validation": trial.score,
            "n": len(trial.seeds),
            "chosen": trial == one.best,
        }
        for one in found
        for trial in one.trials
    ]


def _written(one: Choice, trial: Trial) -> str:
    return ", ".join(
        f"{_UNITS.get(name, name)} {value:g}" for name, value in zip(one.settings, trial.values, strict=True)
    )


def _tried(trial: Trial) -> str:
    return f"{' / '.join(f'{value:g}' for value in trial.values)}: {100 * trial.score:.2f}"


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
