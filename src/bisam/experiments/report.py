"""Report: tables from run folders, and from nothing else. Each number is a mean ± standard deviation over n seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import mean, median, stdev
from typing import Any

from bisam.experiments.catalogue import METHODS
from bisam.experiments.recipes import Recipe
from bisam.experiments.runs import Finished


def title(method: str) -> str:
    """A method as people write it: its name, or the expression."""
    return METHODS[method].name if method in METHODS else method


def grouped(runs: Iterable[Finished]) -> dict[Recipe, list[Finished]]:
    """Runs by recipe, whatever their seed; by label noise, then in the order of the methods' names above."""
    groups: dict[Recipe, list[Finished]] = {}
    for run in runs:
        groups.setdefault(replace(run.recipe, seed=0), []).append(run)
    order = {name: i for i, name in enumerate(METHODS)}
    keys = sorted(groups, key=lambda r: (r.noise, order.get(r.method, len(order)), r.epochs, r.rho or 0, r.slug))
    return {key: sorted(groups[key], key=lambda run: run.recipe.seed) for key in keys}


def summary(runs: Iterable[Finished]) -> list[dict[str, Any]]:
    """One row per recipe, accuracies as shares of the test set."""
    rows: list[dict[str, Any]] = []
    for recipe, group in grouped(runs).items():
        row: dict[str, Any] = {
            "method": title(recipe.method),
            "noise": recipe.noise,
            "rho": "" if recipe.rho is None else recipe.rho,
            "epochs": recipe.epochs,
        }
        for key in ("test_best", "test_last", "validation_best", "relative_time"):
            values = [run.result[key] for run in group]
            row[f"{key}_mean"] = mean(values)
            row[f"{key}_std"] = stdev(values) if len(values) > 1 else float("nan")
        row["n"] = len(group)
        row["gradients_per_step"] = mean(run.result["gradients_per_step"] for run in group)
        row["forwards_per_step"] = mean(run.result["forwards_per_step"] for run in group)
        row["seconds_per_epoch"] = median(run.result["seconds_per_epoch"] for run in group)
        row["recipe"] = recipe.slug
        rows.append(row)
    return rows


HEADER = ("method", "noise", "rho", "epochs", "best val.", "last", "n", "gradients", "time")
CAPTION = (
    "Test accuracy in per cent, mean ± standard deviation over n seeds, with the weights of the epoch of best "
    "validation accuracy and with the last ones. The test set was looked at once, at the end of each run. Noise is on "
    "the training labels only. Seeds vary the initial weights, the noise and the order of the batches, not the split. "
    "Gradients: batch gradients per step, and forward passes besides, as counted. Time: of an epoch, relative to plain "
    "training that was measured between the epochs of the same run."
)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of `summary` as text, accuracies in per cent."""
    forwards = f" + {row['forwards_per_step']:.2g} f" if row["forwards_per_step"] else ""
    return (
        row["method"],
        f"{100 * row['noise']:g} %",
        f"{row['rho']}" or "–",
        f"{row['epochs']}",
        _spread(row, "test_best", 100),
        _spread(row, "test_last", 100),
        f"{row['n']}",
        f"{row['gradients_per_step']:.3g}{forwards}",
        _spread(row, "relative_time", 1),
    )


def markdown(title: str, runs: Sequence[Finished], pictures: Mapping[str, str], note: str = "") -> str:
    """The whole report as Markdown.

    Args:
        title: of the study.
        runs: what it is about.
        pictures: files beside the report, and what they show.
        note: how to read it.
    """
    rows = [cells(row) for row in summary(runs)]
    lines = [
        f"# {title}",
        "",
        CAPTION,
        "",
        *([note, ""] if note else []),
        f"| {' | '.join(HEADER)} |",
        f"|{'---|' * len(HEADER)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        *(line for file, what in pictures.items() for line in (f"![{what}]({file})", "")),
        *provenance(runs),
    ]
    return "\n".join(lines) + "\n"


def perturbed(runs: Iterable[Finished]) -> list[Finished]:
    """The runs whose method perturbs the weights."""
    return [run for run in runs if run.recipe.method != "sgd"]


def provenance(runs: Sequence[Finished]) -> list[str]:
    """Where the numbers come from, one line for each environment they were made in."""
    keys = ("hardware", "device", "torch", "python", "bisam", "commit")
    made = sorted({tuple(str(run.result.get(key, "unknown")) for key in keys) for run in runs})
    dates = sorted(run.result["finished"][:10] for run in runs)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return [f"Made {when} on {', '.join(f'{k} {v}' for k, v in zip(keys, env, strict=True))}." for env in made]


def _spread(row: dict[str, Any], key: str, unit: float) -> str:
    centre, spread = unit * row[f"{key}_mean"], unit * row[f"{key}_std"]
    digits = 1 if unit == 100 else 2
    return f"{centre:.{digits}f}" if spread != spread else f"{centre:.{digits}f} ± {spread:.{digits}f}"
