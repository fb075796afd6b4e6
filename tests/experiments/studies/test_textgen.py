"""The study of text: its design, and the whole of it in small."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest

from bisam.experiments.launch import processes
from bisam.experiments.launch.outcomes import Outcome
from bisam.experiments.recipes.catalogue import METHODS as CATALOGUE
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run
from bisam.experiments.studies import STUDIES
from bisam.experiments.studies.textgen import GRIDS, METHODS, TASKS, TEXTGEN
from bisam.experiments.training.train import train

TEST, TUNING = (STUDIES[name] for name in ("textgen", "textgen-rho"))


def tuned(recipe: Recipe) -> float:
    return recipe.weight_decay if recipe.is_plain else recipe.rho


def kind(recipe: Recipe) -> Recipe:
    """A recipe without what is tuned."""
    return replace(recipe, rho=None, weight_decay=0.0)


def test_each_method_has_a_value_from_its_own_grid():
    trials = TUNING.recipes(None)
    assert len(TEST.recipes(None)) == len(TASKS) * len(METHODS)
    for recipe in TEST.recipes(None):
        same = [trial for trial in trials if kind(trial) == kind(recipe)]
        assert [tuned(trial) for trial in same] == list(GRIDS[recipe.method])
        assert tuned(recipe) in [tuned(trial) for trial in same]
    assert len({len(grid) for grid in GRIDS.values()}) == 1  # the same budget for all


@pytest.mark.parametrize("epochs", [None, 1])
def test_all_compute_as_many_gradients_and_differ_in_nothing_else(epochs):
    for study in (TEST, TUNING):
        for task in TASKS:
            recipes = [one for one in study.recipes(epochs) if one.dataset == f"text:{task}"]
            assert len({one.epochs * float(CATALOGUE[one.method].gradients) for one in recipes}) == 1
            assert len({replace(kind(one), method="sgd", epochs=1) for one in recipes}) == 1


def test_the_comparison_is_registered():
    assert TEST.seeds == 5
    assert not {*range(5)} & {*range(TUNING.first_seed, TUNING.first_seed + TUNING.seeds)}
    assert (TEST.primary.method, TEST.primary.against) == ("bisam_log", "sam")
    found = [r for r in TEST.recipes(None) if all(r.setting(k) == v for k, v in TEST.primary.where.items())]
    assert [r.method for r in found].count("bisam_log") == 1
    assert (
        "*Registered before the first run*: the primary comparison is BiSAM (-log) minus SAM on text:pydoc" in TEST.note
    )
    assert [study.name for study in TEXTGEN] == ["textgen", "textgen-rho"]


@pytest.fixture
def _here(monkeypatch):
    """Runs are in this process."""

    def run_all(recipes, root, workers, machine, progress, analyses=None, stack=None):
        return [Outcome(recipe, train(Run.under(root, recipe), machine)) for recipe in recipes]

    monkeypatch.setattr(processes, "run_all", run_all)


SMALL = [f"--set={change}" for change in ("train_examples=32", "limit=32", "batch_size=16", "warmup=0", "max_length=8")]


@pytest.mark.slow
@pytest.mark.usefixtures("_here")
def test_the_study_end_to_end(tmp_path, bisam):
    code, _, err = bisam("run", "textgen", "--epochs", 1, "--seeds", 2, *SMALL, "--out", tmp_path)
    assert code == 0, err
    page = tmp_path / "textgen"
    rows = list(csv.DictReader((page / "report.csv").read_text().splitlines()))
    assert len(rows) == len(TEST.recipes(None))
    assert {(row["dataset"], row["metric"], row["n"]) for row in rows} == {
        ("text:pydoc", "likelihood", "2"),
        ("text:addition", "exact_match", "2"),
    }
    assert {row["pairs"] for row in rows if row["method"] != "SAM"} == {"2"}  # also AdamW, with its own length
    results = [json.loads(path.read_text()) for path in page.glob("*/seed-*/result.json")]
    assert len(results) == 2 * len(rows)
    assert {result["headline"] for result in results} == {"last"}
    assert {"accuracy", "likelihood"} <= set(results[0]["scores"]["last"])
    text = (page / "report.md").read_text()
    assert "Registered before the first run" in text
    assert "likelihood of a token" in text


@pytest.mark.slow
@pytest.mark.usefixtures("_here")
def test_its_settings_are_chosen_end_to_end(tmp_path, bisam):
    tiny = [f"--set={change}" for change in ("train_examples=4", "limit=4", "batch_size=4", "warmup=0", "max_length=8")]
    code, _, err = bisam("run", "textgen-rho", "--epochs", 1, "--seeds", 1, *tiny, "--out", tmp_path)
    assert code == 0, err
    rows = list(csv.DictReader((tmp_path / "textgen-rho" / "report.csv").read_text().splitlines()))
    assert len(rows) == len(TUNING.recipes(None))
    assert "nan" not in {row["validation_best_mean"] for row in rows}
    chosen = list(csv.DictReader((tmp_path / "textgen-rho" / "choices.csv").read_text().splitlines()))
    assert [row["chosen"] for row in chosen].count("True") == len(TEST.recipes(None))
