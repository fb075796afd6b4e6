"""The studies of other adversaries: equal trials, seeds of their own, the choice of the settings, and a run of each."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bisam.experiments.recipes.expressions import check_step
from bisam.experiments.reports.choice import choices
from bisam.experiments.runs.folder import Finished
from bisam.experiments.studies import LABELS, STUDIES, recover

TASKS = {"recover": recover.DIGITS, "recover-cifar10": recover.CIFAR10}
each_task = pytest.mark.parametrize("name", TASKS)


@each_task
def test_every_method_has_as_many_trials_as_sam(name):
    recipes, task = STUDIES[f"{name}-tune"].recipes(None), TASKS[name]
    assert len(set(recipes)) == len(recipes) == 2 * 7 * (9 if task.more else 8)
    for noise in (0.4, 0.0):
        for method in ("sam", *recover.CANDIDATES):
            mine = [r for r in recipes if r.noise == noise and LABELS.get(r.method, r.method) == method]
            assert len(mine) == len(recipes) / 14
            assert tuple(r.setting("rho") for r in mine) == task.trials_of(method, noise)
    for study in (STUDIES[name], STUDIES[f"{name}-tune"]):
        assert all(recipe.method == "sam" or recipe.method in LABELS for recipe in study.recipes(None))
        assert all(recipe.setting("rho") is not None for recipe in study.recipes(None))
        assert {recipe.epochs for recipe in study.recipes(3)} == {3}


@pytest.mark.parametrize("expression", [template.format(0.1) for template in recover.CANDIDATES.values()])
def test_every_candidate_is_a_method(expression):
    check_step(expression, 16)


@each_task
def test_a_test_has_one_trial_of_each_method_and_seeds_that_no_study_shares(name):
    study, tuning = STUDIES[name], STUDIES[f"{name}-tune"]
    assert len(study.recipes(None)) == 2 * 7
    assert {*study.recipes(None)} <= {*tuning.recipes(None)}
    seeds = set(range(study.first_seed, study.first_seed + study.seeds))
    others = [one for one in STUDIES.values() if one.name not in TASKS]
    assert not any(seeds & set(range(one.first_seed, one.first_seed + one.seeds)) for one in others)
    assert f"n = {study.seeds} (seeds {min(seeds)} to {max(seeds)})" in study.note
    assert "primary comparison" in study.note
    assert f"best of {9 if TASKS[name].more else 8} trials by validation accuracy on other seeds" in study.note


@each_task
def test_the_report_of_the_tuning_study_chooses_a_setting_for_each_method_and_noise(name):
    tuning = STUDIES[f"{name}-tune"]
    assert tuning.tunes
    runs = [
        Finished(replace(recipe, seed=100), {"validation_best": 0.5, "headline": "best"}, [{"validation": 0.5}])
        for recipe in tuning.recipes(None)
    ]
    found = choices(runs)
    assert {(one.place.noise, one.method) for one in found} == {
        (noise, method) for noise in (0.4, 0.0) for method in ("SAM", *recover.CANDIDATES)
    }
    assert {one.settings for one in found} == {("rho",)}
    assert {len(one.trials) for one in found} == {9 if TASKS[name].more else 8}


@each_task
def test_the_primary_comparison_is_one_row_with_label_noise(name):
    primary = STUDIES[name].primary
    rows = [r for r in STUDIES[name].recipes(None) if r.method == primary.method and r.noise == primary.where["noise"]]
    assert [LABELS[r.method] for r in rows] == [recover.FLIP_RATE]


def test_chosen_settings_are_tested():
    task = replace(recover.DIGITS, chosen={("sam", 0.4): 1.13, (recover.FLIP_RATE, 0.0): 0.012})
    recipes = task.tests(None)
    assert recipes[0] == task.trial("sam", 0.4, 1.13, None)
    assert task.trial(recover.FLIP_RATE, 0.0, 0.012, None) in recipes
    assert "sam (0.0)" in task.settings.note()
    every = {(name, noise): task.trials_of(name, noise)[-1] for noise in (0.4, 0.0) for name in _NAMES}
    task = replace(task, chosen=every)
    assert not task.settings.note()
    assert task.tests(None)[0].rho == task.more[0.4][0]


def test_the_studies_end_to_end(tmp_path, here, bisam):
    small = ("--set", "limit=48", "--set", "batch_size=16", "--out", tmp_path)
    code, _, _ = bisam("run", "recover", "--epochs", 2, "--seeds", 1, *small)
    assert code == 0
    page = (tmp_path / "recover" / "report.md").read_text()
    assert all(name in page for name in recover.CANDIDATES)
    assert "primary comparison" in page


_NAMES = ("sam", *recover.CANDIDATES)
