"""The best epoch: the latest of tied ones is tested; the result says how many tie, and which score is the headline."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from bisam.experiments import data
from bisam.experiments.models.build import build
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs import results
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.runs.results import headline, headline_score
from bisam.experiments.training import train as training
from bisam.experiments.training.train import train
from tests.experiments.data.test_image_folders import classes

MACHINE = Machine(log=())
TIED = Recipe(method="sam", rho=0.05, limit=16, epochs=6, batch_size=12)
"""Of so few validation examples the last epochs classify the same number."""


def validation(run: Run) -> list[float]:
    """The validation scores in metrics.csv."""
    with (run.folder / "metrics.csv").open() as file:
        return [float(row["validation"]) for row in csv.DictReader(file)]


def untimed(values: dict[str, Any]) -> dict[str, Any]:
    changing = {"seconds_per_epoch", "relative_time", "finished", "metrics", "checksum"}
    return {name: value for name, value in values.items() if name not in changing}


@pytest.fixture
def scripted(monkeypatch):
    """Makes the validation scores those of a list; then come test scores, of which each is 0."""

    def script(*values: float) -> None:
        left = list(values)
        monkeypatch.setattr(training, "scores", lambda *_: [left.pop(0) if left else 0.0])

    return script


@pytest.mark.parametrize(
    "machine", [MACHINE, pytest.param(Machine(devices=2, log=()), marks=pytest.mark.slow)], ids=["one", "two processes"]
)
@pytest.mark.parametrize("ema", [None, 0.9])
def test_the_latest_of_tied_epochs_is_tested(tmp_path, machine, ema):
    run = Run.under(tmp_path, replace(TIED, ema=ema))
    result = train(run, machine)
    scores = validation(run)
    tied = [epoch for epoch, score in enumerate(scores, 1) if score == max(scores)]
    assert len(tied) > 1
    assert (result["best_epoch"], result["validation_ties"]) == (tied[-1], len(tied))
    assert (result["validation_best"], result["validation_examples"]) == (max(scores), 16)
    best = run.checkpoint()["best"]
    assert best["epoch"] == tied[-1]
    model = build("convnet", 10, channels=1)
    model.load_state_dict(best["weights"])
    ((x, y),) = data.load(run.recipe, MACHINE).test.batches(16)
    with torch.no_grad():
        assert result["test_best"] == (model.eval()(x).argmax(1) == y).sum().item() / 16


def test_later_epochs_take_the_tie_from_the_first(tmp_path, scripted):
    scripted(0.5, 0.7, 0.6, 0.7, 0.7, 0.6)
    result = train(Run.under(tmp_path, TIED), MACHINE)
    assert (result["best_epoch"], result["validation_ties"], result["validation_best"]) == (5, 3, 0.7)


@pytest.mark.parametrize("after", [1, 3, 4, 5, 6])
def test_a_resumed_run_counts_the_same_ties(tmp_path, after):
    def interrupt(row):
        if row["epoch"] == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(Run.under(tmp_path / "a", TIED), MACHINE, interrupt)
    resumed, whole = (train(Run.under(tmp_path / name, TIED), MACHINE) for name in ("a", "b"))
    assert untimed(resumed) == untimed(whole)
    assert whole["validation_ties"] > 1
    ours, theirs = (Run.under(tmp_path / name, TIED).checkpoint()["best"]["weights"] for name in ("a", "b"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_weights_that_are_not_finite_take_no_tie(tmp_path, scripted):
    scripted(0.5, 0.5, 0.5)
    diverging = replace(TIED, method="sgd", rho=None, epochs=3, learning_rate=1e30)
    result = train(Run.under(tmp_path, diverging), replace(MACHINE, stop_on_nan=False))
    assert result["diverged"] == 1
    assert (result["best_epoch"], result["validation_ties"]) == (1, 3)


def test_a_score_that_is_nan_is_never_the_best(tmp_path, scripted):
    scripted(0.5, math.nan, 0.4)
    result = train(Run.under(tmp_path, replace(TIED, epochs=3)), MACHINE)
    assert (result["best_epoch"], result["validation_ties"], result["validation_best"]) == (1, 1, 0.5)


@pytest.mark.parametrize(("examples", "first"), [(1, "last"), (1999, "last"), (2000, "best"), (10_000, "best")])
def test_the_headline_depends_on_the_number_of_validation_examples(examples, first):
    assert results.headline_for(examples) == first
    one = {"headline": first, "test_best": 0.9, "test_last": 0.8}
    assert (headline(one), headline_score(one)) == (first, one[f"test_{first}"])


def test_results_of_earlier_versions_are_reported_with_the_best_epoch():
    one = {"test_best": 0.9, "test_last": 0.8}
    assert (headline(one), headline_score(one)) == ("best", 0.9)


@pytest.mark.parametrize("enough", [16, 17])
def test_the_closing_line_shows_both_scores_and_the_headline_first(tmp_path, bisam, monkeypatch, enough):
    monkeypatch.setattr(results, "ENOUGH", enough)
    flags = ["--method", "sam", "--rho", 0.05, "--limit", 16, "--epochs", 6, "--batch-size", 12]
    code, out, _ = bisam("train", *flags, "--out", tmp_path)
    assert code == 0
    result = json.loads(next(tmp_path.rglob("result.json")).read_text())
    tie = f", the latest of {result['validation_ties']} that tie"
    best = f"{100 * result['test_best']:.1f} % at the best validation epoch ({result['best_epoch']}{tie})"
    last = f"{100 * result['test_last']:.1f} % at the last epoch"
    assert result["headline"] == ("best" if enough == 16 else "last")
    few = f"test accuracy {last}, the headline because validation has only 16 examples; {best}; "
    assert (f"test accuracy {best}, the headline; {last}; " if enough == 16 else few) in out


def test_the_closing_line_says_that_none_is_held_out(tmp_path, bisam):
    for part in ("train", "test"):
        classes(tmp_path / "few" / part, a=3, b=3)
    flags = [
        "--dataset",
        f"folder:{tmp_path / 'few'}",
        "--model",
        "convnet",
        "--image-size",
        8,
        "--epochs",
        1,
        "--batch-size",
        3,
        "--held-out",
        0,
    ]
    code, out, errors = bisam("train", *flags, "--out", tmp_path / "runs")
    assert code == 0, errors
    assert "at the last epoch, the headline because none is held out; " in " ".join(out.split())
