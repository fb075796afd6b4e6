"""The studies of other adversaries: equal trials, seeds of their own, the choice of the settings, and a run of each."""

from __future__ import annotations

import ast
from dataclasses import replace

import pytest

from bisam.experiments.launch import processes
from bisam.experiments.launch.outcomes import Outcome
from bisam.experiments.recipes.expressions import check_step
from bisam.experiments.runs.folder import Finished, Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.studies import LABELS, STUDIES, recover
from bisam.experiments.training.train import train

TASKS = {"recover": recover.DIGITS, "recover-cifar10": recover.CIFAR10}
each_task = pytest.mark.parametrize("name", TASKS)


@each_task
def test_every_method_has_as_many_trials_as_sam(name):
    recipes, task = STUDIES[f"{name}-tune"].recipes(None), TASKS[name]
    assert len(set(recipes)) == len(recipes) == 2 * 7 * 8
    places = task.places()
    assert [*places] == recipes
    for noise in (0.4, 0.0):
        for method in ("sam", *recover.CANDIDATES):
            mine = [value for (_, at, which), value in places.values() if (at, which) == (noise, method)]
            assert mine == sorted(task.rates if method == recover.FLIP_RATE else task.radii)
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
    chosen = TASKS[name].is_tuned
    assert ("settings are not chosen yet" in study.note) is not chosen
    assert ("on other seeds" in study.note) is chosen


def run(recipe, last: float, best: float, headline: str) -> Finished:
    result = {"validation_best": best, "headline": headline}
    return Finished(recipe, result, [{"validation": best}, {"validation": last}])  # pyright: ignore


def test_the_best_setting_is_that_of_the_score_that_is_tested():
    """The largest mean over the seeds, of the last or the best epoch as the headline says; ties go to the smaller."""
    task, name = recover.DIGITS, recover.FLIP_RATE
    a, b, c = (task.trial(name, 0.4, rate, None) for rate in (0.02, 0.03, 0.045))
    runs = [run(replace(r, seed=s), *rest) for r, s, *rest in [(a, 100, 0.7, 0.9, "last"), (a, 101, 0.9, 0.9, "last")]]
    runs += [run(replace(b, seed=100), 0.8, 0.8, "last"), run(replace(c, seed=100), 0.1, 0.99, "last")]
    assert recover.choose(runs) == {("digits", 0.4, name): 0.02}
    better = [replace(one, result={**one.result, "headline": "best"}) for one in runs]  # pyright: ignore
    assert recover.choose(better) == {("digits", 0.4, name): 0.045}
    sam = run(task.trial("sam", 0.0, 0.4, None), 0.5, 0.5, "last")
    foreign = run(replace(a, epochs=3), 1.0, 1.0, "last")
    assert recover.choose([*runs, sam, foreign]) == {("digits", 0.4, name): 0.02, ("digits", 0.0, "sam"): 0.4}
    assert recover.choose([foreign]) == {}


def test_chosen_settings_are_tested(monkeypatch):
    task = recover.DIGITS
    monkeypatch.setattr(recover, "CHOSEN", {("digits", 0.4, "sam"): 1.13, ("digits", 0.0, recover.FLIP_RATE): 0.012})
    recipes = task.tests(None)
    assert recipes[0] == task.trial("sam", 0.4, 1.13, None)
    assert task.trial(recover.FLIP_RATE, 0.0, 0.012, None) in recipes
    assert not task.is_tuned
    monkeypatch.setattr(recover, "CHOSEN", dict(task.places().values()))
    assert task.is_tuned
    assert task.tests(None)[0].rho == task.radii[-1]


@pytest.fixture
def here(monkeypatch):
    """Runs of a study one after the other in this process."""

    def run_all(recipes, root, workers, machine, progress, *_):
        outcomes = []
        for recipe in recipes:
            outcomes.append(Outcome(recipe, train(Run.under(root, recipe), Machine())))
            progress.done(recipe, None)
        return outcomes

    monkeypatch.setattr(processes, "run_all", run_all)


def test_the_studies_end_to_end(tmp_path, here, bisam, capsys, monkeypatch):
    small = ("--set", "limit=48", "--set", "batch_size=16", "--out", tmp_path)
    code, _, _ = bisam("run", "recover", "--epochs", 2, "--seeds", 1, *small)
    assert code == 0
    page = (tmp_path / "recover" / "report.md").read_text()
    assert all(name in page for name in recover.CANDIDATES)
    assert "primary comparison" in page
    assert recover.main([str(tmp_path / "recover")]) == 2  # other recipes than the tuning study's
    assert "no finished run" in capsys.readouterr().err
    assert recover.main([]) == 2
    assert "usage" in capsys.readouterr().err
    task = replace(recover.DIGITS, recipe=replace(recover.DIGITS.recipe, epochs=2, limit=48, batch_size=16))
    monkeypatch.setattr(recover, "DIGITS", task)
    assert recover.main([str(tmp_path / "recover")]) == 0
    printed = ast.literal_eval("{" + capsys.readouterr().out + "}")
    assert printed == {("digits", noise, name): task.setting(name, noise) for noise in (0.4, 0.0) for name in _NAMES}
    damaged = next(tmp_path.glob("recover/*/seed-600/result.json"))
    damaged.write_text("{")
    assert recover.main([str(tmp_path / "recover")]) == 2
    assert str(damaged) in capsys.readouterr().err


_NAMES = ("sam", *recover.CANDIDATES)
