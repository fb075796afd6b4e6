"""Studies as wholes: what they run, and what they keep."""

from __future__ import annotations

import csv
import multiprocessing as mp
from dataclasses import replace
from pathlib import Path

import pytest

from bisam.experiments import studies
from bisam.experiments.launch import processes
from bisam.experiments.launch.estimate import queries
from bisam.experiments.recipes.catalogue import METHODS
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.reports.differences import baseline
from bisam.experiments.reports.groups import title, varying
from bisam.experiments.runs.folder import Run, finished
from bisam.experiments.runs.machine import Machine
from bisam.experiments.studies import digits, finetune, longtail, recover, textgen
from bisam.experiments.studies.equal import GRADIENTS
from bisam.experiments.studies.study import expand
from bisam.experiments.training.train import train
from tests.support.doubles import Silent

SHORT = Recipe(method="bisam_log", noise=0.4, rho=0.4, epochs=3, batch_size=256)
SGD = replace(SHORT, method="sgd", rho=None)
NO_RHO = {method for method, entry in METHODS.items() if entry.rho is None}


def test_a_study_keeps_finished_runs_reports_failures_and_goes_on(tmp_path):
    recipes = [replace(recipe, epochs=1) for recipe in (SGD, replace(SHORT, method="sam"), SHORT)]
    done, damaged, fresh = (Run.under(tmp_path, recipe) for recipe in recipes)
    kept = train(done)
    damaged.folder.mkdir(parents=True)
    (damaged.folder / "checkpoint.pt").write_bytes(b"garbage")
    progress = Silent()
    outcomes = processes.run_all(recipes, tmp_path, workers=2, machine=Machine(), progress=progress)
    assert [outcome.recipe for outcome in outcomes] == recipes
    assert outcomes[0].result == kept
    assert "checkpoint.pt is damaged" in outcomes[1].error
    assert outcomes[2].result == fresh.result
    assert set(progress.ended) == set(recipes)
    assert (recipes[2], 1) in progress.epochs
    assert (recipes[0], 1) not in progress.epochs


@pytest.mark.slow
def test_a_killed_worker_costs_no_run(tmp_path):
    recipes = [replace(recipe, epochs=30, batch_size=64) for recipe in (SGD, replace(SHORT, method="sam"), SHORT)]

    class Killer(Silent):
        def epoch(self, recipe, epoch, validation):
            if not self.epochs:
                mp.active_children()[0].kill()
            super().epoch(recipe, epoch, validation)

    progress = Killer()
    outcomes = processes.run_all(recipes, tmp_path, workers=2, machine=Machine(), progress=progress)
    assert [(outcome.recipe, outcome.error) for outcome in outcomes] == [(recipe, None) for recipe in recipes]
    assert len(list(finished(tmp_path))) == 3


def test_the_digits_study_is_what_it_says():
    study = studies.STUDIES["digits"]
    recipes = study.recipes(None)
    assert study.seeds == 5
    assert {(r.method, r.noise) for r in recipes} == {
        (method, noise) for method in ("sgd", "sam", "bisam_log", "bisam_tanh", "asam") for noise in (0.0, 0.4)
    }
    assert len({r.epochs for r in recipes if r.method != "sgd"}) == 1
    assert all(r.epochs == 2 * recipes[1].epochs for r in recipes if r.method == "sgd")
    assert len(expand(recipes, 5)) == len(set(expand(recipes, 5))) == 50


def test_the_methods_study_runs_every_method_that_it_has_registered():
    recipes = studies.STUDIES["methods"].recipes(None)
    assert len(recipes) == 40
    later = {"sam_ce", "gcsam", "gnp", "stable_sam", "sagm", "bilateral_sam", "lookbehind", "gam", "tsam", "tilted"}
    later |= {"eigen_sam", "sam_sps", "accumulated", "imb_sam", "focal_sam", "zeroth_order", "zeroth_order_redrawn"}
    later |= {"filter_noise", "filter_noise_redrawn"}
    assert [recipe.method for recipe in recipes] == [method for method in METHODS if method not in later]
    assert all((recipe.rho is None) == (recipe.method in NO_RHO) for recipe in recipes)


TUNED = {"digits": "digits-rho", "methods": "methods-rho", "cifar10-fitted": "cifar10-fitted-rho"}


@pytest.mark.parametrize(("name", "trials"), TUNED.items())
def test_settings_are_chosen_on_other_seeds_with_equal_budgets(name, trials):
    """Every recipe of the study is one of the trials, inside its grid, and each method has as many trials.

    Without noise BiSAM (-log) has the same validation score on digits at 0.025, 0.4 and 0.8: the smallest is an end.
    """
    study, tuning = studies.STUDIES[name], studies.STUDIES[trials]
    tried = tuning.recipes(None)
    assert tuning.tunes
    assert not set(range(tuning.first_seed, tuning.first_seed + tuning.seeds)) & set(range(study.first_seed, 60))
    kin: dict[tuple[str, float], set[float]] = {}
    for recipe in tried:
        value = recipe.weight_decay if recipe.method in NO_RHO else recipe.rho
        kin.setdefault((recipe.method, recipe.noise), set()).add(value)
    assert len({len(values) for values in kin.values()}) == 1
    for recipe in study.recipes(None):
        assert recipe in tried
        values = sorted(kin[recipe.method, recipe.noise])
        if (name, recipe.method, recipe.noise) == ("digits", "bisam_log", 0.0):
            assert recipe.rho == values[0]
            continue
        assert recipe.weight_decay in values[:-1] if recipe.method in NO_RHO else recipe.rho in values[1:-1]


@pytest.mark.parametrize(
    ("settings", "base"),
    [
        (digits.SETTINGS, Recipe()),
        (finetune.GLUE_SETTINGS, finetune.GLUE),
        (finetune.FLOWERS_SETTINGS, finetune.FLOWERS),
        (recover.DIGITS.settings, Recipe()),
        (longtail.DIGITS.settings, longtail.DIGITS.recipe),
        (textgen.SETTINGS, textgen.TASKS["pydoc"]),
    ],
    ids=["digits", "finetune-glue", "finetune-flowers", "recover", "longtail", "textgen"],
)
def test_the_settings_are_those_of_the_committed_choice(settings, base):
    """The value with the largest score, of equal ones the smallest: also by the scores in the file."""
    file = Path(__file__).parents[3] / "docs" / "reproduction" / settings.study / "choices.csv"
    trials: dict[tuple[str, float | str], list[tuple[float, float, bool]]] = {}
    for row in csv.DictReader(file.read_text().splitlines()):
        number = float(row.get("imbalance") or row["noise"])  # a study of long tails has no noise
        source, _, task = row["dataset"].partition(":")
        condition = {"glue": task, "text": task, "folder": "flowers"}.get(source, number)
        trial = (float(row["values"]), float(row["validation"]), row["chosen"] == "True")
        trials.setdefault((row["method"], condition), []).append(trial)
    assert settings.chosen.keys() == settings.before.keys()
    for (method, condition), value in settings.chosen.items():
        name = title(replace(base, method=method)) if method in METHODS else method
        tried = trials[name, condition]
        assert [value for value, _, is_chosen in tried if is_chosen] == [value]
        best = max(score for _, score, _ in tried)
        assert min(value for value, score, _ in tried if score == pytest.approx(best, abs=1e-9)) == value


@pytest.mark.parametrize("name", [*TUNED, *TUNED.values()])
def test_all_methods_compute_about_as_many_gradients(name):
    """By count, on a toy: the gradients of a step times the epochs. AE-SAM decides by itself: 1 to 2 in a step."""
    for recipe in studies.STUDIES[name].recipes(None):
        if recipe.method != "ae_sam":
            in_a_step, _ = queries(METHODS[recipe.method].written(), recipe.batch_size)
            length = {"cifar10": 40}.get(recipe.dataset.partition(":")[0], 30)
            assert in_a_step * recipe.length == pytest.approx(2 * length, rel=0.06), recipe.method


def test_lengths_keep_their_proportions():
    study = studies.STUDIES["methods"]
    for change, factor in (((), 1), (("epochs=60",), 2), (("steps=1500",), 50)):
        lengths = {recipe.method: recipe.length for recipe in study.changed(None, change)}
        expected = {"sam": 30, "sgd": 60, "looksam": 50, "every": 40, "gbisam": 20}
        assert {method: lengths[method] for method in expected} == {m: factor * n for m, n in expected.items()}
    assert min(recipe.length for recipe in study.changed(1, ())) == 1


def test_gradients_of_the_catalogue_are_those_of_the_lengths():
    """What is not 2 in the catalogue has a number here, and methods with it are compared at other lengths."""
    for method, entry in METHODS.items():
        differs = entry.gradients not in ("2", "2 + samples / n / every", "2 + 2 * iterations / every")
        assert (method in GRADIENTS) == differs == ("epochs" in entry.own_fields), method


def test_a_tuned_weight_decay_is_compared_and_shown():
    """With the radius of another method, as a radius of its own would be; other fields must be the same."""
    sgd = Recipe(method="sgd", epochs=60, weight_decay=0.01)
    sam = Recipe(method="sam", rho=0.4, epochs=30)
    assert baseline(sgd, [sgd, sam], ("sam",)) == sam
    assert "weight_decay" in varying([sgd, sam])
    assert baseline(replace(sgd, learning_rate=0.2), [sgd, sam], ("sam",)) is None
    asam = Recipe(method="asam", rho=4.0, epochs=30, weight_decay=0.01)
    assert baseline(asam, [asam, sam], ("sam",)) is None


def test_the_clip_of_le_sam_does_not_bind(tmp_path):
    """The displacements of the largest sigmas that are tried are below it, and so their runs differ."""
    recipes = [r for r in studies.STUDIES["methods-rho"].changed(1, ()) if r.method == "le_sam"]
    largest = sorted(recipes, key=lambda recipe: recipe.rho)[-2:]
    rows = []
    for recipe in largest:
        run = Run.under(tmp_path, recipe)
        train(run, Machine(stats=True))
        (row,) = run.stats()
        rows.append(row)
    clip = largest[0].build_method().perturb.rho_max
    norms = [row["displacement_norm"] for row in rows]
    assert 0 < norms[0] < norms[1] < clip / 2


def test_the_superseded_study_says_so():
    study = studies.STUDIES["cifar10-small"]
    assert "superseded by cifar10-fitted" in study.title
    assert "Superseded" in study.note
    fitted = studies.STUDIES["cifar10-fitted"]
    assert fitted.seeds >= 10
    assert {recipe.method for recipe in fitted.recipes(None)} >= {"sgd", "sam", "sam_ce", "bisam_log", "bisam_tanh"}
    assert {recipe.noise for recipe in fitted.recipes(None)} == {0.0, 0.4}
    assert "primary comparison" in fitted.note


def test_a_primary_comparison_in_a_note_is_one_that_the_report_tests():
    for study in studies.STUDIES.values():
        if "primary comparison" in study.note:
            assert study.primary or study.analyses or study.regret, study.name
