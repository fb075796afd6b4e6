"""Report of a search: its answer and what limits it, its table, its page, and the recipe of the best trial."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from math import log, sqrt
from pathlib import Path
from statistics import stdev
from typing import Any

from bisam.experiments.markdown import escaped, table
from bisam.experiments.recipes import config
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.reports.cells import spread
from bisam.experiments.reports.groups import title as method_title
from bisam.experiments.runs.results import TITLES
from bisam.experiments.tuning.figures import CAPTIONS
from bisam.experiments.tuning.search import RUNS, Search
from bisam.experiments.tuning.space import Range, describe
from bisam.experiments.tuning.trials import Trial, count, outcome, ranked, settings, written

BEST = "best.toml"
"""Name of the file with the recipe of the best trial."""
FRESH = 5
"""Seeds that the command for the best recipe names."""
_SHOWN = 20
_EDGE = 0.05
"""Part of a range at each end in which the best value is said to be at an end."""


def title(search: Search) -> str:
    """What was tuned on which data."""
    base = search.base
    method = method_title(base) if search.method is None else search.method
    noise = f" with {100 * base.noise:g} % label noise" if base.noise else ""
    return f"Tuning of {method}: {base.dataset}, {base.model}{noise}"


def best_recipe(search: Search, trials: Sequence[Trial]) -> str | None:
    """The recipe of the best trial with a seed that no trial has, as a file for `--config`; None if there is none."""
    if not (found := ranked(trials)):
        return None
    recipe = replace(search.recipe(found[0].values), seed=search.fresh_seed)
    return (
        f"# {_one_line(settings(found[0].values))}: the best of {_counted(trials)} by validation score.\n"
        f"# Seed {recipe.seed} is the first that no trial has.\n"
        f"{config.text(recipe, Path(BEST))}"
    )


def answer(search: Search, trials: Sequence[Trial]) -> str:
    """The best trial in a sentence, and what became of the others."""
    rest = ", ".join(
        f"{number} {state}"
        for state in ("pruned", "diverged", "failed", "unfinished")
        if (number := count(trials, state))
    )
    rest = f" ({rest})" if rest else ""
    if not (found := ranked(trials)):
        return f"No trial of {len(trials)} is complete{rest}."
    best = found[0]
    seeds = f", the mean of {len(best.scores)} seeds" if len(best.scores) > 1 else ""
    return (
        f"The best of {_counted(trials)}{rest} has a validation {_metric(best)} of "
        f"{spread(best.scores, 100)}{seeds}: {settings(best.values)} (trial {best.number})."
    )


def cautions(search: Search, trials: Sequence[Trial]) -> list[str]:
    """What a reader of the answer should know, a sentence or two each."""
    if not (found := ranked(trials)):
        return []
    best, several = found[0], len(found) > 1
    said: list[str] = []
    if several:
        said.append(
            f"The largest of {len(found)} scores is too high as an estimate: it was chosen for being the largest. Run "
            "the recipe with new seeds."
        )
    if several and (error := _standard_error(best)) is not None:
        near = sum(best.score - trial.score <= error for trial in found[1:])
        said.append(
            f"Its standard error is about {100 * error:.2g} points, {_of_what(best)}: {near} of the other "
            f"{len(found) - 1} complete trials are within it."
        )
    for name, dimension in search.ranges.items():
        if (end := _end(dimension, best.values[name])) is not None:
            said.append(f"The best {name} is at the {end} end of its range: a wider one may have a better value.")
    return said


def command(search: Search, folder: Path) -> str:
    """The commands that train the best recipe with seeds that no trial has."""
    seeds = " ".join(str(search.fresh_seed + i) for i in range(FRESH))
    path = shlex.quote((folder / BEST).as_posix())
    return f"for seed in {seeds}; do bisam train --config {path} --seed $seed; done"


def best_rows(search: Search, trials: Sequence[Trial], most: int) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of the best trials.

    Args:
        search: what was searched.
        trials: all trials.
        most: number of rows.
    """
    header = ["trial", *search.space, "validation", "n", "epoch", "seconds"]
    body = [
        [
            str(trial.number),
            *(written(trial.values[name]) for name in search.space),
            spread(trial.scores, 100),
            str(len(trial.scores)),
            ", ".join(map(str, dict.fromkeys(trial.epochs))),
            f"{trial.seconds:.3g}",
        ]
        for trial in ranked(trials)[:most]
    ]
    return header, body


def rows(search: Search, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """A row for each trial, for a CSV file."""
    return [
        {
            "trial": trial.number,
            "state": trial.state,
            **{name: trial.values.get(name) for name in search.space},
            "validation": trial.score if trial.state == "complete" else None,
            "spread": stdev(trial.scores) if trial.state == "complete" and len(trial.scores) > 1 else None,
            "n": len(trial.scores) if trial.state == "complete" else None,
            "seconds": trial.seconds,
            "folder": f"{RUNS}/{search.recipe(trial.values).slug}",
            "how": outcome(trial, search.base.unit),
        }
        for trial in trials
    ]


def markdown(
    search: Search, folder: Path, trials: Sequence[Trial], importances: Mapping[str, float], pictures: Sequence[str]
) -> str:
    """The report as Markdown.

    Args:
        search: what was searched.
        folder: of the search.
        trials: all trials.
        importances: see `Database.importances`.
        pictures: files of the figures.
    """
    parts = [f"# {escaped(title(search))}", escaped(answer(search, trials)), *map(escaped, cautions(search, trials))]
    found = ranked(trials)
    if found:
        parts += [
            f"[{BEST}]({BEST}) is the recipe of the best trial with a seed that no trial has. The next seeds:",
            f"```\n{command(search, folder)}\n```",
        ]
    parts += [f"![{CAPTIONS[name.removesuffix('.png')]}]({name})" for name in pictures]
    if importances:
        shares = ", ".join(f"{escaped(name)} {100 * share:.0f} %" for name, share in importances.items())
        parts.append(
            f"Importances: {shares}. They say how much the values of the best trials differ from those of all trials "
            "([PED-ANOVA](https://arxiv.org/abs/2304.10255), shares of the sum), in this space and with this number of "
            "trials; a setting without effect has a share above 0 by chance."
        )
    if found:
        header, body = best_rows(search, trials, _SHOWN)
        many = f"The best {len(body)} of {len(found)} complete trials" if len(found) > len(body) else "Complete trials"
        parts += [
            "## Trials",
            f"{many}. Validation scores times 100, mean ± standard deviation over n seeds, "
            f"{_which(found[0])}; seconds are those of the training steps. All trials are in "
            "[trials.csv](trials.csv).",
            table(header, body),
        ]
    others = [trial for trial in trials if trial.state != "complete"]
    if others:
        body = [
            [str(trial.number), *(written(trial.values.get(n)) for n in search.space), outcome(trial, search.base.unit)]
            for trial in others
        ]
        parts += ["Not complete:", table(["trial", *search.space, "how it ended"], body)]
    parts += ["## How it was searched", _how(search), _fixed(search)]
    return "\n\n".join(parts) + "\n"


def _how(search: Search) -> str:
    samplers = {
        "tpe": "TPE, which prefers values like those of the best trials before",
        "random": "random values",
        "grid": "all combinations",
    }
    pruner = (
        "A trial was stopped early if its first seed was below the median of the earlier trials after the same epoch, "
        "but not in the first third of its epochs and not among the first five trials."
        if search.pruner == "median"
        else "No trial was stopped early, except for those whose loss was not finite."
    )
    first = search.base.seed
    seeds = f"seed {first}" if search.seeds == 1 else f"seeds {first} to {first + search.seeds - 1}"
    return (
        f"Searched: {escaped(describe(search.space))}. Sampler: {samplers[search.sampler]}. {pruner} Each trial has "
        f"{seeds}. Runs of trials are trained and validated, and not tested: the test examples had no part in the "
        "choice. Trials that diverged count as the worst."
    )


def _fixed(search: Search) -> str:
    """The fields of the recipe that all trials share and that are not defaults."""
    default = Recipe()
    shared = {
        field.name: value
        for field in fields(Recipe)
        if field.name not in (*search.space, "dataset", "model", "seed", "version")
        and (value := getattr(search.base, field.name)) != field.default
        and not (field.name == "epochs" and value == default.epochs and search.base.steps is None)
        and not (field.name == "method" and search.method is not None)
    }
    if search.method is not None:
        shared = {"method": search.method, **shared}
    said = ", ".join(f"{name} {written(value)}" for name, value in shared.items())
    return f"All trials: dataset {escaped(search.base.dataset)}, model {escaped(search.base.model)}" + (
        f"; fields that are not defaults: {escaped(said)}." if said else ", all other fields are defaults."
    )


def _counted(trials: Sequence[Trial]) -> str:
    return f"{len(trials)} trials" if len(trials) != 1 else "1 trial"


def _standard_error(trial: Trial) -> float | None:
    """Standard error of a mean accuracy from the number of validation examples; None for other metrics."""
    if trial.metric != "accuracy" or not trial.examples:
        return None
    p = min(max(trial.score, 0.0), 1.0)
    return sqrt(p * (1 - p) / (trial.examples * len(trial.scores)))


def _of_what(trial: Trial) -> str:
    seeds = f" of each of {len(trial.scores)} seeds" if len(trial.scores) > 1 else ""
    return f"by its {trial.examples:,} validation examples{seeds} alone"


def _which(trial: Trial) -> str:
    return "of the best epoch" if trial.headline == "best" else "of the last epoch"


def _end(dimension: Range, value: float) -> str | None:
    """The end of a range at which a value is, or None."""
    low, high, at = (log(x) for x in (dimension.low, dimension.high, value)) if dimension.log else (
        dimension.low, dimension.high, value
    )  # fmt: skip
    place = (at - low) / (high - low)
    return "lower" if place < _EDGE else "upper" if place > 1 - _EDGE else None


def _metric(trial: Trial) -> str:
    return TITLES.get(trial.metric, trial.metric)


def _one_line(text: str) -> str:
    return " ".join(text.split())
