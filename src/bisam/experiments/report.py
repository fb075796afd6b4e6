"""Report: tables from run folders, and from nothing else. Each number is a mean ± standard deviation over n seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import mean, median, stdev
from typing import Any

from bisam.experiments.recipes import Recipe
from bisam.experiments.runs import Finished

NAMES = {
    "sgd": "SGD",
    "sam": "SAM",
    "bisam_log": "BiSAM (-log)",
    "bisam_tanh": "BiSAM (tanh)",
    "asam": "ASAM",
    "abisam_log": "A-BiSAM (-log)",
    "abisam_tanh": "A-BiSAM (tanh)",
}


def grouped(runs: Iterable[Finished]) -> dict[Recipe, list[Finished]]:
    """Runs by recipe, whatever their seed; by label noise, then in the order of the methods' names above."""
    groups: dict[Recipe, list[Finished]] = {}
    for run in runs:
        groups.setdefault(replace(run.recipe, seed=0), []).append(run)
    order = list(NAMES)
    keys = sorted(groups, key=lambda r: (r.noise, order.index(r.method), r.epochs, r.slug))
    return {key: sorted(groups[key], key=lambda run: run.recipe.seed) for key in keys}


def summary(runs: Iterable[Finished]) -> list[dict[str, Any]]:
    """One row per recipe, accuracies as shares of the test set."""
    rows: list[dict[str, Any]] = []
    for recipe, group in grouped(runs).items():
        row: dict[str, Any] = {
            "method": NAMES[recipe.method],
            "noise": recipe.noise,
            "rho": "" if recipe.method == "sgd" else recipe.rho,
            "epochs": recipe.epochs,
        }
        for when in ("best", "last"):
            values = [run.result[f"test_accuracy_{when}"] for run in group]
            row[f"test_accuracy_{when}_mean"] = mean(values)
            row[f"test_accuracy_{when}_std"] = stdev(values) if len(values) > 1 else float("nan")
        row["n"] = len(group)
        row["seconds_per_epoch"] = median(run.result["seconds_per_epoch"] for run in group)
        row["recipe"] = recipe.slug
        rows.append(row)
    return rows


HEADER = ("method", "noise", "rho", "epochs", "best val.", "last", "n", "s/epoch")
CAPTION = (
    "Test accuracy in per cent, mean ± standard deviation over n seeds, with the weights of the epoch of best "
    "validation accuracy and with the last ones. The test set was looked at once, at the end of each run. Noise is on "
    "the training labels only. Seeds vary the initial weights, the noise and the order of the batches, not the split."
)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of `summary` as text, accuracies in per cent."""
    return (
        row["method"],
        f"{100 * row['noise']:g} %",
        f"{row['rho']}" or "–",
        f"{row['epochs']}",
        *(_accuracy(row, when) for when in ("best", "last")),
        f"{row['n']}",
        f"{row['seconds_per_epoch']:.3f}",
    )


def markdown(title: str, runs: Sequence[Finished]) -> str:
    """The whole report as Markdown."""
    rows = [cells(row) for row in summary(runs)]
    lines = [
        f"# {title}",
        "",
        CAPTION,
        "",
        f"| {' | '.join(HEADER)} |",
        f"|{'---|' * len(HEADER)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        "![Test accuracy by method and label noise](accuracy.png)",
        "",
        *(["![Training samples that the perturbation flips](flips.png)", ""] if perturbed(runs) else []),
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


def _accuracy(row: dict[str, Any], when: str) -> str:
    centre, spread = 100 * row[f"test_accuracy_{when}_mean"], 100 * row[f"test_accuracy_{when}_std"]
    return f"{centre:.1f}" if spread != spread else f"{centre:.1f} ± {spread:.1f}"
