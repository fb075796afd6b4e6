"""The studies of long tails: equal trials, seeds of their own, the choice of the settings, and a run of each."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bisam.experiments.recipes.expressions import check_step
from bisam.experiments.reports.choice import choices, rows
from bisam.experiments.reports.groups import title
from bisam.experiments.runs.folder import Finished
from bisam.experiments.studies import STUDIES, longtail

TASKS = {"longtail": longtail.DIGITS, "longtail-cifar10": longtail.CIFAR10}
TITLES = {"SGD", "SAM", "BiSAM (-log)", *longtail.WEIGHTED}
each_task = pytest.mark.parametrize("name", TASKS)


@each_task
def test_every_method_has_as_many_trials_at_equal_gradients(name):
    recipes, task = STUDIES[f"{name}-rho"].recipes(None), TASKS[name]
    assert len(set(recipes)) == len(recipes) == 2 * 6 * len(task.radii)
    for imbalance in (10.0, 100.0):
        for method in TITLES:
            mine = [r for r in recipes if r.imbalance == imbalance and title(r) == method]
            settings = [r.weight_decay if method == "SGD" else r.setting("rho") for r in mine]
            assert settings == list(task.decays if method == "SGD" else task.radii)
            assert {r.epochs for r in mine} == {80 if method == "SGD" else 40}
    assert {r.epochs for r in STUDIES[name].recipes(3)} == {3, 6}


@pytest.mark.parametrize("expression", [template.format(0.1) for template in longtail.WEIGHTED.values()])
def test_every_weighted_adversary_is_a_method(expression):
    check_step(expression, 16)


@each_task
def test_a_test_has_one_trial_of_each_method_and_seeds_that_no_study_shares(name):
    study, tuning = STUDIES[name], STUDIES[f"{name}-rho"]
    assert len(study.recipes(None)) == 2 * 6
    assert {*study.recipes(None)} <= {*tuning.recipes(None)}
    seeds = set(range(study.first_seed, study.first_seed + study.seeds))
    assert not seeds & set(range(tuning.first_seed, tuning.first_seed + tuning.seeds))
    others = [one for one in STUDIES.values() if one.name not in TASKS]
    assert not any(seeds & set(range(one.first_seed, one.first_seed + one.seeds)) for one in others)
    assert f"n = {study.seeds} (seeds {min(seeds)} to {max(seeds)})" in study.note
    assert "*primary comparison* is BiSAM (-log, balanced) minus SAM" in study.note
    epoch = "last epoch" if name == "longtail" else "best validation epoch"
    assert f"in balanced test accuracy of the {epoch} at imbalance 100" in study.note


@each_task
def test_the_primary_comparison_is_one_row_at_imbalance_100(name):
    primary = STUDIES[name].primary
    mine = [
        r
        for r in STUDIES[name].recipes(None)
        if r.method == primary.method and all(r.setting(key) == value for key, value in primary.where.items())
    ]
    assert [(title(r), r.imbalance) for r in mine] == [(longtail.BISAM_BALANCED, 100.0)]


@each_task
def test_the_report_of_the_tuning_study_chooses_a_setting_for_each_method_and_imbalance(name):
    tuning = STUDIES[f"{name}-rho"]
    assert tuning.tunes
    runs = [
        Finished(replace(recipe, seed=110), {"validation_best": 0.5, "headline": "best"}, [{"validation": 0.5}])
        for recipe in tuning.recipes(None)
    ]
    found = choices(runs)
    assert {(one.place.imbalance, one.method) for one in found} == {(r, m) for r in (10.0, 100.0) for m in TITLES}
    assert {one.settings for one in found} == {("rho",), ("weight_decay",)}
    assert {len(one.trials) for one in found} == {len(TASKS[name].radii)} == {len(TASKS[name].decays)}
    assert {row["imbalance"] for row in rows(runs)} == {10.0, 100.0}


def test_chosen_settings_are_tested():
    task = replace(longtail.DIGITS, chosen={("sgd", 10.0): 0.02, (longtail.BISAM_BALANCED, 100.0): 1.6})
    recipes = task.tests(None)
    assert recipes[0] == task.trial("sgd", 10.0, 0.02, None)
    assert task.trial(longtail.BISAM_BALANCED, 100.0, 1.6, None) in recipes
    assert "1.6" in task.primary().method
    assert "sam (10.0)" in task.settings.note()
    every = {(name, r): task.trials_of(name, r)[-1] for name in longtail.METHODS for r in longtail.IMBALANCES}
    assert not replace(task, chosen=every).settings.note()


@pytest.mark.slow
def test_the_study_end_to_end(tmp_path, here, bisam):
    code, _, _ = bisam("run", "longtail", "--epochs", 1, "--seeds", 1, "--out", tmp_path)
    assert code == 0
    page = (tmp_path / "longtail" / "report.md").read_text()
    assert all(name in page for name in TITLES)
    assert "Primary comparison" in page
    assert "imbalance 100 balanced accuracy" in page
    assert "imbalance 10 few-example classes" in page
